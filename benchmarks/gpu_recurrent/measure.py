"""Recurrent layers over whole sequences on a GPU; as a program, the worker that measures them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import torch

from benchmarks.core import cuda, limits, workers
from benchmarks.core.benchmark import BASE, OURS, Axis, Benchmark, Work, by_rank
from benchmarks.core.measuring import NoBaseError, Row, each_point, peer_rows, ready, sample
from benchmarks.core.subjects import Subject, first_line
from benchmarks.core.table import significant
from benchmarks.core.timing import Call, quartiles
from benchmarks.core.workers import Emit, WorkerError, serve
from benchmarks.gpu_recurrent.peers import ALONE, LOOPED, PEERS, PERSISTENT, UNNORMALIZED, is_missing
from benchmarks.recurrent import measure as recurrent
from benchmarks.recurrent.measure import Expected, Point
from benchmarks.recurrent.peers import ONLY_IN
from layernorm import backends, machine

CELLS: Final = ("lstm", "gru")
#: The peers of every point; the others are measured at few of them, unless they are named.
EVERYWHERE: Final = (OURS, LOOPED, PERSISTENT, BASE, "loop")
#: Those few: their dtype, batch and size. The first call is timed there too, in training.
FEW: Final = ("bfloat16", 64, 512)
_BATCHES: Final = (1, 16, 64, 256)
_VALUED_BATCHES: Final = (16, 64)
# After the norms: what is compiled at few points, and then the rest.
_RANK_OF_ALONE: Final = 5
_RANK_OF_REST: Final = 6
_HIDDEN: Final = (128, 256, 512, 1024, 2048)
_STEPS: Final = 512
_FIRST: Final = (OURS, BASE)
_KERNELS: Final = {LOOPED: "looped", PERSISTENT: "persistent"}
_FIRST_LIMIT: Final = 300.0


def measure(job: dict[str, Any], emit: Emit) -> None:
    """Measure the points of a job; the worker."""
    if "first" in job:
        emit({"first_s": _first_call(Point(**job["points"][0]), job["first"], job["device"])})
        return
    environment = machine.gpu()
    right = recurrent.right_results(job["device"])

    def rows_of(point: Point) -> list[Row]:
        names = BENCHMARK.in_mode(job["peers"], point.mode)
        try:
            with cuda.exact_float32():
                expected = right(point)
            rows = _measure(point, expected, names, job, emit)
        except (torch.OutOfMemoryError, NoBaseError) as error:
            # One point that this device or this PyTorch cannot have must not end the run.
            emit({"note": f"{point.name}: {first_line(error)}"})
            status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "not measured"
            rows = [{**asdict(point), "peer": name, "status": status} for name in names]
        # An error of the device ends this process, or the points that follow would have it too.
        cuda.synchronize(job["device"])
        if job["device"] == "cuda":
            torch.cuda.empty_cache()
        return [row | environment for row in rows]

    each_point(job, emit, Point, rows_of)


def _is_one_of_few(point: Point) -> bool:
    return (point.dtype, point.batch, point.hidden) == FEW


def _measure(
    point: Point, expected: Expected, names: Sequence[str], job: Mapping[str, Any], emit: Emit
) -> list[Row]:
    device: str = job["device"]
    training = point.mode == "training"
    with torch.inference_mode(not training):
        case = point.case(device).to(getattr(torch, point.dtype))
        check = recurrent.check_of(point, case, expected, UNNORMALIZED, cuda.as_cudnn)
        subjects, problems = ready(point, names, lambda name: PEERS[name](case), check, emit)
        peaks = {name: cuda.peak_bytes(subject, device) for name, subject in subjects.items() if training}
        matrices = case.normalized["weight_ih"], case.normalized["weight_hh"]
        products = cuda.in_graph(limits.products(case.x, *matrices, training), device)
        forwards = {
            f"forward of {name}": _forward(made)
            for name, made in subjects.items()
            if _has_forward(name, made)
        }
        samples, others = sample(subjects, {"products": products} | forwards, job, cuda.clock(device))

    def figures(name: str, row: Row) -> Row:
        own, off = samples[name], check.differences[name]
        found = recurrent.layer_figures(subjects[name], off, own, samples["products"])
        peak = peaks.get(name)
        found["peak_bytes"] = "" if peak is None else peak
        if f"forward of {name}" in samples:
            found["forward_us"] = significant(1e6 * quartiles(samples[f"forward of {name}"].seconds).median)
        if job["firsts"] and name in _FIRST and training and _is_one_of_few(point):
            found["first_s"] = _first_s(point, name, job, emit)
        return found

    return peer_rows(
        point,
        names,
        problems,
        (samples, others),
        kernel=lambda name: _KERNELS.get(name) or _kernel(point, device),
        figures=figures,
    )


def _has_forward(name: str, made: Subject) -> bool:
    """Return whether forward is timed by itself in training: of this package's kernels."""
    return name in (OURS, *_KERNELS) and made.forward is not None


def _forward(made: Subject) -> Call:
    """Return the forward pass of training alone, with the peer's kernel."""
    forward: Any = made.forward

    def call() -> None:
        with made.context():
            forward()

    return call


def _kernel(point: Point, device: str) -> str:
    with cuda.kernels(device)():
        return backends.choose(point.cell, torch.device(device), getattr(torch, point.dtype)).kernel


def _first_s(point: Point, peer: str, job: Mapping[str, Any], emit: Emit) -> float | str:
    """Return the seconds of a peer's first call in a process of its own; nothing where that fails."""
    alone = {**job, "points": [asdict(point)], "first": peer}
    try:
        *_, last = workers.events("benchmarks.gpu_recurrent.measure", alone, job["threads"], _FIRST_LIMIT)
    except WorkerError as error:
        emit({"note": f"{point.name}: the first call of {peer}: {error}"})
        return ""
    return significant(last["first_s"])


def _first_call(point: Point, peer: str, device: str) -> float:
    with torch.inference_mode(point.mode != "training"):
        case = point.case(device).to(getattr(torch, point.dtype))
        torch.mm(case.x[0], case.x[0].t())  # the device and its library of products have been started
        cuda.synchronize(device)
        began = time.perf_counter()
        made = PEERS[peer](case)
        with made.context():
            made.call()
        cuda.synchronize(device)
        return time.perf_counter() - began


def _plan(works: list[Work], options: argparse.Namespace) -> list[Work]:
    """Return the work in parts by value; the persistent kernel and what compiles have their own workers.

    Peers that are not everywhere are measured at few points, unless peers are named.
    """
    (work,) = works
    peers = work.job["peers"]
    alone = [name for name in peers if name in ALONE and not is_missing(name)]
    job = dict(work.job) | recurrent.sampling(options)
    found = []
    for part in by_rank(work, _rank):
        few = [point for point in part.points if options.peers is not None or _is_one_of_few(point)]
        for points, names in (
            ([point for point in part.points if point not in few], [n for n in peers if n in EVERYWHERE]),
            (few, peers),
        ):
            shared = [name for name in names if name not in (PERSISTENT, *alone)]
            found.append(replace(part, points=points, job=job | {"peers": shared, "firsts": True}))
        own = replace(part, job=job | {"firsts": False})
        if PERSISTENT in peers:
            with_it = dict(own.job) | {"peers": [OURS, BASE, PERSISTENT]}
            found.append(replace(own, job=with_it, only=PERSISTENT))
        for name in alone:
            each = recurrent.in_own_workers(name, [replace(own, points=few)], options.compile_limit)
            found += [replace(one, rank=_RANK_OF_ALONE) for one in each]
    return [each for each in found if each.points]


def _rank(point: Point) -> int:
    """Return the place of a point in the order of value; the norms in bfloat16 have 3, in float32 4."""
    if point.batch not in _VALUED_BATCHES:
        return _RANK_OF_REST
    return {("lstm", "bfloat16"): 0, ("gru", "bfloat16"): 1, ("lstm", "float16"): 2}.get(
        (point.cell, point.dtype), _RANK_OF_REST
    )


def _peers_to_name(data: Any) -> list[str] | None:
    """Return the peers of a run that named them; it has the same ones at all of its points."""
    dtype, batch, hidden = FEW
    few = (data.dtype == dtype) & (data.batch == batch) & (data.hidden == hidden)
    usual, found = set(EVERYWHERE), set(data.peer)
    more = set(data[~few].peer) - usual
    fewer = not usual <= found or (few.any() and found <= usual)
    return [name for name in PEERS if name in found] if more or fewer else None


def _listed(values: Sequence[object]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}"


_FEW_TEXT: Final = f"{FEW[0]}, batch {FEW[1]}, size {FEW[2]}"
_ABOUT: Final = f"""\
peers of recurrent layers:
  layernorm             LayerNormLSTM, LayerNormGRU, LayerNormRNN
  layernorm-looped      by the kernel that loops over the steps of small layers
  layernorm-persistent  by the kernel that keeps the weights on the chip, where they fit
  layernorm-recompute   the same with recompute=True, in training
  layernorm-none        the same with variant="none", un-normalized
  torch                 torch.nn.LSTM, GRU, RNN, un-normalized; ratios are relative to it
  loop                  the layer-normalized cell in a Python loop
  compile-step          that with each step under torch.compile
  scan                  that in PyTorch's operator scan, under torch.compile
  flashrnn              FlashRNN's fused kernels, un-normalized, where installed
  torchrl               TorchRL's Triton kernels, un-normalized, where installed

The default grid of the recurrent layers has these points and peers:
  - {_listed(CELLS)} over {_STEPS} steps in bfloat16, float16 and float32;
  - the batches {_listed(_BATCHES)} with the sizes {_listed(_HIDDEN)};
  - the peers {_listed(EVERYWHERE)}; the others at {_FEW_TEXT} only.
The most valuable comes first: the LSTM and then the GRU in bfloat16 at batches 16 and 64, the LSTM in
float16, the norms in bfloat16 and some in float32, peers that compile, and the rest. No GPU has timed it;
it takes several runs with --resume.
Naming --peers measures those at every point: each that compiles takes half a minute or more there, FlashRNN
and TorchRL longer. The loop in training needs some 40 GB at the largest points.
"""

BENCHMARK: Final = Benchmark(
    name="gpu_recurrent",
    command="gpu",
    folder="gpu_recurrent",
    point=Point,
    axes=(
        # The command measures the norms too, unless operators are named.
        Axis(("cell",), "operator", choices=recurrent.CELLS, default=CELLS, always_shown=True),
        *recurrent.shapes(_BATCHES, _HIDDEN, ((16,), (256, 1024)), _STEPS),
        recurrent.BENCHMARK.axis("mode"),
        # The innermost: its points have the same numbers. cuDNN has kernels for float16 that it has not for
        # bfloat16.
        Axis(("dtype",), "dtypes", choices=("bfloat16", "float16", "float32")),
    ),
    peers=tuple(PEERS),
    rounds=recurrent.BENCHMARK.rounds,
    quick_rounds=recurrent.BENCHMARK.quick_rounds,
    # first_s: seconds of the first call in a fresh process. peak_bytes: of memory, in a training call.
    # forward_us: the forward pass in training alone.
    figures=(
        "difference",
        "forward_us",
        "peak_bytes",
        "compile_s",
        "first_s",
        "products_us",
        "over_products",
    ),
    options=recurrent.time_options(f"each of the peers {', '.join(ALONE)}"),
    about=_ABOUT,
    on_gpu=True,
    only_in=ONLY_IN,
    plan=_plan,
    peers_to_name=_peers_to_name,
    problem=cuda.problem,
)

if __name__ == "__main__":
    serve(measure)
