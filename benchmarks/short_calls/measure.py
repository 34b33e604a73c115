"""Recurrent layers over a few steps; as a program, the worker that measures them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from benchmarks.core.benchmark import BASE, OURS, Axis, Benchmark, Command, Work
from benchmarks.core.measuring import each_point
from benchmarks.core.workers import Emit, serve
from benchmarks.recurrent import measure as sequences
from benchmarks.recurrent.measure import CELLS, DTYPES, MODES, measure_point, right_results


@dataclass(frozen=True)
class Point(sequences.Point):
    """One point of the grid, as those of whole sequences."""

    words: ClassVar[str] = "{cell} {dtype} batch {batch} hidden {hidden} steps {steps} {mode}"


def measure(job: dict[str, Any], emit: Emit) -> None:
    """Measure the points of a job; the worker."""
    right = right_results()
    each_point(job, emit, Point, lambda point: measure_point(point, right(point), job, emit))


def _plan(works: list[Work], options: argparse.Namespace) -> list[Work]:
    whole = {"large": float("inf"), "memory": False}
    return [replace(work, job=dict(work.job) | whole) for work in works]


_ABOUT: Final = """\
peers:
  layernorm   LayerNormLSTM, LayerNormGRU, LayerNormRNN
  torch       torch.nn.LSTM, GRU, RNN, un-normalized; ratios are relative to it

The default grid takes about 4 minutes on two CPUs.
"""

BENCHMARK: Final = Benchmark(
    name="short_calls",
    command="short-calls",
    folder="short_calls",
    point=Point,
    axes=(
        Axis(("cell",), "cells", choices=CELLS),
        Axis(("batch",), "batches", "sequences", default=(1, 16, 64), quick=(1, 16), metavar="N,…"),
        Axis(
            ("hidden",),
            "hidden",
            "features of input and state",
            default=(64, 256, 512, 1024),
            quick=(64, 512),
            metavar="H,…",
        ),
        Axis(("steps",), "steps", "of time", default=(1, 4, 16), metavar="T,…"),
        Axis(("mode",), "modes", "training is forward and backward to input and parameters", MODES),
        Axis(("dtype",), "dtypes", choices=DTYPES, default=("float32",)),
    ),
    peers=(OURS, BASE),
    rounds=15,
    quick_rounds=5,
    budget=0.7,
    figures=("difference", "products_us", "over_products", "weights_us"),
    about=_ABOUT,
    plan=_plan,
)
COMMAND: Final = Command(
    name="short-calls",
    title="recurrent layers over a few steps",
    description="Measure LayerNormLSTM, LayerNormGRU and LayerNormRNN over 1, 4 and 16 steps next to\n"
    "PyTorch's un-normalized layers, interleaved in one process for each number of threads; write a table,\n"
    "pictures and a page.",
    benchmarks=(BENCHMARK,),
    examples=("--quick", "--cells lstm --steps 1 --batches 1 --hidden 256"),
)

if __name__ == "__main__":
    serve(measure)
