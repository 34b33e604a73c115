"""What a benchmark is: its options, its grid, its peers and its table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

#: The peer that is this package.
OURS: Final = "layernorm"
_ALWAYS: Final = (OURS, "torch")


@dataclass(frozen=True)
class Work:
    """What one worker is to do.

    Attributes:
        points: of the grid: dataclasses with a property ``name``.
        job: what it is told beside the points.
        threads: of the worker.
        only: the one peer whose rows are kept, None for all.
        limit: seconds after which the worker is ended; then ``only`` counts as "timed out".
    """

    points: Sequence[Any]
    job: Mapping[str, Any]
    threads: int
    only: str | None = None
    limit: float | None = None

    def fields(self, point: Any) -> dict[str, Any]:
        """What the point's rows begin with."""
        return asdict(point) | {"threads": self.threads}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark; its worker is the module ``layernorm.bench.NAME``, its report ``NAME_report``.

    Attributes:
        name: of the command, the table and the pictures.
        title: what it measures.
        description: for ``--help``.
        keys: the columns that make a point.
        columns: of the table.
        peers: all there are, in the order of tables.
        add_options: adds the options of this benchmark.
        works: what options ask for.
        group: a column; a run replaces all rows of its own groups. None replaces its own points only.
        unasked: peers that are not measured unless they are named.
        epilog: for ``--help``.
        threaded: whether numbers of threads are measured.
        problem: why it cannot be measured here, None where it can.
        also: others that the same command measures after it, by the options that they share; their columns
            and files are their own.
    """

    name: str
    title: str
    description: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    peers: tuple[str, ...]
    add_options: Callable[[argparse.ArgumentParser], None]
    works: Callable[[argparse.Namespace], list[Work]]
    group: str | None = None
    unasked: tuple[str, ...] = ()
    epilog: str = field(default="", repr=False)
    threaded: bool = True
    problem: Callable[[], str | None] = lambda: None
    also: tuple[Benchmark, ...] = ()

    @property
    def tables(self) -> tuple[Benchmark, ...]:
        """What a command measures: a table each."""
        return (self, *self.also)

    @property
    def default_peers(self) -> tuple[str, ...]:
        """The peers that are measured unless others are named."""
        return tuple(name for name in self.peers if name not in self.unasked)

    def chosen(self, peers: Sequence[str] | None) -> list[str]:
        """The peers that are measured where these were named, None for none, in the order of tables."""
        named = self.default_peers if peers is None else peers
        return [name for name in self.peers if name in _ALWAYS or name in named]

    def key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """What tells the row's point from others, as text."""
        return tuple(str(row[name]) for name in self.keys)


@dataclass(frozen=True)
class Outputs:
    """The files of a run; all benchmarks share a page.

    Attributes:
        tables: the folder of the CSV files.
        images: the folder of the pictures.
        page: the Markdown page.
        shown: what the page has before a table's name.
    """

    tables: Path
    images: Path
    page: Path
    shown: str

    def table(self, benchmark: str) -> Path:
        """The CSV file of a benchmark."""
        return self.tables / f"{benchmark}.csv"

    def image(self, *parts: str) -> Path:
        """A picture; the parts of its name begin with the benchmark's."""
        return self.images / f"{'-'.join(('bench', *parts))}.png"


def in_folder(folder: Path) -> Outputs:
    """All files in one folder."""
    return Outputs(folder, folder, folder / "benchmarks.md", "")


def in_checkout(root: Path) -> Outputs:
    """The files that the project publishes."""
    name = "benchmarks/results/"
    return Outputs(root / name, root / "docs/images", root / "docs/benchmarks.md", name)


def plural(count: Any, noun: str) -> str:
    """The count with its noun.

    Examples:
        >>> from benchmarks.core.benchmark import plural
        >>> plural(1, "thread"), plural(2, "thread")
        ('1 thread', '2 threads')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
