"""The display of a benchmark: which point is measured now, and what the last one gave."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from layernorm.arguments import say


class Display:
    """One line that changes; where there is no terminal, one line for each point.

    Args:
        console: where to show it.
        points: how many there are.
    """

    def __init__(self, console: Console, points: int) -> None:
        self._console, self._points, self._done = console, points, 0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            # Drawing takes time from what is measured.
            refresh_per_second=1,
        )
        self._line = self._progress.add_task(f"point 0/{points}", total=points, text="starting")

    def __enter__(self) -> Self:
        """Start to show."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()

    def begin(self) -> None:
        """Show that the next point is being measured."""
        self._progress.update(self._line, description=f"point {self._done + 1}/{self._points}")

    def finish(self, text: str) -> None:
        """Show that a point is done; the text says what it gave."""
        self._done += 1
        self._progress.update(self._line, completed=self._done, text=text)
        if not self._console.is_terminal:
            self.say(f"[{self._done}/{self._points}] {text}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        say(self._console, text)
