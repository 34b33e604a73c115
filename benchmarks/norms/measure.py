"""The norm operators over a grid of sizes; as a program, the worker that measures it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final

import torch

from benchmarks.core import benchmark
from benchmarks.core.benchmark import BASE, Axis, Benchmark, Command
from benchmarks.core.measuring import Check, Row, each_point, kernel_on_cpu, peer_rows, ready, sample
from benchmarks.core.subjects import Subject, difference
from benchmarks.core.table import significant
from benchmarks.core.timing import Call, quartiles
from benchmarks.core.workers import Emit, serve
from benchmarks.norms.peers import PEERS, Case, make_case
from layernorm import backends

DTYPES: Final = ("float32", "bfloat16", "float16")
MODES: Final = ("forward", "training")

# How many times a tensor of rows x width is read or written at least. Layer norm: x, output; and backward
# the output's gradient, x, the input's gradient. With a residual: x, residual, sum, output; backward the
# gradients of output and sum, sum, and the gradients of x and residual.
_PASSES: Final = {
    ("layer_norm", "forward"): 2,
    ("layer_norm", "training"): 5,
    ("add_layer_norm", "forward"): 4,
    ("add_layer_norm", "training"): 9,
}
# Results may differ from those in float32 by this much, relative to their norm: some units in the last
# place, which are 1.2e-7, 9.8e-4 and 7.8e-3. PyTorch's own gradients of the weight in half precision can
# be further off, and so may others' be. A wrong formula is off by far more.
_TOLERANCE: Final = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Point(benchmark.Point):
    """One point of the grid.

    Attributes:
        operator: one of ``layernorm.backends.NORMS``.
        dtype: of all tensors.
        rows: how many are normalized.
        width: of a row.
        mode: "forward", or "training" for forward and backward.
    """

    operator: str
    dtype: str
    rows: int
    width: int
    mode: str
    words: ClassVar[str] = "{operator} {dtype} {rows}×{width} {mode}"

    def case(self, device: str = "cpu") -> Case:
        """Return its tensors."""
        dtype = getattr(torch, self.dtype)
        return make_case(self.operator, dtype, self.rows, self.width, self.mode == "training", device)

    @property
    def clones(self) -> float:
        """How many copies of the input take the least traffic that this point needs."""
        return _PASSES[self.operator.replace("rms", "layer"), self.mode] / 2


def measure(job: dict[str, Any], emit: Emit) -> None:
    """Measure the points of a job; the worker."""
    each_point(job, emit, Point, lambda point: _measure(point, job, emit))


def _measure(point: Point, job: Mapping[str, Any], emit: Emit) -> list[Row]:
    with torch.set_grad_enabled(point.mode == "training"):
        case = point.case()
        subjects, problems = checked(point, case, job["peers"], lambda name, case: PEERS[name](case), emit)
        x = case.inputs[0]
        # A copy that allocates its result as the operators do, and one into memory that is there.
        copies: dict[str, Call] = {"copy": x.clone, "copy into": partial(torch.empty_like(x).copy_, x)}
        samples, others = sample(subjects, copies, job)
    copy, copy_into = (1e6 * quartiles(samples[name].seconds).median for name in copies)

    def figures(name: str, row: Row) -> Row:
        return {"copy_into_us": significant(copy_into), **limits(point, copy, row)}

    return peer_rows(
        point,
        job["peers"],
        problems,
        (samples, others),
        kernel=lambda name: kernel_on_cpu(point.operator, point.dtype),
        figures=figures,
    )


def limits(point: Point, copy: float, row: Row) -> Row:
    """Return what a row has of the limit, given the microseconds of a copy."""
    limit = point.clones * copy
    return {
        "copy_us": significant(copy),
        "limit_us": significant(limit),
        "fraction_of_limit": significant(limit / row["median_us"]),
    }


def checked(
    point: Point, case: Case, names: list[str], build: Callable[[str, Case], Subject], emit: Emit
) -> tuple[dict[str, Subject], dict[str, str]]:
    """Return the peers that can be measured, and what is the matter with the others.

    Args:
        point: of the grid.
        case: its tensors.
        names: of peers.
        build: makes a peer ready for a case.
        emit: is told why a peer has no figures.
    """
    expected = build(BASE, case.in_float32()).results()
    allowed = max(_TOLERANCE[point.dtype], 2 * difference(build(BASE, case).results(), expected))
    check = Check(lambda name: expected, lambda name, off: off <= allowed)
    return ready(point, names, lambda name: build(name, case), check, emit)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([1-9]\d*)[x×]([1-9]\d*)\s*", part)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"expected ROWSxWIDTH separated by commas, as in 64x256,8x768; got {part!r}"
            )
        sizes.append((int(found[1]), int(found[2])))
    return tuple(dict.fromkeys(sizes))


def size_axis(default: tuple[tuple[int, int], ...], quick: tuple[tuple[int, int], ...]) -> Axis:
    """Return the axis of sizes with its defaults."""
    return Axis(("rows", "width"), "sizes", "rows and width", (), default, quick, _sizes, "RxW,…")


BENCHMARK: Final = Benchmark(
    name="norms",
    command="norms",
    folder="norms",
    point=Point,
    axes=(
        Axis(
            ("operator",),
            "operator",
            "an earlier table in the same place keeps its other operators",
            choices=backends.NORMS,
            default=("layer_norm",),
        ),
        Axis(("dtype",), "dtypes", choices=DTYPES, default=("float32", "bfloat16")),
        Axis(("mode",), "modes", "training is forward and backward", choices=MODES),
        # An activation in and out of the caches, a long row, a single step of a small network.
        size_axis(
            ((64, 256), (512, 512), (4096, 1024), (16384, 2048), (1, 64), (8, 768)),
            quick=((64, 256), (512, 512), (1, 64), (8, 768)),
        ),
    ),
    peers=tuple(PEERS),
    rounds=30,
    quick_rounds=10,
    budget=9.0,
    figures=("copy_us", "copy_into_us", "limit_us", "fraction_of_limit"),
    replaced_by="operator",
)
COMMAND: Final = Command(
    name="norms",
    title="the norm operators",
    description="Measure the norm operators next to PyTorch's and others', interleaved in one process for "
    "each\nnumber of threads; write a table, a picture and a page.",
    benchmarks=(BENCHMARK,),
)


if __name__ == "__main__":
    serve(measure)
