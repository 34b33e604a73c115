"""Runs a study into its folder, which the report reads again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from layernorm.arguments import say
from layernorm.experiments import registry
from layernorm.experiments.report import drawing, page
from layernorm.experiments.results import folder, results_table, terminal
from layernorm.experiments.section import Section, Table


def run(
    name: str, out: Path, console: Console, preset: str = "small", sizes: Mapping[str, Any] | None = None
) -> Path:
    """Measure what is not yet measured, write the report, print the tables and the cards.

    Args:
        name: of the study.
        out: its folder.
        console: where progress, tables and cards go.
        preset: its size.
        sizes: what replaces the preset's.

    Returns:
        The path of the report.

    Raises:
        ExperimentError: something that the user can mend, or another command in the folder.
        OSError: a file cannot be written.
    """
    study = registry.find_study(name)
    chosen = {**study.presets[preset], **(sizes or {})}
    settings = {"study": name, "preset": preset, "sizes": chosen}
    with folder.opened(out):
        if damage := folder.check(out, settings, ("study", "sizes")):
            say(console, f"{damage}; it is written anew")
        folder.write(out, settings, shlex.join(("layernorm", name, "--preset", preset)))
        study.run(out, partial(say, console), **chosen)
        section = read(out)
        for chart in section.charts:
            drawing.save(chart, out)
        path = page.write(out / "report.html", f"layernorm {name}", [section])
    for table in section.tables:
        show(console, table)
    terminal.show_cards(console, section.cards)
    say(console, f"Report: {path}")
    return path


def read(out: Path) -> Section:
    """Return what the report shows of a study's folder.

    Raises:
        ExperimentError: the folder holds none, or is damaged.
    """
    config = folder.read(out)
    section = registry.find_study(config["study"]).read(out)
    return Section(
        **{
            **vars(section),
            "command": config["command"],
            "facts": (*section.facts, *results_table.facts(config)),
        }
    )


def show(console: Console, table: Table) -> None:
    """Print a table."""
    console.print()
    say(console, table.caption)
    terminal.show_table(console, table.columns, table.rows)
    if table.note:
        console.print(Text(table.note, "dim"))
