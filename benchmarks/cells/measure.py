"""Recurrent cells called step by step; as a program, the worker that measures them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from benchmarks.cells.by_hand import VARIANTS
from benchmarks.cells.peers import PEERS
from benchmarks.core import limits
from benchmarks.core.benchmark import BASE, Axis, Benchmark, Command
from benchmarks.core.measuring import Check, Row, each_point, kernel_on_cpu, peer_rows, ready, sample
from benchmarks.core.subjects import difference
from benchmarks.core.workers import Emit, serve
from benchmarks.recurrent.case import make_case
from benchmarks.recurrent.measure import CELLS, DTYPES, MODES, TOLERANCE, Point, layer_figures, shapes

#: Points whose products are more GFLOP are left out: they take more than a second a call with one thread.
LARGEST: Final = 60.0
_STEPS: Final = 8


def measure(job: dict[str, Any], emit: Emit) -> None:
    """Measure the points of a job; the worker."""
    each_point(job, emit, Point, lambda point: _measure(point, job, emit))


def _measure(point: Point, job: Mapping[str, Any], emit: Emit) -> list[Row]:
    training = point.mode == "training"
    variant = VARIANTS[point.cell]
    with torch.set_grad_enabled(training):
        exact = make_case(point.cell, point.batch, point.hidden, point.steps, training, variant=variant)
        expected = PEERS[BASE](exact).results()
        case = exact.to(getattr(torch, point.dtype))

        def allows(name: str, off: float) -> bool:
            own = TOLERANCE[point.dtype]
            return off <= own or off <= 2 * difference(PEERS[BASE](case).results(), expected)

        check = Check(lambda name: expected, allows)
        subjects, problems = ready(point, job["peers"], lambda name: PEERS[name](case), check, emit)
        matrices = case.normalized["weight_ih"], case.normalized["weight_hh"]
        # Of one step: where the next input follows from the state, no product can be of several.
        step = limits.products(case.x[:1], *matrices, training)
        samples, others = sample(subjects, {"products": step}, job)
    seconds = tuple(point.steps * each for each in samples["products"].seconds)
    products = replace(samples["products"], seconds=seconds)
    return peer_rows(
        point,
        job["peers"],
        problems,
        (samples, others),
        kernel=lambda name: kernel_on_cpu(point.cell, point.dtype),
        figures=lambda name, row: layer_figures(
            subjects[name], check.differences[name], samples[name], products
        ),
    )


def _keep(point: Point, options: argparse.Namespace, threads: int) -> bool:
    return options.full or point.gflop <= LARGEST


_ABOUT: Final = f"""\
peers:
  layernorm   LayerNormLSTMCell and LayerNormRNNCell with variant="paper", LayerNormGRUCell with "sheeprl"
  torch       the same cell written by hand as a module of torch.nn.Linear, torch.nn.LayerNorm and
              pointwise functions; ratios are relative to it

The default grid takes about 7 minutes on two CPUs. Points with more than {LARGEST:g} GFLOP of matrix products
are left out: they take more than a second a call with one thread.
"""

BENCHMARK: Final = Benchmark(
    name="cells",
    command="cells",
    folder="cells",
    point=Point,
    axes=(
        Axis(("cell",), "cells", choices=CELLS),
        *shapes((1, 16, 64, 256, 1024), (64, 128, 256, 512, 1024, 2048), ((1, 16), (128, 512)), steps=_STEPS),
        Axis(("mode",), "modes", "training is forward and backward to input and parameters", MODES),
        Axis(("dtype",), "dtypes", choices=DTYPES, default=("float32",)),
    ),
    peers=tuple(PEERS),
    rounds=15,
    quick_rounds=5,
    budget=0.8,
    figures=("difference", "products_us", "over_products"),
    options={"full": {"action": "store_true", "help": "the largest points too"}},
    about=_ABOUT,
    keep=_keep,
)
COMMAND: Final = Command(
    name="cells",
    title="recurrent cells called step by step",
    description="Measure LayerNormLSTMCell, LayerNormGRUCell and LayerNormRNNCell in a loop of a few steps\n"
    "next to the same cells written by hand in eager PyTorch, interleaved in one process for each number\n"
    "of threads; write a table, pictures and a page.",
    benchmarks=(BENCHMARK,),
    examples=("--quick", "--cells gru --batches 16 --hidden 512 --modes training"),
)

if __name__ == "__main__":
    serve(measure)
