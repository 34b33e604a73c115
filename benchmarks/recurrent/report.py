"""What the benchmark of the recurrent layers found: its part of the page."""

from __future__ import annotations

from typing import Final

from benchmarks.core import plots, sections
from benchmarks.recurrent import measure
from benchmarks.recurrent.measure import BENCHMARK
from benchmarks.recurrent.peers import BY_HAND

TORCH_LAYER: Final = "torch.nn, un-normalized"
SHARE: Final = sections.Against("share of the products' limit", value=lambda ours: 1 / ours.over_products)
_METHOD: Final = """\
### How the recurrent layers are measured

- One layer and direction over {steps} steps, as many features in as out, from a state of zeros. Inference
  runs under `torch.inference_mode()`; training is forward and backward with a given gradient of the output,
  to fresh gradients of the input and all parameters. Everything has the same dtype.
- `layernorm` is `LayerNormLSTM`, `LayerNormGRU` or `LayerNormRNN`, computed by the kernel in the table;
  `layernorm-recompute` has `recompute=True`, and `layernorm-none` is the un-normalized variant. `torch` is
  `torch.nn.LSTM`, `GRU` or `RNN`, which normalizes nothing.
- By hand: `loop` is the layer-normalized cell of `F.linear` and `F.layer_norm` in a Python loop, the
  product with the input taken out of it; `script` is that under TorchScript and `compile` under
  `torch.compile`, which takes minutes for a point and is measured only where it is asked for. `jax` is the
  same cell in a jitted `lax.scan` with float32 statistics. `onnxruntime` is the cell inside ONNX's Scan,
  `onnxruntime-none` ONNX's un-normalized operator; both are for inference and have no bfloat16.
- Before a peer is measured, its output and gradients are compared with those of the loop in float32, for
  un-normalized ones with those of `torch.nn`. One that is off is listed as failed; column `difference` has
  by how much they differ.
- All peers of a point run in one process and are sampled in turn, in an order that changes from round to
  round. A sample is as many calls as take 3 ms. A peer is sampled in every round until its samples have
  taken {each} seconds, but at least {least} times. {rounds}
- Times are medians. A ratio is `torch`'s time divided by the peer's in the same round, as the median over
  the rounds both were sampled in, with its quartiles in brackets: above 1 is faster than un-normalized
  PyTorch. In the summary, ratios to other peers than `torch` are those of medians, and the least of all
  points is in brackets.
- The limit is the bare matrix products of the same sizes with `torch.mm`, into memory that is there: one of
  all steps' inputs and one for each step; in training those of the gradients too. The share is the limit
  divided by `layernorm`'s time; it can be above 1, because `torch.mm` is not the fastest there is for every
  size. With a batch of 1 the table has the time too that reading the recurrent weights once a step takes:
  their bytes over the rate of a dot product of vectors of that size in all.
- Memory is what a forward pass in training leaves allocated in addition to its results, as PyTorch's profiler
  counts it.
- Where not named otherwise, GRU and RNN are measured with batches {others} and sizes {sizes} only. Points
  whose products are more than {large:g} GFLOP have all threads and {large_peers} only, and those of more
  than {largest:g} are left out.
- There is a process for each number of threads. With one thread it may run on one CPU only, so that no
  library has more.
"""

REPORT: Final = sections.Report(
    benchmark=BENCHMARK,
    title="Recurrent networks",
    order=("threads", "cell", "dtype", "mode", "batch", "hidden", "steps"),
    parts=(
        sections.Environments(),
        sections.Summary(
            {"threads": "threads", "mode": "mode", "dtype": "points of"},
            (
                sections.Against(TORCH_LAYER, value=sections.in_rounds),
                sections.Against("best by hand", BY_HAND),
                sections.Against("JAX", ("jax",)),
                SHARE,
            ),
            "{keys}: speed over {all}",
            worst="; slowest relative to torch.nn: {cell} batch {batch} hidden {hidden}",
            total="cell",
        ),
        sections.Slower(
            sections.as_given("threads", "cell", "dtype", "mode", "batch", "hidden"),
            "`torch.nn`'s un-normalized layer",
            most=10,
        ),
        sections.Picture(
            plots.ratio_curves,
            lambda row: ("recurrent", row["threads"]),
            "Speed relative to torch.nn's un-normalized layers with {threads}",
            by=("threads",),
            ours=True,
        ),
        sections.Memory(
            "saved_bytes",
            "### Memory of a training step",
            "MB that the forward pass keeps for backward, in addition to its results:",
        ),
        sections.Points(
            sections.as_given("dtype", "mode", "batch", "hidden", "kernel"),
            (
                sections.shared("products", "products_us"),
                sections.shared("weights", "weights_us"),
                sections.RATIO,
            ),
            "Times in µs; the ratio is `layernorm`'s speed over `torch`'s.",
            by=("threads", "cell"),
            heading="### {CELL}, {threads}",
        ),
    ),
    method=_METHOD,
    facts={
        "each": measure.EACH,
        "least": measure.LEAST_ROUNDS,
        "others": " and ".join(map(str, measure.OTHER_BATCHES)),
        "sizes": " and ".join(map(str, measure.OTHER_HIDDEN)),
        "large": measure.LARGE,
        "largest": measure.LARGEST,
        "large_peers": " and ".join(f"`{name}`" for name in measure.LARGE_PEERS),
    },
)
