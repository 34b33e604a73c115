"""The norm operators on a GPU; as a program, the worker that measures it."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from itertools import cycle
from typing import Any, Final

import torch

from benchmarks.core import cuda
from benchmarks.core.benchmark import OURS, Benchmark, Work
from benchmarks.core.measuring import Row, each_point, peer_rows, sample
from benchmarks.core.subjects import Subject
from benchmarks.core.table import MEASURES, significant
from benchmarks.core.timing import quartiles
from benchmarks.core.workers import Emit, serve
from benchmarks.gpu_norms import peers as gpu_peers
from benchmarks.gpu_norms.peers import PEERS
from benchmarks.gpu_recurrent import measure as gpu_recurrent
from benchmarks.gpu_recurrent.measure import GPU_RECURRENT
from benchmarks.norms import measure as norms
from benchmarks.norms.measure import KEYS, Grid, Point, checked
from benchmarks.norms.peers import Case
from benchmarks.recurrent import measure as recurrent
from layernorm import backends, machine

DEFAULTS: Final = Grid(
    operators=("layer_norm", "add_rms_norm"),
    sizes=((32768, 1024), (16384, 4096), (8192, 8192), (4096, 32768), (1024, 131072), (128, 768)),
    rounds=30,
    quick_sizes=((16384, 4096), (128, 768)),
    quick_rounds=10,
)
_BUDGET: Final = 4.0  # seconds for each point
_HOST_CALLS: Final = 50
#: ``host_us``: the CPU's time for issuing a call. ``graph_us``: the GPU's time for one in a CUDA graph.
LIMITS: Final = ("copy_us", "limit_us", "fraction_of_limit", "host_us", "graph_us", "other_cpus")
COLUMNS: Final = (
    *KEYS,
    "peer",
    "status",
    "kernel",
    *MEASURES,
    *LIMITS,
    *machine.GPU_COLUMNS,
    *machine.COLUMNS,
)


def measure(job: dict[str, Any], emit: Emit) -> None:
    """The worker."""
    environment = machine.gpu()

    def rows_of(point: Point) -> list[Row]:
        return [row | environment for row in _measure(point, job, emit)]

    each_point(job, emit, Point, rows_of)


def _measure(point: Point, job: Mapping[str, Any], emit: Emit) -> list[Row]:
    device: str = job["device"]
    with torch.set_grad_enabled(point.mode == "training"):
        case = point.case(device)
        cases = gpu_peers.rotation(case)

        def build(name: str, of: Case) -> Subject:
            return gpu_peers.prepare(name, cases if of is case else [of])

        subjects, problems = checked(point, case, job["peers"], build, emit)
        clones = cycle([each.inputs[0].clone for each in cases])
        samples, others = sample(subjects, {"copy": lambda: next(clones)()}, job, clock=cuda.clock(device))
        host = {name: _host_us(subject, device) for name, subject in subjects.items()}
        graph = {name: _graph_us(subject, point, len(cases), device) for name, subject in subjects.items()}
    copy = 1e6 * quartiles(samples["copy"].seconds).median
    limit = point.clones * copy
    table = []
    for row, measured in peer_rows(point, job["peers"], problems, samples, others):
        if row["peer"] == OURS:
            row["kernel"] = "triton" if device == "cuda" else _kernel(point)
        if measured:
            in_graph = graph[row["peer"]]
            row |= {
                "copy_us": significant(copy),
                "limit_us": significant(limit),
                "fraction_of_limit": significant(limit / row["median_us"]),
                "host_us": significant(host[row["peer"]]),
                "graph_us": "" if in_graph is None else significant(in_graph),
            }
        table.append(row)
    return table


def _kernel(point: Point) -> str:
    return backends.choose(point.operator, torch.device("cpu"), getattr(torch, point.dtype)).kernel


def _host_us(subject: Subject, device: str) -> float:
    """Microseconds that issuing a call takes the CPU, while the GPU's queue is not full."""
    times = []
    with subject.context():
        for _ in range(5):
            cuda.synchronize(device)
            began = time.perf_counter()
            for _ in range(_HOST_CALLS):
                subject.call()
            times.append((time.perf_counter() - began) / _HOST_CALLS)
            cuda.synchronize(device)
    return 1e6 * statistics.median(times)


def _graph_us(subject: Subject, point: Point, cases: int, device: str) -> float | None:
    """Microseconds of the GPU for a call in a CUDA graph of as many as there are cases; None without one."""
    if device != "cuda" or point.mode != "forward":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with subject.context(), torch.cuda.graph(graph):
            for _ in range(cases):
                subject.call()
    except Exception:  # a peer that cannot be captured has no figure
        torch.cuda.synchronize()
        return None
    times = []
    for _ in range(7):
        began = cuda.Instant()
        graph.replay()
        times.append(cuda.Instant() - began)
    return 1e6 * statistics.median(times) / cases


def _add_options(parser: argparse.ArgumentParser) -> None:
    norms.add_options(
        parser,
        DEFAULTS,
        choices=(*backends.NORMS, *recurrent.CELLS),
        chosen=(*DEFAULTS.operators, *gpu_recurrent.CELLS),
        modes=("forward", "inference", "training"),
    )
    gpu_recurrent.add_options(parser)


def _works(options: argparse.Namespace) -> list[Work]:
    points = DEFAULTS.points(options)
    job = {
        "peers": GPU.chosen(options.peers),
        "rounds": DEFAULTS.rounds_for(options),
        "budget": _BUDGET,
        "device": "cuda",
    }
    return [Work(points, job, machine.cpus())]


_EPILOG: Final = f"""\
Norms and recurrent layers have tables of their own, and --operator chooses one or the other. --sizes is for
norms, --batches, --hidden, --steps, --time and --compile-limit are for recurrent layers; norms have the modes
forward and training, recurrent layers inference and training.

peers of norms beside torch and torch.compile, where they are installed:
  liger                 liger-kernel's functions
  quack                 quack-kernels' rmsnorm
  apex                  apex's fused norms
  flash-attention       its Triton norm

The default grid of the norms is planned for 8 minutes at most; no GPU has timed it yet.

{GPU_RECURRENT.epilog}
examples:
  layernorm bench gpu --operator layer_norm,add_rms_norm
  layernorm bench gpu --operator lstm,gru --quick
  layernorm bench gpu --operator lstm --batches 16 --hidden 512 --peers compile-step,scan

"""

GPU: Final = Benchmark(
    name="gpu",
    title="the norm operators and recurrent layers on a GPU",
    description="Measures the norm operators and recurrent layers on a GPU beside PyTorch's and others',\n"
    "interleaved, by CUDA events, the norms with inputs that no cache holds; writes tables, pictures and\n"
    "a page.",
    keys=KEYS,
    columns=COLUMNS,
    peers=tuple(PEERS),
    add_options=_add_options,
    works=_works,
    group="operator",
    threaded=False,
    problem=cuda.problem,
    also=(GPU_RECURRENT,),
    epilog=_EPILOG,
)

if __name__ == "__main__":
    serve(measure)
