"""What the benchmark of the norms on a GPU found: its part of the page."""

from __future__ import annotations

from functools import partial
from typing import Final

from benchmarks.core import plots, sections
from benchmarks.core.benchmark import BASE, OURS
from benchmarks.gpu_norms.measure import BENCHMARK
from benchmarks.norms.report import size

_PACKAGES: Final = {
    "driver": "driver",
    "cuda": "CUDA",
    "triton": "Triton",
    "liger-kernel": "Liger",
    "quack-kernels": "quack",
    "apex": "apex",
    "flash-attn": "flash-attention",
}

_METHOD: Final = """\
### How the norms are measured on a GPU

- `layernorm` is `layernorm.functional`'s operator, always computed by the Triton kernels;
  `torch` is PyTorch's own, called eagerly, `torch.compile` the same compiled by Inductor for the one shape.
  The others' functions are called with their own defaults; "not installed" and "not supported" stand where
  there is nothing to measure. An operator that adds a residual is an addition and a norm where a peer has no
  operator for both.
- Times are the GPU's, between CUDA events around as many calls as take 3 ms, medians over the rounds, every
  peer once in each round in an order that changes. Inputs and given gradients rotate through copies of
  together 256 MiB or more, so that no cache holds them. Where a call's kernels are shorter than what issuing
  them takes the CPU, the GPU waits, and the time is the CPU's: `host_us` in the table.
- A ratio is `torch`'s time divided by the peer's in the same round; above 1 is faster.
- The limit is the time of `x.clone()` in the same rounds, by the bytes that must be read and written at
  least: for norms those of two tensors forward and five in training, with a residual four and nine.
- `graph_us` is the time of a call in a CUDA graph, forward.
- {rounds}
"""

REPORT: Final = sections.Report(
    benchmark=BENCHMARK,
    title="Norm operators on a GPU",
    group="operator",
    heading="### {operator} on a GPU",
    order=("operator", "dtype", "width", "rows", "mode"),
    derived={"size": size, "label": lambda data: data.dtype + " " + size(data)},
    parts=(
        sections.Environments("gpu", _PACKAGES),
        sections.Summary(
            sections.as_given("operator", "mode"),
            (
                sections.Against("torch", value=sections.in_rounds),
                sections.Against("fastest", [peer for peer in BENCHMARK.peers if peer != OURS]),
                sections.Against("copy", value=lambda ours: ours.fraction_of_limit),
            ),
            "{keys}: {0} times PyTorch's speed, {1} times the fastest peer's, {2} of the copy's: "
            "geometric mean (the least)",
            text=None,
        ),
        sections.Picture(
            partial(plots.ratios, base=BASE, by_threads=False),
            lambda row: ("gpu", row["operator"]),
            "Speed of {operator} relative to PyTorch's eager operator on a GPU",
        ),
        sections.Points(
            {"dtype": "dtype", "size": "rows × width", "mode": "mode"},
            (
                sections.RATIO,
                sections.own("of the limit", lambda ours: ours["fraction_of_limit"], "{:.2f}"),
                sections.own("CPU", lambda ours: ours["host_us"]),
                sections.own("in a graph", lambda ours: ours["graph_us"]),
            ),
            "Times in µs; ratio, part of the limit, CPU and graph are `layernorm`'s.",
        ),
    ),
    method=_METHOD,
)
