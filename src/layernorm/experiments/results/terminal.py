"""Tables and cards in a terminal of any width: nothing in them is wrapped inside a cell or cut."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from typing import Final

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from layernorm.arguments import printable, say
from layernorm.experiments.section import Card

_GAP: Final = 2


def show_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[str] = (),
) -> None:
    """Print a table; the last columns that a terminal has no room for are named below it instead.

    Args:
        console: where to.
        columns: their headings.
        rows: the texts of each.
        right: the columns to justify to the right.

    Examples:
        >>> from rich.console import Console
        >>> from layernorm.experiments.results.terminal import show_table
        >>> console = Console(width=12, force_terminal=True, color_system=None)
        >>> show_table(console, ["a", "wide"], [["1", "x" * 10]])
        a
        1
        (no room here for: wide)
    """
    widths = [
        max(cell_len(printable(text)) for text in texts) + _GAP for texts in zip(columns, *rows, strict=True)
    ]
    shown = len(columns)
    while console.is_terminal and shown > 1 and sum(widths[:shown]) - _GAP > console.width:
        shown -= 1
    for line, texts in enumerate((columns, *rows)):
        cells = [
            _padded(text, width, column in right)
            for text, width, column in zip(texts[:shown], widths, columns, strict=False)
        ]
        console.print(Text("".join(cells).rstrip(), "" if line else "bold"), soft_wrap=True)
    if shown < len(columns):
        say(console, f"(no room here for: {', '.join(columns[shown:])})")


def _padded(text: str, width: int, to_the_right: bool) -> str:
    text = printable(text)
    space = " " * (width - _GAP - cell_len(text))
    return f"{space}{text}{' ' * _GAP}" if to_the_right else f"{text}{space}{' ' * _GAP}"


def show_cards(console: Console, cards: Sequence[Card]) -> None:
    """Print what was claimed, what was measured, and whether the two agree; addresses stay whole."""
    width = max(40, console.width)
    for card in cards:
        console.print()
        console.print(Text(card.verdict, "bold"))
        remark = f" {card.remark[0].upper()}{card.remark[1:]}" if card.remark else ""
        for heading, text in (
            ("claim", f"{card.claim} ({card.section})"),
            ("measured", card.figure + remark),
        ):
            lines = textwrap.wrap(
                f"{heading + ':':<10}{printable(text)}",
                width,
                initial_indent="  ",
                subsequent_indent=" " * 12,
                break_long_words=False,
                break_on_hyphens=False,
            )
            for line in lines:
                say(console, line)
