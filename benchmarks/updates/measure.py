"""One training update of each recurrent experiment; as a program, the worker that measures it."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from benchmarks.core.benchmark import OURS, Benchmark, Work
from benchmarks.core.measuring import BASE, Row, each_point, peer_rows, sample
from benchmarks.core.subjects import Subject, difference, first_line, prepare
from benchmarks.core.table import MEASURES
from benchmarks.core.workers import Emit, serve
from layernorm import machine
from layernorm.arguments import positive, some_of

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
DEFAULT_PRESETS: Final = ("small",)
#: The norm of each peer's network.
PEERS: Final = {OURS: "layer", BASE: "none"}
ROUNDS: Final = 25
KEYS: Final = ("task", "preset", "batch", "threads")
COLUMNS: Final = (*KEYS, "peer", "status", *MEASURES, "other_cpus", *machine.COLUMNS)
_QUICK_ROUNDS: Final = 5
_BUDGET: Final = 12.0
#: What the experiments need beyond the benchmarks.
_PACKAGES: Final = ("pooch", "scipy", "sklearn")


@dataclass(frozen=True)
class Point:
    """One point of the grid.

    Attributes:
        task: the name of a task.
        preset: of its presets.
        batch: training cases of an update.
    """

    task: str
    preset: str
    batch: int

    @property
    def name(self) -> str:
        """The point in words."""
        return f"{self.task} {self.preset} batch {self.batch}"


def grid(names: Sequence[str], presets: Sequence[str]) -> Iterator[Point]:
    """All points: the presets' batch sizes. Presets of a task that are the same are one."""
    from layernorm.experiments import registry

    for name in names:
        seen = []
        for preset in presets:
            found = registry.find(name).presets[preset]
            if found not in seen:
                yield from (Point(name, preset, batch) for batch in found.batch_sizes)
            seen.append(found)


def measure(job: dict[str, Any], emit: Emit) -> None:
    """The worker."""
    each_point(job, emit, Point, lambda point: _measure(point, job, emit))


def _measure(point: Point, job: Mapping[str, Any], emit: Emit) -> list[Row]:
    from layernorm.experiments.task import ExperimentError, MissingData

    peers: list[str] = job["peers"]
    try:
        problem = _problem(point.task, point.preset)
    except ExperimentError as error:
        emit({"note": f"{point.name}: {first_line(error)}"})
        status = "no data" if isinstance(error, MissingData) else "failed"
        return [row for row, _ in peer_rows(point, peers, dict.fromkeys(peers, status), {}, None)]
    subjects, problems = prepare(
        peers,
        lambda name: _subject(point, PEERS[name], problem),
        _check,
        lambda text: emit({"note": f"{point.name}: {text}"}),
    )
    if BASE not in subjects:
        raise RuntimeError(f"{BASE} itself cannot be measured at {point.name}")
    samples, others = sample(subjects, {}, job)
    return [row for row, _ in peer_rows(point, peers, problems, samples, others)]


@functools.lru_cache(maxsize=1)
def _problem(name: str, preset: str) -> Problem:
    """A task's problem, the same for all its points and peers as long as they follow one another."""
    from layernorm.experiments import registry

    task = registry.find(name)
    return task.problem(**task.presets[preset].sizes)


def _subject(point: Point, norm: str, problem: Problem) -> Subject:
    """Updates of a network with this norm."""
    from layernorm.experiments import registry
    from layernorm.experiments.run.training import Run, Trainer

    preset = registry.find(point.task).presets[point.preset]
    # There is no checkpoint in the null device, and none is written unless it is asked for.
    trainer = Trainer(problem, Run(norm, point.batch, 0), preset, checkpoint=Path(os.devnull))
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
    """The training cases of the updates of the first epoch, over and over: the same for every norm."""
    whole = trainer.order(0).split(trainer.run.batch_size)[: trainer.per_epoch]
    return itertools.cycle(whole)


def _check(name: str, subject: Subject) -> None:
    """Sees that updates change the network, and to something finite."""
    before = subject.results()
    change = difference(subject.results(), before)
    if not 0.0 < change < math.inf:
        raise RuntimeError(f"an update changes its parameters by {change:g}")


def _problem_here() -> str | None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        return f"this benchmark needs {missing[0]}: pip install 'layernorm[bench,experiments]'"
    return None


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tasks",
        type=some_of(TASKS),
        default=TASKS,
        metavar="A,B,…",
        help=f"some of {', '.join(TASKS)} (default: all)",
    )
    add(
        "--presets",
        type=some_of(PRESETS),
        default=DEFAULT_PRESETS,
        metavar="A,B",
        help=f"some of {', '.join(PRESETS)} (default: {', '.join(DEFAULT_PRESETS)})",
    )
    add("--rounds", type=positive, metavar="N", help=f"samples of each peer (default: {ROUNDS})")
    add("--quick", action="store_true", help=f"{_QUICK_ROUNDS} rounds")


def _works(options: argparse.Namespace) -> list[Work]:
    job = {
        "peers": list(PEERS),
        "rounds": options.rounds or (_QUICK_ROUNDS if options.quick else ROUNDS),
        "budget": _BUDGET,
    }
    points = list(grid(options.tasks, options.presets))
    return [Work(points, job, threads) for threads in options.threads]


_EPILOG: Final = """\
peers:
  layernorm        the task's network with layer norm
  torch            that of torch.nn, without norm: what ratios are to

The data sets are those of layernorm compare; a task whose data is not here and cannot be downloaded has
the status "no data". The default grid takes about 3 minutes.

examples:
  layernorm bench updates --quick
  layernorm bench updates --tasks draw,handwriting --presets small,paper --threads 1

"""

UPDATES: Final = Benchmark(
    name="updates",
    title="training updates of the recurrent experiments",
    description="Measures the time of one whole update of each recurrent experiment (forward, backward,\n"
    "clipping, optimizer) with layer norm beside that of torch.nn without norm, on the same batches,\n"
    "interleaved in one process for each number of threads; writes a table, pictures and a page.",
    keys=KEYS,
    columns=COLUMNS,
    peers=tuple(PEERS),
    add_options=_add_options,
    works=_works,
    epilog=_EPILOG,
    problem=_problem_here,
)

if __name__ == "__main__":
    serve(measure)
