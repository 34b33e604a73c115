"""The parts of the fuzz, each a function of a seed, and the messages of failures."""

from __future__ import annotations

from collections.abc import Callable

from . import arguments, gates, large_norms, layers, norms, promises

PARTS: dict[str, Callable[[int], float]] = {
    "norms": norms.run,
    "large_norms": large_norms.run,
    "gates": gates.run,
    "layers": layers.run,
    "promises": promises.run,
    "arguments": arguments.run,
}
#: The number of cases that share the cost of starting a part.
TOGETHER = {"arguments": 500}


def failure_of(part: str, seed: int) -> str | None:
    """Run a case; return what is wrong and the command that repeats it."""
    try:
        PARTS[part](seed)
    except Exception as error:
        return told(part, seed, f"{type(error).__name__}: {error}")
    return None


def failures_of(part: str, seeds: range) -> list[str]:
    """Run cases; return what is wrong with each that fails."""
    if part in TOGETHER:
        return [told(part, seed, what) for seed, what in arguments.failures(seeds.start, seeds.stop)]
    return [found for seed in seeds if (found := failure_of(part, seed)) is not None]


def told(part: str, seed: int, what: str) -> str:
    """Return a failure with the command that repeats it."""
    return f"{what}\n  again: python -m tests.fuzz {part} --case {seed}"
