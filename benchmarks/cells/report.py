"""Write the part of the page that says what the benchmark of the cells found."""

from __future__ import annotations

from functools import partial
from typing import Final

from benchmarks.cells import measure
from benchmarks.cells.measure import BENCHMARK
from benchmarks.core import plots, sections
from benchmarks.recurrent.report import SHARE

_BY_HAND: Final = "the cell by hand"
_METHOD: Final = """\
### How the cells are measured

- A call takes {steps} steps in a Python loop, one call of the cell each, from a state of zeros and with as
  many features in as out. Inference runs under `torch.no_grad()`; training is forward, and backward through
  all steps with a given gradient of each output, to fresh gradients of the inputs and all parameters.
- `layernorm` is `LayerNormLSTMCell` or `LayerNormRNNCell` with `variant="paper"`, or `LayerNormGRUCell` with
  `variant="sheeprl"`, computed by the kernel in the table.
- `torch` is the same cell as people write it in eager PyTorch, a module of `torch.nn.Linear`,
  `torch.nn.LayerNorm` and pointwise functions: the LSTM has two products, a norm of each and one of the cell;
  the GRU, Dreamer V3's as in sheeprl, one product of state and input together and one norm of all gates; the
  RNN two products and a norm of their sum.
- Both have the same weights. Before they are measured, their outputs and gradients are compared with those of
  the cell by hand in float32. A peer that is off is listed as failed; column `difference` has by how much
  they differ.
- Both run in one process and are sampled in turn, in an order that changes from round to round. A sample is
  as many calls as take 3 ms. {rounds} Times are medians, and so are ratios, of those within a round, with
  their quartiles in brackets: above 1 is faster than by hand.
- The limit is the bare matrix products of one step with `torch.mm`, into memory that is there, times the
  steps; in training those of the gradients too. The share is the limit divided by `layernorm`'s time; it can
  be above 1, because `torch.mm` is not the fastest there is for every size.
- Points whose products are more than {largest:g} GFLOP are left out: they take more than a second a call with
  one thread.
- There is a process for each number of threads. With one thread it may run on one CPU only.
"""

REPORT: Final = sections.Report(
    benchmark=BENCHMARK,
    title="Cells called step by step",
    order=("threads", "cell", "dtype", "mode", "batch", "hidden", "steps"),
    parts=(
        sections.Environments(packages={}),
        sections.Summary(
            {"threads": "threads", "mode": "mode", "cell": "points of"},
            (sections.Against(_BY_HAND, value=sections.in_rounds), SHARE),
            "{keys}: speed over {all}",
            worst="; slowest relative to the cell by hand: batch {batch} hidden {hidden}",
        ),
        sections.Slower(
            sections.as_given("threads", "cell", "dtype", "mode", "batch", "hidden"), _BY_HAND, most=10
        ),
        sections.Picture(
            partial(plots.ratio_curves, of=_BY_HAND),
            lambda row: ("cells", row["threads"]),
            "Speed relative to the cells by hand with {threads}",
            by=("threads",),
            ours=True,
        ),
        sections.Points(
            sections.as_given("dtype", "mode", "batch", "hidden", "kernel"),
            (sections.shared("products", "products_us"), sections.RATIO),
            "Times of all steps in µs; the ratio is `layernorm`'s speed over `torch`'s, by hand.",
            by=("threads", "cell"),
            heading="### {CELL} cell, {threads}",
        ),
    ),
    method=_METHOD,
    facts={"largest": measure.LARGEST},
)
