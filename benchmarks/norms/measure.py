"""The norm operators over a grid of sizes; as a program, the worker that measures it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from benchmarks.core.benchmark import OURS, Benchmark, Work
from benchmarks.core.measuring import BASE, Row, each_point, peer_rows, sample
from benchmarks.core.subjects import Subject, difference, prepare
from benchmarks.core.table import MEASURES, significant
from benchmarks.core.timing import Call, quartiles
from benchmarks.core.workers import Emit, serve
from benchmarks.norms.peers import PEERS, Case, make_case
from layernorm import backends, machine
from layernorm.arguments import positive, some_of

DTYPES: Final = ("float32", "bfloat16", "float16")
MODES: Final = ("forward", "training")
DEFAULT_DTYPES: Final = ("float32", "bfloat16")
_BUDGET: Final = 9.0  # seconds for each point
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

    def case(self, device: str = "cpu") -> Case:
        """Its tensors."""
        dtype = getattr(torch, self.dtype)
        return make_case(self.operator, dtype, self.rows, self.width, self.mode == "training", device)

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


def measure(job: dict[str, Any], emit: Emit) -> None:
    """The worker."""
    each_point(job, emit, Point, lambda point: _measure(point, job, emit))


def _measure(point: Point, job: Mapping[str, Any], emit: Emit) -> list[Row]:
    with torch.set_grad_enabled(point.mode == "training"):
        dtype: torch.dtype = getattr(torch, point.dtype)
        case = point.case()
        subjects, problems = checked(point, case, job["peers"], lambda name, case: PEERS[name](case), emit)
        x = case.inputs[0]
        # A copy that allocates its result as the operators do, and one into memory that is there.
        copies: dict[str, Call] = {"copy": x.clone, "copy into": partial(torch.empty_like(x).copy_, x)}
        samples, others = sample(subjects, copies, job)
    copy, copy_into = (1e6 * quartiles(samples[name].seconds).median for name in copies)
    limit = point.clones * copy
    table = []
    for row, measured in peer_rows(point, job["peers"], problems, samples, others):
        if row["peer"] == OURS:
            row["kernel"] = backends.choose(point.operator, torch.device("cpu"), dtype).kernel
        if measured:
            row |= {
                "copy_us": significant(copy),
                "copy_into_us": significant(copy_into),
                "limit_us": significant(limit),
                "fraction_of_limit": significant(limit / row["median_us"]),
            }
        table.append(row)
    return table


def checked(
    point: Point, case: Case, names: Sequence[str], build: Callable[[str, Case], Subject], emit: Emit
) -> tuple[dict[str, Subject], dict[str, str]]:
    """The peers that can be measured, and what is the matter with the others.

    Args:
        point: of the grid.
        case: its tensors.
        names: of peers.
        build: makes a peer ready for a case.
        emit: is told why a peer has no figures.
    """
    expected = build(BASE, case.in_float32()).results()
    base = difference(build(BASE, case).results(), expected)

    def check(name: str, subject: Subject) -> None:
        off = difference(subject.results(), expected)
        if not off <= max(_TOLERANCE[point.dtype], 2 * base):
            raise RuntimeError(f"its results are off by {off:.1e}")

    found = prepare(
        names,
        lambda name: build(name, case),
        check,
        lambda text: emit({"note": f"{point.name}: {text}"}),
    )
    if BASE not in found[0]:
        raise RuntimeError(f"{BASE} itself cannot be measured at {point.name}")
    return found


@dataclass(frozen=True)
class Grid:
    """The points and rounds of a benchmark of norms, unless options say otherwise.

    Attributes:
        operators: some of ``layernorm.backends.NORMS``.
        sizes: rows and width.
        rounds: samples of each peer.
        quick_sizes: with ``--quick``.
        quick_rounds: likewise.
    """

    operators: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    rounds: int
    quick_sizes: tuple[tuple[int, int], ...]
    quick_rounds: int

    def points(self, options: argparse.Namespace) -> list[Point]:
        """The points that the options ask for."""
        sizes = options.sizes or (self.quick_sizes if options.quick else self.sizes)
        operators = [name for name in options.operator if name in backends.NORMS]
        modes = [name for name in options.modes if name in MODES]
        return list(grid(operators, options.dtypes, sizes, modes))

    def rounds_for(self, options: argparse.Namespace) -> int:
        """The rounds that the options ask for."""
        rounds: int = options.rounds or (self.quick_rounds if options.quick else self.rounds)
        return rounds


#: An activation in and out of the caches, a long row, a single step of a small network.
DEFAULTS: Final = Grid(
    operators=("layer_norm",),
    sizes=((64, 256), (512, 512), (4096, 1024), (16384, 2048), (1, 64), (8, 768)),
    rounds=30,
    quick_sizes=((64, 256), (512, 512), (1, 64), (8, 768)),
    quick_rounds=10,
)


def add_options(
    parser: argparse.ArgumentParser,
    defaults: Grid = DEFAULTS,
    *,
    choices: Sequence[str] = backends.NORMS,
    chosen: Sequence[str] = DEFAULTS.operators,
    modes: Sequence[str] = MODES,
) -> None:
    """The options that choose points.

    Args:
        parser: to which they are added.
        defaults: the points that they give otherwise.
        choices: the operators there are.
        chosen: those that are measured unless others are named.
        modes: all there are.
    """
    add = parser.add_argument
    add(
        "--operator",
        type=some_of(choices),
        default=tuple(chosen),
        metavar="A,B,…",
        help=f"some of {', '.join(choices)} (default: {','.join(chosen)}); an "
        "earlier table in the same place keeps its other operators",
    )
    add(
        "--dtypes",
        type=some_of(DTYPES),
        default=DEFAULT_DTYPES,
        metavar="A,B,…",
        help=f"some of {', '.join(DTYPES)} (default: {','.join(DEFAULT_DTYPES)})",
    )
    sizes = ",".join(f"{rows}x{width}" for rows, width in defaults.sizes)
    add("--sizes", type=_sizes, metavar="RxW,…", help=f"rows and width (default: {sizes})")
    add(
        "--modes",
        type=some_of(modes),
        default=tuple(modes),
        metavar="A,B",
        help=f"some of {', '.join(modes)}, which is forward and backward (default: all)",
    )
    add("--rounds", type=positive, metavar="N", help=f"samples of each peer (default: {defaults.rounds})")
    add("--quick", action="store_true", help=f"{defaults.quick_rounds} rounds, and fewer sizes")


def _works(options: argparse.Namespace) -> list[Work]:
    points = DEFAULTS.points(options)
    job = {
        "peers": NORMS.chosen(options.peers),
        "rounds": DEFAULTS.rounds_for(options),
        "budget": _BUDGET,
    }
    return [Work(points, job, threads) for threads in options.threads]


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([1-9]\d*)[x×]([1-9]\d*)\s*", part)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"expected ROWSxWIDTH separated by commas, as in 64x256,8x768; got {part!r}"
            )
        sizes.append((int(found[1]), int(found[2])))
    return tuple(dict.fromkeys(sizes))


NORMS: Final = Benchmark(
    name="norms",
    title="the norm operators",
    description="Measures the norm operators beside PyTorch's and others', interleaved in one process "
    "for each number of threads; writes a table, a picture and a page.",
    keys=KEYS,
    columns=COLUMNS,
    peers=tuple(PEERS),
    add_options=add_options,
    works=_works,
    group="operator",
)

if __name__ == "__main__":
    serve(measure)
