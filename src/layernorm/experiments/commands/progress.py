"""The display of a comparison: what runs now, its losses, and the time left for the whole."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from layernorm.arguments import say
from layernorm.experiments.run.training import Record, Run, Trainer
from layernorm.experiments.task import Metric


class Display:
    """One live display for all runs; where there is no terminal, one line for each run.

    Args:
        console: where to show it.
        updates: the updates of each run, in the order of the runs.
        epochs: of each run.
        metric: the one to show.
    """

    def __init__(self, console: Console, updates: Mapping[Run, int], epochs: int, metric: Metric) -> None:
        self._console, self._updates, self._epochs = console, dict(updates), epochs
        self._metric = metric
        self._done = 0
        self._seconds: dict[Run, float] = {}  # of one update, of the runs seen in this session
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._whole = self._progress.add_task("whole comparison", total=sum(updates.values()), text="")
        self._line: TaskID | None = None
        self._first, self._shown, self._began = 0, 0, 0.0

    def __enter__(self) -> Self:
        """Start to show."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()

    def skip(self, run: Run) -> None:
        """Count a run that was finished by an earlier command."""
        self._done += 1
        self._progress.advance(self._whole, self._updates[run])
        self._say(run, "finished before")

    def start(self, trainer: Trainer) -> None:
        """Show that a run begins, or continues from its checkpoint."""
        self._first = self._shown = trainer.update
        self._began = time.monotonic()
        if trainer.update:
            self._say(trainer.run, f"goes on from update {trainer.update} of {trainer.updates}")
        self._progress.advance(self._whole, trainer.update)
        self._line = self._progress.add_task(
            _name(trainer.run), total=trainer.updates, completed=trainer.update, text=""
        )

    def advance(self, trainer: Trainer) -> None:
        """Show how far a run has come."""
        if self._line is None or trainer.update == self._first:
            return
        spent = time.monotonic() - self._began
        self._seconds[trainer.run] = spent / (trainer.update - self._first)
        last = trainer.records[-1]
        loss = "" if last["train_loss"] is None else f"loss {last['train_loss']:.4f}, "
        epoch = trainer.update / trainer.updates * self._epochs
        text = f"epoch {epoch:.1f}/{self._epochs}, {loss}{self._value(last[self._metric.name])}"
        self._progress.update(self._line, completed=trainer.update, text=text)
        self._progress.advance(self._whole, trainer.update - self._shown)
        self._shown = trainer.update
        left = duration(self._left(trainer))
        self._progress.update(self._whole, text=f"{self._done}/{len(self._updates)} runs, {left} left")

    def finish(self, run: Run, records: Sequence[Record]) -> None:
        """Show that a run has ended, here or elsewhere."""
        self._done += 1
        if self._line is not None:
            self._progress.remove_task(self._line)
            self._line = None
        else:
            self._progress.advance(self._whole, self._updates[run])
        self._progress.update(self._whole, text=f"{self._done}/{len(self._updates)} runs")
        spent = duration(records[-1]["seconds"])
        self._say(run, f"{self._value(records[-1][self._metric.name])}, {spent} of training")

    def say(self, run: Run, text: str) -> None:
        """Show something else about a run."""
        self._say(run, text)

    def _value(self, value: float) -> str:
        return f"{self._metric.label} {self._metric.form.format(value)}"

    def _say(self, run: Run, text: str) -> None:
        count = f"[{self._done}/{len(self._updates)}]"
        say(self._console, f"{count} {_name(run)}: {text}")

    def _left(self, trainer: Trainer) -> float:
        """Estimate the seconds until all runs are done."""
        this = (trainer.updates - trainer.update) * self._seconds[trainer.run]
        pending = list(self._updates)[self._done + 1 :]
        return this + sum(self._updates[run] * self._cost(run) for run in pending)

    def _cost(self, run: Run) -> float:
        """Estimate the seconds for an update from runs of the same norm and batch size, or near it."""
        likeness = {
            other: 2 * (other.batch_size == run.batch_size) + (other.norm == run.norm)
            for other in self._seconds
        }
        most = max(likeness.values())
        nearest = [self._seconds[other] for other, alike in likeness.items() if alike == most]
        return sum(nearest) / len(nearest)


def duration(seconds: float) -> str:
    """Show seconds as minutes and seconds, with hours where there are any.

    Examples:
        >>> from layernorm.experiments.commands.progress import duration
        >>> duration(75), duration(3675)
        ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _name(run: Run) -> str:
    warmup = f", warm-up {run.warmup}" if run.warmup else ""
    return f"{run.norm}, batch {run.batch_size}, rate {run.learning_rate:g}{warmup}, seed {run.seed}"
