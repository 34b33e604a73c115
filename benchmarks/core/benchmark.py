"""A benchmark as data: the axes of its grid, its options, its peers and its table."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Final

from benchmarks.core.table import MEASURES
from layernorm import machine
from layernorm.arguments import positives, some_of

PROGRAM: Final = "python -m benchmarks"
#: Installs what the benchmarks need; pip has groups since 25.1.
INSTALL: Final = "pip install --group bench"
#: The peer that is this package.
OURS: Final = "layernorm"
#: The peer that is 1 in every ratio.
BASE: Final = "torch"


@dataclass(frozen=True)
class Point:
    """A point of a grid; a benchmark's own has a field for each column that tells points apart."""

    #: The point in words, by its fields.
    words: ClassVar[str]

    @property
    def name(self) -> str:
        """The point in words."""
        return self.words.format(**asdict(self))


@dataclass(frozen=True)
class Axis:
    """An axis of a grid, and the option that chooses values along it.

    Attributes:
        columns: the fields of a point that a value sets: one, or one for each part of the value.
        option: the option, without its dashes.
        help: what the values are, for ``--help``.
        choices: all values there are, in the order of tables; empty where any number can be asked for.
        default: the values that are measured unless others are named; all choices where it is empty.
        quick: the values with ``--quick``, where they differ from the default.
        parse: reads the option's text where there are no choices.
        metavar: stands for the values in ``--help``.
        always_shown: whether the page's commands name the values even if they are the default.
    """

    columns: tuple[str, ...]
    option: str
    help: str = ""
    choices: tuple[Any, ...] = ()
    default: tuple[Any, ...] = ()
    quick: tuple[Any, ...] = ()
    parse: Callable[[str], tuple[Any, ...]] = positives
    metavar: str = "A,B,…"
    always_shown: bool = False

    @property
    def usual(self) -> tuple[Any, ...]:
        """The values that are measured unless others are named."""
        return self.default or self.choices

    def chosen(self, options: argparse.Namespace) -> tuple[Any, ...]:
        """Return the values that the options ask for."""
        named = getattr(options, self.option)
        if named is None:
            return self.quick if options.quick and self.quick else self.usual
        return tuple(value for value in named if not self.choices or value in self.choices)

    def set(self, value: Any) -> dict[str, Any]:
        """Return the fields of a point that a value sets."""
        return dict(zip(self.columns, value if len(self.columns) > 1 else (value,), strict=True))

    def text(self, values: Sequence[Any]) -> str:
        """Return values as the option takes them."""
        return ",".join("x".join(map(str, self.set(value).values())) for value in values)

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add the option."""
        default = "all" if self.choices and self.usual == self.choices else self.text(self.usual)
        some = f"some of {', '.join(self.choices)}" if self.choices else ""
        about = "; ".join(part for part in (some, self.help) if part)
        parse = some_of(self.choices) if self.choices else self.parse
        text = f"{about} (default: {default})".strip()
        parser.add_argument(f"--{self.option}", type=parse, metavar=self.metavar, help=text)


@dataclass(frozen=True)
class Work:
    """What one worker is to do.

    Attributes:
        points: of the grid.
        job: what else it is told.
        threads: of the worker.
        only: the one peer whose rows are kept, None for all.
        limit: seconds after which the worker is ended; then ``only`` counts as "timed out".
        rank: of its value; those of all benchmarks of a command are run in the order of their ranks.
    """

    points: Sequence[Any]
    job: Mapping[str, Any]
    threads: int
    only: str | None = None
    limit: float | None = None
    rank: int = 0

    def fields(self, point: Any) -> dict[str, Any]:
        """Return what the point's rows begin with."""
        return asdict(point) | {"threads": self.threads}


@dataclass(frozen=True)
class Benchmark:
    """A table of measurements, and how it is filled.

    Attributes:
        name: of the table and the pictures.
        command: that measures it.
        folder: in ``benchmarks``; its ``measure`` is the worker, its ``report`` has ``REPORT``.
        point: the class of the grid's points.
        axes: of the grid, the outermost loop first.
        peers: all there are, in the order of tables.
        rounds: samples of each peer.
        quick_rounds: the same with ``--quick``.
        figures: the columns that only this benchmark has.
        budget: seconds of samples at a point.
        options: that are no axes; by their names what ``add_argument`` takes.
        about: its peers and its grid, for ``--help``.
        has_kernel: whether a column tells which kernel computed this package's rows.
        on_gpu: whether it measures on a GPU; numbers of threads are not an axis then.
        on_request: peers that are not measured unless they are named.
        only_in: the one mode of peers that have only one.
        replaced_by: an axis's column; a run replaces all rows that have its values there. None replaces only
            the points that are measured.
        keep: tells whether a point is measured with these options and this number of threads.
        expand: the points of chosen values, by option; None for all combinations.
        plan: completes the workers' jobs by the options, or adds workers.
        peers_to_name: the peers that a run like that of a table has to name, None where they are the default.
        problem: why it cannot be measured here, None where it can.
    """

    name: str
    command: str
    folder: str
    point: type[Any]
    axes: tuple[Axis, ...]
    peers: tuple[str, ...]
    rounds: int
    quick_rounds: int
    figures: tuple[str, ...] = ()
    budget: float = float("inf")
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    about: str = field(default="", repr=False)
    has_kernel: bool = True
    on_gpu: bool = False
    on_request: tuple[str, ...] = ()
    only_in: Mapping[str, str] = field(default_factory=dict)
    replaced_by: str | None = None
    keep: Callable[[Any, argparse.Namespace, int], bool] = lambda point, options, threads: True
    expand: Callable[[Mapping[str, Sequence[Any]]], Iterator[Any]] | None = None
    plan: Callable[[list[Work], argparse.Namespace], list[Work]] = lambda works, options: works
    peers_to_name: Callable[[Any], Sequence[str] | None] | None = None
    problem: Callable[[], str | None] = lambda: None

    @property
    def keys(self) -> tuple[str, ...]:
        """The columns that make a point."""
        return (*(each.name for each in fields(self.point)), "threads")

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of the table."""
        kernel = ("kernel",) if self.has_kernel else ()
        where = (*machine.GPU_COLUMNS, *machine.COLUMNS) if self.on_gpu else machine.COLUMNS
        return (*self.keys, "peer", "status", *kernel, *MEASURES, *self.figures, "other_cpus", *where)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The columns that hold numbers."""
        sizes = (each.name for each in fields(self.point) if each.type in (int, "int"))
        return (*sizes, "threads", *MEASURES, *self.figures, "other_cpus")

    @property
    def default_peers(self) -> tuple[str, ...]:
        """The peers that are measured unless others are named."""
        return tuple(name for name in self.peers if name not in self.on_request)

    def chosen_peers(self, named: Sequence[str] | None) -> list[str]:
        """Return the peers to measure where these were named, None for none, in the order of tables."""
        wanted = self.default_peers if named is None else named
        return [name for name in self.peers if name in (OURS, BASE) or name in wanted]

    def in_mode(self, names: Sequence[str], mode: str) -> list[str]:
        """Return the peers that there are in a mode."""
        return [name for name in names if self.only_in.get(name, mode) == mode]

    def axis(self, column: str) -> Axis:
        """Return the axis of a column."""
        return next(axis for axis in self.axes if column in axis.columns)

    def key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what tells the row's point from others, as text."""
        return tuple(str(row[name]) for name in self.keys)

    def grid(self, **chosen: Sequence[Any]) -> Iterator[Any]:
        """Yield the points of these values, by option; axes that are not named have their default."""
        values = {axis.option: chosen.get(axis.option, axis.usual) for axis in self.axes}
        if self.expand is not None:
            yield from self.expand(values)
            return
        for place in itertools.product(*values.values()):
            found: dict[str, Any] = {}
            for axis, value in zip(self.axes, place, strict=True):
                found |= axis.set(value)
            yield self.point(**found)

    def works(self, options: argparse.Namespace) -> list[Work]:
        """Return what the options ask for."""
        job: dict[str, Any] = {
            "peers": self.chosen_peers(getattr(options, "peers", None)),
            "rounds": options.rounds or (self.quick_rounds if options.quick else self.rounds),
            "budget": self.budget,
        }
        if self.on_gpu:
            job["device"] = "cuda"
        points = list(self.grid(**{axis.option: axis.chosen(options) for axis in self.axes}))
        works = [
            Work([point for point in points if self.keep(point, options, threads)], job, threads)
            for threads in ((machine.cpus(),) if self.on_gpu else options.threads)
        ]
        return self.plan(works, options)


@dataclass(frozen=True)
class Command:
    """A command of ``python -m benchmarks``.

    Attributes:
        name: of the command.
        title: what it measures.
        description: for ``--help``.
        benchmarks: what it measures, a table each; they share the options that they both have.
        about: for ``--help``, before what the benchmarks say of themselves.
        examples: options to begin with.
    """

    name: str
    title: str
    description: str
    benchmarks: tuple[Benchmark, ...]
    about: str = ""
    examples: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Tell whether it measures on a GPU."""
        return self.benchmarks[0].on_gpu

    @property
    def peers(self) -> tuple[str, ...]:
        """All peers of the benchmarks."""
        return tuple(dict.fromkeys(name for each in self.benchmarks for name in each.peers))

    def axes(self) -> list[Axis]:
        """Return the axes by their options: one that several benchmarks have has the values of all."""
        found: dict[str, Axis] = {}
        for axis in (axis for each in self.benchmarks for axis in each.axes):
            first = found.get(axis.option, axis)
            choices, default = merged(first.choices, axis.choices), merged(first.usual, axis.usual)
            found[axis.option] = replace(first, choices=choices, default=default)
        return list(found.values())


def merged(first: Sequence[Any], second: Sequence[Any]) -> tuple[Any, ...]:
    """Return the values of both, each once and in the order of each.

    Examples:
        >>> from benchmarks.core.benchmark import merged
        >>> merged("ad", "bcd")
        ('a', 'b', 'c', 'd')
    """
    found = list(first)
    for index, value in enumerate(second):
        if value not in found:
            places = [found.index(later) for later in second[index:] if later in found]
            found.insert(min(places, default=len(found)), value)
    return tuple(found)


def by_rank(work: Work, rank: Callable[[Any], int]) -> list[Work]:
    """Return the work in parts, each with the points of a rank, the most valuable first."""
    parts: dict[int, list[Any]] = {}
    for point in work.points:
        parts.setdefault(rank(point), []).append(point)
    return [replace(work, points=points, rank=number) for number, points in sorted(parts.items())]


def plural(count: Any, noun: str) -> str:
    """Return the count with its noun.

    Examples:
        >>> from benchmarks.core.benchmark import plural
        >>> plural(1, "thread"), plural(2, "thread")
        ('1 thread', '2 threads')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
