"""What the benchmark of training updates found: its picture and its part of the page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.core import pages, plots
from benchmarks.core.benchmark import OURS, Outputs, plural
from benchmarks.core.measuring import BASE
from benchmarks.core.table import MEASURES
from benchmarks.updates import measure as updates

#: How much longer than ``torch.nn`` without norm an update may take.
AIM: Final = 1.1
_NUMBERS: Final = ("batch", "threads", *MEASURES, "other_cpus")
_POINT: Final = ["threads", "preset", "task", "batch"]
_OF: Final = "torch.nn without norm"

_METHOD: Final = """\
### How training updates are measured

- A call is one whole update as `layernorm compare` makes it: the batch taken from the data, forward, loss,
  backward, clipping of the gradients where the preset has it, and the optimizer, in float32.
- `layernorm` is the task's network with layer norm, `torch` the same network without norm, its recurrent
  layers those of `torch.nn`. Where a layer's output decides on its next input (both of DRAW's, the first of
  handwriting's) the layer is written with PyTorch's operators; but for handwriting's norms and gates, which
  are `layernorm.functional.lstm_gates`.
- Each starts as a run with seed 0 does, and learning goes on from call to call. Both take the batches of the
  first epoch in the same order, a new one in each round, so that a round's ratio is of the same training
  cases. Updates must change the network, and to finite parameters; otherwise a peer is listed as failed.
- Both run in one process and are sampled in turn, in an order that changes from round to round. A sample is
  as many updates as take 3 ms. {rounds} Times are medians, and so are ratios, of those within a round.
- There is a process for each number of threads. With one thread it may run on one CPU only.
- The tasks need `pip install 'layernorm[bench,experiments]'`. One whose data is not here and cannot be
  downloaded is listed with "no data".
"""


def load(path: Path) -> pd.DataFrame:
    """The table in the order of the tasks, with a column ``label`` that names task and batch.

    Raises:
        TableError: it is missing or damaged, or has no rows.
    """
    orders = {"task": updates.TASKS, "preset": updates.PRESETS, "peer": tuple(updates.PEERS)}
    data = pages.load(path, updates.COLUMNS, _NUMBERS, orders)
    data["label"] = data.task + ", batch " + data.batch.astype(str)
    keys = ["threads", "preset_place", "task_place", "batch", "peer_place"]
    return data.sort_values(keys, kind="stable", ignore_index=True)


def pictures(data: pd.DataFrame, outputs: Outputs) -> Iterator[tuple[Path, Figure]]:
    """One picture of all points, and where it goes."""
    yield outputs.image("updates"), plots.ratios(data.assign(mode=data.preset), BASE, of=_OF)


def section(data: pd.DataFrame, outputs: Outputs) -> Iterator[str]:
    """The part of the page, in Markdown."""
    yield "## Training updates of the recurrent experiments\n"
    yield from (f"{line}\n" for line in pages.environments(data, packages={}))
    yield f"Speed of `layernorm` relative to {_OF}: geometric means, the least of all points in brackets:\n"
    body = [
        [str(threads), str(preset), str(len(part)), pages.mean_and_worst(part.ratio_to_torch)]
        for (threads, preset), part in _ours(data)
    ]
    yield pages.markdown(["threads", "preset", "points", "speed"], "rlrr", body)
    yield f"{_beyond(data)}\n"
    image = Path(os.path.relpath(outputs.image("updates"), outputs.page.parent)).as_posix()
    yield f"![Speed of training updates relative to {_OF} at every point]({image})\n"
    yield "Times of one update in µs; the ratio is `layernorm`'s speed over `torch`'s.\n"
    yield _points_table(data)
    yield _METHOD.format(rounds=pages.rounds(data))


def summary(data: pd.DataFrame) -> list[str]:
    """For each number of threads and preset a line: mean and worst point."""
    lines = [
        f"{plural(threads, 'thread')}, {preset}: {pages.mean_and_worst(part.ratio_to_torch)} times the speed "
        f"of {_OF}: the geometric mean (the least)"
        for (threads, preset), part in _ours(data)
    ]
    return [*lines, _beyond(data)]


def options(data: pd.DataFrame) -> list[str]:
    """The options that measure these points again, where they are not the defaults."""
    found = pages.options(
        data, {"task": ("tasks", updates.TASKS), "preset": ("presets", updates.DEFAULT_PRESETS)}
    )
    return found + pages.asked_for(data, updates.ROUNDS)


def _ours(data: pd.DataFrame) -> Any:
    """This package's rows, by number of threads and preset."""
    return data[data.peer == OURS].groupby(["threads", "preset"], sort=False)


def _beyond(data: pd.DataFrame) -> str:
    """A sentence on the points at which an update takes longer than it is meant to."""
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


def _points_table(data: pd.DataFrame) -> str:
    body = []
    for _, part in data.groupby(_POINT, sort=False):
        found = {row["peer"]: row for row in part.to_dict("records")}
        ours = found[OURS]
        times = [pages.time(found[peer]) if peer in found else "–" for peer in updates.PEERS]
        body.append([*(str(ours[name]) for name in _POINT), *times, pages.ratio(ours)])
    heads = [*_POINT, *updates.PEERS, "ratio"]
    return pages.markdown(heads, "rllrrrr", body)


__all__ = ["AIM", "load", "options", "pictures", "section", "summary"]
