"""The statements of the paper's analysis (§5 and the supplement) and what the study measured of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import pandas as pd

from layernorm.experiments.section import Card, Verdict

#: Deviations below it are rounding: a sum over some hundred cases is off by some hundred roundings of 1e-16,
#: and no model here amplifies errors a thousandfold. What differs does so by more than 1e-3.
AGREE: Final = 1e-10
# Of the gradient with the weights, in float32 and with eps = 1e-5.
_ORTHOGONAL: Final = 1e-3
_NAMES: Final = {"batch": "Batch", "weight": "Weight", "layer": "Layer"}


def cards(results: Mapping[str, pd.DataFrame]) -> Sequence[Card]:
    """Return one card for each row of table 1 and for each statement on the geometry.

    Args:
        results: the study's files by name.
    """
    return (
        *(_row(results["invariance"], norm) for norm in _NAMES),
        _dataset_rescaling(results["invariance"]),
        _equation(results["fisher"], ("none",), "equation 12"),
        _equation(results["fisher"], ("batch", "weight"), "equations 13 and 14"),
        _layer_equation(results["fisher"], results["widths"]),
        _curvature(results["scaling"]),
        _same_outputs(results["scaling"]),
        _gain_equation_batch(results["gains"]),
        _gain_equations(results["gains"]),
        _robust(results["gains"]),
        _growth(results["growth"]),
    )


def _verdict(*agree: bool) -> Verdict:
    return "agrees" if all(agree) else "partly" if any(agree) else "differs"


def _row(results: pd.DataFrame, norm: str) -> Card:
    row = results[results.norm == norm]
    cells = row.groupby("transformation", sort=False).agg(
        invariant=("invariant", "mean"), paper=("paper", "first")
    )
    agree = cells.invariant == cells.paper.astype(float)
    invariant = [name for name, cell in cells.iterrows() if cell.paper]
    return Card(
        claim=f"{_NAMES[norm]} norm is invariant to {', '.join(map(str, invariant))}, and to nothing else.",
        section="§5.1, table 1",
        figure=(
            f"{agree.sum()} of {len(cells)} cells are as in the table, with every one of "
            f"{row.seed.nunique()} seeds."
        ),
        verdict="agrees" if agree.all() else "partly",
        remark="" if agree.all() else f"Not: {', '.join(map(str, cells.index[~agree]))}.",
    )


def _dataset_rescaling(results: pd.DataFrame) -> Card:
    cells = results[(results.transformation == "dataset re-scaling") & results.norm.isin(_NAMES)]
    invariant = cells.groupby("norm", sort=False).invariant.all()
    change = cells[~cells.invariant].deviation
    others = ", ".join(invariant.index[~invariant])
    changed = f" {others}: an output changes by {change.min():.1f} standard deviations."
    return Card(
        claim="All the normalization methods are invariant to re-scaling the dataset.",
        section="§5.1, the text",
        figure=f"Invariant: {', '.join(invariant.index[invariant])}.{'' if invariant.all() else changed}",
        verdict=_verdict(*invariant),
        remark=""
        if invariant.all()
        else "The paper's table 1 has a no for weight norm, and is right: ‖w‖ knows nothing of the data.",
    )


def _equation(results: pd.DataFrame, norms: tuple[str, ...], equation: str) -> Card:
    greatest = results[results.norm.isin(norms)].printed.max()
    what = "without a norm" if norms == ("none",) else f"under {' and '.join(norms)} norm"
    return Card(
        claim=f"The Fisher information {what} is that of {equation}.",
        section=f"§5.2.2, {equation}",
        figure=f"Every block of every pair of neurons agrees to {greatest:.0e}.",
        verdict="agrees" if greatest < AGREE else "differs",
    )


def _layer_equation(results: pd.DataFrame, widths: pd.DataFrame) -> Card:
    layer = results[results.norm == "layer"]
    with_weights = layer[layer.block.str.contains("weight")]
    gains_biases = layer[~layer.block.str.contains("weight")]
    exact = gains_biases.printed.max() < AGREE, with_weights.printed.max() < AGREE
    by_width = (
        widths[(widths.norm == "layer") & (widths.family == "Bernoulli")].groupby("width").deviation.mean()
    )
    return Card(
        claim="The Fisher information under layer norm is that of equations 13 and 14.",
        section="§5.2.2, equations 13 and 14",
        figure=(
            f"Blocks of gains and biases agree to {gains_biases.printed.max():.0e}; blocks with weights are "
            f"off by up to {with_weights.printed.max():.2f} of their diagonal."
        ),
        verdict=_verdict(*exact),
        remark=""
        if all(exact)
        else (
            "Under layer norm μ and σ of every neuron depend on all weights; the equation leaves out what "
            f"a weight does to other neurons. With it the formula is exact ({layer.complete.max():.0e}). The "
            f"block of a neuron's own weights is off by {by_width.iloc[0]:.0%} with {by_width.index[0]} "
            f"neurons in the layer, by {by_width.iloc[-1]:.1%} with {by_width.index[-1]}."
        ),
    )


def _curvature(results: pd.DataFrame) -> Card:
    same = _unchanged(results)
    factors = same[same.factor == 2.0].weights
    shrinks, half = bool((factors < 1).all()), bool((abs(factors - 0.5) < AGREE).all())
    figure = f"{factors.min():.2f}" + (
        "" if factors.max() - factors.min() < 5e-3 else f" to {factors.max():.2f}"
    )
    return Card(
        claim="When the norm of w doubles, the curvature along w changes by a factor of 1/2.",
        section="§5.2.2",
        figure=f"Factor of the weights' block: {figure}, wherever the outputs stay the same.",
        verdict=_verdict(shrinks, half),
        remark=""
        if half
        else (
            "It falls, as claimed, but equation 13 itself has 1/σ² there, hence 1/4; a factor of 1/2 is that "
            "of the blocks of weights with gains and biases."
        ),
    )


def _unchanged(results: pd.DataFrame) -> pd.DataFrame:
    return results[results.outputs < AGREE]


def _same_outputs(results: pd.DataFrame) -> Card:
    doubled = results[(results.factor == 2.0) & results.norm.isin(_NAMES)]
    vector = doubled[doubled.scaled == "vector"].groupby("norm", sort=False).outputs.max() < AGREE
    matrix = doubled[doubled.scaled == "matrix"].groupby("norm", sort=False).outputs.max() < AGREE
    along = _unchanged(doubled).along.abs().max()
    return Card(
        claim="The outputs of a normalized model remain the same when the norm of one neuron's w doubles.",
        section="§5.2.2",
        figure=(
            f"The same for one vector: {', '.join(vector.index[vector])}; for the whole matrix: "
            f"{', '.join(matrix.index[matrix])}. Curvature along such weights themselves: {along:.0e} of the "
            "mean, so all of it is in turning them."
        ),
        verdict=_verdict(*vector),
        remark="" if vector.all() else "Layer norm has the property for the matrix only, as table 1 says.",
    )


def _gain_equation_batch(results: pd.DataFrame) -> Card:
    batch = results[results.norm == "batch"]
    gaussian, others = (batch[(batch.family == "Gaussian") == same].deviation.max() for same in (True, False))
    return Card(
        claim="Under batch norm ds² along the gains is half the mean covariance of the outputs.",
        section="supplement, equation 32",
        figure=f"Gaussian outputs: agrees to {gaussian:.0e}; others: off by up to {others:.0%}.",
        verdict=_verdict(gaussian < AGREE, others < AGREE),
        remark=""
        if others < AGREE
        else (
            "Equation 13 has (a_i - μ_i)(a_j - μ_j)/(σ_i σ_j) in the mean, which can be left out only where "
            "the covariance is the same for all inputs."
        ),
    )


def _gain_equations(results: pd.DataFrame) -> Card:
    greatest = results[results.norm.isin(("layer", "weight", "none"))].groupby("norm").deviation.max()
    figure = ", ".join(f"{norm} {value:.0e}" for norm, value in greatest.items())
    return Card(
        claim=(
            "ds² along the gains under layer norm and weight norm, and along the lengths of the weight "
            "vectors without a norm, is that of equations 33, 34 and 35."
        ),
        section="supplement, equations 33 to 35",
        figure=f"Greatest deviation: {figure}.",
        verdict=_verdict(*(greatest < AGREE)),
        remark="Equation 35 is the part of one pair i, j; ds² is the sum over all pairs.",
    )


def _robust(results: pd.DataFrame) -> Card:
    def factors(norm: str) -> pd.DataFrame:
        return results[results.norm == norm][["inputs_doubled", "weights_doubled"]]

    robust = [bool(((factors(norm) - 1).abs() < AGREE).all(axis=None)) for norm in ("batch", "layer")]
    gaussian = results[results.family == "Gaussian"].groupby("norm").inputs_doubled.mean()
    return Card(
        claim=(
            "Learning the gains is robust to the scale of inputs and weights under batch norm and layer "
            "norm; learning the lengths of the weight vectors without a norm is not."
        ),
        section="§5.2.2 and supplement",
        figure=(
            f"Inputs twice as large, Gaussian outputs: ds² times {gaussian['batch']:.2f} (batch), "
            f"{gaussian['layer']:.2f} (layer), {gaussian['none']:.2f} (none), {gaussian['weight']:.2f} "
            "(weight)."
        ),
        verdict=_verdict(*robust, gaussian["none"] > 1.5),
        remark="Weight norm's gains depend on the scale of the inputs as lengths without a norm do.",
    )


def _growth(results: pd.DataFrame) -> Card:
    normalized = results[results.norm.isin(_NAMES)]
    parts, agree = [], []
    for norm, rows in normalized[normalized.initial == 1.0].groupby("norm", sort=False):
        updates = rows.groupby("update")[["norm_of_weights", "angle", "cosine", "effective_rate"]].mean()
        first, last = updates.iloc[0], updates.iloc[-1]
        agree.append(
            bool(updates.norm_of_weights.is_monotonic_increasing and rows.cosine.max() < _ORTHOGONAL)
        )
        rate = last.effective_rate / first.effective_rate
        growth = last.norm_of_weights / first.norm_of_weights
        parts.append(f"{norm} ‖W‖ times {growth:.2f}, effective rate times {rate:.2f}")
    start = (
        normalized[(normalized.norm == "layer") & (normalized["update"] == 0)].groupby("initial").angle.mean()
    )
    return Card(
        claim=(
            "The growth of the weights reduces the learning rate: a long weight vector is harder to turn, an "
            "implicit early stopping."
        ),
        section="§5.2.2",
        figure=(
            f"During training: {'; '.join(parts)}. Under layer norm the first update turns the weights by "
            + ", ".join(f"{angle:.2g}° (×{initial:g})" for initial, angle in start.items())
            + " for initial weights of three lengths."
        ),
        verdict=_verdict(*agree),
    )
