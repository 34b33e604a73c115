"""Tables and cards in terminals of several widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from layernorm.experiments.results.terminal import show_cards, show_table
from layernorm.experiments.section import Card

COLUMNS = ["batch", "norm", "best test error (%)", "epochs to baseline's best", "final training loss"]
ROWS = [
    ["128", "none", "4.81 ± 0.38", "14.47 ± 0.33", "0.149 ± 0.01"],
    ["4", "[red]x", "1.19", "4.25", "1e-4"],
]
ADDRESS = "https://example.org/" + "/".join(["a-folder-of-some-length"] * 6) + "/data.zip"


def shown(show, *arguments, width, terminal=True, **options):
    file = io.StringIO()
    show(Console(file=file, width=width, force_terminal=terminal, no_color=True), *arguments, **options)
    return file.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()


@pytest.mark.parametrize("width", [30, 50, 80, 120])
def test_a_table_never_wraps_and_names_what_it_leaves_out(width):
    lines = shown(show_table, COLUMNS, ROWS, width=width, right={"batch"})
    assert len(lines) == (3 if width == 120 else 4)
    assert max(map(len, lines[:3])) <= width
    there = [column for column in COLUMNS if column in lines[0]]
    assert there == COLUMNS[: len(there)]
    assert lines[3:] == ([] if width == 120 else [f"(no room here for: {', '.join(COLUMNS[len(there) :])})"])
    assert lines[1].startswith("  128  none")
    assert lines[2].startswith("    4  [red]x")


def test_in_a_file_a_table_is_whole():
    lines = shown(show_table, COLUMNS, ROWS, width=30, terminal=False)
    assert len(lines) == 3
    assert all(column in lines[0] for column in COLUMNS)


@pytest.mark.parametrize("width", [30, 80])
def test_an_address_in_a_card_stays_whole(width):
    card = Card(
        "A claim of many words that does not fit", "§6", "1 against 2", "not run", f"Put {ADDRESS} there."
    )
    lines = shown(show_cards, [card], width=width)
    assert any(ADDRESS in line for line in lines)
    assert all(len(line) <= max(width, 40) or ADDRESS in line for line in lines)
    assert "not run" in lines
