"""The worker's loop that all benchmarks share: point by point, sample, and make the rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final

from benchmarks.core.subjects import Subject
from benchmarks.core.table import measures
from benchmarks.core.timing import LEAST_ROUNDS, Call, Clock, Samples, interleaved
from benchmarks.core.workers import Emit
from layernorm import machine

#: The peer that is 1 in every ratio.
BASE: Final = "torch"
Row = dict[str, Any]


def each_point(
    job: Mapping[str, Any], emit: Emit, point_type: Callable[..., Any], rows_of: Callable[[Any], list[Row]]
) -> None:
    """For each point {"point": its index}, then {"rows": one for each peer}."""
    for index, fields in enumerate(job["points"]):
        emit({"point": index})
        rows = rows_of(point_type(**fields))
        for row in rows:
            row["threads"] = job["threads"]
        emit({"rows": rows})


def sample(
    subjects: Mapping[str, Subject],
    limits: Mapping[str, Call],
    job: Mapping[str, Any],
    *,
    least_rounds: int = LEAST_ROUNDS,
    each: float | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, Samples], float | None]:
    """Samples peers and limits in the same rounds.

    Args:
        subjects: the peers by name.
        limits: what else is called in each round, by a name that no peer has.
        job: with "rounds" and "budget".
        least_rounds: rounds that are sampled even where they take longer than the budget.
        each: seconds after which a single one takes no longer part; see ``interleaved``.
        clock: likewise.

    Returns:
        The samples by name, and how many CPUs other processes took meanwhile, None where Linux does
        not tell.
    """
    calls = {name: subject.call for name, subject in subjects.items()} | dict(limits)
    contexts = {name: subject.context for name, subject in subjects.items()}
    with _others() as others:
        samples = interleaved(
            calls,
            job["rounds"],
            budget=job["budget"],
            contexts=contexts,
            least_rounds=least_rounds,
            each=each,
            clock=clock,
        )
    return samples, others[0] if others else None


def peer_rows(
    point: Any,
    names: Sequence[str],
    problems: Mapping[str, str],
    samples: Mapping[str, Samples],
    others: float | None,
) -> Iterator[tuple[Row, bool]]:
    """A row for each peer with the figures that all benchmarks have, and whether it was measured."""
    for name in names:
        row = {**asdict(point), "peer": name, "status": problems.get(name, "measured")}
        if name in samples:
            row |= measures(samples[name], samples[BASE])
            row["other_cpus"] = "" if others is None else round(others, 3)
        yield row, name in samples


@contextmanager
def _others() -> Iterator[list[float]]:
    """How many CPUs other processes took within the block, in a list that is filled at its end."""
    found: list[float] = []
    began, before, own = time.monotonic(), machine.busy_seconds(), time.process_time()
    yield found
    after = machine.busy_seconds()
    if before is not None and after is not None:
        others = after - before - (time.process_time() - own)
        found.append(max(0.0, others / (time.monotonic() - began)))
