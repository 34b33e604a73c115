"""Runs a study into its folder, which the report reads again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from layernorm.experiments import drawing, folder, report, results
from layernorm.experiments import task as tasks
from layernorm.experiments.section import Card, Section, Table


def run(
    name: str, out: Path, console: Console, preset: str = "small", sizes: Mapping[str, Any] | None = None
) -> Path:
    """Measures what is not yet measured, writes the report, prints the tables and the cards.

    Args:
        name: of the study.
        out: its folder.
        console: where progress, tables and cards go.
        preset: its size.
        sizes: what replaces the preset's.

    Returns:
        The path of the report.

    Raises:
        ExperimentError: something that the user can mend.
    """
    study = tasks.find_study(name)
    chosen = {**study.presets[preset], **(sizes or {})}
    settings = {"study": name, "preset": preset, "sizes": chosen}
    folder.prepare(out, settings, ("study", "sizes"))
    folder.write(out, settings, shlex.join(("layernorm", name, "--preset", preset)))
    study.run(out, lambda line: console.print(line, highlight=False, markup=False), **chosen)
    section = read(out)
    for chart in section.charts:
        drawing.save(chart, out)
    path = report.write(out / "report.html", f"layernorm {name}", [section])
    for table in section.tables:
        show(console, table)
    show_cards(console, section.cards)
    console.print(f"Report: {path}", soft_wrap=True, highlight=False)
    return path


def read(out: Path) -> Section:
    """What the report shows of a study's folder.

    Raises:
        ExperimentError: the folder holds none, or is damaged.
    """
    config = folder.read(out)
    section = tasks.find_study(config["study"]).read(out)
    return Section(
        **{
            **vars(section),
            "command": config["command"],
            "facts": (*section.facts, *results.facts(config)),
        }
    )


def show(console: Console, table: Table) -> None:
    """Prints a table."""
    console.print(f"\n{table.caption}", highlight=False, markup=False)
    shown = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in table.columns:
        shown.add_column(column)
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)
    if table.note:
        console.print(table.note, style="dim", highlight=False, markup=False)


def show_cards(console: Console, cards: Sequence[Card]) -> None:
    """Prints what was claimed, what was measured, and whether the two agree."""
    shown = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("verdict", "claim", "measured"):
        shown.add_column(heading)
    for card in cards:
        remark = f" {card.remark}" if card.remark else ""
        shown.add_row(card.verdict, f"{card.claim} ({card.section})", f"{card.figure}{remark}")
    console.print()
    console.print(shown, highlight=False, markup=False)
