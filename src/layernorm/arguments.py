"""Shared by all commands: a parser that says in one line what is wrong, and types of arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """End the program with code 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def printable(text: str) -> str:
    r"""Return a text in one line: of what cannot be printed, or is no character at all, the escapes.

    Examples:
        >>> from layernorm.arguments import printable
        >>> printable("a\nb\x1b[31m")
        'a\\nb\\x1b[31m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(console: Console, text: str) -> None:
    r"""Print a line as it is: no markup in it, no emoji, and of what cannot be printed the escapes.

    Examples:
        >>> from rich.console import Console
        >>> from layernorm.arguments import say
        >>> say(Console(), "x[/b]y [red]q :cat:\a")
        x[/b]y [red]q :cat:\x07
    """
    from rich.text import Text

    console.print(Text(printable(text)), soft_wrap=True)


def names(text: str) -> tuple[str, ...]:
    """Split names separated by commas, each once.

    Examples:
        >>> from layernorm.arguments import names
        >>> names("none, layer,none")
        ('none', 'layer')
    """
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return found


def some_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return the type of an argument that holds some of ``choices``, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        found = names(text)
        for name in found:
            if name not in choices:
                raise argparse.ArgumentTypeError(
                    f"expected some of {', '.join(choices)}, separated by commas; got {name!r}"
                )
        return found

    return parse


def positive(text: str) -> int:
    """Convert text to a whole number of at least 1."""
    return _whole_number(text, 1)


def _whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return value


def positives(text: str) -> tuple[int, ...]:
    """Convert text to whole numbers of at least 1 separated by commas, each once."""
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def from_0(text: str) -> tuple[int, ...]:
    """Convert text to whole numbers of at least 0 separated by commas, each once."""
    return tuple(dict.fromkeys(_whole_number(part, 0) for part in text.split(",")))


def rates(text: str) -> tuple[float, ...]:
    """Convert text to numbers greater than 0 separated by commas, each once.

    Examples:
        >>> from layernorm.arguments import rates
        >>> rates("3e-4,0.001")
        (0.0003, 0.001)
    """
    return tuple(dict.fromkeys(number(0.0, above=True)(part) for part in text.split(",")))


def number(least: float, above: bool = False) -> Callable[[str], float]:
    """Return the type of an argument that is a finite number of at least ``least``, or greater than it.

    Examples:
        >>> from layernorm.arguments import number
        >>> number(0.0)("0.5")
        0.5
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or value == math.inf:
            bound = "greater than" if above else "of at least"
            raise argparse.ArgumentTypeError(f"expected a number {bound} {least:g}, got {text!r}")
        return value

    return parse


def seconds(text: str) -> float:
    """Convert text to a number of seconds greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds greater than 0, got {text!r}")
    return value
