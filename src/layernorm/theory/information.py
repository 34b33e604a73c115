"""The Fisher information of normalized generalized linear models, by autograd and by equations 12 to 14."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from layernorm.theory.models import Model, statistics

#: The parameters of one neuron, in the order of θ = vec([W, b, g]ᵀ).
PARAMETERS: Final = ("weight", "bias", "gain")


@dataclass(frozen=True)
class Block:
    """One block of the Fisher information, compared with the equations.

    A deviation is the largest difference between an element and its value by autograd, F[p, q], in units of
    √(F[p, p]·F[q, q]) with the largest elements of the two blocks on the diagonal.

    Attributes:
        norm: the model's norm.
        family: the name of the model's family.
        neurons: i and j.
        parameters: a parameter of neuron i and one of neuron j, each one of ``PARAMETERS``.
        printed: the deviation of equation 13 with 14 as printed, or of equation 12 without a norm.
        complete: the deviation of the equation in which μ and σ depend on all weights.
    """

    norm: str
    family: str
    neurons: tuple[int, int]
    parameters: tuple[str, str]
    printed: float
    complete: float


def kl_divergence(model: Model, inputs: Tensor, parameters: Tensor) -> Tensor:
    """Return KL[P(y | x; θ) ‖ P(y | x; θ')], a scalar, averaged over the cases (paper eq. 8).

    For an exponential family it is (η(s') - η(s) - η'(s)·(s' - s))/φ.

    Args:
        model: P(y | x; θ).
        inputs: (cases, D).
        parameters: θ', as ``Model.parameters``.

    Examples:
        >>> from layernorm.theory import features, kl_divergence, model
        >>> m = model("layer", "Poisson")
        >>> float(kl_divergence(m, features(), m.parameters))
        0.0
    """
    family = model.family
    here = model.natural(inputs).detach()
    mean, value = torch.func.grad_and_value(lambda s: family.cumulant(s).sum())(here)
    there = model.with_parameters(parameters).natural(inputs)
    difference: Tensor = family.cumulant(there).sum() - value - (mean * (there - here)).sum()
    return difference / (family.dispersion * len(inputs))


def fisher(model: Model, inputs: Tensor) -> Tensor:
    """Compute the Fisher information by autograd: the KL divergence's second derivative (paper eq. 8, 9).

    Args:
        model: with H outputs and P parameters for each.
        inputs: (cases, D), over which the expectation is taken.

    Returns:
        Tensor (H, P, H, P); ``[i, :, j, :]`` is the block of neurons i and j. P is D + 2, the weights,
        the bias and the gain, or D + 1 without a norm.

    Examples:
        >>> from layernorm.theory import features, fisher, model
        >>> fisher(model("layer", "Gaussian"), features()).shape
        torch.Size([4, 8, 4, 8])
    """

    def divergence(parameters: Tensor) -> Tensor:
        return kl_divergence(model, inputs, parameters)

    result: Tensor = torch.func.hessian(divergence)(model.parameters)
    return result


def fisher_equation(model: Model, inputs: Tensor, complete: bool = False) -> Tensor:
    """Compute the Fisher information by the paper's formula.

    The printed form is equations 13 and 14, or 12 without a norm. In it, neuron i's weights affect only its
    own summed input. Under layer norm μ and σ of all neurons depend on them too, which the complete form
    includes: χ_ki = [k = i] x - ∂μ_k/∂w_i - (a_k - μ_k)/σ_k·∂σ_k/∂w_i, summed over all outputs k and l.

    Args:
        model: with H outputs and P parameters for each.
        inputs: (cases, D), over which the expectation is taken.
        complete: whether to include all dependencies.

    Returns:
        Tensor (H, P, H, P), as ``fisher``.

    Examples:
        >>> from layernorm.theory import features, fisher, fisher_equation, model
        >>> m, x = model("batch", "Poisson"), features()
        >>> bool((fisher(m, x) - fisher_equation(m, x)).abs().max() < 1e-12)
        True
        >>> m = model("layer", "Poisson")
        >>> bool((fisher(m, x) - fisher_equation(m, x)).abs().max() < 1e-12)
        False
        >>> bool((fisher(m, x) - fisher_equation(m, x, complete=True)).abs().max() < 1e-12)
        True
    """
    covariance = model.family.covariance(model.natural(inputs)) / model.family.dispersion**2
    slopes = _slopes(model, inputs)
    if not complete:
        own = slopes.diagonal(dim1=1, dim2=2).transpose(1, 2)  # (cases, H, P): of s_i by neuron i
        return torch.einsum("nip,nij,njq->ipjq", own, covariance, own) / len(inputs)
    return torch.einsum("nkip,nkl,nljq->ipjq", slopes, covariance, slopes) / len(inputs)


def compare_blocks(model: Model, inputs: Tensor) -> list[Block]:
    """Compare every block of the Fisher information, by autograd and by the equations.

    Examples:
        >>> from layernorm.theory import compare_blocks, features, model
        >>> blocks = compare_blocks(model("layer", "Bernoulli"), features())
        >>> sorted({b.parameters for b in blocks if b.printed > 1e-12})
        [('weight', 'bias'), ('weight', 'gain'), ('weight', 'weight')]
    """
    exact = fisher(model, inputs)
    printed, complete = (fisher_equation(model, inputs, complete=c) for c in (False, True))
    outputs, size = model.weight.shape
    parts = {"weight": slice(0, size), "bias": slice(size, size + 1)}
    if model.norm != "none":
        parts["gain"] = slice(size + 1, size + 2)
    diagonal = torch.einsum("ipip->ip", exact)
    blocks = []
    for i in range(outputs):
        for j in range(outputs):
            for number, (first, rows) in enumerate(parts.items()):
                for second, columns in list(parts.items())[number:]:
                    scale = (diagonal[i, rows].max() * diagonal[j, columns].max()).sqrt()
                    deviations = [
                        float((exact - other)[i, rows, j, columns].abs().max() / scale)
                        for other in (printed, complete)
                    ]
                    blocks.append(Block(model.norm, model.family.name, (i, j), (first, second), *deviations))
    return blocks


def _slopes(model: Model, inputs: Tensor) -> Tensor:
    """Return ∂s_k/∂(w_i, b_i, g_i) as (cases, k, i, P), derived by hand."""
    _, deviation = statistics(model.norm, model.weight, inputs)
    normalized = model.normalized(inputs)
    cases, outputs = normalized.shape
    own = torch.eye(outputs, dtype=inputs.dtype)
    by_mean, by_deviation = _statistics_slopes(model, inputs)
    chi = own[:, :, None] * inputs[:, None, None, :] - by_mean - normalized[:, :, None, None] * by_deviation
    gain = torch.ones_like(model.gain) if model.norm == "none" else model.gain
    by_weight = (gain / deviation).expand(cases, outputs)[:, :, None, None] * chi
    columns = [by_weight, own.expand(cases, -1, -1)[..., None]]
    if model.norm != "none":
        columns.append((own * normalized[:, :, None])[..., None])
    return torch.cat(columns, dim=-1)


def _statistics_slopes(model: Model, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return ∂μ_k/∂w_i and ∂σ_k/∂w_i, each broadcasting to (cases, k, i, D)."""
    weight = model.weight
    outputs = len(weight)
    own = torch.eye(outputs, dtype=inputs.dtype)[:, :, None]
    x = inputs[:, None, None, :]
    normalized = model.normalized(inputs)
    zero = torch.zeros_like(x)
    match model.norm:
        case "batch":
            mean = inputs.mean(0)
            by_deviation = (normalized.T @ (inputs - mean)) / len(inputs)  # E[â_i (x - E x)]
            return (own * mean)[None], (own * by_deviation)[None]
        case "weight":
            return zero, (own * weight / weight.norm(dim=1, keepdim=True))[None]
        case "layer":
            return x / outputs, normalized[:, None, :, None] * x / outputs
        case "rms":
            return zero, normalized[:, None, :, None] * x / outputs
        case _:
            return zero, zero
