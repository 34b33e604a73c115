"""The paper's analysis, checked numerically: table 1, the geometry of §5.2, the implicit learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pandas as pd
import torch
from sklearn.datasets import load_digits

from layernorm import theory
from layernorm.experiments.errors import DamagedFile
from layernorm.experiments.networks import feedforward
from layernorm.experiments.results import study_tables
from layernorm.experiments.section import Section
from layernorm.experiments.studies.theory import cards, section
from layernorm.experiments.studies.theory.section import CHARTED
from layernorm.experiments.task import Study
from layernorm.theory.models import NORMS

Say = Callable[[str], None]
# By what the initial weights of the hidden layers are multiplied before training.
_INITIAL: Final = (0.25, 1.0, 4.0)
_LEARNING_RATE: Final = 0.1
# The number of stretches of a training whose means are kept.
_WINDOWS: Final = 40
# The files, and the columns of each.
_FILES: Final = {
    "invariance": ("norm", "transformation", "deviation", "invariant", "paper"),
    "fisher": ("norm", "family", "same_neuron", "block", "printed", "complete"),
    "widths": ("norm", "family", "width", "deviation"),
    "scaling": ("norm", "family", "scaled", "factor", "outputs", "weights", "weights_bias", "along"),
    "gains": ("norm", "family", "equation", "deviation", "inputs_doubled", "weights_doubled"),
    "growth": ("norm", "initial", "update", "loss", "norm_of_weights", "angle", "cosine", "effective_rate"),
}


def run(
    folder: Path,
    say: Say,
    *,
    seeds: int,
    layers: Sequence[int],
    outputs: int,
    inputs: int,
    widths: Sequence[int],
    updates: int,
) -> None:
    """Measure, and write one CSV file for each part; a part whose file is there is not repeated.

    Args:
        folder: where the files go.
        say: shows a line of progress.
        seeds: repetitions, each with its own weights and data.
        layers: features of the input and of each layer of the networks of table 1.
        outputs: of the generalized linear models.
        inputs: of the generalized linear models.
        widths: numbers of outputs for which layer norm's printed and complete equations are compared.
        updates: of each training.
    """
    parts: Mapping[str, tuple[str, Callable[[int], Iterable[Any]]]] = {
        "invariance": ("Table 1", lambda seed: theory.invariance_table(seed, tuple(layers))),
        "fisher": ("Fisher information", lambda seed: _blocks(outputs, inputs, seed)),
        "widths": ("Fisher information by width", lambda seed: _widths(widths, inputs, seed)),
        "scaling": ("Fisher information of scaled weights", lambda seed: _scalings(outputs, inputs, seed)),
        "gains": ("Metric along the gains", lambda seed: _gains(outputs, inputs, seed)),
        "growth": ("Growth of weights during training", lambda seed: _growth(updates, seed)),
    }
    about = (
        f"theory seeds={seeds} layers={list(layers)} outputs={outputs} inputs={inputs} widths={list(widths)} "
        f"updates={updates}"
    )
    for name, (title, measure) in parts.items():
        path = folder / f"{name}.csv"
        if path.exists():
            try:
                _file(path, _FILES[name], about)
            except DamagedFile as error:
                say(study_tables.will_be_repeated(error))
            else:
                say(f"{title}: measured before")
                continue
        rows = []
        for seed in range(seeds):
            say(f"{title}: seed {seed}")
            rows += [
                {"seed": seed, **(row if isinstance(row, dict) else asdict(row))} for row in measure(seed)
            ]
        study_tables.write(path, pd.DataFrame(rows), about)


def _blocks(outputs: int, inputs: int, seed: int) -> Iterable[dict[str, Any]]:
    features = theory.features(inputs=inputs, seed=seed)
    for norm in NORMS:
        for family in theory.FAMILIES:
            model = theory.model(norm, family, outputs, inputs, seed)
            for block in theory.compare_blocks(model, features):
                yield {
                    "norm": norm,
                    "family": family,
                    "same_neuron": block.neurons[0] == block.neurons[1],
                    "block": " and ".join(block.parameters),
                    "printed": block.printed,
                    "complete": block.complete,
                }


def _widths(widths: Sequence[int], inputs: int, seed: int) -> Iterable[dict[str, Any]]:
    features = theory.features(inputs=inputs, seed=seed)
    for norm in ("layer", "rms"):
        for family in ("Bernoulli", "categorical"):
            for width in widths:
                model = theory.model(norm, family, width, inputs, seed)
                printed, complete = (
                    torch.stack([information[i, :inputs, i, :inputs] for i in range(width)])
                    for information in (
                        theory.fisher_equation(model, features, complete=c) for c in (False, True)
                    )
                )
                deviation = float((printed - complete).norm() / complete.norm())
                yield {"norm": norm, "family": family, "width": width, "deviation": deviation}


def _scalings(outputs: int, inputs: int, seed: int) -> Iterable[theory.Scaling]:
    features = theory.features(inputs=inputs, seed=seed)
    for norm in NORMS:
        for family in theory.FAMILIES:
            model = theory.model(norm, family, outputs, inputs, seed)
            # Several factors for the chart, and the paper's for every family.
            for factor in (0.25, 0.5, 2.0, 4.0) if family == CHARTED else (2.0,):
                yield theory.scale_weights(model, features, "vector", factor)
                yield theory.scale_weights(model, features, "matrix", factor)


def _gains(outputs: int, inputs: int, seed: int) -> Iterable[theory.GainMetric]:
    features = theory.features(inputs=inputs, seed=seed)
    for norm in NORMS:
        for family in theory.FAMILIES:
            yield theory.compare_gain_metric(theory.model(norm, family, outputs, inputs, seed), features)


def _growth(updates: int, seed: int) -> Iterable[dict[str, Any]]:
    """Train a network of 64-64-64-10 on scikit-learn's digits by plain gradient descent."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)
    for norm in feedforward.NORMS:
        for initial in _INITIAL:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = feedforward.network((64, 64, 64, 10), norm)
            with torch.no_grad():
                for weight in theory.weights(network)[:-1]:
                    weight *= initial
            steps = theory.weight_growth(network, inputs, targets, _LEARNING_RATE, updates, seed=seed)
            length = max(1, updates // _WINDOWS)
            # The first update on its own: it is the one that starts from the same function.
            for window in [steps[:1], *(steps[i : i + length] for i in range(1, updates, length))]:
                means = pd.DataFrame(window).abs().mean().rename({"norm": "norm_of_weights"})
                yield {"norm": norm, "initial": initial, **{str(name): x for name, x in means.items()}}


def read(folder: Path) -> Section:
    """Return cards, tables and charts from the files that ``run`` wrote.

    Raises:
        ExperimentError: a file is missing or damaged.
    """
    results = {name: _file(folder / f"{name}.csv", columns) for name, columns in _FILES.items()}
    return Section(
        name=STUDY.name,
        title=STUDY.title,
        summary=STUDY.summary,
        command="layernorm theory",
        cards=cards.cards(results),
        tables=section.tables(results),
        charts=section.charts(results),
    )


def _file(path: Path, columns: Sequence[str], about: str | None = None) -> pd.DataFrame:
    def parse(table: pd.DataFrame) -> pd.DataFrame:
        missing = [column for column in ("seed", *columns) if column not in table]
        if missing:
            raise ValueError(f"no column {missing[0]!r}")
        return table

    return study_tables.read(path, parse, "delete it, and the same command measures this part again", about)


STUDY = Study(
    name="theory",
    title="The analysis",
    section="§5",
    summary=(
        "Table 1 decided on networks of several layers, Fisher information of generalized linear models by "
        "automatic differentiation beside the equations, growth of the weights while 64-64-64-10 learns "
        "scikit-learn's digits by plain gradient descent"
    ),
    run=run,
    read=read,
    presets={
        "small": {
            "seeds": 3,
            "layers": (12, 16, 16, 8),
            "outputs": 4,
            "inputs": 6,
            "widths": (4, 8, 16, 32, 64),
            "updates": 400,
        },
        "paper": {
            "seeds": 20,
            "layers": (64, 128, 128, 128, 10),
            "outputs": 8,
            "inputs": 16,
            "widths": (4, 8, 16, 32, 64),
            "updates": 2000,
        },
    },
)
