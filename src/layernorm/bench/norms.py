"""The norm operators over a grid of sizes; as a program, the worker that measures it."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from layernorm import backends, machine
from layernorm.bench import peers
from layernorm.bench.table import MEASURES, measures, significant
from layernorm.bench.timing import interleaved, quartiles
from layernorm.bench.workers import Emit, serve

DTYPES: Final = ("float32", "bfloat16", "float16")
MODES: Final = ("forward", "training")
BASE: Final = "torch"
#: What makes a point; two rows with the same ones are two peers.
KEYS: Final = ("operator", "dtype", "rows", "width", "mode", "threads")
LIMITS: Final = ("copy_us", "copy_into_us", "limit_us", "fraction_of_limit", "other_cpus")
COLUMNS: Final = (*KEYS, "peer", "status", "kernel", *MEASURES, *LIMITS, *machine.COLUMNS)

# How many times a tensor of rows x width is read or written at least. Layer norm: x, output; and backward
# the output's gradient, x, the input's gradient. With a residual: x, residual, sum, output; backward the
# gradients of output and sum, sum, and the gradients of x and residual.
_PASSES: Final = {
    ("layer_norm", "forward"): 2,
    ("layer_norm", "training"): 5,
    ("add_layer_norm", "forward"): 4,
    ("add_layer_norm", "training"): 9,
}
# Results may differ from those in float32 by this much, relative to their norm: some units in the last
# place, which are 1.2e-7, 9.8e-4 and 7.8e-3. PyTorch's own gradients of the weight in half precision can
# be further off, and so may others' be. A wrong formula is off by far more.
_TOLERANCE: Final = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Point:
    """One point of the grid.

    Attributes:
        operator: one of ``layernorm.backends.NORMS``.
        dtype: of all tensors.
        rows: how many are normalized.
        width: of a row.
        mode: "forward", or "training" for forward and backward.
    """

    operator: str
    dtype: str
    rows: int
    width: int
    mode: str

    @property
    def name(self) -> str:
        """The point in words."""
        return f"{self.operator} {self.dtype} {self.rows}×{self.width} {self.mode}"

    @property
    def clones(self) -> float:
        """How many copies of the input take the least traffic that this point needs."""
        return _PASSES[self.operator.replace("rms", "layer"), self.mode] / 2


def grid(
    operators: Sequence[str], dtypes: Sequence[str], sizes: Sequence[tuple[int, int]], modes: Sequence[str]
) -> Iterator[Point]:
    """All points, those of one operator and dtype together."""
    for operator in operators:
        for dtype in dtypes:
            for mode in modes:
                for rows, width in sizes:
                    yield Point(operator, dtype, rows, width, mode)


def job(points: Sequence[Point], names: Sequence[str], rounds: int, budget: float) -> dict[str, Any]:
    """What a worker is to measure.

    Args:
        points: of the grid.
        names: of peers; PyTorch's eager operator is among them.
        rounds: for each point.
        budget: seconds for each point.
    """
    return {
        "points": [asdict(point) for point in points],
        "peers": list(names),
        "rounds": rounds,
        "budget": budget,
    }


def measure(job: dict[str, Any], emit: Emit) -> None:
    """The worker: for each point {"point": its index}, then {"rows": one for each peer}."""
    for index, fields in enumerate(job["points"]):
        emit({"point": index})
        point = Point(**fields)
        with torch.set_grad_enabled(point.mode == "training"):
            rows = _measure(point, job["peers"], job["rounds"], job["budget"], emit)
        for row in rows:
            row["threads"] = job["threads"]
        emit({"rows": rows})


def _measure(
    point: Point, names: Sequence[str], rounds: int, budget: float, emit: Emit
) -> list[dict[str, Any]]:
    dtype: torch.dtype = getattr(torch, point.dtype)
    case = peers.make_case(point.operator, dtype, point.rows, point.width, point.mode == "training")
    subjects, problems = _prepare(point, case, names, emit)
    x = case.inputs[0]
    calls = {name: subject.call for name, subject in subjects.items()}
    # A copy that allocates its result as the operators do, and one into memory that is there.
    calls["copy"] = x.clone
    calls["copy into"] = partial(torch.empty_like(x).copy_, x)
    contexts = {name: subject.context for name, subject in subjects.items()}
    with _others() as others:
        samples = interleaved(calls, rounds, budget=budget, contexts=contexts)
    copy, copy_into = (1e6 * quartiles(samples[name].seconds).median for name in ("copy", "copy into"))
    limit = point.clones * copy
    table = []
    for name in names:
        row = {**asdict(point), "peer": name, "status": problems.get(name, "measured")}
        if name == "layernorm":
            row["kernel"] = backends.choose(point.operator, torch.device("cpu"), dtype).kernel
        if name in subjects:
            row |= measures(samples[name], samples[BASE])
            row |= {
                "copy_us": significant(copy),
                "copy_into_us": significant(copy_into),
                "limit_us": significant(limit),
                "fraction_of_limit": significant(limit / row["median_us"]),
                "other_cpus": round(others[0], 3) if others else "",
            }
        table.append(row)
    return table


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


def _prepare(
    point: Point, case: peers.Case, names: Sequence[str], emit: Emit
) -> tuple[dict[str, peers.Subject], dict[str, str]]:
    """The peers that can be measured, and what is the matter with the others."""
    gc.collect()
    subjects, problems = {}, {}
    expected = peers.prepare(BASE, case.in_float32()).results()
    base = _difference(peers.prepare(BASE, case).results(), expected)
    for name in names:
        try:
            subject = peers.prepare(name, case)
            difference = _difference(subject.results(), expected)
            if difference > max(_TOLERANCE[point.dtype], 2 * base):
                raise RuntimeError(f"its results are off by {difference:.1e}")
            subjects[name] = subject
        except peers.NotInstalledError:
            problems[name] = "not installed"
        except peers.NotSupportedError:
            problems[name] = "not supported"
        except Exception as error:
            # A peer that fails must not end the run; it is shown, and stands in the table.
            problems[name] = "failed"
            lines = [line for line in str(error).splitlines() if line.strip()]
            emit({"note": f"{name} failed at {point.name}: {lines[0] if lines else type(error).__name__}"})
    if BASE not in subjects:
        raise RuntimeError(f"{BASE} itself cannot be measured at {point.name}")
    return subjects, problems


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of the results' relative differences."""
    if len(found) != len(expected):
        raise RuntimeError(f"{len(found)} results, expected {len(expected)}")
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


if __name__ == "__main__":
    serve(measure)
