"""Recurrent layers over whole sequences on a GPU; as a program, the worker that measures them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import torch

from benchmarks.core import cuda, limits, workers
from benchmarks.core.benchmark import OURS, Benchmark, Work
from benchmarks.core.measuring import BASE, Row, each_point, peer_rows, sample
from benchmarks.core.subjects import first_line
from benchmarks.core.table import MEASURES, significant
from benchmarks.core.workers import Emit, WorkerError, serve
from benchmarks.gpu_recurrent.peers import ALONE, PEERS, PLAIN, is_missing
from benchmarks.recurrent import measure as recurrent
from benchmarks.recurrent.measure import Expected, Point
from layernorm import backends, machine

CELLS: Final = ("lstm", "gru")
DTYPES: Final = ("float32", "bfloat16")
BATCHES: Final = (1, 16, 64, 256)
HIDDEN: Final = (128, 256, 512, 1024, 2048)
STEPS: Final = 512
#: The peers of every point; the others are measured at few of them, unless they are named.
EVERYWHERE: Final = (OURS, "layernorm-persistent", BASE, "loop")
#: Those few: their dtype, batch and size. The first call is timed there too, in training.
FEW: Final = ("bfloat16", 64, 512)
KEYS: Final = recurrent.KEYS
#: ``first_s``: seconds of the first call in a fresh process. ``peak_bytes``: of memory, in a training call.
FIGURES: Final = ("difference", "peak_bytes", "compile_s", "first_s", "products_us", "over_products")
COLUMNS: Final = (
    *KEYS,
    "peer",
    "status",
    "kernel",
    *MEASURES,
    *FIGURES,
    "other_cpus",
    *machine.GPU_COLUMNS,
    *machine.COLUMNS,
)
_QUICK: Final = ((16,), (256, 1024))
_FIRST: Final = (OURS, BASE)
_FIRST_LIMIT: Final = 300.0


def measure(job: dict[str, Any], emit: Emit) -> None:
    """The worker."""
    if "first" in job:
        emit({"first_s": _first_call(Point(**job["points"][0]), job["first"], job["device"])})
        return
    environment = machine.gpu()
    right = recurrent.known(job["device"])

    def rows_of(point: Point) -> list[Row]:
        names = [name for name in job["peers"] if name in EVERYWHERE or job["all"] or _is_one_of_few(point)]
        names = recurrent.in_mode(names, point.mode)
        try:
            with cuda.exact_float32():
                expected = right(point)
            rows = _measure(point, expected, names, job, emit)
        except (torch.OutOfMemoryError, recurrent.NoBaseError) as error:
            # One point that this device or this PyTorch cannot have must not end the run.
            emit({"note": f"{point.name}: {first_line(error)}"})
            status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "not measured"
            rows = [{**asdict(point), "peer": name, "status": status} for name in names]
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
        peers = {name: PEERS[name] for name in names}
        subjects, problems, differences = recurrent.checked(point, case, expected, peers, PLAIN, emit)
        peaks = {name: cuda.peak_bytes(subject, device) for name, subject in subjects.items() if training}
        matrices = case.normalized["weight_ih"], case.normalized["weight_hh"]
        products = cuda.in_graph(limits.products(case.x, *matrices, training), device)
        samples, others = sample(
            subjects,
            {"products": products},
            job,
            least_rounds=recurrent.LEAST_ROUNDS,
            each=job["each"],
            clock=cuda.clock(device),
        )
    table = []
    for row, measured in peer_rows(point, names, problems, samples, others):
        name = row["peer"]
        if name.startswith(OURS):
            row["kernel"] = "persistent" if name == "layernorm-persistent" else _kernel(point, device)
        if measured:
            row |= recurrent.figures(subjects[name], differences[name], samples[name], samples["products"])
            peak = peaks.get(name)
            row["peak_bytes"] = "" if peak is None else peak
            if job["firsts"] and name in _FIRST and training and _is_one_of_few(point):
                row["first_s"] = _first_s(point, name, job, emit)
        table.append(row)
    return table


def _kernel(point: Point, device: str) -> str:
    with cuda.kernels(device)():
        return backends.choose(point.cell, torch.device(device), getattr(torch, point.dtype)).kernel


def _first_s(point: Point, peer: str, job: Mapping[str, Any], emit: Emit) -> float | str:
    """Seconds of the peer's first call in a process of its own; nothing where that fails."""
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that norms on a GPU do not have."""
    recurrent.add_shapes(parser, BATCHES, HIDDEN, STEPS)
    recurrent.add_limits(parser, f"each of the peers {', '.join(ALONE)}")


def _works(options: argparse.Namespace) -> list[Work]:
    points = list(_points(options))
    chosen = GPU_RECURRENT.chosen(options.peers)
    alone = [name for name in chosen if name in ALONE and not is_missing(name)]
    job = recurrent.sampling(options) | {
        "peers": [name for name in chosen if name not in alone],
        "all": options.peers is not None,
        "firsts": True,
        "device": "cuda",
    }
    work = Work(points, job, machine.cpus())
    few = [point for point in points if options.peers is not None or _is_one_of_few(point)]
    own = replace(work, points=few, job=job | {"all": True, "firsts": False})
    limit = options.compile_limit
    return [work, *(found for name in alone for found in recurrent.in_own_workers(name, [own], limit))]


def _points(options: argparse.Namespace) -> Iterator[Point]:
    batches, hidden = _QUICK if options.quick else (BATCHES, HIDDEN)
    return recurrent.grid(
        [name for name in options.operator if name in recurrent.CELLS],
        options.dtypes,
        options.batches or batches,
        options.hidden or hidden,
        options.steps,
        [mode for mode in options.modes if mode in recurrent.MODES],
    )


def _listed(values: Sequence[object]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}"


_FEW_TEXT: Final = f"{FEW[0]}, batch {FEW[1]}, size {FEW[2]}"
_EPILOG: Final = f"""\
peers of recurrent layers:
  layernorm             LayerNormLSTM, LayerNormGRU, LayerNormRNN
  layernorm-persistent  by the kernel that keeps the weights on the chip, where they fit
  layernorm-recompute   the same with recompute=True, in training
  layernorm-none        the same with variant="none", un-normalized
  torch                 torch.nn.LSTM, GRU, RNN, un-normalized: what ratios are to
  loop                  the layer-normalized cell in a Python loop
  compile-step          that with each step under torch.compile
  scan                  that in PyTorch's operator scan, under torch.compile
  flashrnn              FlashRNN's fused kernels, un-normalized, where installed
  torchrl               TorchRL's Triton kernels, un-normalized, where installed

The default grid of the recurrent layers is planned for 10 minutes, --quick for 3 with the norms; no GPU has
timed them yet. It has {recurrent.ROUNDS} rounds at most and these points and peers:
  - {_listed(CELLS)} over {STEPS} steps in float32 and bfloat16;
  - the batches {_listed(BATCHES)} with the sizes {_listed(HIDDEN)};
  - the peers {_listed(EVERYWHERE)}; the others at {_FEW_TEXT} only.
Naming --peers measures those at every point: each that compiles takes half a minute or more there, FlashRNN
and TorchRL longer. The loop in training needs some 40 GB at the largest points.

"""

GPU_RECURRENT: Final = Benchmark(
    name="gpu_recurrent",
    title="recurrent layers over whole sequences on a GPU",
    description="",
    keys=KEYS,
    columns=COLUMNS,
    peers=tuple(PEERS),
    add_options=add_options,
    works=_works,
    threaded=False,
    problem=cuda.problem,
    epilog=_EPILOG,
)

if __name__ == "__main__":
    serve(measure)
