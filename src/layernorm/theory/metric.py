"""Consequences of equations 12 to 14 and 32 to 35: scaled weights, scaled inputs, and ds² along the gains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor

from layernorm.theory.information import fisher
from layernorm.theory.models import Model

#: The number of the equation for ds² along the gains; RMS norm has none in the paper.
GAIN_EQUATIONS: Final = MappingProxyType({"batch": 32, "layer": 33, "weight": 34, "none": 35})


@dataclass(frozen=True)
class Scaling:
    """How the Fisher information changes when weights are scaled (paper §5.2.2).

    Attributes:
        norm: the model's norm.
        family: the name of the model's family.
        scaled: "vector" for the weights of one neuron, "matrix" for all.
        factor: the factor of the weights.
        outputs: the largest change of a natural parameter, in standard deviations; 0 up to rounding where
            the model stays the same.
        weights: the factor of the block of the scaled weights with themselves.
        weights_bias: the factor of the block of the scaled weights with their neurons' biases.
        proportional: whether every element of the two blocks changed by these factors, up to 1e-9.
        along: the curvature along the scaled weights, in units of the mean over all directions.
    """

    norm: str
    family: str
    scaled: Literal["vector", "matrix"]
    factor: float
    outputs: float
    weights: float
    weights_bias: float
    proportional: bool
    along: float


@dataclass(frozen=True)
class GainMetric:
    """ds² along the gains, and how it depends on the scale of inputs and weights (paper's supplement).

    Attributes:
        norm: the model's norm.
        family: the name of the model's family.
        equation: the number of its equation, 32 to 35, or None.
        deviation: the largest difference between the metric and the equation, relative to the metric's
            largest element.
        inputs_doubled: the factor of the metric's trace when all inputs are doubled.
        weights_doubled: the factor of the metric's trace when all weights are doubled.
    """

    norm: str
    family: str
    equation: int | None
    deviation: float
    inputs_doubled: float
    weights_doubled: float


def scale_weights(
    model: Model, inputs: Tensor, scaled: Literal["vector", "matrix"] = "matrix", factor: float = 2.0
) -> Scaling:
    """Scale the weights of the first neuron or of all, and compare the Fisher information.

    Args:
        model: a model, for example from ``layernorm.theory.model``.
        inputs: (cases, D).
        scaled: "vector" for one neuron's weights, "matrix" for all.
        factor: the factor of the weights, positive.

    Raises:
        ValueError: ``scaled`` is neither of these, or the factor is not positive.

    Examples:
        >>> from layernorm.theory import features, model, scale_weights
        >>> result = scale_weights(model("layer", "Bernoulli"), features())
        >>> round(result.weights, 9), round(result.weights_bias, 9), result.outputs < 1e-12
        (0.25, 0.5, True)
    """
    if scaled not in ("vector", "matrix"):
        raise ValueError(f'scaled: expected "vector" or "matrix", got {scaled!r}')
    if not factor > 0:
        raise ValueError(f"factor: expected a positive number, got {factor}")
    outputs, size = model.weight.shape
    neurons = slice(0, 1 if scaled == "vector" else outputs)
    weight = model.weight.clone()
    weight[neurons] *= factor
    other = replace(model, weight=weight)
    before, after = fisher(model, inputs), fisher(other, inputs)
    factors, proportional = [], True
    for columns in (slice(0, size), slice(size, size + 1)):
        old, new = (f[neurons, :size, neurons, columns] for f in (before, after))
        ratio = (old * new).sum() / old.square().sum()
        factors.append(float(ratio))
        proportional &= bool((new - ratio * old).abs().max() < 1e-9 * new.abs().max())
    direction = model.weight[neurons].flatten()
    block = before[neurons, :size, neurons, :size].reshape(len(direction), len(direction))
    along = direction @ block @ direction / direction.square().sum()
    old, new = model.natural(inputs), other.natural(inputs)
    return Scaling(
        norm=model.norm,
        family=model.family.name,
        scaled=scaled,
        factor=factor,
        outputs=float((new - old).abs().max() / old.std()),
        weights=factors[0],
        weights_bias=factors[1],
        proportional=proportional,
        along=float(along / block.diagonal().mean()),
    )


def gain_metric(model: Model, inputs: Tensor) -> Tensor:
    """Compute the metric M of ds² = δᵀ M δ for a change δ of the gains, by autograd (paper's supplement).

    Without a norm there is no gain; δ_i then lengthens neuron i's weights, along w_i/‖w_i‖.

    Args:
        model: with H outputs.
        inputs: (cases, D).

    Returns:
        Tensor (H, H).

    Examples:
        >>> from layernorm.theory import features, gain_metric, model
        >>> gain_metric(model("layer", "Gaussian"), features()).shape
        torch.Size([4, 4])
    """
    information = fisher(model, inputs)
    if model.norm != "none":
        return information[:, -1, :, -1] / 2
    size = model.weight.shape[1]
    direction = model.weight / model.weight.norm(dim=1, keepdim=True)
    return torch.einsum("ip,ipjq,jq->ij", direction, information[:, :size, :, :size], direction) / 2


def gain_metric_equation(model: Model, inputs: Tensor) -> Tensor:
    """Compute the metric along the gains by equations 32 (batch), 33 (layer), 34 (weight) and 35 (none).

    Equation 32 lacks the normalized summed inputs of equation 13 and is E[Cov[y | x]]/φ² alone. Equation 35
    is the term of one pair, in row i and column j of the metric. RMS norm is equation 33 with μ = 0.

    Args:
        model: with H outputs.
        inputs: (cases, D).

    Returns:
        Tensor (H, H), as ``gain_metric``.

    Examples:
        >>> from layernorm.theory import features, gain_metric, gain_metric_equation, model
        >>> m, x = model("layer", "Poisson"), features()
        >>> bool((gain_metric(m, x) - gain_metric_equation(m, x)).abs().max() < 1e-12)
        True
    """
    covariance = model.family.covariance(model.natural(inputs)) / model.family.dispersion**2
    match model.norm:
        case "batch":
            return covariance.mean(0) / 2
        case "none":
            factors = inputs @ model.weight.T / model.weight.norm(dim=1)
        case _:
            factors = model.normalized(inputs)
    return torch.einsum("ni,nij,nj->ij", factors, covariance, factors) / (2 * len(inputs))


def compare_gain_metric(model: Model, inputs: Tensor) -> GainMetric:
    """Compare the metric along the gains with its equation, and with that of doubled inputs and weights.

    Examples:
        >>> from layernorm.theory import compare_gain_metric, features, model
        >>> layer = compare_gain_metric(model("layer", "Gaussian"), features())
        >>> none = compare_gain_metric(model("none", "Gaussian"), features())
        >>> round(layer.inputs_doubled, 9), round(none.inputs_doubled, 9)
        (1.0, 4.0)
    """
    metric = gain_metric(model, inputs)
    heavier = replace(model, weight=2 * model.weight)
    return GainMetric(
        norm=model.norm,
        family=model.family.name,
        equation=GAIN_EQUATIONS.get(model.norm),
        deviation=float((metric - gain_metric_equation(model, inputs)).abs().max() / metric.abs().max()),
        inputs_doubled=float(gain_metric(model, 2 * inputs).trace() / metric.trace()),
        weights_doubled=float(gain_metric(heavier, inputs).trace() / metric.trace()),
    )
