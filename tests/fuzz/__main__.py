"""``python -m tests.fuzz``: the fuzz for a given time, or one case repeated."""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import collections
import itertools
import random
import sys
import time
import warnings

import torch

from .parts import PARTS, TOGETHER, failure_of, failures_of


def main(arguments: list[str] | None = None) -> int:
    """Run the parts in turn, each for the same time; return 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"one or more of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to run in all (default: 1)")
    parser.add_argument("--seed", type=int, help="the first case's number (default: drawn, and printed)")
    parser.add_argument("--case", type=int, help="run this case of one part and show its failure")
    options = parser.parse_args(arguments)
    parts = options.parts or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    if options.case is not None:
        if len(parts) != 1:
            parser.error("--case is a case of one part: name it")
        return failed([found] if (found := failure_of(parts[0], options.case)) else [])
    seed = random.randrange(1 << 31) if options.seed is None else options.seed
    print(f"python -m tests.fuzz {' '.join(parts)} --minutes {options.minutes:g} --seed {seed}", flush=True)
    return run(parts, seed, 60 * options.minutes)


def run(parts: list[str], seed: int, seconds: float) -> int:
    """Run rounds of cases until the time is over; return 1 if a case failed."""
    cases, wrong, spent = (collections.Counter[str]() for _ in range(3))
    begin = time.monotonic()
    for _ in itertools.count():
        part = min(parts, key=lambda name: spent[name])
        count, start = TOGETHER.get(part, 1), time.monotonic()
        first = seed + cases[part]
        found = failures_of(part, range(first, first + count))
        spent[part] += max(1, int(1000 * (time.monotonic() - start)))
        cases[part] += count
        wrong[part] += failed(found)
        if time.monotonic() - begin > seconds:
            break
    for part in parts:
        print(f"{part}: {cases[part]} cases, {wrong[part]} failed, {spent[part] / 1000:.0f} s")
    return int(wrong.total() > 0)


def failed(found: list[str]) -> int:
    """Print failures and return how many there are."""
    for failure in found:
        print(failure, flush=True)
    return len(found)


if __name__ == "__main__":
    sys.exit(min(1, main()))
