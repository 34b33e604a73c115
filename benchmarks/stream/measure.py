"""One recurrent step at a time; as a program, the worker that measures it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch

from benchmarks.core import benchmark, limits
from benchmarks.core.benchmark import Axis, Benchmark, Command
from benchmarks.core.measuring import Check, Row, each_point, kernel_on_cpu, peer_rows, ready, sample
from benchmarks.core.table import significant
from benchmarks.core.workers import Emit, serve
from benchmarks.recurrent.case import make_case
from benchmarks.recurrent.measure import CELLS, DTYPES
from benchmarks.stream.peers import PEERS, UNNORMALIZED

# Results of these few steps may differ from those in float32 by this much, relative to their norm.
_TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Point(benchmark.Point):
    """One point of the grid.

    Attributes:
        cell: "lstm", "gru" or "rnn".
        dtype: of all tensors.
        batch: rows, N.
        hidden: features of the input and of the state, H.
    """

    cell: Any
    dtype: str
    batch: int
    hidden: int
    words: ClassVar[str] = "{cell} {dtype} batch {batch} hidden {hidden}"


def measure(job: dict[str, Any], emit: Emit) -> None:
    """Measure the points of a job; the worker."""
    with torch.inference_mode():
        each_point(job, emit, Point, lambda point: _measure(point, job, emit))


def _measure(point: Point, job: Mapping[str, Any], emit: Emit) -> list[Row]:
    exact = make_case(point.cell, point.batch, point.hidden, 1, training=False)
    judges = {True: "torch", False: "eager"}  # by whether the cell is un-normalized
    expected = {kind: PEERS[judge](exact).results() for kind, judge in judges.items()}
    check = Check(
        lambda name: expected[name in UNNORMALIZED], lambda name, off: off <= _TOLERANCE[point.dtype]
    )
    case = exact.to(getattr(torch, point.dtype))
    subjects, problems = ready(point, job["peers"], lambda name: PEERS[name](case), check, emit)
    size = sum(case.normalized[name].nbytes for name in ("weight_ih", "weight_hh"))
    samples, others = sample(subjects, limits.reads(size), job)
    weights = limits.read_us(samples)

    def figures(name: str, row: Row) -> Row:
        found = {"difference": float(f"{check.differences[name]:.1e}")}
        if weights:  # a few bytes take no time that can be told
            found["weights_us"] = significant(weights)
            found["over_weights"] = significant(row["median_us"] / weights)
        return found

    return peer_rows(
        point,
        job["peers"],
        problems,
        (samples, others),
        kernel=lambda name: kernel_on_cpu(point.cell, point.dtype),
        figures=figures,
    )


_ABOUT: Final = """\
peers:
  layernorm        stream() of LayerNormLSTM, LayerNormGRU, LayerNormRNN, and its step()
  layernorm-cell   LayerNormLSTMCell, LayerNormGRUCell, LayerNormRNNCell
  torch            torch.nn.LSTMCell, GRUCell, RNNCell, un-normalized; ratios are relative to it
  torch-sequence   torch.nn.LSTM, GRU, RNN called for one step, un-normalized
  eager, script    the layer-normalized cell written with PyTorch's functions, and that under TorchScript
  jax              the layer-normalized cell jitted
  onnxruntime      the layer-normalized cell as an ONNX graph, its state in bound memory

The default grid takes about 3 minutes.
"""

BENCHMARK: Final = Benchmark(
    name="stream",
    command="stream",
    folder="stream",
    point=Point,
    axes=(
        Axis(("cell",), "cells", choices=CELLS),
        Axis(("dtype",), "dtypes", choices=DTYPES),
        Axis(("batch",), "batches", "rows of a step", default=(1,), metavar="N,…"),
        Axis(
            ("hidden",),
            "hidden",
            "features of input and state",
            default=(64, 128, 256, 320, 512, 1024),
            quick=(128, 512),
            metavar="H,…",
        ),
    ),
    peers=tuple(PEERS),
    rounds=20,
    quick_rounds=5,
    budget=4.0,
    figures=("difference", "weights_us", "over_weights"),
    about=_ABOUT,
)
COMMAND: Final = Command(
    name="stream",
    title="recurrent layers one step at a time",
    description="Measure the time of one step called from Python, with a batch of 1, next to PyTorch's\n"
    "un-normalized cells, hand-written layer-normalized ones, JAX and ONNX Runtime, interleaved in one\n"
    "process for each number of threads; write a table, pictures and a page.",
    benchmarks=(BENCHMARK,),
    examples=("--quick", "--cells lstm --hidden 320 --threads 1"),
)

if __name__ == "__main__":
    serve(measure)
