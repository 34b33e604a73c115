"""The worker's loop that all benchmarks share: point by point, check, sample, and make the rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.core.benchmark import BASE, OURS, Point
from benchmarks.core.subjects import Subject, difference, prepare
from benchmarks.core.table import measures
from benchmarks.core.timing import LEAST_ROUNDS, Call, Clock, Samples, interleaved
from benchmarks.core.workers import Emit
from layernorm import backends, machine

Row = dict[str, Any]


class NoBaseError(RuntimeError):
    """PyTorch's own, which ratios are to, cannot be measured."""


class Check:
    """Raise where results are off, and keep by how much they are.

    Args:
        expected: the results that are right for a peer.
        allows: tells whether a peer may be off by so much.

    Attributes:
        differences: by how much the peers that were checked are off.
    """

    def __init__(
        self, expected: Callable[[str], Sequence[Tensor]], allows: Callable[[str, float], bool]
    ) -> None:
        self.differences: dict[str, float] = {}
        self._expected, self._allows = expected, allows

    def __call__(self, name: str, subject: Subject) -> None:
        """Check a peer."""
        self.differences[name] = off = difference(subject.results(), self._expected(name))
        if not self._allows(name, off):
            raise RuntimeError(f"its results are off by {off:.1e}")


def each_point(
    job: Mapping[str, Any], emit: Emit, point_type: Callable[..., Any], rows_of: Callable[[Any], list[Row]]
) -> None:
    """Emit {"point": its index} and then {"rows": one for each peer}, for each point."""
    for index, fields in enumerate(job["points"]):
        emit({"point": index})
        rows = rows_of(point_type(**fields))
        for row in rows:
            row["threads"] = job["threads"]
        emit({"rows": rows})


def ready(
    point: Point,
    names: Sequence[str],
    build: Callable[[str], Subject],
    check: Callable[[str, Subject], None],
    emit: Emit,
) -> tuple[dict[str, Subject], dict[str, str]]:
    """Return the peers that can be measured at a point, and what is the matter with the others.

    Args:
        point: of the grid.
        names: of peers.
        build: makes one ready; see ``prepare``.
        check: raises where its results are not what they should be.
        emit: is told why a peer has no figures.

    Raises:
        NoBaseError: PyTorch's own is among the others.
    """
    subjects, problems = prepare(names, build, check, lambda text: emit({"note": f"{point.name}: {text}"}))
    if BASE not in subjects:
        raise NoBaseError(f"{BASE} itself cannot be measured at {point.name}")
    return subjects, problems


def sample(
    subjects: Mapping[str, Subject],
    limits: Mapping[str, Call],
    job: Mapping[str, Any],
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, Samples], float | None]:
    """Sample peers and limits in the same rounds.

    Args:
        subjects: the peers by name.
        limits: what else is called in each round, by a name that no peer has.
        job: has "rounds" and "budget", and may have "least_rounds" and "each"; see ``interleaved``.
        clock: see ``interleaved``.

    Returns:
        The samples by name, and how many CPUs other processes took meanwhile, None where Linux does
        not tell.
    """
    with _others() as others:
        samples = interleaved(
            {name: subject.call for name, subject in subjects.items()} | dict(limits),
            job["rounds"],
            budget=job["budget"],
            contexts={name: subject.context for name, subject in subjects.items()},
            least_rounds=job.get("least_rounds", LEAST_ROUNDS),
            each=job.get("each"),
            clock=clock,
        )
    return samples, others[0] if others else None


def peer_rows(
    point: Point,
    names: Sequence[str],
    problems: Mapping[str, str],
    measured: tuple[Mapping[str, Samples], float | None] = ({}, None),
    *,
    kernel: Callable[[str], str] | None = None,
    figures: Callable[[str, Row], Row] = lambda name, row: {},
) -> list[Row]:
    """Return a row for each peer.

    Args:
        point: of the grid.
        names: of all peers, in their order.
        problems: why some have no figures.
        measured: what ``sample`` returned.
        kernel: tells which kernel computes one of this package's rows.
        figures: what only this benchmark has, of a peer that was measured and its row.
    """
    samples, others = measured
    rows = []
    for name in names:
        row: Row = {**asdict(point), "peer": name, "status": problems.get(name, "measured")}
        if kernel is not None and name.startswith(OURS):
            row["kernel"] = kernel(name)
        if name in samples:
            row |= measures(samples[name], samples[BASE])
            row["other_cpus"] = "" if others is None else round(others, 3)
            row |= figures(name, row)
        rows.append(row)
    return rows


def kernel_on_cpu(operator: Any, dtype: str) -> str:
    """Return the kernel that computes an operator, or a cell, on the CPU."""
    return backends.choose(operator, torch.device("cpu"), getattr(torch, dtype)).kernel


@contextmanager
def _others() -> Iterator[list[float]]:
    """Put into a list, at the end of the block, how many CPUs other processes took within it."""
    found: list[float] = []
    began, before, own = time.monotonic(), machine.busy_seconds(), time.process_time()
    yield found
    after = machine.busy_seconds()
    if before is not None and after is not None:
        others = after - before - (time.process_time() - own)
        found.append(max(0.0, others / (time.monotonic() - began)))
