"""Interleaved measurement: every subject is sampled once in each round, so that all see the same machine.

A machine's speed drifts (other work on it, its clock, its memory's state). Figures of one round share that
drift, and the ratio of two of them is free of it; the median over the rounds is free of what disturbs single
samples.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final, NamedTuple

Call = Callable[[], object]
#: The difference of two instants is seconds.
Clock = Callable[[], Any]
Context = Callable[[], AbstractContextManager[None]]
#: Rounds that are sampled even where they take longer than the budget.
LEAST_ROUNDS: Final = 5
#: Seconds; a subject whose calls are shorter makes one that is not timed before each sample.
WARM_UP_BELOW: Final = 0.03
#: Seconds; a call that is longer is a sample by itself, and not called a second time to find that out.
_LONG: Final = 0.1


@dataclass(frozen=True)
class Samples:
    """What was measured of one subject.

    Attributes:
        calls: how many calls one sample takes.
        seconds: per call, one figure for each round that it took part in, which are the first ones.
    """

    calls: int
    seconds: tuple[float, ...]


class Quartiles(NamedTuple):
    """The median and the quartiles of some figures."""

    q25: float
    median: float
    q75: float


def interleaved(
    subjects: Mapping[str, Call],
    rounds: int,
    *,
    least: float = 3e-3,
    budget: float = 9.0,
    contexts: Mapping[str, Context] | None = None,
    clock: Clock = time.perf_counter,
    least_rounds: int = LEAST_ROUNDS,
    each: float | None = None,
) -> dict[str, Samples]:
    """Sample every subject once in each round, in an order that changes from round to round.

    Before a sample comes one call that is not timed, unless calls are long: threads of the subject before
    spin for some milliseconds after their work, and one's own have to be woken.

    Args:
        subjects: what to call, by name. Whatever a call needs once (compiling, say) has been done.
        rounds: how many samples of each subject.
        least: seconds that a sample should take; a subject is called as often as that needs.
        budget: seconds for everything; after them no further round begins, once there are
            ``least_rounds``.
        contexts: by a subject's name, what surrounds each of its samples and is not timed.
        clock: returns seconds, or instants whose difference is seconds.
        least_rounds: see ``budget`` and ``each``.
        each: seconds for each subject; one whose samples have taken them, and are at least
            ``least_rounds``, is left out of further rounds. None sets no such limit.

    Returns:
        The samples by the subjects' names. Without ``each`` all have the same number of rounds.

    Examples:
        >>> from benchmarks.core.timing import interleaved
        >>> samples = interleaved({"list": list, "dict": dict}, 2, least=1e-4)
        >>> len(samples["list"].seconds)
        2
    """
    names = list(subjects)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    around: dict[str, Context] = dict.fromkeys(names, nullcontext) | dict(contexts or {})
    plans: dict[str, tuple[int, float]] = {}
    spent: dict[str, float] = dict.fromkeys(names, 0.0)
    began = clock()
    with _no_collection():
        for name in names:
            with around[name]():
                plans[name] = _calibrate(subjects[name], least, clock)
        for index in range(rounds):
            if index >= least_rounds and clock() - began > budget:
                break
            for name in order(names, index):
                if each is not None and index >= least_rounds and spent[name] >= each:
                    continue
                call, (count, lasts) = subjects[name], plans[name]
                with around[name]():
                    if lasts < WARM_UP_BELOW:
                        call()
                    seconds[name].append(_sample(call, count, clock))
                spent[name] += count * seconds[name][-1]
    return {name: Samples(plans[name][0], tuple(seconds[name])) for name in names}


def order(names: Sequence[str], index: int) -> list[str]:
    """Return the order in which round ``index`` samples the subjects.

    It rotates by one place with each round; every second turn goes backwards, so that no subject always
    has the same one before it.

    Examples:
        >>> from benchmarks.core.timing import order
        >>> [" ".join(order("abc", index)) for index in range(4)]
        ['a b c', 'b c a', 'c a b', 'c b a']
    """
    turn, place = divmod(index, len(names))
    rotated = [*names[place:], *names[:place]]
    return rotated[::-1] if turn % 2 else rotated


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return the median and the quartiles, by linear interpolation.

    Examples:
        >>> from benchmarks.core.timing import quartiles
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
        Quartiles(q25=2.0, median=3.0, q75=4.0)
    """
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratios(base: Samples, other: Samples) -> list[float]:
    """Return how many times as fast as ``base`` the other one is, in each round that both took part in."""
    return [a / b for a, b in zip(base.seconds, other.seconds, strict=False)]


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean, or NaN if there are no values.

    Examples:
        >>> from benchmarks.core.timing import geometric_mean
        >>> geometric_mean([0.5, 2.0])
        1.0
    """
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else math.nan


def _calibrate(call: Call, least: float, clock: Clock) -> tuple[int, float]:
    """Return how many calls take ``least`` seconds or more, approached from below, and the seconds of one."""
    first = _sample(call, 1, clock)
    if first >= max(_LONG, 4 * least):
        return 1, first
    count = 1
    while (elapsed := _undisturbed(call, count, 4 * least, clock)) < least:
        # Aims at 1.2 times the least, so that noise does not ask for one more step.
        wanted = math.ceil(1.2 * least / elapsed * count) if elapsed > 0 else 2 * count
        count = min(max(wanted, count + 1), 10 * count)
    return count, elapsed / count


def _undisturbed(call: Call, count: int, long: float, clock: Clock) -> float:
    """Return the seconds of this many calls: the best of three, or of fewer if one takes ``long`` or more.

    One sample could hold a pause of the process, and the count would stay far too small.
    """
    best = math.inf
    for _ in range(3):
        best = min(best, _sample(call, count, clock) * count)
        if best >= long:
            break
    return best


def _sample(call: Call, count: int, clock: Clock) -> float:
    """Return seconds per call."""
    began = clock()
    for _ in repeat(None, count):
        call()
    seconds: float = clock() - began
    return seconds / count


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage within the block: it would be charged to whoever is sampled then."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
