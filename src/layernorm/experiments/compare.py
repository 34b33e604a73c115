"""The comparison: every norm at every batch size with every seed, kept on disk as it goes.

A folder holds ``config.json``, ``results.csv`` and ``results.parquet``, ``curves.png`` and ``curves.svg``,
``report.html``, the pictures of ``samples/``, and in ``runs/`` one CSV file for each finished run and a
checkpoint for an unfinished one. Every file is replaced whole. The same command goes on where an earlier one
was stopped.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pandas as pd
import torch
from rich.console import Console

from layernorm.experiments import drawing, folder, processes, report, results
from layernorm.experiments import task as tasks
from layernorm.experiments.files import replacing
from layernorm.experiments.progress import Display
from layernorm.experiments.section import Section
from layernorm.experiments.task import ExperimentError, Preset, Problem, Task
from layernorm.experiments.training import Interrupted, Precision, Record, Run, Trainer

#: What a folder holds one value of; norms, batch sizes and seeds can be added to it.
_FIXED: Final = (
    "task", "epochs", "learning_rate", "optimizer", "schedule", "warmup", "clip", "evaluate_every", "sizes",
    "device", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        task: the task's name.
        preset: its size, with what the command line changed.
        out: the folder for everything.
        preset_name: of the preset, before changes.
        device: where to train, as ``torch.device`` takes it; "cuda" is each process's own GPU.
        precision: of the forward pass.
        save_weights: whether the trained networks' state dicts are kept in ``runs/``.
        tensorboard: whether the records also go to ``tensorboard/``.
        command: what was typed.
    """

    task: str
    preset: Preset
    out: Path
    preset_name: str = "small"
    device: str = "cpu"
    precision: Precision = "float32"
    save_weights: bool = False
    tensorboard: bool = False
    command: str = ""

    @property
    def runs(self) -> list[Run]:
        """All runs: seed by seed, so that an unfinished comparison is even."""
        return [
            Run(norm, batch_size, seed)
            for seed in range(self.preset.seeds)
            for batch_size in self.preset.batch_sizes
            for norm in self.preset.norms
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """What ``config.json`` says of it."""
        preset = {field.name: getattr(self.preset, field.name) for field in dataclasses.fields(Preset)}
        return {
            "task": self.task,
            "preset": self.preset_name,
            **preset | {"sizes": dict(self.preset.sizes)},
            "device": torch.device(self.device).type,
            "precision": self.precision,
        }

    @property
    def identity(self) -> str:
        """What a checkpoint must agree with, in one line."""
        return " ".join(f"{name}={self.settings[name]}" for name in _FIXED)

    def path(self, run: Run, suffix: str) -> Path:
        """A file of a run."""
        return self.out / "runs" / f"{run.name}{suffix}"


Sweep = Callable[[Comparison, list[Run], "Display"], None]


def compare(comparison: Comparison, console: Console, sweep: Sweep | None = None) -> Path:
    """Trains what is not yet trained, writes all results, and prints the summary.

    Args:
        comparison: what is compared.
        console: where progress and summary go; with several processes, that of process 0.
        sweep: trains the runs it is given, elsewhere; None trains them here one after another.

    Returns:
        The path of the report.

    Raises:
        ExperimentError: an argument or a file that the user can mend.
        Interrupted: by Ctrl-C or SIGTERM; what was reached is kept.
    """
    task = tasks.find(comparison.task)
    check(comparison, task)
    leads = processes.rank() == 0
    problem = task.problem(**comparison.preset.sizes)
    _check_sizes(comparison, problem)
    if leads:
        folder.prepare(comparison.out, comparison.settings, _FIXED)
        (comparison.out / "runs").mkdir(exist_ok=True)
        folder.write(comparison.out, comparison.settings, comparison.command or _command(comparison))
    updates = {run: problem.cases // run.batch_size * comparison.preset.epochs for run in comparison.runs}
    try:
        with (
            stop_flag() as stop,
            Display(console, updates, comparison.preset.epochs, task.metrics[0]) as display,
        ):
            finished = [run for run in comparison.runs if comparison.path(run, ".csv").is_file()]
            finished = processes.from_leader(finished)
            for run in finished:
                display.skip(run)
            missing = [run for run in comparison.runs if run not in finished]
            if sweep is not None:
                sweep(comparison, missing, display)
            else:
                for run in missing:
                    train(comparison, run, problem, display, stop)
    finally:
        # What is finished is in the table, however this ends.
        table = results.collect(comparison.runs, comparison.out / "runs", task) if leads else pd.DataFrame()
        if not table.empty:
            results.write(table, comparison.out)
    path = comparison.out / "report.html"
    if leads:
        shown = read(comparison.out)
        drawing.save(shown.charts[0], comparison.out)
        report.write(path, f"layernorm compare {task.name}", [shown])
        metric = task.metrics[0]
        results.show(console, results.summarize(table, comparison.preset.norms, metric), metric)
        console.print(f"Report: {path}", soft_wrap=True, highlight=False)
    return path


def train(
    comparison: Comparison,
    run: Run,
    problem: Problem,
    display: Display | None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains one run to its end and writes its files.

    Raises:
        Interrupted: ``stop`` answered True; the checkpoint holds what was reached.
    """
    device = torch.device(comparison.device)
    problem.to(device)
    checkpoint = comparison.path(run, ".checkpoint")
    trainer = Trainer(
        problem, run, comparison.preset, checkpoint, device, comparison.precision, comparison.identity
    )
    if display is not None:
        display.start(trainer)
    with _log(comparison, trainer) as recorded:
        trainer.train(display.advance if display else lambda trainer: None, stop, recorded)
    if processes.rank() == 0:
        if comparison.save_weights:
            with replacing(comparison.path(run, ".pt")) as fresh:
                torch.save(trainer.network.state_dict(), fresh)
        _write_pictures(comparison, run, problem, trainer)
        with replacing(comparison.path(run, ".csv")) as fresh:
            fresh.write_text(pd.DataFrame(trainer.records).to_csv(index=False))
        checkpoint.unlink(missing_ok=True)
    if display is not None:
        display.finish(run, trainer.records)


def read(path: Path) -> Section:
    """What the report shows of a comparison's folder.

    Raises:
        ExperimentError: the folder holds none, or is damaged.
    """
    config = folder.read(path)
    task = tasks.find(config["task"])
    table = path / "results.csv"
    if not table.is_file():
        raise ExperimentError(f"{path} has no results yet: no run is finished; give its command again")
    return results.section(path, task, config, results.read(table, task))


def check(comparison: Comparison, task: Task) -> None:
    """Sees that a comparison can be run.

    Raises:
        ExperimentError: it cannot; names the option.
    """
    preset = comparison.preset
    for norm in preset.norms:
        if norm not in task.norms:
            raise ExperimentError(
                f"--norms: unknown norm {norm!r} for {task.name}; expected some of {', '.join(task.norms)}"
            )
        if norm == "batch" and 1 in preset.batch_sizes:
            raise ExperimentError("--batch-sizes: batch norm needs at least 2 cases, got 1")
    try:
        torch.zeros(1, device=comparison.device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ExperimentError(f"--device: cannot use {comparison.device!r}: {reason}") from error


def _check_sizes(comparison: Comparison, problem: Problem) -> None:
    for batch_size in comparison.preset.batch_sizes:
        if batch_size > problem.cases:
            raise ExperimentError(
                f"--batch-sizes: {batch_size} is more than the {problem.cases} training cases of "
                f"{comparison.task}"
            )
        if batch_size < processes.count():
            raise ExperimentError(
                f"--batch-sizes: {batch_size} cases cannot be shared among {processes.count()} processes"
            )


def _write_pictures(comparison: Comparison, run: Run, problem: Problem, trainer: Trainer) -> None:
    trainer.network.eval()
    with torch.no_grad():
        figures = problem.pictures(trainer.network)
    for name, figure in figures.items():
        path = comparison.out / "samples" / f"{run.name}-{name}.png"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as fresh:
            figure.savefig(fresh, format="png", dpi=150)


@contextmanager
def _log(comparison: Comparison, trainer: Trainer) -> Iterator[Callable[[Record], None]]:
    """What is called with each record; writes it for TensorBoard where that is wanted."""
    if not comparison.tensorboard or processes.rank() != 0:
        yield lambda record: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ExperimentError(
            f"--tensorboard needs {error.name}: pip install 'layernorm[tensorboard]'"
        ) from error
    place = comparison.out / "tensorboard" / trainer.run.name
    # Anew from the checkpoint's records: what an earlier command logged may go beyond them or be cut off.
    shutil.rmtree(place, ignore_errors=True)
    with SummaryWriter(place) as writer:

        def recorded(record: Record) -> None:
            for name, value in record.items():
                if name not in ("norm", "batch_size", "seed", "update") and value is not None:
                    writer.add_scalar(name, value, record["update"])

        for record in trainer.records:
            recorded(record)
        yield recorded


def _command(comparison: Comparison) -> str:
    """The command that makes this comparison where none was typed."""
    task = tasks.find(comparison.task)
    plain = task.presets.get(comparison.preset_name)
    words = ["layernorm", "compare", comparison.task, "--preset", comparison.preset_name]
    for field in dataclasses.fields(Preset):
        value = getattr(comparison.preset, field.name)
        if plain is None or value == getattr(plain, field.name) or field.name == "sizes":
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{field.name.replace('_', '-')}", text]
    return shlex.join(words)


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C and SIGTERM ask for a stop between two updates.

    Another Ctrl-C a second later or more stops at once, and what was reached since the last checkpoint is
    lost. (One that comes with the first is the same: a terminal and ``torchrun`` both pass it on.)
    """
    asked = math.inf

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if time.monotonic() > asked + 1.0:
            raise KeyboardInterrupt
        asked = min(asked, time.monotonic())

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked < math.inf
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Comparison", "Interrupted", "compare"]
