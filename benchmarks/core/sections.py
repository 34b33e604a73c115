"""A benchmark's section of the page as data: what it compares, its tables, its pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.core import pages
from benchmarks.core.benchmark import OURS, Benchmark, plural
from benchmarks.core.outputs import Outputs

#: Rows of a table, by the point's keys.
Row = Mapping[Hashable, Any]


class Part:
    """A part of a section; it is given the rows of the section or, where that has groups, of one."""

    def markdown(self, data: pd.DataFrame, report: Report, outputs: Outputs) -> Iterator[str]:
        """Yield what the page says."""
        yield from ()

    def lines(self, data: pd.DataFrame, report: Report) -> Iterator[str]:
        """Yield what the command says when it has measured."""
        yield from ()


@dataclass(frozen=True)
class Report:
    """A section of the page.

    Attributes:
        benchmark: whose table it is about.
        title: of the section.
        parts: in their order; where there are groups, all of them for each group.
        method: how the benchmark measures, in Markdown; it may name ``rounds``, ``steps`` and ``facts``.
        order: the columns by which rows are sorted, before the peers.
        facts: what the method names.
        derived: columns that follow from others.
        group: the column that makes groups, None for none.
        heading: of a group.
    """

    benchmark: Benchmark
    title: str
    parts: tuple[Part, ...]
    method: str
    order: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Callable[[pd.DataFrame], pd.Series[Any]]] = field(default_factory=dict)
    group: str | None = None
    heading: str = ""

    def groups(self, data: pd.DataFrame) -> Iterator[pd.DataFrame]:
        """Yield the rows of each group."""
        if self.group is None:
            yield data
        else:
            yield from (rows for _, rows in data.groupby(self.group, sort=False))

    def markdown(self, data: pd.DataFrame, outputs: Outputs) -> Iterator[str]:
        """Yield the section."""
        yield f"## {self.title}\n"
        for rows in self.groups(data):
            if self.heading:
                yield f"{self.heading.format(**words(rows))}\n"
            for part in self.parts:
                yield from part.markdown(rows, self, outputs)
        facts = dict(self.facts) | {"rounds": pages.rounds(data)}
        if "steps" in data:
            facts["steps"] = pages.joined(data.steps)
        yield self.method.format(**facts)

    def lines(self, data: pd.DataFrame) -> list[str]:
        """Return what was found, in a few lines."""
        return [line for rows in self.groups(data) for part in self.parts for line in part.lines(rows, self)]

    def pictures(self, data: pd.DataFrame, outputs: Outputs) -> Iterator[tuple[Path, Figure]]:
        """Yield the pictures, and where they go."""
        for rows in self.groups(data):
            for part in self.parts:
                if isinstance(part, Picture):
                    yield from ((outputs.image(*part.file(r)), part.draw(r)) for r in part.panels(rows))


def words(rows: pd.DataFrame) -> dict[str, str]:
    """Return the first row's values as headings have them: threads with their noun, and in capitals too."""
    first = {str(name): value for name, value in rows.iloc[0].items()}
    first["threads"] = plural(first["threads"], "thread")
    return {name: str(value) for name, value in first.items()} | {
        name.upper(): str(value).upper() for name, value in first.items()
    }


@dataclass(frozen=True)
class Environments(Part):
    """Where the rows were measured: the column that names the device, and packages by their columns."""

    device: str = "machine"
    packages: Mapping[str, str] = field(default_factory=lambda: pages.PACKAGES)

    def markdown(self, data: pd.DataFrame, report: Report, outputs: Outputs) -> Iterator[str]:
        """Yield a line for each run."""
        yield from (f"{line}\n" for line in pages.environments(data, self.device, self.packages))


@dataclass(frozen=True)
class Against:
    """What this package's speed is compared with.

    Attributes:
        head: of the column.
        peers: the fastest of these counts, by the medians.
        value: the ratio from this package's rows instead.
    """

    head: str
    peers: Sequence[str] = ()
    value: Callable[[pd.DataFrame], pd.Series[float]] | None = None


def in_rounds(rows: pd.DataFrame) -> pd.Series[float]:
    """Return the ratios to PyTorch within the same rounds."""
    return rows.ratio_to_torch


def compared(data: pd.DataFrame, keys: Sequence[str], against: Sequence[Against]) -> pd.DataFrame:
    """Return a row for each point: its keys, and this package's speed by the heads."""
    points = data.drop_duplicates(list(keys)).set_index(list(keys)).index
    by_peer = {str(peer): rows.set_index(list(keys)) for peer, rows in data.groupby("peer", sort=False)}
    ours = by_peer.get(OURS, data.iloc[:0].set_index(list(keys))).reindex(points)
    found = {}
    for each in against:
        if each.value is not None:
            found[each.head] = each.value(ours)
            continue
        times = [by_peer[peer].median_us.reindex(points) for peer in each.peers if peer in by_peer]
        fastest = pd.concat(times, axis=1).min(axis=1) if times else float("nan")
        found[each.head] = fastest / ours.median_us
    return pd.DataFrame(found, index=points).reset_index()


@dataclass(frozen=True)
class Summary(Part):
    """Geometric means of this package's speed over others', and the least.

    Attributes:
        keys: the heads of the columns that make its rows.
        against: what it is compared with.
        line: what the command says of a row: ``{keys}``, ``{all}`` comparisons with their heads, and each
            by its number.
        worst: what the line says of the point with the least of the first ratios.
        total: a column; each of its values has a row for all else together.
        text: what stands before the table; None for no table.
    """

    keys: Mapping[str, str]
    against: tuple[Against, ...]
    line: str
    worst: str = ""
    total: str | None = None
    text: str | None = (
        "Speed of `layernorm` relative to others': geometric means, the least of all points in brackets:"
    )

    def markdown(self, data: pd.DataFrame, report: Report, outputs: Outputs) -> Iterator[str]:
        """Yield the table."""
        if self.text is None:
            return
        table = compared(data, report.benchmark.keys, self.against)
        groups = [([*key], part) for key, part in table.groupby(list(self.keys), sort=False)]
        if self.total is not None:
            for value, part in table.groupby(self.total, sort=False):
                groups.append((["all"] * (len(self.keys) - 1) + [value], part))
        body = [[*map(str, key), str(self._count(part)), *self._means(part)] for key, part in groups]
        heads = [*self.keys.values(), "points", *(each.head for each in self.against)]
        yield f"{self.text}\n"
        yield pages.markdown(heads, align(self.keys, report) + "r" * (1 + len(self.against)), body)

    def lines(self, data: pd.DataFrame, report: Report) -> Iterator[str]:
        """Yield a line for each row of the table."""
        table = compared(data, report.benchmark.keys, self.against)
        for _, part in table.groupby(list(self.keys), sort=False):
            named, means = words(part), self._means(part)
            each = [f"{one.head} {mean}" for one, mean in zip(self.against, means, strict=True)]
            keys = ", ".join(named[name] for name in self.keys)
            line = self.line.format(*means, keys=keys, all=", ".join(each))
            known = part[part[self.against[0].head].notna()]
            if self.worst and len(known):
                line += self.worst.format(**words(known.sort_values(self.against[0].head)))
            yield line

    def _means(self, part: pd.DataFrame) -> list[str]:
        return [pages.mean_and_worst(part[each.head]) for each in self.against]

    def _count(self, part: pd.DataFrame) -> int:
        return int(part[[each.head for each in self.against]].notna().any(axis=1).sum())


@dataclass(frozen=True)
class Slower(Part):
    """The points at which PyTorch is faster.

    Attributes:
        columns: that name a point, and their heads.
        than: what PyTorch's is.
        most: how many are named, None for all.
    """

    columns: Mapping[str, str]
    than: str
    most: int | None = None

    def markdown(self, data: pd.DataFrame, report: Report, outputs: Outputs) -> Iterator[str]:
        """Yield a sentence, and a table where there are such points."""
        ours = data[(data.peer == OURS) & data.ratio_to_torch.notna()]
        slow = ours[ours.ratio_to_torch < 1].sort_values("ratio_to_torch", kind="stable")
        if slow.empty:
            yield f"`{OURS}` is at no point of {len(ours)} slower than {self.than}.\n"
            return
        some = self.most is not None and len(slow) > self.most
        which = "of which these are the slowest" if some else "the slowest first"
        yield (
            f"`{OURS}` is slower than {self.than} at {len(slow)} of {len(ours)} points, {which}; where the "
            "quartiles reach 1 the two may be equal:\n"
        )
        rows = slow.head(self.most or len(slow)).to_dict("records")
        body = [[*(str(row[name]) for name in self.columns), pages.ratio(row)] for row in rows]
        yield pages.markdown([*self.columns.values(), "ratio"], align(self.columns, report) + "r", body)


@dataclass(frozen=True)
class Picture(Part):
    """A picture, or one for each value of some columns.

    Attributes:
        draw: draws rows.
        name: the parts of the file's name, from a row's words.
        text: what the picture shows.
        by: these columns.
        ours: whether it shows this package's measured rows only; without any there is no picture.
    """

    draw: Callable[[pd.DataFrame], Figure]
    name: Callable[[Mapping[str, str]], Sequence[str]]
    text: str
    by: tuple[str, ...] = ()
    ours: bool = False

    def panels(self, data: pd.DataFrame) -> Iterator[pd.DataFrame]:
        """Yield the rows of each picture."""
        rows = data[(data.peer == OURS) & data.ratio_to_torch.notna()] if self.ours else data
        if self.by:
            yield from (part for _, part in rows.groupby(list(self.by)))
        elif len(rows):
            yield rows

    def file(self, rows: pd.DataFrame) -> list[str]:
        """Return the parts of the file's name."""
        return [part.replace(" ", "-") for part in self.name(words(rows))]

    def markdown(self, data: pd.DataFrame, report: Report, outputs: Outputs) -> Iterator[str]:
        """Yield the links."""
        for rows in self.panels(data):
            image = os.path.relpath(outputs.image(*self.file(rows)), outputs.page.parent)
            yield f"![{self.text.format(**words(rows))}]({Path(image).as_posix()})\n"


@dataclass(frozen=True)
class Column:
    """A column of a table of points: from this package's row, and all rows of the point."""

    head: str
    text: Callable[[Row, pd.DataFrame], str]


RATIO = Column("ratio", lambda ours, point: pages.ratio(ours))


def shared(head: str, column: str) -> Column:
    """Return a column of microseconds that all peers of a point share."""

    def text(ours: Row, point: pd.DataFrame) -> str:
        known = point[column].dropna()
        return pages.microseconds(known.iloc[0]) if len(known) else "–"

    return Column(head, text)


def own(head: str, value: Callable[[Row], float], form: str | None = None) -> Column:
    """Return a column of this package's figures, as microseconds or in another form."""

    def text(ours: Row, point: pd.DataFrame) -> str:
        found = value(ours)
        return "–" if pd.isna(found) else form.format(found) if form else pages.microseconds(found)

    return Column(head, text)


@dataclass(frozen=True)
class Points(Part):
    """Tables of all points, with the time of each peer.

    Attributes:
        keys: the columns that begin a row, and their heads.
        columns: what follows the peers' times.
        text: what stands before a table.
        by: a table for each value of these columns.
        heading: of a table.
    """

    keys: Mapping[str, str]
    columns: tuple[Column, ...]
    text: str
    by: tuple[str, ...] = ()
    heading: str = ""

    def markdown(self, data: pd.DataFrame, report: Report, outputs: Outputs) -> Iterator[str]:
        """Yield the tables."""
        tables = [rows for _, rows in data.groupby(list(self.by), sort=False)] if self.by else [data]
        for rows in tables:
            if self.heading:
                yield f"{self.heading.format(**words(rows))}\n"
            yield f"{self.text}\n"
            yield self._table(rows, report)

    def _table(self, rows: pd.DataFrame, report: Report) -> str:
        peers = present(rows, report.benchmark)
        body = []
        for _, point in rows.groupby(list(report.benchmark.keys), sort=False):
            found = {row["peer"]: row for row in point.to_dict("records")}
            ours = found.get(OURS, next(iter(found.values())))
            times = (pages.time(found[peer]) if peer in found else "–" for peer in peers)
            figures = (column.text(ours, point) for column in self.columns)
            body.append([*(str(ours[name]) for name in self.keys), *times, *figures])
        heads = [*self.keys.values(), *peers, *(column.head for column in self.columns)]
        return pages.markdown(heads, align(self.keys, report) + "r" * (len(heads) - len(self.keys)), body)


@dataclass(frozen=True)
class Memory(Part):
    """Megabytes of each peer in training.

    Attributes:
        column: has the bytes.
        heading: of the table.
        text: what stands before it.
    """

    column: str
    heading: str
    text: str

    def markdown(self, data: pd.DataFrame, report: Report, outputs: Outputs) -> Iterator[str]:
        """Yield the table, if there are figures."""
        rows = data[data[self.column].notna()]
        if rows.empty:
            return
        peers, keys = present(rows, report.benchmark), ["cell", "dtype", "batch", "hidden"]
        body = [
            [*(str(row[name]) for name in keys), *(_megabytes(row[peer]) for peer in peers)]
            for row in pages.by_peer(rows, keys, self.column).to_dict("records")
        ]
        yield f"{self.heading}\n"
        yield f"{self.text}\n"
        yield pages.markdown([*keys, *peers], align(keys, report) + "r" * len(peers), body)


def _megabytes(value: float) -> str:
    return "–" if pd.isna(value) else f"{value / 1e6:,.0f}" if value >= 1e8 else f"{value / 1e6:.3g}"


def present(rows: pd.DataFrame, benchmark: Benchmark) -> list[str]:
    """Return the peers that have rows, in the order of tables."""
    found = set(rows.peer)
    return [peer for peer in benchmark.peers if peer in found]


def align(columns: Sequence[str] | Mapping[str, str], report: Report) -> str:
    """Return an "r" for each column of numbers or sizes and an "l" for each other one."""
    right = {*report.benchmark.numbers, *report.derived}
    return "".join("r" if name in right else "l" for name in columns)


def as_given(*columns: str) -> dict[str, str]:
    """Return columns whose heads are their names."""
    return {name: name for name in columns}
