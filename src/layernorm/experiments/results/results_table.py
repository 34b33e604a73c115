"""The results of a comparison: one table of all logged steps, its summary, what the report shows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from rich.console import Console

from layernorm.experiments.errors import DamagedFile, ExperimentError, reason
from layernorm.experiments.results import judging, terminal
from layernorm.experiments.results.statistics import interval
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


def summarize(table: pd.DataFrame, norms: Sequence[str], task: Task) -> pd.DataFrame:
    """Return one row for each batch size and norm: means over the seeds, at the norm's best rate and warm-up.

    The baseline is the norm "none", or else the first of ``norms``. ``final`` is the task's reported metric
    at the end of training, and ``difference`` what it is more than the baseline's with the same seed.
    ``epochs_to_baseline`` and ``seconds_to_baseline`` tell when a run was first as good as the baseline's
    best by the task's first metric, with the same batch size and seed; where some seeds never were,
    ``reached`` says how many were.

    Args:
        table: the records of all runs.
        norms: the norms in the order of the table.
        task: what was trained.

    Returns:
        A table with the columns of ``headings``; for ``final`` and the figures after it also one with
        ``_std``, the standard deviation with n - 1; ``difference_low`` and ``difference_high``, the ends of
        its 95 % interval; ``reached`` and ``seeds``.
    """
    metric, reported = task.metrics[0], task.final
    table = judging.at_best_rates(table, metric)
    baseline = "none" if "none" in norms else norms[0]
    runs = {
        (batch_size, seed): run
        for (batch_size, seed), run in table[table.norm == baseline].groupby(["batch_size", "seed"])
    }
    rows = []
    for (batch_size, norm, seed), run in table.groupby(["batch_size", "norm", "seed"], sort=False):
        against = runs.get((batch_size, seed))
        goal = np.nan if against is None else judging.best(against, metric)
        first = judging.first_at(run, metric, goal)
        last = run.iloc[-1]
        value = judging.final(run, reported)
        rows.append(
            {
                "batch_size": batch_size,
                "norm": norm,
                "learning_rate": last.learning_rate,
                "warmup": last.warmup,
                "goal": goal,
                "final": value,
                "difference": np.nan if against is None else value - judging.final(against, reported),
                "epochs_to_baseline": np.nan if first is None else first.epoch,
                "seconds_to_baseline": np.nan if first is None else first.seconds,
                "final_loss": last.train_loss,
                "update_ms": 1000.0 * last.seconds / last["update"],
            }
        )
    found = pd.DataFrame(rows)
    groups = found.groupby(["batch_size", "norm"], sort=False)
    means, spread = groups.mean(), groups.std(ddof=1).add_suffix("_std")
    counts = groups.epochs_to_baseline.agg(reached="count", seeds="size")
    ends = groups.difference.agg(
        difference_low=lambda values: interval(values.dropna().tolist()).low if values.any() else np.nan,
        difference_high=lambda values: interval(values.dropna().tolist()).high if values.any() else np.nan,
    )
    summary = pd.concat([means, spread, ends, counts], axis=1).reset_index()
    summary["order"] = summary.norm.map({norm: index for index, norm in enumerate(norms)})
    summary = summary.sort_values(["batch_size", "order"], ascending=[False, True])
    return summary.drop(columns="order").reset_index(drop=True)


def headings(task: Task) -> dict[str, str]:
    """Return the columns of the summary and their headings."""
    return {
        "batch_size": "batch",
        "norm": "norm",
        "learning_rate": "rate",
        "final": task.final.label,
        "difference": "more than baseline",
        "epochs_to_baseline": "epochs to baseline's best",
        "seconds_to_baseline": "seconds to baseline's best",
        "final_loss": "final training loss",
        "update_ms": "ms an update",
    }


def cells(summary: pd.DataFrame, task: Task) -> list[dict[str, str]]:
    """Return the summary as text, one dict for each row by the keys of ``headings``."""
    form = task.final.form
    formats = {
        "final": (form, form),
        "epochs_to_baseline": ("{:.2f}", "{:.2f}"),
        "seconds_to_baseline": ("{:.1f}", "{:.1f}"),
        "final_loss": ("{:.3g}", "{:.1g}"),
        "update_ms": ("{:.3g}", "{:.1g}"),
    }
    rows = []
    for row in summary.to_dict("records"):
        texts = {
            "batch_size": str(row["batch_size"]),
            "norm": str(row["norm"]),
            "learning_rate": f"{row['learning_rate']:g}"
            + (f", warm-up {row['warmup']:.0f}" if row["warmup"] else ""),
            "difference": _difference(row, form),
        }
        for name, (form_of_mean, form_of_spread) in formats.items():
            mean, spread = row[name], row[f"{name}_std"]
            to_baseline = name.endswith("to_baseline")
            if pd.isna(mean):
                texts[name] = "not reached" if to_baseline and not pd.isna(row["goal"]) else "–"
                continue
            text = form_of_mean.format(mean)
            if not pd.isna(spread):
                text += f" ± {form_of_spread.format(spread)}"
            if to_baseline and row["reached"] < row["seeds"]:
                text += f" ({row['reached']} of {row['seeds']})"
            texts[name] = text
        rows.append(texts)
    return rows


def _difference(row: Mapping[Any, Any], form: str) -> str:
    """Return the difference from the baseline with its interval; a dash for the baseline itself."""
    low, high = row["difference_low"], row["difference_high"]
    if pd.isna(row["difference"]) or (row["difference"] == 0 and pd.isna(low)):
        return "–"
    signed = form.replace("{:", "{:+")
    text = signed.format(row["difference"])
    return text if pd.isna(low) else f"{text} ({signed.format(low)} to {signed.format(high)})"


def rates_table(table: pd.DataFrame, task: Task) -> Table | None:
    """Return what each norm reaches with each learning rate and warm-up; None where there is one of each."""
    warmups = table.warmup.nunique() > 1
    if table.learning_rate.nunique() < 2 and not warmups:
        return None
    metric = task.metrics[0]
    rates = sorted(table.learning_rate.unique())
    means = judging.at_rates(table, metric)
    rows, at_the_end = [], []
    for (batch_size, norm), group in means.groupby(["batch_size", "norm"], sort=False):
        found = {(row.warmup, row.learning_rate): getattr(row, metric.name) for row in group.itertuples()}
        chosen = (max if metric.higher else min)(found, key=found.__getitem__)
        is_last = len(rates) > 1 and chosen[1] in (rates[0], rates[-1])
        at_the_end += [f"{norm} at batch size {batch_size}"] if is_last else []
        for warmup in sorted(group.warmup.unique()):
            settings = [(warmup, rate) for rate in rates]
            texts = (metric.form.format(found[one]) if one in found else "–" for one in settings)
            marked = (
                f"{text} *" if one == chosen else text for text, one in zip(texts, settings, strict=True)
            )
            rows.append([str(batch_size), str(norm), *([str(warmup)] if warmups else []), *marked])
    note = f"The {metric.label} at the end, mean over the seeds; * chosen, by it alone."
    if at_the_end:
        note += f" At an end of the list, so that a rate beyond it may be better: {', '.join(at_the_end)}."
    title, column = ("Learning rates and warm-ups", ["warm-up"]) if warmups else ("Learning rates", [])
    return Table(title, ["batch", "norm", *column, *(f"{rate:g}" for rate in rates)], rows, note)


def show(console: Console, summary: pd.DataFrame, task: Task) -> None:
    """Print the summary."""
    columns = headings(task)
    rows = [[row[name] for name in columns] for row in cells(summary, task)]
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
    metric, *others = (one for one in task.metrics if not one.is_test or one == task.final)
    norms = config["norms"]
    summary = summarize(table, norms, task)
    rates, of_settings = rates_table(table, task), task.judge_settings(table)
    table = judging.at_best_rates(table, metric)
    columns = headings(task)
    baseline = "none" if "none" in norms else norms[0]
    count = len(config["seeds"])
    spread = (
        f"Mean ± standard deviation over {count} seeds; differences are paired by seed, with their 95 % "
        "intervals by Student's t. "
        if count > 1
        else "One seed, so nothing here tells chance from effect. "
    )
    note = (
        f"{spread}The {task.final.label} is that at the end of training. The baseline is {baseline}; its "
        f"best is its best {metric.label} with the same batch size and seed. Epochs and seconds count "
        "training until a run is first as good; seconds leave evaluations out."
    )
    rows = [[row[name] for name in columns] for row in cells(summary, task)]
    charts = [
        chart("curves", table, norms, [metric, *others[:1], TRAIN_LOSS]),
        chart("time", table, norms, [metric], "seconds"),
    ]
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
        cards=(*task.judge(table), *of_settings),
        tables=(
            Table("Summary", list(columns.values()), rows, note),
            *([] if rates is None else [rates]),
            *task.tables(table),
        ),
        charts=charts,
        pictures=pictures,
        facts=facts(config),
    )


def chart(
    name: str,
    table: pd.DataFrame,
    norms: Sequence[str],
    metrics: Sequence[Metric],
    over: Literal["epoch", "seconds"] = "epoch",
) -> Chart:
    """Draw metrics over training, a row for each metric and a column for each batch size.

    Lines are means over the seeds, bands go from the least to the greatest. Over seconds a point is where the
    seeds are on average after an update.
    """
    batch_sizes = sorted(table.batch_size.unique(), reverse=True)
    label = {"epoch": "epoch", "seconds": "seconds of training"}[over]
    rows = []
    for metric in metrics:
        panels = []
        for batch_size in batch_sizes:
            chosen = table[table.batch_size == batch_size].dropna(subset=metric.name)
            # A logarithmic axis has no place for what is not positive.
            log = metric.log and bool((chosen[metric.name] > 0).all())
            lines = [_line(norm, chosen[chosen.norm == norm], metric, over) for norm in norms]
            title = f"batch size {batch_size}"
            panels.append(Panel(title, label, metric.label, lines, y_log=log))
        rows.append(panels)
    caption = " and ".join(metric.label for metric in metrics)
    caption += " over the epochs." if over == "epoch" else " over the time of training, without evaluations."
    if table.seed.nunique() > 1:
        caption += " Lines are means over the seeds; bands go from the least to the greatest."
    return Chart(name, caption[0].upper() + caption[1:], rows)


def _line(norm: str, table: pd.DataFrame, metric: Metric, over: str) -> Line:
    updates = table.groupby("update")
    seeds = updates[metric.name]
    x, y = updates[over].mean().astype(float).tolist(), seeds.mean().tolist()
    if table.seed.nunique() < 2:
        return Line(norm, x, y)
    return Line(norm, x, y, seeds.min().tolist(), seeds.max().tolist())


def _described(config: Mapping[str, Any]) -> str:
    """Return the settings in words."""
    seeds = "1 seed" if len(config["seeds"]) == 1 else f"{len(config['seeds'])} seeds"
    rates = ", ".join(f"{rate:g}" for rate in config["learning_rates"])
    several = "s" if len(config["learning_rates"]) > 1 else ""
    sizes = "".join(f", {name} {value}" for name, value in config["sizes"].items())
    each = " each" if config["clip_each"] else ""
    clip = f", gradients{each} clipped at {config['clip']:g}" if config["clip"] else ""
    schedule = "" if config["schedule"] == "constant" else f" ({config['schedule']})"
    warmups = " or ".join(map(str, config["warmups"]))
    warmup = f", warm-up of {warmups} updates" if any(config["warmups"]) else ""
    return (
        f"Preset {config['preset']}: {config['epochs']} epochs, {seeds}, {config['optimizer']} with learning "
        f"rate{several} {rates}{schedule}{warmup}{clip}{sizes}."
    )


def facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return versions, machine and date of a ``config.json``."""
    machine = config["machine"]
    where = f"{machine['processor']}, {machine['system']}, {machine['threads']} threads"
    training = [("trained", f"on {config['device']} in {config['precision']}")] if "device" in config else []
    return [*config["versions"].items(), ("machine", where), *training, ("date", config["date"])]
