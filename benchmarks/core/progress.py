"""The display of a benchmark: which point is measured now, and what the last one gave."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from layernorm.arguments import printable, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def console() -> Console | None:
    """Return rich's console, or None where rich is not installed and lines are printed as they are."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    return Console()


def show(where: Console | None, text: str) -> None:
    """Print a line."""
    if where is None:
        sys.stdout.write(printable(text) + "\n")
        sys.stdout.flush()
    else:
        say(where, text)


class Display:
    """One line that changes; where there is no terminal, one line for each point.

    Args:
        console: where to show it.
        points: how many there are.
    """

    def __init__(self, console: Console | None, points: int) -> None:
        self._console, self._points, self._done = console, points, 0
        self._progress = None if console is None or not console.is_terminal else _progress(console)
        if self._progress is not None:
            self._line = self._progress.add_task(f"point 0/{points}", total=points, text="starting")

    def __enter__(self) -> Self:
        """Start to show."""
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        if self._progress is not None:
            self._progress.stop()

    def begin(self) -> None:
        """Show that the next point is being measured."""
        if self._progress is not None:
            self._progress.update(self._line, description=f"point {self._done + 1}/{self._points}")

    def finish(self, text: str) -> None:
        """Show that a point is done; the text says what it gave."""
        self._done += 1
        if self._progress is not None:
            self._progress.update(self._line, completed=self._done, text=text)
        else:
            self.say(f"[{self._done}/{self._points}] {text}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        show(self._console, text)


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
        # Drawing takes time from what is measured.
        refresh_per_second=1,
    )
