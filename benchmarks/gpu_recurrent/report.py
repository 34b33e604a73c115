"""What the benchmark of the recurrent layers on a GPU found: its part of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pandas as pd

from benchmarks.core import pages, plots, sections
from benchmarks.core.outputs import Outputs
from benchmarks.gpu_recurrent.measure import BENCHMARK, EVERYWHERE, FEW
from benchmarks.gpu_recurrent.peers import BY_HAND, KERNELS
from benchmarks.recurrent import measure as recurrent
from benchmarks.recurrent.report import SHARE, TORCH_LAYER

_PACKAGES: Final = {
    "driver": "driver",
    "cuda": "CUDA",
    "triton": "Triton",
    "flashrnn": "FlashRNN",
    "torchrl": "TorchRL",
}
_METHOD: Final = """\
### How the recurrent layers are measured on a GPU

- One layer and direction over {steps} steps, as many features in as out, from a state of zeros. Inference
  runs under `torch.inference_mode()`; training is forward and backward with a given gradient of the output,
  to fresh gradients of the input and all parameters. Everything has the same dtype, and PyTorch's settings
  are its defaults: cuDNN may compute float32 in TF32, `torch.mm` does not.
- `layernorm` is `LayerNormLSTM`, `LayerNormGRU` or `LayerNormRNN`, computed by the kernel in the table even
  where another would be chosen; `layernorm-looped` by the one that loops over the steps of small layers, and
  `layernorm-persistent` by the one that keeps the weights on the chip, at the sizes that fit there;
  `layernorm-recompute` has `recompute=True`, and `layernorm-none` is the un-normalized variant. `torch` is
  `torch.nn.LSTM`, `GRU` or `RNN`, cuDNN's, which normalizes nothing; ratios are to it.
- By hand: `loop` is the layer-normalized cell of `F.linear` and `F.layer_norm` in a Python loop, the product
  with the input taken out of it; `compile-step` is that with the step and what is outside the loop under
  `torch.compile`, and `scan` has PyTorch's operator of that name for the loop, all of it compiled.
- `flashrnn` is FlashRNN's fused kernels (for the GRU those that alternate with products), `torchrl` TorchRL's
  Triton kernels; both normalize nothing, and get their input with the sequences first in memory.
- Unless peers are named, `{everywhere}` are measured at every point and the others at {few} only.
  Those that compile have a process of their own at each point, together with `layernorm` and `torch`, and
  `layernorm-persistent` has one for all of its points; one that dies loses its own rows only.
- Before a peer is measured, its output and gradients are compared with those of the loop in float32, for
  un-normalized ones with those of `torch.nn`, both without TF32. One that is off by more than a tolerance of
  its dtype and than twice what the loop or `torch.nn` is, in that dtype and where cuDNN does in TF32, is
  listed as failed; column `difference` has by how much they differ.
- Times are between CUDA events around as many calls as take 3 ms, medians over the rounds, the peers of a
  point in turn and in an order that changes. A peer is sampled in every round until its samples have taken
  {each} seconds, but at least {least} times. {rounds}
- A ratio is `torch`'s time divided by the peer's in the same round, with its quartiles in brackets: above 1
  is faster than un-normalized PyTorch.
- The limit is the bare matrix products of the same sizes with `torch.mm` in a CUDA graph, into memory that is
  there: one of all steps' inputs and one for each step; in training those of the gradients too. The share is
  the limit divided by `layernorm`'s time; kernels that keep the weights on the chip from step to step can be
  above 1.
- Memory is the most that a call of forward and backward has allocated at a time beyond what was allocated
  before it: results, gradients and what is kept between.
- The first call is timed at {few}, in training, in a fresh process whose GPU has been started; it holds
  making the module, and compiling what no cache on disk has.
"""


class FirstCalls(sections.Part):
    """How long first calls take, and compiling."""

    def markdown(self, data: pd.DataFrame, report: sections.Report, outputs: Outputs) -> Iterator[str]:
        """Yield the table, if there are figures."""
        rows = data[data.first_s.notna() | data.compile_s.notna()]
        if rows.empty:
            return
        columns = ["cell", "dtype", "mode", "batch", "hidden", "peer"]
        body = [
            [
                *(str(row[name]) for name in columns),
                *(_seconds(row[name]) for name in ("first_s", "compile_s")),
            ]
            for row in rows.to_dict("records")
        ]
        yield "### Seconds of first calls on a GPU\n"
        yield pages.markdown(
            [*columns, "fresh process", "compiling"], sections.align(columns, report) + "rr", body
        )


def _seconds(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3g}"


REPORT: Final = sections.Report(
    benchmark=BENCHMARK,
    title="Recurrent networks on a GPU",
    order=("cell", "dtype", "mode", "batch", "hidden", "steps"),
    parts=(
        sections.Environments("gpu", _PACKAGES),
        sections.Summary(
            sections.as_given("cell", "mode", "dtype"),
            (
                sections.Against(TORCH_LAYER, value=sections.in_rounds),
                sections.Against("best by hand", BY_HAND),
                sections.Against("others' kernels, un-normalized", KERNELS),
                SHARE,
            ),
            "{keys}: speed over {all}: geometric mean (the least)",
        ),
        sections.Slower(
            sections.as_given("cell", "dtype", "mode", "batch", "hidden"),
            "`torch.nn`'s un-normalized layer",
            most=10,
        ),
        sections.Picture(
            plots.ratio_curves,
            lambda row: ("gpu", "recurrent"),
            "Speed relative to torch.nn's un-normalized layers on a GPU",
            ours=True,
        ),
        sections.Memory(
            "peak_bytes",
            "### Memory of a training step on a GPU",
            "MB that are allocated at a time in forward and backward, beyond what was before:",
        ),
        sections.Points(
            sections.as_given("dtype", "mode", "batch", "hidden", "kernel"),
            (
                sections.shared("products", "products_us"),
                sections.own("a step", lambda ours: ours["median_us"] / ours["steps"]),
                sections.own("of the limit", lambda ours: 1 / ours["over_products"], "{:.2f}"),
                sections.RATIO,
            ),
            "Times in µs; limit, step (its time over their number) and ratio are `layernorm`'s.",
            by=("cell",),
            heading="### {CELL} on a GPU",
        ),
        FirstCalls(),
    ),
    method=_METHOD,
    facts={
        "everywhere": "`, `".join(EVERYWHERE),
        "few": "{}, batch {}, size {}".format(*FEW),
        "each": recurrent.EACH,
        "least": recurrent.LEAST_ROUNDS,
    },
)
