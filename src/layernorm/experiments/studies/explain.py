"""Show what each norm averages, in pictures and numbers, and what follows for the size of the batch.

The paper's own statements: which summed inputs share a mean (§2, §3), that batch norm needs large batches and
running statistics (§2), and that layer norm needs neither (§3).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from layernorm.baselines import BatchNorm
from layernorm.experiments.classification import TEST_ERROR, VALIDATION_ERROR, Classification
from layernorm.experiments.errors import DamagedFile
from layernorm.experiments.networks import feedforward
from layernorm.experiments.report import drawing
from layernorm.experiments.results import judging, study_tables
from layernorm.experiments.run.training import Run, Trainer
from layernorm.experiments.section import Card, Chart, Line, Panel, Picture, Section, Table
from layernorm.experiments.storage import files
from layernorm.experiments.task import Preset, Study
from layernorm.experiments.tasks import digits

#: What is trained at every batch size. With one case batch norm has no variance, and is left out.
NORMS: Final = ("none", "batch", "batch-hidden", "layer", "rms")
#: How much of each batch enters the running statistics.
MOMENTA: Final = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
#: The numbers that the steps of the norms are shown on: a row for each case.
MATRIX: Final = ((1.0, 2.0, 3.0, 6.0), (2.0, 4.0, 6.0, 8.0), (0.0, 0.0, 3.0, 1.0))
GAIN, BIAS = 2.0, 1.0
_SIZES: Final = (64, 128, 128, 10)
_TRAINED: Final = ("norm", "batch_size", "learning_rate", "seed")
_KEPT: Final = ("batch_size", "momentum", "seed")
_WORDS: Final = "delete it, and the same command measures it again"


class Step(NamedTuple):
    """A step of a norm: what it is called, its formula, and its numbers."""

    name: str
    formula: str
    numbers: Tensor


def steps(over: str, matrix: Sequence[Sequence[float]] = MATRIX) -> list[Step]:
    """Return the steps of batch norm (``over="batch"``) or layer norm ("layer") on a matrix, a row a case.

    The mean, the variance, the normalized numbers, and those with gain 2 and bias 1; without eps.

    Examples:
        >>> from layernorm.experiments.studies.explain import steps
        >>> steps("layer")[0].numbers.flatten().tolist()
        [3.0, 5.0, 1.0]
    """
    a = torch.tensor(matrix, dtype=torch.float64)
    dim, of = (0, "cases") if over == "batch" else (1, "features")
    mean = a.mean(dim, keepdim=True)
    var = (a - mean).square().mean(dim, keepdim=True)
    normalized = (a - mean) / var.sqrt()
    return [
        Step("mean", f"μ = Σ a / {of}", mean),
        Step("variance", f"σ² = Σ (a - μ)² / {of}", var),
        Step("normalize", "n = (a - μ) / σ", normalized),
        Step("gain and bias", f"y = {GAIN:g}·n + {BIAS:g}", GAIN * normalized + BIAS),
    ]


def axes_picture() -> Figure:
    """Draw what shares one mean: a cube of cases, features and places for each norm."""
    cases, features, places = 4, 6, 4
    chosen = np.zeros((cases, features, places), dtype=bool)
    marked: Mapping[str, tuple[Any, ...]] = {
        "batch norm": (slice(None), 0, slice(None)),
        "layer norm": (0, slice(None), slice(None)),
        "instance norm": (0, 0, slice(None)),
        "group norm (3 groups)": (0, slice(0, features // 3), slice(None)),
    }
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for place, (name, where) in enumerate(marked.items(), 1):
        one = chosen.copy()
        one[where] = True
        colours = np.where(one[..., None], (0.0, 0.447, 0.698, 0.95), (0.85, 0.85, 0.85, 0.25))
        axes: Any = figure.add_subplot(1, len(marked), place, projection="3d")
        axes.voxels(np.ones_like(chosen), facecolors=colours, edgecolor=(0.4, 0.4, 0.4, 0.6), linewidth=0.4)
        axes.set_title(name)
        axes.set_xlabel("cases", labelpad=-12)
        axes.set_ylabel("features", labelpad=-12)
        axes.set_zlabel("places", labelpad=-12)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_zticks([])
        axes.view_init(elev=22, azim=-55)
        axes.set_box_aspect((cases, features, places))
    return figure


def run(
    folder: Path,
    say: Callable[[str], None],
    *,
    batch_sizes: Sequence[int],
    learning_rates: Sequence[float],
    seeds: int,
    epochs: int,
) -> None:
    """Train the digits at every batch size; write ``training.csv`` and ``statistics.csv``, and the picture.

    Args:
        folder: where the files go; what they hold already is not trained again.
        say: shows a line of progress.
        batch_sizes: cases per update.
        learning_rates: of which each norm has its best at each batch size, by the validation cases.
        seeds: repetitions.
        epochs: passes over the training cases.

    Raises:
        ExperimentError: a file is of something else.
    """
    files.write(folder / "axes.png", drawing.png(axes_picture(), dpi=110))
    about = f"explain epochs={epochs}"
    wanted = list(_cases(batch_sizes, learning_rates, range(seeds)))
    for case in _missing(folder, "training", _TRAINED, wanted, about, say):
        say(f"norm {case[0]}, batch size {case[1]}, rate {case[2]:g}, seed {case[3]}")
        _add(
            folder,
            "training",
            [dict(zip(_TRAINED, case, strict=True)) | _errors(folder, Run(*case), epochs)],
            about,
        )
    small = [size for size in batch_sizes if size > 1]
    kept = list(itertools.product((min(small), max(small)), MOMENTA, range(seeds)))
    for kept_case in _missing(folder, "statistics", _KEPT, kept, about, say):
        say(f"batch norm, batch size {kept_case[0]}, momentum {kept_case[1]:g}, seed {kept_case[2]}")
        found = _with_momentum(folder, *kept_case, epochs=epochs)
        _add(folder, "statistics", [dict(zip(_KEPT, kept_case, strict=True)) | found], about)


def _cases(
    batch_sizes: Sequence[int], rates: Sequence[float], seeds: Sequence[int]
) -> Iterator[tuple[str, int, float, int]]:
    for seed, batch_size, rate, norm in itertools.product(seeds, batch_sizes, rates, NORMS):
        if batch_size > 1 or not norm.startswith("batch"):
            yield norm, batch_size, rate, seed


def _trained(
    folder: Path, run: Run, epochs: int, network: Callable[[str], nn.Module], kind: str = ""
) -> Trainer:
    problem = Classification(digits.load(), network)
    every = max(1, problem.cases // run.batch_size * epochs)
    preset = Preset(epochs, (run.batch_size,), (run.norm,), evaluate_every=every)
    checkpoint = folder / f"{run.name}{kind}.checkpoint"
    trainer = Trainer(problem, run, preset, checkpoint, identity=f"explain {epochs}{kind}")
    trainer.train()
    checkpoint.unlink(missing_ok=True)
    return trainer


def _errors(folder: Path, run: Run, epochs: int) -> dict[str, float]:
    last = _trained(folder, run, epochs, partial(feedforward.network, _SIZES)).records[-1]
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
    trainer = _trained(folder, run, epochs, network, f"-momentum{momentum!r}")
    data = digits.load()
    with torch.no_grad():
        answers = trainer.network.train()(data.test_inputs).argmax(1)
    own = 100.0 * (answers != data.test_targets).float().mean().item()
    return {TEST_ERROR.name: trainer.records[-1][TEST_ERROR.name], "own_statistics": own}


def _missing(
    folder: Path,
    name: str,
    keys: Sequence[str],
    wanted: Sequence[tuple[Any, ...]],
    about: str,
    say: Callable[[str], None],
) -> list[tuple[Any, ...]]:
    path = folder / f"{name}.csv"
    if not path.exists():
        return list(wanted)
    try:
        there = _load(path, about)
    except DamagedFile as error:
        say(study_tables.will_be_repeated(error))
        path.unlink()
        return list(wanted)
    done = {*there[list(keys)].itertuples(index=False, name=None)}
    return [case for case in wanted if case not in done]


def _add(folder: Path, name: str, rows: list[dict[str, Any]], about: str) -> None:
    path = folder / f"{name}.csv"
    before = [_load(path, about)] if path.exists() else []
    study_tables.write(path, pd.concat([*before, pd.DataFrame(rows)], ignore_index=True), about)


def _load(path: Path, about: str | None = None) -> pd.DataFrame:
    def parse(table: pd.DataFrame) -> pd.DataFrame:
        return table.astype({"batch_size": int, "seed": int, TEST_ERROR.name: float})

    return study_tables.read(path, parse, _WORDS, about)


def read(folder: Path) -> Section:
    """Return what the report shows of a folder.

    Raises:
        ExperimentError: a file is missing or damaged.
    """
    training, statistics = (_load(folder / f"{name}.csv") for name in ("training", "statistics"))
    chosen = judging.at_best_rates(training.assign(update=1, warmup=0), VALIDATION_ERROR)
    return Section(
        name=STUDY.name,
        title=STUDY.title,
        summary=STUDY.summary,
        command="layernorm explain",
        cards=(_robust(chosen), _running(statistics)),
        tables=(_numbers("batch"), _numbers("layer"), _table(chosen)),
        charts=(_over_batch_sizes(chosen), _over_momenta(statistics)),
        pictures=[Picture(folder / "axes.png", "What shares one mean and one variance, in blue")],
    )


def _numbers(over: str) -> Table:
    """Return the steps of a norm as a table, a column for each number of the matrix' rows."""
    rows = [["a", "the summed inputs", *(_row(row) for row in MATRIX)]]
    for step in steps(over):
        each = step.numbers.expand(len(MATRIX), -1) if over == "batch" else step.numbers
        alike = over == "batch" and step.numbers.size(0) == 1
        cells = ["the same for all: " + _row(step.numbers[0])] if alike else [_row(row) for row in each]
        rows.append([step.name, step.formula, *cells, *([""] * (len(MATRIX) - len(cells)))])
    what = "each feature over the cases" if over == "batch" else "each case over its features"
    return Table(
        f"{over.capitalize()} norm in four steps, on three cases of four features: {what}",
        ["step", "formula", *(f"case {i + 1}" for i in range(len(MATRIX)))],
        rows,
        note="Without eps; gain 2 and bias 1 for every feature.",
    )


def _row(numbers: Sequence[float] | Tensor) -> str:
    return "  ".join(f"{float(number):.3g}" for number in numbers)


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


STUDY: Final = Study(
    name="explain",
    title="What each norm averages",
    section="§1 to §3",
    summary=(
        "Which inputs share a mean, the steps in numbers, and the digits' test error over batch sizes and "
        "over the momentum of running statistics"
    ),
    run=run,
    read=read,
    presets={
        "small": {"batch_sizes": (2, 4, 8, 32, 128), "learning_rates": (3e-4, 3e-3), "seeds": 5, "epochs": 5},
        "paper": {
            "batch_sizes": (1, 2, 4, 8, 16, 32, 64, 128, 256),
            "learning_rates": (3e-4, 1e-3, 3e-3, 1e-2),
            "seeds": 5,
            "epochs": 15,
        },
    },
)
