"""Training updates of a world model's recurrence; as a program, the worker that measures them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from benchmarks.core import benchmark
from benchmarks.core.benchmark import BASE, Axis, Benchmark
from benchmarks.core.measuring import Check, Row, each_point, kernel_on_cpu, peer_rows, ready, sample
from benchmarks.core.subjects import Subject
from benchmarks.core.workers import Emit, serve
from benchmarks.recurrent.measure import TOLERANCE, shapes
from benchmarks.world_model.peers import PEERS, updates

TASK: Final = "world-model"


@dataclass(frozen=True)
class Point(benchmark.Point):
    """One point of the grid.

    Attributes:
        task: "world-model".
        batch: sequences, N.
        hidden: features of the state, H.
        steps: of time, T.
    """

    task: str
    batch: int
    hidden: int
    steps: int
    words: ClassVar[str] = "{task} batch {batch} hidden {hidden}"


def measure(job: dict[str, Any], emit: Emit) -> None:
    """Measure the points of a job; the worker."""
    each_point(job, emit, Point, lambda point: _measure(point, job, emit))


def _measure(point: Point, job: Mapping[str, Any], emit: Emit) -> list[Row]:
    def build(name: str) -> Subject:
        return updates(PEERS[name], point.hidden, point.batch, point.steps)

    expected = build(BASE).results()
    check = Check(lambda name: expected, lambda name, off: off <= TOLERANCE["float32"])
    subjects, problems = ready(point, job["peers"], build, check, emit)
    return peer_rows(
        point,
        job["peers"],
        problems,
        sample(subjects, {}, job),
        kernel=lambda name: kernel_on_cpu("gru", "float32"),
        figures=lambda name, row: {"difference": float(f"{check.differences[name]:.1e}")},
    )


_ABOUT: Final = f"""\
peers of the task {TASK}, a world model's recurrence:
  layernorm        with LayerNormGRUCell(variant="sheeprl")
  torch            with that cell written by hand; ratios are relative to it
"""

BENCHMARK: Final = Benchmark(
    name="world_model",
    command="updates",
    folder="world_model",
    point=Point,
    axes=(
        # The command measures the experiments too, unless tasks are named.
        Axis(("task",), "tasks", choices=(TASK,), always_shown=True),
        *shapes((16,), (512, 1024), quick=((16,), (512,)), steps=16),
    ),
    peers=tuple(PEERS),
    rounds=25,
    quick_rounds=5,
    budget=12.0,
    figures=("difference",),
    about=_ABOUT,
)

if __name__ == "__main__":
    serve(measure)
