"""What the benchmark of training updates found: its part of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pandas as pd

from benchmarks.core import plots, sections
from benchmarks.core.benchmark import BASE, INSTALL, OURS, plural
from benchmarks.core.outputs import Outputs
from benchmarks.updates.measure import BENCHMARK

#: How many times as long as with ``torch.nn`` without norm an update may take.
AIM: Final = 1.1
_OF: Final = "torch.nn without norm"

_METHOD: Final = """\
### How training updates are measured

- A call is one whole update as `layernorm compare` makes it: the batch taken from the data, forward, loss,
  backward, clipping of the gradients where the preset has it, and the optimizer, in float32.
- `layernorm` is the task's network with layer norm, `torch` the same network without norm, its recurrent
  layers those of `torch.nn`. Where a layer's output decides on its next input (both of DRAW's, the first of
  handwriting's) the layer is written with PyTorch's operators; but for handwriting's norms and gates, which
  are `layernorm.functional.lstm_gates`.
- Each starts as a run with seed 0 does, and learning continues from call to call. Both take the batches of
  the first epoch in the same order, a new one in each round, so that a round's ratio is of the same training
  cases. Updates must change the network, and to finite parameters; otherwise a peer is listed as failed.
- Both run in one process and are sampled in turn, in an order that changes from round to round. A sample is
  as many updates as take 3 ms. {rounds} Times are medians, and so are ratios, of those within a round.
- There is a process for each number of threads. With one thread it may run on one CPU only.
- The tasks need `{install} '.[experiments]'`. One whose data is not here and cannot be
  downloaded is listed with "no data".
"""


class BeyondAim(sections.Part):
    """The points at which an update takes longer than it is meant to."""

    def markdown(self, data: pd.DataFrame, report: sections.Report, outputs: Outputs) -> Iterator[str]:
        """Yield a sentence."""
        yield f"{_beyond_aim(data)}\n"

    def lines(self, data: pd.DataFrame, report: sections.Report) -> Iterator[str]:
        """Yield the same sentence."""
        yield _beyond_aim(data)


def _beyond_aim(data: pd.DataFrame) -> str:
    ours = data[(data.peer == OURS) & data.ratio_to_torch.notna()]
    slow = ours[ours.ratio_to_torch < 1 / AIM].sort_values("ratio_to_torch", kind="stable")
    text = (
        f"An update takes more than {AIM} times as long as that of {_OF} at {len(slow)} of {len(ours)} points"
    )
    if slow.empty:
        return f"{text}."
    which = (
        f"{row['label']}, {row['preset']}, {plural(row['threads'], 'thread')}: "
        f"{1 / row['ratio_to_torch']:.2f} times"
        for row in slow.to_dict("records")
    )
    return f"{text} ({'; '.join(which)})."


REPORT: Final = sections.Report(
    benchmark=BENCHMARK,
    title="Training updates of the recurrent experiments",
    order=("threads", "preset", "task", "batch"),
    derived={"label": lambda data: data.task + ", batch " + data.batch.astype(str)},
    parts=(
        sections.Environments(packages={}),
        sections.Summary(
            sections.as_given("threads", "preset"),
            (sections.Against("speed", value=sections.in_rounds),),
            f"{{keys}}: {{0}} times the speed of {_OF}: the geometric mean (the least)",
            text=f"Speed of `layernorm` relative to {_OF}: geometric means, the least of all in brackets:",
        ),
        BeyondAim(),
        sections.Picture(
            lambda data: plots.ratios(data.assign(mode=data.preset), BASE, of=_OF),
            lambda row: ("updates",),
            f"Speed of training updates relative to {_OF} at every point",
        ),
        sections.Points(
            sections.as_given("threads", "preset", "task", "batch"),
            (sections.RATIO,),
            "Times of one update in µs; the ratio is `layernorm`'s speed over `torch`'s.",
        ),
    ),
    method=_METHOD,
    facts={"install": INSTALL},
)
