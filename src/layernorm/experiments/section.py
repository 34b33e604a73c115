"""The results of an experiment as data: cards, charts, tables and pictures, which are drawn elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

#: Whether what was measured is what the paper claims; see ``results.judging``.
Verdict: TypeAlias = Literal["agrees", "partly", "differs", "cannot tell", "not converged", "not run"]


@dataclass(frozen=True)
class Card:
    """One claim of the paper and the measurement that tests it.

    Attributes:
        claim: of the paper, in a sentence.
        section: of the paper, as "§6.6, figure 6".
        figure: what was measured, in a sentence with its numbers.
        verdict: whether the two go together.
        remark: why, where they do not.
    """

    claim: str
    section: str
    figure: str
    verdict: Verdict
    remark: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a panel: a name, which also gives its looks, and its points.

    Attributes:
        name: as in the legend; lines of one name look alike in all panels of all charts.
        x: where.
        y: the values.
        low: the lower edge of a band around the line, or empty.
        high: the upper edge.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        x_label: with unit.
        y_label: with unit.
        lines: in the order of the legend.
        x_log: whether the x axis is logarithmic.
        y_log: whether the y axis is.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    x_log: bool = False
    y_log: bool = False


@dataclass(frozen=True)
class Chart:
    """Panels in rows and columns; those of a row share what they measure.

    Attributes:
        name: of the files it is drawn into.
        caption: one sentence.
        rows: the panels.
    """

    name: str
    caption: str
    rows: Sequence[Sequence[Panel]]


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        caption: one sentence, above it.
        columns: the headings.
        rows: each as long as ``columns``.
        note: below it.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file, or its content, and what is on it."""

    png: Path | bytes
    caption: str


@dataclass(frozen=True)
class Background:
    """Hold what a reader may want to look up, folded at the end of a page.

    Attributes:
        title: a heading.
        tables: in their order.
        pictures: above them.
    """

    title: str
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Section:
    """All that the report shows of one experiment.

    Attributes:
        name: of the experiment, as on the command line.
        title: a heading.
        summary: data, network, optimizer, sizes.
        command: what was run.
        cards: the claims.
        tables: in their order.
        charts: in their order.
        pictures: samples.
        facts: names and values: versions, machine, date.
    """

    name: str
    title: str
    summary: str
    command: str
    cards: Sequence[Card] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    pictures: Sequence[Picture] = ()
    facts: Sequence[tuple[str, str]] = field(default=())
