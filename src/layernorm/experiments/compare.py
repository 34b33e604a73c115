"""The comparison: every norm at every batch size with every seed, kept on disk as it goes.

A folder holds ``config.json``, ``results.csv``, ``curves.png``, ``curves.svg`` and ``report.html``, and in
``runs/`` one CSV file for each finished run and a checkpoint for an unfinished one. Every file is replaced
whole. The same command goes on where an earlier one was stopped.
"""

from __future__ import annotations

import json
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import pandas as pd
import torch
from rich.console import Console

import layernorm
from layernorm import machine
from layernorm.experiments import report
from layernorm.experiments import task as tasks
from layernorm.experiments.files import replacing
from layernorm.experiments.progress import Display
from layernorm.experiments.task import Data, ExperimentError, Task
from layernorm.experiments.training import Interrupted, Record, Run, Trainer


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        task: the task's name.
        norms: each a norm of the task.
        batch_sizes: cases per update.
        epochs: passes over the training cases.
        seeds: repetitions, with seeds 0, 1, ...
        out: the folder for everything.
        learning_rate: of Adam.
        device: where to train, as ``torch.device`` takes it.
    """

    task: str
    norms: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    epochs: int
    seeds: int
    out: Path
    learning_rate: float
    device: str = "cpu"

    @property
    def runs(self) -> list[Run]:
        """All runs: seed by seed, so that an unfinished comparison is even."""
        return [
            Run(norm, batch_size, seed)
            for seed in range(self.seeds)
            for batch_size in self.batch_sizes
            for norm in self.norms
        ]


def compare(comparison: Comparison, console: Console) -> Path:
    """Trains what is not yet trained, writes all results, and prints the summary.

    Returns:
        The path of the report.

    Raises:
        ExperimentError: an argument or a file that the user can mend.
        Interrupted: by Ctrl-C or SIGTERM; what was reached is kept.
    """
    task = replace(tasks.find(comparison.task), learning_rate=comparison.learning_rate)
    _check(comparison, task)
    data = _to(task.data(), comparison.device)
    cases = len(data.train_inputs)
    for batch_size in comparison.batch_sizes:
        if batch_size > cases:
            raise ExperimentError(
                f"--batch-sizes: {batch_size} is more than the {cases} training cases of {task.name}"
            )
    runs_folder = _prepare(comparison)
    config = _config(comparison, task)
    _write(comparison.out / "config.json", json.dumps(config, indent=2) + "\n")
    try:
        updates = {run: cases // run.batch_size * comparison.epochs for run in comparison.runs}
        with _stop_flag() as stop, Display(console, updates, comparison.epochs) as display:
            for run in comparison.runs:
                finished = runs_folder / f"{run.name}.csv"
                checkpoint = finished.with_suffix(".checkpoint")
                if finished.is_file():
                    checkpoint.unlink(missing_ok=True)
                    display.skip(run)
                    continue
                trainer = Trainer(task, data, run, comparison.epochs, checkpoint)
                display.start(trainer)
                trainer.train(display.advance, stop)
                _write(finished, pd.DataFrame(trainer.records).to_csv(index=False))
                checkpoint.unlink(missing_ok=True)
                display.finish(trainer)
    finally:
        results = _collect(comparison, runs_folder)
        if not results.empty:
            _write(comparison.out / "results.csv", results.to_csv(index=False))
    summary = report.summarize(results, comparison.norms)
    path = report.write(comparison.out, config, results, summary)
    report.show(console, summary)
    console.print(f"Report: {path}", soft_wrap=True, highlight=False)
    return path


def _check(comparison: Comparison, task: Task) -> None:
    for norm in comparison.norms:
        if norm not in task.norms:
            raise ExperimentError(
                f"--norms: unknown norm {norm!r} for {task.name}; expected some of {', '.join(task.norms)}"
            )
        if norm == "batch" and 1 in comparison.batch_sizes:
            raise ExperimentError("--batch-sizes: batch norm needs at least 2 cases, got 1")
    try:
        torch.zeros(1, device=comparison.device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ExperimentError(f"--device: cannot use {comparison.device!r}: {reason}") from error


def _prepare(comparison: Comparison) -> Path:
    """Makes the folders and sees that they hold nothing of another comparison."""
    folder = comparison.out / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ExperimentError(
            f"--out: cannot write into {comparison.out}: {error.strerror or error}"
        ) from error
    path = comparison.out / "config.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ExperimentError(f"{path} is damaged: {error}; choose another --out") from error
        for name in ("task", "epochs", "learning_rate", "device"):
            asked = getattr(comparison, name)
            if before.get(name) != asked:
                what = name.replace("_", " ")
                raise ExperimentError(
                    f"--out: {comparison.out} holds a comparison with {what} {before.get(name)}, and "
                    f"{asked} is asked for; choose another --out"
                )
    return folder


def _collect(comparison: Comparison, folder: Path) -> pd.DataFrame:
    """The records of the finished runs of this comparison."""
    found = [folder / f"{run.name}.csv" for run in comparison.runs]
    tables = []
    for path in found:
        if not path.is_file():
            continue
        try:
            table = pd.read_csv(path)
            if tuple(table.columns) != Record._fields:
                raise ValueError("wrong columns")
        except (OSError, ValueError) as error:
            raise ExperimentError(
                f"{path} is damaged ({error}); delete it, and the same command trains this run again"
            ) from error
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _config(comparison: Comparison, task: Task) -> dict[str, Any]:
    return {
        **{k: v for k, v in asdict(comparison).items() if k != "out"},
        "summary": task.summary,
        "optimizer": "Adam",
        "versions": {
            "layernorm": layernorm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": metadata.version("numpy"),
            "scikit-learn": metadata.version("scikit-learn"),
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": machine.processor(),
            "threads": torch.get_num_threads(),
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _to(data: Data, device: str) -> Data:
    return Data(**{name: tensor.to(device) for name, tensor in vars(data).items()})


def _write(path: Path, text: str) -> None:
    with replacing(path) as fresh:
        fresh.write_text(text)


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C and SIGTERM ask for a stop between two updates.

    A second Ctrl-C stops at once, and what was reached since the last checkpoint is lost.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Comparison", "Interrupted", "compare"]
