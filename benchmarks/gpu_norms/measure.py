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
from benchmarks.core.benchmark import Axis, Benchmark, Command, Work, by_rank
from benchmarks.core.measuring import Row, each_point, kernel_on_cpu, peer_rows, sample
from benchmarks.core.subjects import Subject
from benchmarks.core.table import significant
from benchmarks.core.timing import quartiles
from benchmarks.core.workers import Emit, serve
from benchmarks.gpu_norms import peers
from benchmarks.gpu_norms.peers import PEERS
from benchmarks.gpu_recurrent.measure import BENCHMARK as GPU_RECURRENT
from benchmarks.norms import measure as norms
from benchmarks.norms.measure import Point, checked, limits
from benchmarks.norms.peers import Case
from layernorm import backends, machine

_HOST_CALLS: Final = 50
# Large, wide, and as small as a layer of a small network.
_VALUED_SIZES: Final = ((16384, 4096), (8192, 8192), (128, 768))


def measure(job: dict[str, Any], emit: Emit) -> None:
    """Measure the points of a job; the worker."""
    environment = machine.gpu()

    def rows_of(point: Point) -> list[Row]:
        rows = _measure(point, job, emit)
        # An error of the device ends this process, or the points that follow would have it too.
        cuda.synchronize(job["device"])
        return [row | environment for row in rows]

    each_point(job, emit, Point, rows_of)


def _measure(point: Point, job: Mapping[str, Any], emit: Emit) -> list[Row]:
    device: str = job["device"]
    with torch.set_grad_enabled(point.mode == "training"):
        case = point.case(device)
        cases = peers.rotation(case)

        def build(name: str, of: Case) -> Subject:
            return peers.rotating(name, cases if of is case else [of])

        subjects, problems = checked(point, case, job["peers"], build, emit)
        clones = cycle([each.inputs[0].clone for each in cases])
        samples, others = sample(subjects, {"copy": lambda: next(clones)()}, job, cuda.clock(device))
        host = {name: _host_us(subject, device) for name, subject in subjects.items()}
        graph = {name: _graph_us(subject, point, len(cases), device) for name, subject in subjects.items()}
    copy = 1e6 * quartiles(samples["copy"].seconds).median

    def figures(name: str, row: Row) -> Row:
        in_graph = graph[name]
        return limits(point, copy, row) | {
            "host_us": significant(host[name]),
            "graph_us": "" if in_graph is None else significant(in_graph),
        }

    return peer_rows(
        point,
        job["peers"],
        problems,
        (samples, others),
        kernel=lambda name: "triton" if device == "cuda" else kernel_on_cpu(point.operator, point.dtype),
        figures=figures,
    )


def _host_us(subject: Subject, device: str) -> float:
    """Return the microseconds that issuing a call takes the CPU, while the GPU's queue is not full."""
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
    """Return the GPU's microseconds for a call in a CUDA graph of one for each case; None without a graph."""
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


def _plan(works: list[Work], options: argparse.Namespace) -> list[Work]:
    return [part for work in works for part in by_rank(work, _rank)]


def _rank(point: Point) -> int:
    """Return the place of a point in the order of value, among the recurrent layers' too."""
    if point.dtype == "bfloat16":
        return 3
    is_valued = point.dtype == "float32" and (point.rows, point.width) in _VALUED_SIZES
    return 4 if is_valued else 6


BENCHMARK: Final = Benchmark(
    name="gpu",
    command="gpu",
    folder="gpu_norms",
    point=Point,
    axes=(
        Axis(
            ("operator",),
            "operator",
            "an earlier table in the same place keeps its other operators",
            choices=backends.NORMS,
            default=("layer_norm", "add_rms_norm"),
            always_shown=True,  # the command measures recurrent layers too, unless operators are named
        ),
        norms.BENCHMARK.axis("dtype"),
        norms.BENCHMARK.axis("mode"),
        norms.size_axis(
            # From what a device takes long for down to what no user would notice.
            (
                *((16384, 4096), (8192, 8192), (32768, 1024), (4096, 32768), (1024, 131072)),
                *((4096, 1024), (1024, 1024), (128, 768)),
            ),
            quick=((16384, 4096), (128, 768)),
        ),
    ),
    peers=tuple(PEERS),
    rounds=30,
    quick_rounds=10,
    budget=4.0,
    # host_us: the CPU's time for issuing a call. graph_us: the GPU's time for one in a CUDA graph.
    figures=("copy_us", "limit_us", "fraction_of_limit", "host_us", "graph_us"),
    on_gpu=True,
    replaced_by="operator",
    plan=_plan,
    problem=cuda.problem,
    about="""\
peers of norms in addition to torch and torch.compile, where they are installed:
  liger                 liger-kernel's functions
  quack                 quack-kernels' rmsnorm, layernorm_fwd and layernorm_bwd
  apex                  apex's fused norms
  flash-attention       its Triton norm
""",
)
COMMAND: Final = Command(
    name="gpu",
    title="the norm operators and recurrent layers on a GPU",
    description="Measure the norm operators and recurrent layers on a GPU next to PyTorch's and others',\n"
    "interleaved, by CUDA events, the norms with inputs that no cache holds; write tables, pictures and\n"
    "a page.",
    benchmarks=(BENCHMARK, GPU_RECURRENT),
    about="""\
Norms and recurrent layers have tables of their own, and --operator chooses one or the other. --sizes is for
norms, --batches, --hidden, --steps, --time and --compile-limit are for recurrent layers; norms have the modes
forward and training, recurrent layers inference and training.
""",
    examples=(
        "--operator layer_norm,add_rms_norm",
        "--operator lstm,gru --quick",
        "--operator lstm --batches 16 --hidden 512 --peers compile-step,scan",
    ),
)

if __name__ == "__main__":
    serve(measure)
