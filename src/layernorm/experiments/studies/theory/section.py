"""The results of the study of the paper's analysis as tables and charts, next to the paper's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import pandas as pd

from layernorm.experiments.section import Chart, Line, Panel, Table
from layernorm.experiments.studies.theory.cards import AGREE
from layernorm.theory import TRANSFORMATIONS

#: The family whose Fisher information is drawn against the factor of the weights.
CHARTED: Final = "Bernoulli"


def tables(results: Mapping[str, pd.DataFrame]) -> Sequence[Table]:
    """Return the tables of the study's files by name."""
    return (
        _invariances(results["invariance"]),
        _fisher(results["fisher"]),
        _scaling(results["scaling"]),
        _gains(results["gains"]),
        _growth(results["growth"]),
    )


def charts(results: Mapping[str, pd.DataFrame]) -> Sequence[Chart]:
    """Return the charts of the study's files by name."""
    return (
        _growth_chart(results["growth"]),
        _curvature_chart(results["scaling"]),
        _width_chart(results["widths"]),
    )


def _invariances(results: pd.DataFrame) -> Table:
    norms = list(dict.fromkeys(results.norm))
    rows = []
    for transformation in TRANSFORMATIONS:
        row = [transformation]
        for norm in norms:
            cell = results[(results.transformation == transformation) & (results.norm == norm)]
            found = "yes" if cell.invariant.all() else "no" if not cell.invariant.any() else "by seed"
            paper = cell.paper.iloc[0]
            row.append(found if pd.isna(paper) else f"{found}, {'yes' if paper else 'no'}")
        rows.append(row)
    least, greatest = results[~results.invariant].deviation.min(), results[results.invariant].deviation.max()
    return Table(
        caption="Table 1: do the outputs of a network stay the same? Here, in the paper",
        columns=("", *norms),
        rows=rows,
        note=(
            f"Change of an output in standard deviations of the outputs: at most {greatest:.0e} in every "
            f"yes, at least {least:.2f} in every no; {results.seed.nunique()} seeds."
        ),
    )


def _fisher(results: pd.DataFrame) -> Table:
    columns = {}
    for norm, cells in results.groupby("norm", sort=False):
        columns[f"{norm} ({12 if norm == 'none' else 13})"] = (norm, "printed")
        if cells.printed.max() > AGREE:
            columns[f"{norm} full"] = (norm, "complete")
    rows = []
    order = results.sort_values("same_neuron", ascending=False, kind="stable")
    for (same, block), cells in order.groupby(["same_neuron", "block"], sort=False):
        letters = ", ".join(name[0] for name in str(block).split(" and "))
        row = [letters, "i = j" if same else "i ≠ j"]
        for norm, form in columns.values():
            cell = cells[cells.norm == norm]
            row.append("–" if cell.empty else _deviation(cell[form].max()))
        rows.append(row)
    return Table(
        caption="Fisher information of neurons i and j: greatest deviation of equations 12 and 13",
        columns=("block", "neurons", *columns),
        rows=rows,
        note=(
            "Blocks of weights w, biases b, gains g. Deviation from the Fisher information by automatic "
            "differentiation, in units of its diagonal; 0: below 1e-10, which is rounding. Full: with what a "
            "weight does to other neurons. Gaussian, Bernoulli, Poisson and categorical outputs."
        ),
    )


def _scaling(results: pd.DataFrame) -> Table:
    rows = []
    doubled = results[results.factor == 2.0]
    for (norm, scaled), cells in doubled.groupby(["norm", "scaled"], sort=False):
        figures = (_range(cells[name], "{:.2f}") for name in ("outputs", "weights", "weights_bias", "along"))
        rows.append([str(norm), "one vector" if scaled == "vector" else "matrix", *figures])
    return Table(
        caption="When weights are doubled: change of the outputs, factors of the Fisher information",
        columns=(
            "norm",
            "doubled",
            "change of outputs",
            "factor of weight and weight",
            "factor of weight and bias",
            "curvature along the weights",
        ),
        rows=rows,
        note=(
            "Outputs in standard deviations; curvature along the weights themselves in units of the mean "
            "over all directions. The paper: the outputs stay the same, and the curvature along w changes "
            "by 1/2."
        ),
    )


def _gains(results: pd.DataFrame) -> Table:
    families = list(dict.fromkeys(results.family))
    rows = []
    for norm, cells in results.groupby("norm", sort=False):
        equation = cells.equation.iloc[0]
        row = [str(norm), "–" if pd.isna(equation) else f"{equation:.0f}"]
        for name, form in (("deviation", None), ("inputs_doubled", "{:.2f}"), ("weights_doubled", "{:.2f}")):
            for family in ("Gaussian", "others"):
                chosen = families[:1] if family == "Gaussian" else families[1:]
                values = cells[cells.family.isin(chosen)][name]
                row.append(_deviation(values.max()) if form is None else _range(values, form))
        rows.append(row)
    return Table(
        caption="ds² along the gains; without a norm, along the lengths of the weight vectors",
        columns=(
            "norm",
            "equation",
            *(
                f"{what}, {family}"
                for what in ("error", "inputs ×2", "weights ×2")
                for family in ("Gaussian", "others")
            ),
        ),
        rows=rows,
        note=(
            "Greatest error of the equation; factors of the trace when inputs or weights are doubled. "
            "Others: Bernoulli, Poisson, categorical. 0: below 1e-10."
        ),
    )


def _growth(results: pd.DataFrame) -> Table:
    rows = []
    for (norm, initial), cells in results.groupby(["norm", "initial"], sort=False):
        updates = cells.groupby("update").mean(numeric_only=True)
        first, last = updates.iloc[0], updates.iloc[-1]
        rows.append(
            [
                str(norm),
                f"×{initial:g}",
                f"{first.norm_of_weights:.2f}",
                f"{last.norm_of_weights:.2f}",
                f"{first.angle:.3f}",
                f"{last.angle:.3f}",
                f"{updates.cosine.mean():.0e}",
                f"{last.loss:.3f}",
            ]
        )
    return Table(
        caption="Plain gradient descent on scikit-learn's digits: the weights of the first layer",
        columns=(
            "norm",
            "initial weights",
            "‖W‖ at first",
            "‖W‖ at last",
            "first update turns W by (°)",
            "last updates (°)",
            "mean |cosine| of W and gradient",
            "training loss at last",
        ),
        rows=rows,
        note=f"Means over {results.seed.nunique()} seeds; at last: the last stretch of the training.",
    )


def _line(name: str, results: pd.DataFrame, x: str, y: str) -> Line:
    """Return means over the seeds, and a band from the least to the greatest."""
    groups = results.groupby(x)[y]
    low, high = (groups.min().tolist(), groups.max().tolist()) if results.seed.nunique() > 1 else ((), ())
    return Line(name, groups.mean().index.tolist(), groups.mean().tolist(), low, high)


def _growth_chart(results: pd.DataFrame) -> Chart:
    measures = {
        "norm_of_weights": "‖W‖",
        "angle": "angle per update (°)",
        "effective_rate": "learning rate / ‖W‖²",
    }

    def row(measure: str, label: str) -> list[Panel]:
        usual = results[results.initial == 1.0].groupby("norm", sort=False)
        panels = {"every norm": [_line(str(norm), rows, "update", measure) for norm, rows in usual]}
        for norm, title in (("none", "no norm"), ("layer", "layer norm")):
            scaled = results[results.norm == norm].groupby("initial")
            panels[f"{title}, weights scaled"] = [
                _line(f"weights ×{initial:g}", rows, "update", measure) for initial, rows in scaled
            ]
        return [Panel(title, "update", label, lines, y_log=True) for title, lines in panels.items()]

    return Chart(
        name="growth",
        caption="Weights grow, and with their length the angle falls by which an update turns them.",
        rows=[row(measure, label) for measure, label in measures.items()],
    )


def _curvature_chart(results: pd.DataFrame) -> Chart:
    def panel(title: str, rows: pd.DataFrame) -> Panel:
        lines = []
        for norm, own in rows.groupby("norm", sort=False):
            unscaled = own.drop_duplicates("seed").assign(factor=1.0, weights=1.0)
            lines.append(_line(str(norm), pd.concat([own, unscaled]), "factor", "weights"))
        factors = sorted({*rows.factor, 1.0})
        lines.append(Line("1/factor", factors, [1 / factor for factor in factors]))
        return Panel(title, "factor of the weights", "factor of the curvature", lines, x_log=True, y_log=True)

    charted = results[results.family == CHARTED]
    return Chart(
        name="curvature",
        caption=(
            "Curvature along scaled weights: as 1/factor² where the outputs stay the same; 1/factor is the "
            "paper's text."
        ),
        rows=[
            [
                panel(title, charted[charted.scaled == scaled])
                for title, scaled in (("one neuron's weights", "vector"), ("all weights", "matrix"))
            ]
        ],
    )


def _width_chart(results: pd.DataFrame) -> Chart:
    def panel(title: str, rows: pd.DataFrame) -> Panel:
        lines = [_line(str(n), r, "width", "deviation") for n, r in rows.groupby("norm", sort=False)]
        return Panel(title, "neurons in the layer", "deviation of equation 13", lines, x_log=True, y_log=True)

    return Chart(
        name="widths",
        caption="What equation 13 lacks of a neuron's weight block under layer norm, against the width.",
        rows=[[panel(f"{f} outputs", rows) for f, rows in results.groupby("family", sort=False)]],
    )


def _deviation(value: float) -> str:
    return "0" if value < AGREE else f"{value:.2f}"


def _range(values: pd.Series, form: str) -> str:
    # Rounding may leave the sign of a zero.
    low, high = (form.format(abs(v) if abs(v) < AGREE else v) for v in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"
