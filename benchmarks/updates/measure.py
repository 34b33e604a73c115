"""One training update of each recurrent experiment; as a program, the worker that measures it."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from torch import Tensor

from benchmarks.core import benchmark
from benchmarks.core.benchmark import BASE, INSTALL, OURS, Axis, Benchmark, Command
from benchmarks.core.measuring import Row, each_point, peer_rows, ready, sample
from benchmarks.core.subjects import Subject, difference, first_line
from benchmarks.core.workers import Emit, serve
from benchmarks.world_model.measure import BENCHMARK as WORLD_MODEL

if TYPE_CHECKING:
    from layernorm.experiments.run.training import Trainer
    from layernorm.experiments.task import Problem

#: The recurrent tasks, in the paper's order; "permuted-mnist" makes the updates of "sequential-mnist".
TASKS: Final = (
    "order-embeddings",
    "attentive-reader",
    "skip-thoughts",
    "draw",
    "handwriting",
    "sequential-mnist",
    "digits-rows",
)
PRESETS: Final = ("small", "paper")
#: The norm of each peer's network.
PEERS: Final = {OURS: "layer", BASE: "none"}
#: What the experiments need beyond the benchmarks.
_PACKAGES: Final = ("pooch", "scipy", "sklearn")


@dataclass(frozen=True)
class Point(benchmark.Point):
    """One point of the grid.

    Attributes:
        task: the name of a task.
        preset: of its presets.
        batch: training cases of an update.
    """

    task: str
    preset: str
    batch: int
    words: ClassVar[str] = "{task} {preset} batch {batch}"


def grid(chosen: Mapping[str, Sequence[str]]) -> Iterator[Point]:
    """Yield the points of chosen tasks and presets, with the presets' batch sizes.

    Presets of a task that are the same are one.
    """
    from layernorm.experiments import registry

    for name in chosen["tasks"]:
        seen = []
        for preset in chosen["presets"]:
            found = registry.find(name).presets[preset]
            if found not in seen:
                yield from (Point(name, preset, batch) for batch in found.batch_sizes)
            seen.append(found)


def measure(job: dict[str, Any], emit: Emit) -> None:
    """Measure the points of a job; the worker."""
    each_point(job, emit, Point, lambda point: _measure(point, job, emit))


def _measure(point: Point, job: Mapping[str, Any], emit: Emit) -> list[Row]:
    from layernorm.experiments.task import ExperimentError, MissingData

    peers: list[str] = job["peers"]
    try:
        problem = _problem(point.task, point.preset)
    except ExperimentError as error:
        emit({"note": f"{point.name}: {first_line(error)}"})
        status = "no data" if isinstance(error, MissingData) else "failed"
        return peer_rows(point, peers, dict.fromkeys(peers, status))
    subjects, problems = ready(point, peers, lambda name: _subject(point, PEERS[name], problem), _check, emit)
    return peer_rows(point, peers, problems, sample(subjects, {}, job))


@functools.lru_cache(maxsize=1)
def _problem(name: str, preset: str) -> Problem:
    """Return a task's problem, the same one for all its points and peers that follow one another."""
    from layernorm.experiments import registry

    task = registry.find(name)
    return task.problem(**task.presets[preset].sizes)


def _subject(point: Point, norm: str, problem: Problem) -> Subject:
    """Return the updates of a network with this norm as a peer."""
    from layernorm.experiments import registry
    from layernorm.experiments.run.training import Run, Trainer

    preset = registry.find(point.task).presets[point.preset]
    # There is no checkpoint in the null device, and none is written unless it is asked for.
    trainer = Trainer(
        problem, Run(norm, point.batch, preset.learning_rates[0], 0), preset, checkpoint=Path(os.devnull)
    )
    batches = _batches(trainer)
    cases = next(batches)

    @contextmanager
    def next_batch() -> Iterator[None]:
        nonlocal cases
        cases = next(batches)
        yield

    def call() -> None:
        trainer.step(cases)

    def results() -> list[Tensor]:
        call()
        return [parameter.detach().clone() for parameter in trainer.network.parameters()]

    return Subject(call, results, next_batch)


def _batches(trainer: Trainer) -> Iterator[Tensor]:
    """Yield the training cases of the first epoch's updates, over and over: the same for every norm."""
    whole = trainer.order(0).split(trainer.run.batch_size)[: trainer.per_epoch]
    return itertools.cycle(whole)


def _check(name: str, subject: Subject) -> None:
    """Check that updates change the network, and to something finite."""
    before = subject.results()
    change = difference(subject.results(), before)
    if not 0.0 < change < math.inf:
        raise RuntimeError(f"an update changes its parameters by {change:g}")


def _problem_here() -> str | None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        return f"this benchmark needs {missing[0]}: {INSTALL} '.[experiments]' (pip 25.1 or later)"
    return None


_ABOUT: Final = """\
peers of the experiments:
  layernorm        the task's network with layer norm
  torch            that of torch.nn, without norm; ratios are relative to it

The data sets are those of layernorm compare; a task whose data is not here and cannot be downloaded has
the status "no data". The default grid takes about 3 minutes.
"""

BENCHMARK: Final = Benchmark(
    name="updates",
    command="updates",
    folder="updates",
    point=Point,
    axes=(
        # The command measures a world model too, unless tasks are named.
        Axis(("task",), "tasks", choices=TASKS, always_shown=True),
        Axis(("preset",), "presets", choices=PRESETS, default=("small",)),
    ),
    expand=grid,
    peers=tuple(PEERS),
    rounds=25,
    quick_rounds=5,
    budget=12.0,
    has_kernel=False,
    about=_ABOUT,
    problem=_problem_here,
)
COMMAND: Final = Command(
    name="updates",
    title="training updates of the recurrent experiments and of a world model",
    description="Measure the time of one whole update of each recurrent experiment (forward, backward,\n"
    "clipping, optimizer) with layer norm next to that of torch.nn without norm, on the same batches,\n"
    "interleaved in one process for each number of threads; and that of a world model's recurrence next to\n"
    "the same with its cell written by hand. Write tables, pictures and a page.",
    benchmarks=(BENCHMARK, WORLD_MODEL),
    about="""\
The experiments and the world model have tables of their own, and --tasks chooses. --presets is for
experiments, --batches, --hidden and --steps are for the world model.
""",
    examples=("--quick", "--tasks world-model", "--tasks draw,handwriting --presets small,paper --threads 1"),
)

if __name__ == "__main__":
    serve(measure)
