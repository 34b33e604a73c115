"""What a comparison found: the summary table, the curves, and one self-contained HTML page."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

import jinja2
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from layernorm.experiments.files import replacing

# Okabe and Ito's palette, told apart in every kind of colour vision; line styles repeat the distinction.
_COLOURS: Final = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# The same norm looks the same in every picture; others take the looks that are left.
_PLACES: Final = {"none": 0, "batch": 1, "layer": 2, "rms": 3, "weight": 4}
_STYLES: Final = ("--", "-.", "-", (0, (4, 1, 1, 1, 1, 1)), ":", (0, (6, 2)), (0, (1, 2)))

#: The columns of the summary and their headings.
COLUMNS: Final = {
    "batch_size": "batch",
    "norm": "norm",
    "best_test_error": "best test error (%)",
    "epochs_to_baseline": "epochs to baseline's best",
    "seconds_to_baseline": "seconds to baseline's best",
    "final_loss": "final training loss",
}


def summarize(results: pd.DataFrame, norms: Sequence[str]) -> pd.DataFrame:
    """One row for each batch size and norm: mean and standard deviation over the seeds.

    The baseline is the norm "none", or else the first of ``norms``; its best is its lowest test error with
    the same batch size and seed. ``epochs_to_baseline`` and ``seconds_to_baseline`` tell when a run was
    first at or below it; where some seeds never were, ``reached`` says how many were.

    Args:
        results: the records of all runs.
        norms: the norms in the order of the table.

    Returns:
        A table with the columns of ``COLUMNS``, for each figure also one with ``_std``, and ``reached``
        and ``seeds``.
    """
    baseline = "none" if "none" in norms else norms[0]
    best = results[results.norm == baseline].groupby(["batch_size", "seed"]).test_error.min().to_dict()
    rows = []
    for (batch_size, norm, seed), run in results.groupby(["batch_size", "norm", "seed"], sort=False):
        there = run[run.test_error <= best[batch_size, seed]]
        first = there.iloc[0] if len(there) else None
        rows.append(
            {
                "batch_size": batch_size,
                "norm": norm,
                "best_test_error": run.test_error.min(),
                "epochs_to_baseline": np.nan if first is None else first.epoch,
                "seconds_to_baseline": np.nan if first is None else first.seconds,
                "final_loss": run.train_loss.iloc[-1],
            }
        )
    groups = pd.DataFrame(rows).groupby(["batch_size", "norm"], sort=False)
    means, spread = groups.mean(), groups.std(ddof=0).add_suffix("_std")
    counts = groups.epochs_to_baseline.agg(reached="count", seeds="size")
    table = pd.concat([means, spread, counts], axis=1).reset_index()
    table["order"] = table.norm.map({norm: index for index, norm in enumerate(norms)})
    table = table.sort_values(["batch_size", "order"], ascending=[False, True])
    return table.drop(columns="order").reset_index(drop=True)


def cells(summary: pd.DataFrame) -> list[dict[str, str]]:
    """The summary as text, one dict for each row by the keys of ``COLUMNS``."""
    formats = {
        "best_test_error": ("{:.2f}", "{:.2f}"),
        "epochs_to_baseline": ("{:.2f}", "{:.2f}"),
        "seconds_to_baseline": ("{:.1f}", "{:.1f}"),
        "final_loss": ("{:.3g}", "{:.1g}"),
    }
    rows = []
    for row in summary.to_dict("records"):
        texts = {"batch_size": str(row["batch_size"]), "norm": str(row["norm"])}
        for name, (form, spread_form) in formats.items():
            mean, spread = row[name], row[f"{name}_std"]
            to_baseline = name.endswith("to_baseline")
            if pd.isna(mean):
                texts[name] = "not reached" if to_baseline else "–"
                continue
            text = form.format(mean)
            if row["seeds"] > 1:
                text += f" ± {spread_form.format(spread)}"
            if to_baseline and row["reached"] < row["seeds"]:
                text += f" ({row['reached']} of {row['seeds']})"
            texts[name] = text
        rows.append(texts)
    return rows


def show(console: Console, summary: pd.DataFrame) -> None:
    """Prints the summary."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, heading in COLUMNS.items():
        table.add_column(heading, justify="left" if name == "norm" else "right")
    for row in cells(summary):
        table.add_row(*(row[name] for name in COLUMNS))
    console.print(table)


def curves(results: pd.DataFrame, norms: Sequence[str], title: str) -> Figure:
    """Test error and training loss over the epochs, a column for each batch size.

    Lines are means over the seeds, bands go from the least to the greatest.
    """
    batch_sizes = sorted(results.batch_size.unique(), reverse=True)
    free = (place for place in itertools.count() if place not in {_PLACES.get(norm) for norm in norms})
    places = {norm: _PLACES[norm] if norm in _PLACES else next(free) for norm in norms}
    panels = (("test_error", "test error (%)"), ("train_loss", "training loss"))
    figure = Figure(figsize=(4.6 * len(batch_sizes) + 0.6, 6.6), layout="constrained")
    axes = figure.subplots(len(panels), len(batch_sizes), squeeze=False, sharey="row", sharex="col")
    for column, batch_size in enumerate(batch_sizes):
        for row, (measure, label) in enumerate(panels):
            axis = axes[row, column]
            for norm, index in places.items():
                chosen = results[(results.norm == norm) & (results.batch_size == batch_size)]
                seeds = chosen.dropna(subset=measure).groupby("epoch")[measure]
                middle, low, high = seeds.mean(), seeds.min(), seeds.max()
                colour = _COLOURS[index % len(_COLOURS)]
                axis.plot(
                    middle.index, middle, color=colour, linestyle=_STYLES[index % len(_STYLES)], label=norm
                )
                axis.fill_between(middle.index, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.set_yscale("log")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
            axis.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
            if column == 0:
                axis.set_ylabel(label)
            if row == 0:
                axis.set_title(f"batch size {batch_size}")
            if row == len(panels) - 1:
                axis.set_xlabel("epoch")
    axes[0, -1].legend(title="norm", frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def write(out: Path, config: dict[str, Any], results: pd.DataFrame, summary: pd.DataFrame) -> Path:
    """Writes ``curves.png``, ``curves.svg`` and ``report.html`` into ``out``; returns the page's path."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "layernorm"}):
        figure = curves(results, config["norms"], f"{config['task']}: {', '.join(config['norms'])}")
        with replacing(out / "curves.svg") as fresh:
            figure.savefig(fresh, format="svg", metadata={"Date": None})
            svg = fresh.read_text("utf-8")
        with replacing(out / "curves.png") as fresh:
            figure.savefig(fresh, format="png", dpi=150)
    template = resources.files("layernorm.experiments").joinpath("report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        config=config,
        columns=COLUMNS,
        rows=cells(summary),
        baseline="none" if "none" in config["norms"] else config["norms"][0],
        svg=svg[svg.index("<svg") :],
    )
    path = out / "report.html"
    with replacing(path) as fresh:
        fresh.write_text(page, "utf-8")
    return path
