"""Batch norm over batches: the error by their size, and by the share of each in the running statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import pandas as pd
import torch
from torch import nn

from layernorm.baselines import BatchNorm
from layernorm.experiments.classification import TEST_ERROR, VALIDATION_ERROR
from layernorm.experiments.networks import feedforward
from layernorm.experiments.results import judging
from layernorm.experiments.run.training import Run
from layernorm.experiments.section import Card, Chart, Line, Panel, Table
from layernorm.experiments.studies.explain import measuring
from layernorm.experiments.tasks import digits

#: What is trained at every batch size. With one case batch norm has no variance, and is left out.
NORMS: Final = ("none", "batch", "batch-hidden", "layer", "rms")
#: How much of each batch enters the running statistics.
MOMENTA: Final = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
_SIZES: Final = (64, 128, 128, 10)
_TRAINED: Final = ("norm", "batch_size", "learning_rate", "seed")
_KEPT: Final = ("batch_size", "momentum", "seed")


def measure(
    folder: Path,
    say: Callable[[str], None],
    batch_sizes: Sequence[int],
    learning_rates: Sequence[float],
    seeds: int,
    epochs: int,
) -> None:
    """Train the digits at every batch size; write ``training.csv`` and ``statistics.csv``.

    Raises:
        ExperimentError: a file is of something else.
    """
    about = f"explain epochs={epochs}"
    measuring.complete(
        folder / "training.csv",
        _TRAINED,
        list(_cases(batch_sizes, learning_rates, range(seeds))),
        lambda *case: [_errors(folder, Run(*case), epochs)],
        about,
        say,
    )
    small = [size for size in batch_sizes if size > 1]
    measuring.complete(
        folder / "statistics.csv",
        _KEPT,
        list(itertools.product((min(small), max(small)), MOMENTA, range(seeds))),
        lambda *case: [_with_momentum(folder, *case, epochs=epochs)],
        about,
        say,
    )


def read(folder: Path) -> measuring.Part:
    """Return what the report shows.

    Raises:
        ExperimentError: a file is missing or damaged.
    """
    training, statistics = (measuring.load(folder / f"{name}.csv") for name in ("training", "statistics"))
    chosen = judging.at_best_rates(training.assign(update=1, warmup=0), VALIDATION_ERROR)
    return measuring.Part(
        (_robust(chosen), _running(statistics)),
        (_table(chosen),),
        (_over_batch_sizes(chosen), _over_momenta(statistics)),
    )


def _cases(
    batch_sizes: Sequence[int], rates: Sequence[float], seeds: Sequence[int]
) -> Iterator[tuple[str, int, float, int]]:
    for seed, batch_size, rate, norm in itertools.product(seeds, batch_sizes, rates, NORMS):
        if batch_size > 1 or not norm.startswith("batch"):
            yield norm, batch_size, rate, seed


def _errors(folder: Path, run: Run, epochs: int) -> dict[str, float]:
    network = partial(feedforward.network, _SIZES)
    last = measuring.trained(folder, run, epochs, digits.load(), network).records[-1]
    return {metric.name: last[metric.name] for metric in (VALIDATION_ERROR, TEST_ERROR)}


def _with_momentum(
    folder: Path, batch_size: int, momentum: float, seed: int, *, epochs: int
) -> dict[str, float]:
    """Train batch norm; return its test error by running statistics, and by those of the test cases."""

    def network(norm: str) -> nn.Module:
        made = feedforward.network(_SIZES, norm)
        for module in made.modules():
            if isinstance(module, BatchNorm):
                module.momentum = momentum
        return made

    run = Run("batch-hidden", batch_size, 1e-3, seed)
    data = digits.load()
    trainer = measuring.trained(folder, run, epochs, data, network, f"-momentum{momentum!r}")
    with torch.no_grad():
        answers = trainer.network.train()(data.test_inputs).argmax(1)
    own = 100.0 * (answers != data.test_targets).float().mean().item()
    return {TEST_ERROR.name: trainer.records[-1][TEST_ERROR.name], "own_statistics": own}


def _table(chosen: pd.DataFrame) -> Table:
    sizes = sorted(chosen.batch_size.unique())
    rows = []
    for norm in NORMS:
        cells = []
        for size in sizes:
            errors = chosen[(chosen.norm == norm) & (chosen.batch_size == size)][TEST_ERROR.name]
            spread = f" ± {errors.std():.2f}" if len(errors) > 1 else ""
            cells.append(f"{errors.mean():.2f}{spread}" if len(errors) else "–")
        rows.append([norm, *cells])
    return Table(
        "Test error (%) of the digits by the batch size, each norm at its best learning rate",
        ["norm", *map(str, sizes)],
        rows,
        note=(
            "At the end of training, the rate chosen by validation cases; ± is the standard deviation over "
            "the seeds. batch: batch norm on all layers, the logits too, as in the paper; batch-hidden: on "
            "the hidden layers alone. One case has no variance over a batch."
        ),
    )


def _over_batch_sizes(chosen: pd.DataFrame) -> Chart:
    lines = []
    for norm in NORMS:
        groups = chosen[chosen.norm == norm].groupby("batch_size")[TEST_ERROR.name]
        x, y = [float(str(size)) for size in groups.groups], groups.mean().tolist()
        lines.append(Line(norm, x, y, groups.min().tolist(), groups.max().tolist()))
    panel = Panel("digits", "batch size", TEST_ERROR.label, lines, x_log=True, y_log=True)
    return Chart(
        "batch-sizes", "The test error by the batch size, each norm at its best learning rate.", [[panel]]
    )


def _over_momenta(statistics: pd.DataFrame) -> Chart:
    panels = []
    for size, rows in statistics.groupby("batch_size"):
        lines = []
        for column, name in (
            (TEST_ERROR.name, "running statistics"),
            ("own_statistics", "the test cases' own"),
        ):
            groups = rows.groupby("momentum")[column]
            x, y = [float(str(momentum)) for momentum in groups.groups], groups.mean().tolist()
            lines.append(Line(name, x, y, groups.min().tolist(), groups.max().tolist()))
        panels.append(
            Panel(f"batch size {size}", "momentum", TEST_ERROR.label, lines, x_log=True, y_log=True)
        )
    caption = "Batch norm's test error by the share of each batch in its running statistics."
    return Chart("momentum", caption, [panels])


def _robust(chosen: pd.DataFrame) -> Card:
    sizes = [size for size in judging.small_batches(chosen) if size > 1]
    return judging.better(
        chosen,
        TEST_ERROR,
        than="batch-hidden",
        batch_sizes=sizes,
        claim="Layer norm works with small batches, where batch norm does not, even off the logits.",
        section="§1, §3",
    )


def _running(statistics: pd.DataFrame) -> Card:
    smallest = statistics[statistics.batch_size == statistics.batch_size.min()]
    means = smallest.groupby("momentum")[[TEST_ERROR.name, "own_statistics"]].mean()
    errors = means[TEST_ERROR.name]
    worst, least = errors.idxmax(), errors.idxmin()
    ratio = errors[worst] / max(errors[least], 0.1)
    return Card(
        "Batch norm needs running averages of its statistics, which layer norm does without.",
        "§2",
        f"With batches of {smallest.batch_size.iloc[0]} the test error by running statistics is "
        f"{errors[least]:.2f} % at momentum {least:g} and {errors[worst]:.2f} % at {worst:g}, after the same "
        f"training: {ratio:.1f} times the errors. Layer norm has no such number to choose.",
        "agrees" if ratio > 1.5 else "differs",
    )
