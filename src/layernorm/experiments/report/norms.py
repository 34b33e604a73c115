"""Show what each norm averages: the cube, and batch and layer norm in numbers. Nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from layernorm.experiments.report import drawing
from layernorm.experiments.section import Background, Picture, Table

#: The numbers that the steps of the norms are shown on: a row for each case.
MATRIX: Final = ((1.0, 2.0, 3.0, 6.0), (2.0, 4.0, 6.0, 8.0), (0.0, 0.0, 3.0, 1.0))
GAIN, BIAS = 2.0, 1.0
AXES_CAPTION: Final = "What shares one mean and one variance, in blue"


class Step(NamedTuple):
    """A step of a norm: what it is called, its formula, and its numbers."""

    name: str
    formula: str
    numbers: Tensor


def steps(over: str, matrix: Sequence[Sequence[float]] = MATRIX) -> list[Step]:
    """Return the steps of batch norm (``over="batch"``) or layer norm ("layer") on a matrix, a row a case.

    The mean, the variance, the normalized numbers, and those with gain 2 and bias 1; without eps.

    Examples:
        >>> from layernorm.experiments.report.norms import steps
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


def background() -> Background:
    """Return what the report of a comparison says about the norms themselves."""
    picture = Picture(drawing.png(axes_picture(), dpi=80), AXES_CAPTION)
    return Background("What the norms do", steps_tables(), (picture,))


def steps_tables() -> tuple[Table, Table]:
    """Return the steps of batch norm and of layer norm as tables."""
    return _numbers("batch"), _numbers("layer")


def _numbers(over: str) -> Table:
    """Return the steps of a norm, named as in ``steps``, as a table with a column for each case."""
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
