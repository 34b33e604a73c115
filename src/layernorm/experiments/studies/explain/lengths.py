"""Batch norm over time: its statistics at each step, and sequences that are longer than those of training.

An LSTM reads the rows of a digit from top to bottom, again and again. Its class does not depend on how often,
and every length is a whole number of passes: longer sequences ask for nothing that was not learned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import pandas as pd
import torch
from torch import Tensor, nn

from layernorm.baselines import BatchNormLSTM
from layernorm.experiments.classification import TEST_ERROR
from layernorm.experiments.networks import recurrent
from layernorm.experiments.results import judging
from layernorm.experiments.results.statistics import Interval, interval
from layernorm.experiments.run.training import Run
from layernorm.experiments.section import Card, Chart, Line, Panel, Table, Verdict
from layernorm.experiments.studies.explain import measuring
from layernorm.experiments.tasks import digits_rows

#: The steps of a training sequence: two passes over the rows.
STEPS: Final = 16
NORMS: Final = ("none", "batch", "layer")
SHARED: Final = "batch, shared"
#: What batch norm normalizes at a step, by the name of its statistics.
QUANTITIES: Final = {"ih": "W_ih x", "hh": "W_hh h", "cell": "c"}
_ROWS: Final = 8
_KEYS: Final = ("norm", "seed")
_WAYS: Final = {"none": "none", "batch": "batch, each step's own", SHARED: SHARED, "layer": "layer"}


class Reader(nn.Module):
    """An LSTM of 32 units over sequences of rows; its last hidden state gives the class."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.lstm = recurrent.lstm(norm, _ROWS, 32, batch_first=True, max_length=STEPS)
        self.logits = nn.Linear(32, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (N, T, 8) to logits (N, 10)."""
        logits: Tensor = self.logits(self.lstm(rows)[1][0][0])
        return logits


def passes(images: Tensor, steps: int) -> Tensor:
    """Return images (N, 8, 8) as sequences (N, steps, 8): their rows, again and again."""
    return images[:, torch.arange(steps) % _ROWS]


def measure(
    folder: Path, say: Callable[[str], None], times: Sequence[float], seeds: int, epochs: int
) -> None:
    """Train the readers and test them at each length; write ``lengths.csv``.

    A row has the test error at a length (``what`` is ``error``, or ``shared`` for batch norm by statistics of
    all steps together), or the mean or the variance of a quantity at a step (``mean ih``, ``variance ih``, …)
    against those of the last step.

    Raises:
        ExperimentError: a file is of something else.
        ValueError: a length is no whole number of passes.
    """
    for many in times:
        if many <= 0 or many * STEPS % _ROWS:
            raise ValueError(
                f"times: expected multiples of {_ROWS / STEPS:g}, for whole passes over the {_ROWS} rows, "
                f"got {many}"
            )
    steps = [int(many * STEPS) for many in times]
    measuring.complete(
        folder / "lengths.csv",
        _KEYS,
        list(itertools.product(NORMS, range(seeds))),
        lambda norm, seed: _measured(folder, norm, seed, steps, epochs),
        f"explain lengths={steps} epochs={epochs}",
        say,
    )


@torch.no_grad()
def _measured(
    folder: Path, norm: str, seed: int, lengths: Sequence[int], epochs: int
) -> list[dict[str, Any]]:
    """Return the rows of a network."""
    data = digits_rows.load()
    sequences = {name: passes(getattr(data, name), STEPS) for name in vars(data) if name.endswith("inputs")}
    with torch.enable_grad():
        trainer = measuring.trained(
            folder, Run(norm, 64, 1e-2, seed), epochs, replace(data, **sequences), Reader, "-rows"
        )
    network = cast(Reader, trainer.network.eval())

    def errors(what: str) -> list[dict[str, Any]]:
        wrong = [
            (network(passes(data.test_inputs, steps)).argmax(1) != data.test_targets).float().mean().item()
            for steps in lengths
        ]
        return [
            {"what": what, "place": steps, "value": 100.0 * share}
            for steps, share in zip(lengths, wrong, strict=True)
        ]

    rows = errors("error")
    if isinstance(network.lstm, BatchNormLSTM):
        rows += _over_steps(network.lstm)
        share_statistics(network.lstm)
        rows += errors("shared")
    return rows


def _over_steps(lstm: BatchNormLSTM) -> list[dict[str, Any]]:
    """Return how far mean and variance of each step are from those of the last, over all features.

    That is the root mean square of (mean - mean of the last)/σ of the last, and the mean of variance/variance
    of the last.
    """
    rows = []
    for name in QUANTITIES:
        mean, var = (lstm.get_buffer(f"running_{which}_{name}_l0") + 0.0 for which in ("mean", "var"))
        var = var + lstm.eps
        distance = ((mean - mean[-1]).square() / var[-1]).mean(1).sqrt()
        for what, values in (("mean", distance), ("variance", (var / var[-1]).mean(1))):
            rows += [
                {"what": f"{what} {name}", "place": step, "value": value}
                for step, value in enumerate(values.tolist(), 1)
            ]
    return rows


@torch.no_grad()
def share_statistics(lstm: BatchNormLSTM) -> None:
    """Give all steps of a layer the mean and the variance of all of them together."""
    for name in QUANTITIES:
        mean, var = (lstm.get_buffer(f"running_{which}_{name}_l0") for which in ("mean", "var"))
        # The variance of all is the mean variance of a step and the variance of the steps' means.
        var.copy_((var.mean(0) + mean.var(0, unbiased=False)).expand_as(var))
        mean.copy_(mean.mean(0).expand_as(mean))


def read(folder: Path) -> measuring.Part:
    """Return what the report shows.

    Raises:
        ExperimentError: the file is missing or damaged.
    """
    found = measuring.load(folder / "lengths.csv")
    return measuring.Part(cards(found), (_table(found),), (_statistics_chart(found), _chart(found)))


def _errors(found: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the errors of each way, a row for each seed and a column for each length."""
    tables = {}
    for way in _WAYS:
        norm, what = ("batch", "shared") if way == SHARED else (way, "error")
        rows = found[(found.norm == norm) & (found.what == what)]
        tables[way] = rows.pivot(index="seed", columns="place", values="value").sort_index()
    return tables


def cards(found: pd.DataFrame) -> tuple[Card, Card]:
    """Judge whether one step's statistics serve another, and what becomes of longer sequences."""
    errors = _errors(found)
    lengths = [int(str(length)) for length in errors["batch"].columns]
    cost = _difference(errors[SHARED][STEPS], errors["batch"][STEPS])
    each = Card(
        "A recurrent network with batch norm needs other statistics at each time step.",
        "§3.1",
        f"At the length of training, {STEPS} steps, the test error is {_mean(errors['batch'][STEPS])} with "
        f"the statistics of each step and {_mean(errors[SHARED][STEPS])} with those of all steps together: "
        f"{_shown(cost)} more.",
        judging.verdict_of(cost, 0.0, lower_agrees=False),
    )
    twice = min((length for length in lengths if length > STEPS), key=lambda length: abs(length - 2 * STEPS))
    grown = {way: _difference(table[twice], table[STEPS]) for way, table in errors.items()}
    more = _difference(
        errors["batch"][twice] - errors["batch"][STEPS], errors["layer"][twice] - errors["layer"][STEPS]
    )
    grows = [judging.verdict_of(of, 0.0, lower_agrees=False) for of in (grown["batch"], more)]
    low = grown["layer"].low  # NaN with one seed
    stays: Verdict = "differs" if low > 0 else "agrees" if low <= 0 else "cannot tell"
    longer = Card(
        "Longer test sequences than in training are a problem for batch norm, and none for layer norm.",
        "§3.1",
        f"From {STEPS} to {twice} steps the test error grows by {_shown(grown['batch'])} with batch norm, "
        f"whose last step's statistics serve all later ones, and by {_shown(grown['layer'])} with layer "
        f"norm: {_shown(more)} more. Statistics of all steps together: {_shown(grown[SHARED])}; no norm: "
        f"{_shown(grown['none'])}.",
        judging.together([*grows, stays]),
    )
    return each, longer


def _difference(a: pd.Series, b: pd.Series) -> Interval:
    return interval((a - b).dropna().tolist())


def _mean(errors: pd.Series) -> str:
    return f"{errors.mean():.2f} %"


def _shown(points: Interval) -> str:
    if math.isnan(points.low):
        return f"{points.mean:.2f} points (from one seed)"
    return f"{points.mean:.2f} points (95 % from {points.low:.2f} to {points.high:.2f})"


def _table(found: pd.DataFrame) -> Table:
    errors = _errors(found)
    rows = [
        [_WAYS[way], *(f"{table[n].mean():.2f} ± {table[n].std():.2f}" for n in table.columns)]
        for way, table in errors.items()
    ]
    return Table(
        f"Test error (%) of LSTMs trained on sequences of {STEPS} rows, by the length of the test sequences",
        ["statistics", *(f"{length} steps" for length in errors["none"].columns)],
        rows,
        note=(
            "The eight rows of a digit, again and again; ± is the standard deviation over the seeds. Each "
            f"step's own: beyond step {STEPS} those of step {STEPS}, the last that training had. Shared: the "
            "same networks with the mean and variance of all steps together."
        ),
    )


def _line(name: str, rows: pd.DataFrame) -> Line:
    groups = rows.groupby("place").value
    x, y = [float(str(place)) for place in groups.groups], groups.mean().tolist()
    return Line(name, x, y, groups.min().tolist(), groups.max().tolist())


def _statistics_chart(found: pd.DataFrame) -> Chart:
    panels = []
    for what, label in (
        ("mean", "distance from the last step's (σ)"),
        ("variance", "share of the last step's"),
    ):
        lines = [_line(words, found[found.what == f"{what} {name}"]) for name, words in QUANTITIES.items()]
        panels.append(Panel(what, "time step", label, lines))
    caption = "Batch norm's running statistics of the products and of the cell at each time step."
    return Chart("steps", caption, [panels])


def _chart(found: pd.DataFrame) -> Chart:
    lines = []
    for way, name in _WAYS.items():
        norm, what = ("batch", "shared") if way == SHARED else (way, "error")
        rows = found[(found.norm == norm) & (found.what == what)]
        lines.append(_line("batch" if way == "batch" else name, rows))
    panel = Panel("digits, row by row", "steps of a test sequence", TEST_ERROR.label, lines, y_log=True)
    return Chart(
        "lengths", f"The test error on longer sequences than the {STEPS} steps of training.", [[panel]]
    )
