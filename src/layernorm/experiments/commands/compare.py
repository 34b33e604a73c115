"""The comparison: every norm at every batch size with every seed, kept on disk as it goes.

A folder holds ``config.json``, ``results.csv`` and ``results.parquet``, ``curves.png`` and ``curves.svg``,
``report.html``, the pictures of ``samples/``, and in ``runs/`` one CSV file for each finished run and a
checkpoint for an unfinished one. Every file is replaced whole. The same command continues where an
earlier one was stopped.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType

import pandas as pd
import torch
from rich.console import Console

from layernorm.arguments import say
from layernorm.experiments import registry
from layernorm.experiments.commands.progress import Display
from layernorm.experiments.errors import ExperimentError
from layernorm.experiments.own_task import OwnTask, task_of
from layernorm.experiments.report import drawing, norms, page
from layernorm.experiments.results import folder, results_table
from layernorm.experiments.results.comparison import FIXED, Comparison, command, finished, together
from layernorm.experiments.run import checkpoints, processes
from layernorm.experiments.run.training import Interrupted, Record, Run, Trainer
from layernorm.experiments.section import Section
from layernorm.experiments.storage import files
from layernorm.experiments.storage.locks import claimed
from layernorm.experiments.task import Problem, Task

Sweep = Callable[[Comparison, list[Run], "Display", Callable[[], bool]], None]


def compare(comparison: Comparison, console: Console, sweep: Sweep | None = None) -> Path:
    """Train what is not yet trained, write all results, and print the summary.

    Args:
        comparison: what is compared. What else the folder holds of the same settings stays in its tables and
            its report.
        console: where progress and summary go; with several processes, that of process 0.
        sweep: trains the runs it is given, elsewhere; None trains them here one after another.

    Returns:
        The path of the report.

    Raises:
        ExperimentError: an argument or a file that the user can mend, or another command in the folder.
        OSError: a file cannot be written.
        Interrupted: by Ctrl-C or SIGTERM; what was reached is kept.
    """
    task = registry.find(comparison.task)
    check(comparison, task)
    problem = task.problem(**comparison.preset.sizes)
    _check_sizes(comparison, problem)
    train_missing = partial(_train_missing, comparison, problem, task, console, sweep)
    if processes.rank() != 0:
        train_missing([])
        return comparison.out / "report.html"
    with folder.opened(comparison.out):
        there = _begin(comparison, task, console)
        whole = together(comparison, there)
        described = {"described": task.description} if isinstance(task, OwnTask) else {}
        folder.write(comparison.out, whole.settings | described, command(whole))
        try:
            train_missing([run for run in comparison.runs if run in there])
        finally:
            # What is finished is in the table, however this ends.
            table = _table(finished(comparison.out, whole.settings, task, say=lambda text: None))
            if not table.empty:
                results_table.write(table, comparison.out)
        return _report(whole, task, table, console)


def _begin(comparison: Comparison, task: Task, console: Console) -> dict[Run, pd.DataFrame]:
    """Prepare the folder; return what is finished in it."""
    notices: list[str] = []
    damage = folder.check(comparison.out, comparison.settings, FIXED)
    files.make_folder(comparison.out / "runs")
    try:
        there = finished(
            comparison.out, comparison.settings, task, frozenset(comparison.runs), notices.append
        )
    except ExperimentError as error:
        raise (ExperimentError(f"{damage}; and {error}") if damage else error) from error
    for notice in [*([f"{damage}; it is written anew"] if damage else []), *notices]:
        say(console, notice)
    for run in there:
        for suffix in (".checkpoint", ".claim"):  # that a kill has kept
            comparison.path(run, suffix).unlink(missing_ok=True)
    return there


def _train_missing(
    comparison: Comparison,
    problem: Problem,
    task: Task,
    console: Console,
    sweep: Sweep | None,
    there: list[Run],
) -> None:
    updates = {run: problem.cases // run.batch_size * comparison.preset.epochs for run in comparison.runs}
    with (
        stop_flag() as stop,
        Display(console, updates, comparison.preset.epochs, task.metrics[0]) as display,
    ):
        there = processes.from_leader(there)
        for run in there:
            display.skip(run)
        missing = [run for run in comparison.runs if run not in there]
        if sweep is not None:
            sweep(comparison, missing, display, stop)
        else:
            for run in missing:
                train(comparison, run, problem, display, stop)


def _report(comparison: Comparison, task: Task, table: pd.DataFrame, console: Console) -> Path:
    path = comparison.out / "report.html"
    shown = results_table.section(comparison.out, task, folder.read(comparison.out), table)
    drawing.save(shown.charts[0], comparison.out)
    page.write(path, f"layernorm compare {task.name}", [shown], norms.background())
    results_table.show(console, results_table.summarize(table, comparison.preset.norms, task), task)
    say(console, f"Report: {path}")
    return path


def train(
    comparison: Comparison,
    run: Run,
    problem: Problem,
    display: Display | None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train one run to its end and write its files.

    Raises:
        Interrupted: ``stop`` answered True; the checkpoint holds what was reached.
        ExperimentError: the checkpoint is of something else, or another process has taken over the run.
        OSError: a file cannot be written.
    """
    device = torch.device(comparison.device)
    problem.to(device)
    leads = processes.rank() == 0
    with claimed(comparison.path(run, ".claim")) if leads else nullcontext(lambda: None) as guard:
        checkpoint = comparison.path(run, ".checkpoint")
        if leads:
            checkpoints.drop_damaged(checkpoint, partial(display.say, run) if display else lambda text: None)
        trainer = Trainer(
            problem,
            run,
            comparison.preset,
            checkpoint,
            device,
            comparison.precision,
            comparison.identity,
            guard,
        )
        if display is not None:
            display.start(trainer)
        with _log(comparison, trainer) as recorded:
            trainer.train(display.advance if display else lambda trainer: None, stop, recorded)
        if leads:
            guard()
            _write(comparison, run, problem, trainer)
            checkpoint.unlink(missing_ok=True)
    if display is not None:
        display.finish(run, trainer.records)


def _write(comparison: Comparison, run: Run, problem: Problem, trainer: Trainer) -> None:
    """Write what a run leaves; its table, which says that it is finished, comes last."""
    if comparison.save_weights:
        files.write(comparison.path(run, ".pt"), checkpoints.packed(trainer.network.state_dict()))
    _write_pictures(comparison, run, problem, trainer)
    table = pd.DataFrame(trainer.records).to_csv(index=False, lineterminator="\n")
    files.write_table(comparison.path(run, ".csv"), table, comparison.about(run))


def recorded(comparison: Comparison, run: Run) -> list[Record]:
    """Return the records of a run that has been trained elsewhere."""
    task = registry.find(comparison.task)
    table = results_table.read(comparison.path(run, ".csv"), task, comparison.about(run))
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def read(path: Path) -> Section:
    """Return what the report shows of a comparison's folder.

    Raises:
        ExperimentError: the folder holds none, or is damaged.
    """
    config = folder.read(path)
    return results_table.section(path, task_of(config), config, records(path))


def records(path: Path) -> pd.DataFrame:
    """Return the records of all runs that are finished in a comparison's folder.

    Raises:
        ExperimentError: there are none, or a file is damaged.
    """
    config = folder.read(path)
    table = _table(finished(path, config, task_of(config)))
    if table.empty:
        raise ExperimentError(f"{path} has no results yet: no run is finished; give its command again")
    return table


def _table(there: Mapping[Run, pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(there.values(), ignore_index=True) if there else pd.DataFrame()


def check(comparison: Comparison, task: Task) -> None:
    """Check that a comparison can be run.

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
        files.make_folder(comparison.out / "samples")
        path = comparison.out / "samples" / f"{run.name}-{name}.png"
        files.write(path, drawing.png(figure, dpi=150))


@contextmanager
def _log(comparison: Comparison, trainer: Trainer) -> Iterator[Callable[[Record], None]]:
    """Yield what is called with each record; it writes it for TensorBoard where that is wanted."""
    if not comparison.tensorboard or processes.rank() != 0:
        yield lambda record: None
        return
    try:
        from layernorm.experiments.run.events import Log
    except ModuleNotFoundError as error:
        raise ExperimentError(
            f"--tensorboard needs {error.name}: pip install 'layernorm[tensorboard]'"
        ) from error
    place = comparison.out / "tensorboard" / trainer.run.name
    # Anew from the checkpoint's records: what an earlier command logged may go beyond them or be cut off.
    shutil.rmtree(place, ignore_errors=True)
    with Log(place) as log:

        def recorded(record: Record) -> None:
            for name, value in record.items():
                if name not in ("norm", "batch_size", "seed", "update") and value is not None:
                    log.add(name, value, record["update"])

        for record in trainer.records:
            recorded(record)
        yield recorded


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM ask for a stop between two updates, within the block.

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
