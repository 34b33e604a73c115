"""Recurrent layers over whole sequences; as a program, the worker that measures them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from benchmarks.core import benchmark, limits
from benchmarks.core.benchmark import BASE, OURS, Axis, Benchmark, Command, Work
from benchmarks.core.measuring import Check, Row, each_point, kernel_on_cpu, peer_rows, ready, sample
from benchmarks.core.memory import kept_for_backward
from benchmarks.core.subjects import Subject, difference
from benchmarks.core.table import significant
from benchmarks.core.timing import Samples, quartiles, ratios
from benchmarks.core.workers import Emit, serve
from benchmarks.recurrent.case import Case, make_case
from benchmarks.recurrent.peers import ONLY_IN, PEERS, UNNORMALIZED
from layernorm.arguments import positive, seconds
from layernorm.variants import GATES

CELLS: Final = ("lstm", "gru", "rnn")
DTYPES: Final = ("float32", "bfloat16")
MODES: Final = ("inference", "training")
LEAST_ROUNDS: Final = 3
#: Seconds of samples after which a peer, once it has the least rounds, is sampled no more at a point.
EACH: Final = 0.1
_QUICK_EACH: Final = 0.05
#: Work in GFLOP of a point's products: above the first with all threads and a few peers only, above the
#: second not at all, unless asked for.
LARGE, LARGEST = 30.0, 200.0
#: The peers of large points, and the batches and sizes of cells other than the LSTM.
LARGE_PEERS: Final = (OURS, BASE)
OTHER_BATCHES: Final = (1, 32)
OTHER_HIDDEN: Final = (128, 512)
_COMPILE_LIMIT: Final = 600.0
# Results may differ from those of PyTorch's functions in float32 by this much, relative to their norm, or by
# twice what PyTorch's own in that dtype do: a hundred steps of rounding in another order, and bfloat16 keeps
# 8 bits in each of them. A wrong formula is off by far more.
TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
_JUDGES: Final = {True: "torch", False: "loop"}  # by whether the cell is un-normalized
#: By whether the cell is un-normalized, the results that are right.
Expected = Mapping[bool, list[Tensor]]


@dataclass(frozen=True)
class Point(benchmark.Point):
    """One point of the grid.

    Attributes:
        cell: "lstm", "gru" or "rnn".
        dtype: of all tensors.
        batch: sequences, N.
        hidden: features of the input and of the state, H.
        steps: of time, T.
        mode: "inference", or "training" for forward and backward.
    """

    cell: Any
    dtype: str
    batch: int
    hidden: int
    steps: int
    mode: str
    words: ClassVar[str] = "{cell} {dtype} batch {batch} hidden {hidden} {mode}"

    def case(self, device: str = "cpu") -> Case:
        """Return its numbers in float32."""
        return make_case(self.cell, self.batch, self.hidden, self.steps, self.mode == "training", device)

    @property
    def gflop(self) -> float:
        """The work of the matrix products."""
        forward = 2e-9 * self.steps * self.batch * 2 * self.hidden * GATES[self.cell] * self.hidden
        return 3 * forward if self.mode == "training" else forward


def measure(job: dict[str, Any], emit: Emit) -> None:
    """Measure the points of a job; the worker."""
    right = right_results()
    each_point(job, emit, Point, lambda point: measure_point(point, right(point), job, emit))


def right_results(device: str = "cpu") -> Callable[[Point], Expected]:
    """Return what tells the results that are right in float32, for one point after another."""
    found: dict[Point, Expected] = {}

    def expected(point: Point) -> Expected:
        # The numbers are the same in every dtype, and so are the results that are right.
        same = replace(point, dtype="float32")
        if same not in found:
            found.clear()
            with torch.set_grad_enabled(point.mode == "training"):
                case = same.case(device)
                found[same] = {kind: PEERS[judge](case).results() for kind, judge in _JUDGES.items()}
        return found[same]

    return expected


def check_of(
    point: Point,
    case: Case,
    expected: Expected,
    unnormalized: Sequence[str],
    judging: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Check:
    """Return the check of a point's peers.

    Args:
        point: of the grid.
        case: its tensors, in its dtype.
        expected: what is right.
        unnormalized: the peers that compute PyTorch's un-normalized cell.
        judging: the context in which PyTorch's functions have the precision that the peers have.
    """

    def allows(name: str, off: float) -> bool:
        if off <= TOLERANCE[point.dtype]:
            return True
        with judging():
            judge = PEERS[_JUDGES[name in unnormalized]](case).results()
        return off <= 2 * difference(judge, expected[name in unnormalized])

    return Check(lambda name: expected[name in unnormalized], allows)


def measure_point(point: Point, expected: Expected, job: Mapping[str, Any], emit: Emit) -> list[Row]:
    """Measure a point; return its rows.

    Args:
        point: of the grid.
        expected: what is right.
        job: has "peers", "large" and "memory" beside what ``sample`` takes.
        emit: is told why a peer has no figures.
    """
    training = point.mode == "training"
    names = BENCHMARK.in_mode(job["peers"], point.mode)
    if point.gflop > job["large"]:
        names = [name for name in names if name in LARGE_PEERS]
    with torch.inference_mode(not training):
        case = point.case().to(getattr(torch, point.dtype))
        check = check_of(point, case, expected, UNNORMALIZED)
        subjects, problems = ready(point, names, lambda name: PEERS[name](case), check, emit)
        kept = {}
        if job["memory"]:
            kept = {name: kept_for_backward(s.forward) for name, s in subjects.items() if s.forward}
        matrices = case.normalized["weight_ih"], case.normalized["weight_hh"]
        bounds = {"products": limits.products(case.x, *matrices, training)}
        if point.batch == 1:
            bounds |= limits.reads(matrices[1].nbytes)
        samples, others = sample(subjects, bounds, job)

    def figures(name: str, row: Row) -> Row:
        found = layer_figures(subjects[name], check.differences[name], samples[name], samples["products"])
        if "read" in samples:
            found["weights_us"] = significant(point.steps * limits.read_us(samples))
        return found | ({"saved_bytes": kept[name]} if name in kept else {})

    return peer_rows(
        point,
        names,
        problems,
        (samples, others),
        kernel=lambda name: kernel_on_cpu(point.cell, point.dtype),
        figures=figures,
    )


def layer_figures(subject: Subject, off: float, own: Samples, products: Samples) -> Row:
    """Return what a peer's row has of the check, of compiling and of the limit."""
    row: Row = {
        "difference": float(f"{off:.1e}"),
        "products_us": significant(1e6 * quartiles(products.seconds).median),
        "over_products": significant(quartiles(ratios(own, products)).median),
    }
    if subject.compile_s is not None:
        row["compile_s"] = significant(subject.compile_s)
    return row


def time_options(alone: str) -> dict[str, dict[str, Any]]:
    """Return the options for how long peers are sampled, and those with processes of their own compile."""
    each = f"seconds of samples of each peer at a point (default: {EACH}), {LEAST_ROUNDS} samples at least"
    limit = f"seconds for a point of {alone} (default: {_COMPILE_LIMIT:g})"
    shared = {"type": seconds, "metavar": "S"}
    return {
        "time": shared | {"help": each},
        "compile-limit": shared | {"help": limit, "default": _COMPILE_LIMIT},
    }


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a job says of how long peers are sampled."""
    each = options.time or (_QUICK_EACH if options.quick else EACH)
    return {"each": each, "least_rounds": LEAST_ROUNDS}


def in_own_workers(peer: str, works: Sequence[Work], limit: float) -> list[Work]:
    """Return for each point a worker that measures this peer too, and keeps its rows only."""
    alone = {"peers": [OURS, BASE, peer]}
    return [
        Work([point], dict(work.job) | alone, work.threads, peer, limit)
        for work in works
        for point in work.points
    ]


def _plan(works: list[Work], options: argparse.Namespace) -> list[Work]:
    peers = works[0].job["peers"]
    job = dict(works[0].job) | sampling(options)
    job["peers"] = [name for name in peers if name != "compile"]
    job["large"] = LARGE if options.peers is None and not options.full else float("inf")
    most = max(options.threads)  # memory is the same with any number
    found = [replace(work, job=job | {"memory": work.threads == most}) for work in works]
    return found + (in_own_workers("compile", found, options.compile_limit) if "compile" in peers else [])


def _keep(point: Point, options: argparse.Namespace, threads: int) -> bool:
    if options.batches or options.hidden or options.full:
        return True
    usual = point.batch in OTHER_BATCHES and point.hidden in OTHER_HIDDEN
    thin = point.cell != "lstm" and not usual and not options.quick
    many = point.gflop > LARGE and threads < max(options.threads)
    return not (thin or many or point.gflop > LARGEST)


def shapes(
    batches: tuple[int, ...],
    hidden: tuple[int, ...],
    quick: tuple[tuple[int, ...], tuple[int, ...]],
    steps: int,
) -> tuple[Axis, Axis, Axis]:
    """Return the axes of sizes with their defaults; ``quick`` has the batches and the hidden sizes."""
    return (
        Axis(("batch",), "batches", "sequences", default=batches, quick=quick[0], metavar="N,…"),
        Axis(("hidden",), "hidden", "features of input and state", (), hidden, quick[1], metavar="H,…"),
        Axis(("steps",), "steps", "of time", default=(steps,), parse=lambda t: (positive(t),), metavar="T"),
    )


_ABOUT: Final = f"""\
peers:
  layernorm             LayerNormLSTM, LayerNormGRU, LayerNormRNN
  layernorm-recompute   the same with recompute=True, in training
  layernorm-none        the same with variant="none", un-normalized
  torch                 torch.nn.LSTM, GRU, RNN, un-normalized; ratios are relative to it
  loop, script          the layer-normalized cell in a Python loop, and that under TorchScript
  compile               that under torch.compile; takes minutes a point, so it is measured only where
                        it is named, in a process of its own
  jax                   the layer-normalized cell in a jitted lax.scan
  onnxruntime           the layer-normalized cell in ONNX's Scan, in inference
  onnxruntime-none      ONNX's LSTM, GRU, RNN, un-normalized, in inference

The default grid takes about 13 minutes on two CPUs. It is not the whole product:
  - of GRU and RNN it has the batches {" and ".join(map(str, OTHER_BATCHES))} with the sizes {
    " and ".join(map(str, OTHER_HIDDEN))
} only;
  - points with more than {LARGE:g} GFLOP of matrix products are measured with all threads only, and of
    the peers {" and ".join(LARGE_PEERS)} only; those with more than {LARGEST:g} not at all.
Naming --batches or --hidden gives all points of their product, naming --peers those at every point.
"""

BENCHMARK: Final = Benchmark(
    name="recurrent",
    command="recurrent",
    folder="recurrent",
    point=Point,
    axes=(
        Axis(("cell",), "cells", choices=CELLS, quick=("lstm",)),
        *shapes((1, 8, 32, 128), (128, 256, 512, 1024), ((1, 32), (128, 256)), steps=100),
        Axis(("mode",), "modes", "training is forward and backward to input and parameters", MODES),
        Axis(("dtype",), "dtypes", choices=DTYPES),  # the innermost: its points have the same numbers
    ),
    peers=tuple(PEERS),
    rounds=15,
    quick_rounds=5,
    figures=("difference", "saved_bytes", "compile_s", "products_us", "over_products", "weights_us"),
    options=time_options("the peer compile")
    | {"full": {"action": "store_true", "help": "the whole grid with all peers; takes hours"}},
    about=_ABOUT,
    on_request=("compile",),
    only_in=ONLY_IN,
    keep=_keep,
    plan=_plan,
)
COMMAND: Final = Command(
    name="recurrent",
    title="recurrent layers over whole sequences",
    description="Measure LayerNormLSTM, LayerNormGRU and LayerNormRNN next to PyTorch's un-normalized\n"
    "layers, hand-written layer-normalized ones, JAX and ONNX Runtime, interleaved in one process for each\n"
    "number of threads; write a table, pictures and a page.",
    benchmarks=(BENCHMARK,),
    examples=(
        "--quick",
        "--cells lstm --batches 1,32 --hidden 512 --dtypes float32",
        "--cells lstm --batches 32 --hidden 256 --peers compile",
    ),
)

if __name__ == "__main__":
    serve(measure)
