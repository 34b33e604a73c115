"""The run of a command that fills tables, point by point, the most valuable first."""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.core import workers
from benchmarks.core.benchmark import BASE, OURS, Benchmark, Work, plural
from benchmarks.core.outputs import Outputs
from benchmarks.core.progress import Display
from benchmarks.core.table import Table, read
from layernorm import machine

if TYPE_CHECKING:
    from rich.console import Console

#: Seconds that a command on a GPU takes unless it is given others.
BUDGET: Final = 500.0
# Of a budget: what a worker that starts and measures one point takes at least; and what the system may take
# to end one that a driver holds.
_LEAST: Final = 10.0
_GRACE: Final = 20.0
# What no point takes that will ever end.
_HANGS: Final = 150.0
Keep = Callable[[Mapping[str, str]], bool]


class _BudgetOver(Exception):
    """No seconds are left."""


def fill(
    benchmarks: Sequence[Benchmark], options: argparse.Namespace, outputs: Outputs, console: Console | None
) -> None:
    """Measure what the options ask for, in the order of the works' ranks, until the budget is over.

    Raises:
        WorkerError: a worker failed before its first point, or on a CPU at any.
        TableError: a table is damaged or cannot be written.
    """
    works: list[tuple[Benchmark, Work]] = []
    keeps: dict[str, Keep] = {}
    for benchmark in benchmarks:
        found, path = benchmark.works(options), outputs.table(benchmark.name)
        if options.resume:
            found = _missing(benchmark, found, path)
        keeps[benchmark.name] = _kept_rows(benchmark, options, found)
        works += [(benchmark, work) for work in found if work.points]
    works.sort(key=lambda pair: pair[1].rank)
    budget: float | None = getattr(options, "budget", None)
    points = sum(len(work.points) for _, work in works)
    with Display(console, points) as display, _ended_after(budget):
        deadline = float("inf") if budget is None else time.monotonic() + budget
        environment = machine.environment()
        try:
            for name, group in groupby(works, key=lambda pair: pair[0].name):
                pairs = list(group)
                benchmark = pairs[0][0]
                keep = keeps.pop(name, lambda row: True)
                with Table(outputs.table(name), benchmark.columns, keep) as table:
                    run = _Run(benchmark, table, display, environment, deadline)
                    for _, work in pairs:
                        run.work(work)
        except _BudgetOver:
            display.say(f"The budget of {budget:g} s is over; go on with the same command and --resume.")


def _missing(benchmark: Benchmark, works: Sequence[Work], path: Path) -> list[Work]:
    """Return the works without the points that the table has."""
    rows = read(path, benchmark.columns) if path.is_file() else []
    found = {(benchmark.key(row), row["peer"]) for row in rows}

    def is_missing(work: Work, point: Any) -> bool:
        return (benchmark.key(work.fields(point)), work.only or BASE) not in found

    return [replace(work, points=[p for p in work.points if is_missing(work, p)]) for work in works]


def _kept_rows(
    benchmark: Benchmark, options: argparse.Namespace, works: Sequence[Work]
) -> Callable[[Mapping[str, str]], bool]:
    """Return what chooses the rows of an earlier table that stay."""
    if options.resume:
        return lambda row: True
    column = benchmark.replaced_by
    if column is not None:
        replaced = benchmark.axis(column).chosen(options)
        return lambda row: row[column] not in replaced
    points = {benchmark.key(work.fields(point)) for work in works for point in work.points}
    return lambda row: benchmark.key(row) not in points


@contextmanager
def _ended_after(budget: float | None) -> Iterator[None]:
    """End this process some seconds after the budget, whatever it waits for: the tables are on the disk."""
    timer = threading.Timer(0.0 if budget is None else budget + _GRACE, os._exit, (1,))
    timer.daemon = True
    if budget is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@dataclass
class _Run:
    """A run that fills a table; ``said`` holds the notes that were shown, each without its point."""

    benchmark: Benchmark
    table: Table
    display: Display
    environment: dict[str, str]
    deadline: float = float("inf")
    said: set[str] = field(default_factory=set)

    def work(self, work: Work) -> None:
        """Run one worker, and where it dies at a point another for those that follow."""
        while work.points:
            done = self._worker(work)
            work = replace(work, points=work.points[done:])

    def _worker(self, work: Work) -> int:
        """Run a worker; return how many points have rows now, that at which it died among them."""
        left = self.deadline - time.monotonic()
        if left < _LEAST:
            raise _BudgetOver
        limit = min(left, work.limit or float("inf"))
        done, name, began = 0, "", time.monotonic()
        job = {**work.job, "points": [asdict(point) for point in work.points]}
        module = f"benchmarks.{self.benchmark.folder}.measure"
        seconds = None if limit == float("inf") else limit
        try:
            with closing(workers.events(module, job, work.threads, seconds)) as events:
                for event in events:
                    if "note" in event:
                        self._say_once(event["note"])
                    elif "point" in event:
                        name, began = work.points[event["point"]].name, time.monotonic()
                        self.display.begin()
                    else:
                        rows = [row for row in event["rows"] if work.only in (None, row["peer"])]
                        self._add(name, rows, work)
                        done += 1
        except workers.WorkerError as error:
            where = f"at {name}" if name else "before the first point"
            is_timed_out = isinstance(error, workers.TimedOutError)
            if is_timed_out and limit == left:
                if time.monotonic() - began > _HANGS:  # or the next command would hang there too
                    self._note(work, work.points[done], "timed out")
                raise _BudgetOver from error
            if work.only is None and not (self.benchmark.on_gpu and name):
                raise workers.WorkerError(f"{where}, {error}") from error
            self.display.say(f"{where}, {work.only or 'all peers'}: {error}")
            if done < len(work.points):
                self._note(work, work.points[done], "timed out" if is_timed_out else "failed")
                done += 1
            return done
        return len(work.points)

    def _note(self, work: Work, point: Any, status: str) -> None:
        """Add the rows of a point at which the worker died."""
        names = [work.only] if work.only is not None else list(work.job["peers"])
        names = self.benchmark.in_mode(names, getattr(point, "mode", ""))
        self._add(
            point.name, [{**work.fields(point), "peer": name, "status": status} for name in names], work
        )

    def _say_once(self, note: str) -> None:
        reason = note.partition(": ")[2]
        if reason not in self.said:
            self.display.say(note)
        self.said.add(reason)

    def _add(self, name: str, rows: Sequence[Mapping[str, Any]], work: Work) -> None:
        self.table.add({**row, **self.environment} for row in rows)
        self.display.finish(latest(name, rows, work.threads))


def latest(point: str, rows: Sequence[Mapping[str, Any]], threads: int) -> str:
    """Return what a point gave, in one line."""
    first = rows[0]
    start = f"{point}, {plural(threads, 'thread')}"
    missing = [f"{row['peer']} {row['status']}" for row in rows if row["status"] != "measured"]
    if first["status"] == "measured":
        time, spread = first["median_us"], f"{first['ratio_q25']:.2f}-{first['ratio_q75']:.2f}"
        who = "" if first["peer"] == OURS else f" {first['peer']}"
        start += f":{who} {time:.4g} µs, {first['ratio_to_torch']:.2f} ({spread}) times torch's speed"
        if float(first["other_cpus"] or 0) > 0.1:
            missing.append(f"other work took {first['other_cpus']:.1f} CPUs, so these times are off")
        return "; ".join([start, *missing])
    return f"{start}: {'; '.join(missing)}"
