"""The results of a comparison: one table of all logged steps, its summary, what the report shows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from rich.console import Console

from layernorm.experiments.errors import DamagedFile, ExperimentError, reason
from layernorm.experiments.results import judging, terminal
from layernorm.experiments.run.training import COLUMNS
from layernorm.experiments.section import Chart, Line, Panel, Picture, Section, Table
from layernorm.experiments.storage import files
from layernorm.experiments.task import TRAIN_LOSS, Metric, Task

#: The optional table next to ``results.csv``.
PARQUET: Final = "results.parquet"


def read(path: Path, task: Task, about: str | None = None) -> pd.DataFrame:
    """Return the records in a run's CSV file.

    Args:
        path: the file.
        task: what was trained.
        about: the run and all that it depends on; None for any.

    Raises:
        DamagedFile: the file is empty, torn or changed.
        ExperimentError: it is of something else, or cannot be read.
    """
    columns = [*COLUMNS, *(metric.name for metric in task.metrics)]
    heading = ",".join(columns)
    try:
        begins = path.read_bytes().strip(b"\0")[: len(heading)].decode("utf-8", "replace")
        if not heading.startswith(begins):
            raise files.UnknownTableError(f"its columns should be {', '.join(columns)}")
        text = files.read_table(path, about)
        table = pd.read_csv(io.StringIO(text))
        if list(table.columns) != columns:
            raise ValueError(f"its columns should be {', '.join(columns)}")
        if table.empty:
            raise ValueError("it has no rows")
    except OSError as error:
        raise ExperimentError(f"cannot read {path}: {reason(error)}") from error
    except files.OtherTableError as error:
        raise ExperimentError(
            f"{path} cannot be used ({error}); choose another folder, or delete it"
        ) from error
    except ValueError as error:
        kind = ExperimentError if isinstance(error, files.UnknownTableError) else DamagedFile
        raise kind(
            f"{path} is damaged ({reason(error)}); delete it, and the same command trains this run again"
        ) from error
    return table


def write(table: pd.DataFrame, folder: Path) -> None:
    """Write ``results.csv`` and ``results.parquet``, each whole, where they are not there as they should be.

    Raises:
        OSError: one cannot be written.
    """
    parquet = io.BytesIO()
    table.to_parquet(parquet, index=False)
    text = table.to_csv(index=False, lineterminator="\n").encode("utf-8")
    for name, content in (("results.csv", text), (PARQUET, parquet.getvalue())):
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            files.write(path, content)


def summarize(table: pd.DataFrame, norms: Sequence[str], metric: Metric) -> pd.DataFrame:
    """Return one row for each batch size and norm: mean and standard deviation over the seeds.

    The baseline is the norm "none", or else the first of ``norms``; its best is its best value of the metric
    with the same batch size and seed. ``epochs_to_baseline`` and ``seconds_to_baseline`` tell when a run was
    first as good; where some seeds never were, ``reached`` says how many were.

    Args:
        table: the records of all runs.
        norms: the norms in the order of the table.
        metric: the one that decides.

    Returns:
        A table with the columns of ``headings``, for each figure also one with ``_std``, and ``reached``
        and ``seeds``.
    """
    baseline = "none" if "none" in norms else norms[0]
    goals = {
        key: judging.best(run, metric)
        for key, run in table[table.norm == baseline].groupby(["batch_size", "seed"])
    }
    rows = []
    for (batch_size, norm, seed), run in table.groupby(["batch_size", "norm", "seed"], sort=False):
        goal = goals.get((batch_size, seed), np.nan)
        first = judging.first_at(run, metric, goal)
        last = run.iloc[-1]
        rows.append(
            {
                "batch_size": batch_size,
                "norm": norm,
                "goal": goal,
                "best": judging.best(run, metric),
                "epochs_to_baseline": np.nan if first is None else first.epoch,
                "seconds_to_baseline": np.nan if first is None else first.seconds,
                "final_loss": last.train_loss,
                "update_ms": 1000.0 * last.seconds / last["update"],
            }
        )
    groups = pd.DataFrame(rows).groupby(["batch_size", "norm"], sort=False)
    means, spread = groups.mean(), groups.std(ddof=0).add_suffix("_std")
    counts = groups.epochs_to_baseline.agg(reached="count", seeds="size")
    summary = pd.concat([means, spread, counts], axis=1).reset_index()
    summary["order"] = summary.norm.map({norm: index for index, norm in enumerate(norms)})
    summary = summary.sort_values(["batch_size", "order"], ascending=[False, True])
    return summary.drop(columns="order").reset_index(drop=True)


def headings(metric: Metric) -> dict[str, str]:
    """Return the columns of the summary and their headings."""
    return {
        "batch_size": "batch",
        "norm": "norm",
        "best": f"best {metric.label}",
        "epochs_to_baseline": "epochs to baseline's best",
        "seconds_to_baseline": "seconds to baseline's best",
        "final_loss": "final training loss",
        "update_ms": "ms an update",
    }


def cells(summary: pd.DataFrame, metric: Metric) -> list[dict[str, str]]:
    """Return the summary as text, one dict for each row by the keys of ``headings``."""
    formats = {
        "best": (metric.form, metric.form),
        "epochs_to_baseline": ("{:.2f}", "{:.2f}"),
        "seconds_to_baseline": ("{:.1f}", "{:.1f}"),
        "final_loss": ("{:.3g}", "{:.1g}"),
        "update_ms": ("{:.3g}", "{:.1g}"),
    }
    rows = []
    for row in summary.to_dict("records"):
        texts = {"batch_size": str(row["batch_size"]), "norm": str(row["norm"])}
        for name, (form, spread_form) in formats.items():
            mean, spread = row[name], row[f"{name}_std"]
            to_baseline = name.endswith("to_baseline")
            if pd.isna(mean):
                texts[name] = "not reached" if to_baseline and not pd.isna(row["goal"]) else "–"
                continue
            text = form.format(mean)
            if row["seeds"] > 1:
                text += f" ± {spread_form.format(spread)}"
            if to_baseline and row["reached"] < row["seeds"]:
                text += f" ({row['reached']} of {row['seeds']})"
            texts[name] = text
        rows.append(texts)
    return rows


def show(console: Console, summary: pd.DataFrame, metric: Metric) -> None:
    """Print the summary."""
    columns = headings(metric)
    rows = [[row[name] for name in columns] for row in cells(summary, metric)]
    right = [heading for name, heading in columns.items() if name != "norm"]
    terminal.show_table(console, list(columns.values()), rows, right)


def section(folder: Path, task: Task, config: Mapping[str, Any], table: pd.DataFrame) -> Section:
    """Return what the report shows of a comparison.

    Args:
        folder: of the comparison, with its pictures in ``samples/``.
        task: what was trained.
        config: as in ``config.json``.
        table: the records.
    """
    metric, *others = task.metrics
    norms = config["norms"]
    summary = summarize(table, norms, metric)
    columns = headings(metric)
    baseline = "none" if "none" in norms else norms[0]
    spread = f"Mean ± standard deviation over {config['seeds']} seeds. " if config["seeds"] > 1 else ""
    note = (
        f"{spread}The baseline is {baseline}; its best is its best {metric.label} with the same batch size "
        "and seed. Epochs and seconds count training until a run is first as good; seconds leave evaluations "
        "out."
    )
    rows = [[row[name] for name in columns] for row in cells(summary, metric)]
    charts = [chart("curves", table, norms, [metric, *others[:1], TRAIN_LOSS])]
    if others[1:]:
        charts.append(chart("metrics", table, norms, others[1:]))
    pictures = [
        Picture(path, path.stem.replace("-", " "))
        for path in sorted((folder / "samples").glob("*.png"))
        if any(path.name.startswith(f"{norm}-batch") for norm in norms)
    ]
    return Section(
        name=task.name,
        title=f"{task.title} ({task.section})",
        summary=f"{task.summary[0].upper()}{task.summary[1:]}. {_described(config)}",
        command=config["command"],
        cards=task.judge(table),
        tables=(Table("Summary", list(columns.values()), rows, note), *task.tables(table)),
        charts=charts,
        pictures=pictures,
        facts=facts(config),
    )


def chart(name: str, table: pd.DataFrame, norms: Sequence[str], metrics: Sequence[Metric]) -> Chart:
    """Draw metrics over the updates, a row for each metric and a column for each batch size.

    Lines are means over the seeds, bands go from the least to the greatest.
    """
    batch_sizes = sorted(table.batch_size.unique(), reverse=True)
    rows = []
    for metric in metrics:
        panels = []
        for batch_size in batch_sizes:
            chosen = table[table.batch_size == batch_size].dropna(subset=metric.name)
            # A logarithmic axis has no place for what is not positive.
            log = metric.log and bool((chosen[metric.name] > 0).all())
            lines = [_line(norm, chosen[chosen.norm == norm], metric) for norm in norms]
            title = f"batch size {batch_size}"
            panels.append(Panel(title, "epoch", metric.label, lines, y_log=log))
        rows.append(panels)
    caption = " and ".join(metric.label for metric in metrics) + " over the epochs."
    if table.seed.nunique() > 1:
        caption += " Lines are means over the seeds; bands go from the least to the greatest."
    return Chart(name, caption[0].upper() + caption[1:], rows)


def _line(norm: str, table: pd.DataFrame, metric: Metric) -> Line:
    seeds = table.groupby("epoch")[metric.name]
    mean = seeds.mean()
    x, y = [float(value) for value in mean.index], mean.tolist()
    if table.seed.nunique() < 2:
        return Line(norm, x, y)
    return Line(norm, x, y, seeds.min().tolist(), seeds.max().tolist())


def _described(config: Mapping[str, Any]) -> str:
    """Return the settings in words."""
    seeds = "1 seed" if config["seeds"] == 1 else f"{config['seeds']} seeds"
    sizes = "".join(f", {name} {value}" for name, value in config["sizes"].items())
    clip = f", gradients clipped at {config['clip']:g}" if config["clip"] else ""
    schedule = "" if config["schedule"] == "constant" else f" ({config['schedule']})"
    warmup = f", warm-up of {config['warmup']} updates" if config["warmup"] else ""
    return (
        f"Preset {config['preset']}: {config['epochs']} epochs, {seeds}, {config['optimizer']} with learning "
        f"rate {config['learning_rate']:g}{schedule}{warmup}{clip}{sizes}."
    )


def facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return versions, machine and date of a ``config.json``."""
    machine = config["machine"]
    where = f"{machine['processor']}, {machine['system']}, {machine['threads']} threads"
    training = [("trained", f"on {config['device']} in {config['precision']}")] if "device" in config else []
    return [*config["versions"].items(), ("machine", where), *training, ("date", config["date"])]
