"""What the benchmark of single steps found: its part of the page."""

from __future__ import annotations

from functools import partial
from typing import Final

from benchmarks.core import plots, sections
from benchmarks.stream.measure import BENCHMARK
from benchmarks.stream.peers import BY_HAND, CHECKED

_METHOD: Final = """\
### How single steps are measured

- A call from Python takes one step, and its state is passed to the next call; the input stays the same. There
  are as many features in as out, and everything runs under `torch.inference_mode()`.
- `layernorm` is `step` of `stream()`, `layernorm-cell` is `LayerNormLSTMCell`, `LayerNormGRUCell` or
  `LayerNormRNNCell`. `torch` is `torch.nn.LSTMCell`, `GRUCell` or `RNNCell`, which normalizes nothing, and
  `torch-sequence` a whole `torch.nn.LSTM`, `GRU` or `RNN` that is called for one step.
- `eager` is the layer-normalized cell of `F.linear` and `F.layer_norm`, `script` that under TorchScript,
  `jax` that jitted with float32 statistics, `onnxruntime` an ONNX graph whose state stays in bound memory
  and which has no bfloat16.
- Before a peer is measured, {checked} of its steps are compared with those of `eager` in float32, for
  un-normalized ones with those of `torch`. One that is off is listed as failed.
- All peers of a point run in one process and are sampled in turn, in an order that changes from round to
  round. A sample is as many calls as take 3 ms. {rounds} Times are medians. A ratio in the tables is the
  median of those within a round; the summary has ratios of medians.
- The limit is the time that reading both weight matrices takes: their bytes over the rate of a dot product
  of vectors of that size in all.
- There is a process for each number of threads. With one thread it may run on one CPU only.
"""

REPORT: Final = sections.Report(
    benchmark=BENCHMARK,
    title="One step at a time",
    order=("threads", "cell", "dtype", "batch", "hidden"),
    parts=(
        sections.Environments(),
        sections.Summary(
            sections.as_given("threads", "dtype"),
            (
                sections.Against("torch.nn cell, un-normalized", ("torch",)),
                sections.Against("torch.nn sequence, un-normalized", ("torch-sequence",)),
                sections.Against("best by hand", BY_HAND),
                sections.Against("JAX", ("jax",)),
                sections.Against("ONNX Runtime", ("onnxruntime",)),
                sections.Against("share of the limit", value=lambda ours: ours.weights_us / ours.median_us),
            ),
            "{keys}: speed over {all}",
        ),
        sections.Picture(
            partial(plots.time_curves, peers=BENCHMARK.peers),
            lambda row: (
                "stream",
                row["threads"],
                *(() if row["batch"] == "1" else (f"batch-{row['batch']}",)),
            ),
            "Time of one step with {threads} and a batch of {batch}",
            by=("threads", "batch"),
        ),
        sections.Points(
            sections.as_given("cell", "dtype", "batch", "hidden", "kernel"),
            (sections.shared("weights", "weights_us"), sections.RATIO),
            "Times in µs; the ratio is `layernorm`'s speed over `torch`'s.",
            by=("threads",),
            heading="### One step, {threads}",
        ),
    ),
    method=_METHOD,
    facts={"checked": CHECKED},
)
