"""Write the part of the page that says what the benchmark of short calls found."""

from __future__ import annotations

from typing import Final

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.core import plots, sections
from benchmarks.core.benchmark import plural
from benchmarks.recurrent.report import SHARE, TORCH_LAYER
from benchmarks.short_calls.measure import BENCHMARK

_METHOD: Final = """\
### How short calls are measured

- As the recurrent layers are over whole sequences, but over a few steps ({steps}): one layer and direction,
  as many features in as out, from a state of zeros. Inference runs under `torch.inference_mode()`; training
  is forward and backward with a given gradient of the output, to fresh gradients of the input and all
  parameters.
- `layernorm` is `LayerNormLSTM`, `LayerNormGRU` or `LayerNormRNN`, computed by the kernel in the table;
  `torch` is `torch.nn.LSTM`, `GRU` or `RNN`, which normalizes nothing.
- Before they are measured, output and gradients of `layernorm` are compared with those of the same cell in a
  loop of PyTorch's functions; column `difference` has by how much they differ.
- Both run in one process and are sampled in turn, in an order that changes from round to round. A sample is
  as many calls as take 3 ms. {rounds} Times are medians, and so are ratios, of those within a round, with
  their quartiles in brackets: above 1 is faster than un-normalized PyTorch.
- The limit is the bare matrix products of the same sizes with `torch.mm`; with a batch of 1 the table has the
  time too that reading the recurrent weights once a step takes.
- There is a process for each number of threads. With one thread it may run on one CPU only.
"""


def _curves(data: pd.DataFrame) -> Figure:
    """Draw ratios over the hidden size, the panels of a cell by mode, dtype and steps."""
    kinds = zip(data.dtype, data.steps, strict=True)
    return plots.ratio_curves(data.assign(dtype=[f"{dtype}, {plural(n, 'step')}" for dtype, n in kinds]))


REPORT: Final = sections.Report(
    benchmark=BENCHMARK,
    title="Short calls of recurrent networks",
    order=("threads", "cell", "dtype", "mode", "steps", "batch", "hidden"),
    parts=(
        sections.Environments(packages={}),
        sections.Summary(
            {"threads": "threads", "mode": "mode", "steps": "steps or cell"},
            (sections.Against(TORCH_LAYER, value=sections.in_rounds), SHARE),
            "{keys} steps: speed over {all}",
            worst="; slowest relative to torch.nn: {cell} batch {batch} hidden {hidden}",
            total="cell",
        ),
        sections.Slower(
            sections.as_given("threads", "cell", "dtype", "mode", "steps", "batch", "hidden"),
            "`torch.nn`'s un-normalized layer",
            most=10,
        ),
        sections.Picture(
            _curves,
            lambda row: ("short-calls", row["threads"]),
            "Speed of short calls relative to torch.nn's un-normalized layers with {threads}",
            by=("threads",),
            ours=True,
        ),
        sections.Points(
            sections.as_given("dtype", "mode", "steps", "batch", "hidden", "kernel"),
            (
                sections.shared("products", "products_us"),
                sections.shared("weights", "weights_us"),
                sections.RATIO,
            ),
            "Times in µs; the ratio is `layernorm`'s speed over `torch`'s.",
            by=("threads", "cell"),
            heading="### Short calls of the {CELL}, {threads}",
        ),
    ),
    method=_METHOD,
)
