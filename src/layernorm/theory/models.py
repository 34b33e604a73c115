"""Generalized linear models whose summed inputs are normalized (paper §5.2.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

#: The norms of the summed inputs; "none" has no gain.
NORMS: Final = ("none", "batch", "weight", "layer", "rms")


@dataclass(frozen=True)
class Family:
    """An exponential family, log P(y) = (s·y - η(s))/φ + c(y, φ) (paper eq. 10).

    Attributes:
        name: the name of the distribution.
        cumulant: η, from natural parameters s (cases, H) to (cases,), summed over independent outputs.
        covariance: Cov[y | x] (cases, H, H) from s (cases, H), in closed form.
        dispersion: the dispersion φ.
    """

    name: str
    cumulant: Callable[[Tensor], Tensor]
    covariance: Callable[[Tensor], Tensor]
    dispersion: float = 1.0


def _categorical_covariance(natural: Tensor) -> Tensor:
    probability: Tensor = natural.softmax(-1)
    return torch.diag_embed(probability) - probability[:, :, None] * probability[:, None, :]


#: Three families with independent outputs, as in the paper, and one with correlated outputs, whose blocks
#: between two neurons are not zero.
FAMILIES: Final = {
    family.name: family
    for family in (
        Family(
            "Gaussian",
            lambda s: s.square().sum(-1) / 2,
            lambda s: torch.diag_embed(torch.full_like(s, 0.5)),
            dispersion=0.5,
        ),
        Family(
            "Bernoulli",
            lambda s: F.softplus(s).sum(-1),
            lambda s: torch.diag_embed(s.sigmoid() * (-s).sigmoid()),
        ),
        Family("Poisson", lambda s: s.exp().sum(-1), lambda s: torch.diag_embed(s.exp())),
        Family("categorical", lambda s: s.logsumexp(-1), _categorical_covariance),
    )
}


@dataclass(frozen=True)
class Model:
    """H generalized linear models of one input, s_i = gain_i/σ_i·(a_i - μ_i) + bias_i with a = W x (eq. 5).

    Attributes:
        norm: one of ``NORMS``.
        family: the family of the outputs.
        weight: W (H, D).
        bias: (H,).
        gain: (H,); unused with norm "none".
    """

    norm: str
    family: Family
    weight: Tensor
    bias: Tensor
    gain: Tensor

    @property
    def parameters(self) -> Tensor:
        """The parameters [W, b, g], whose vec is θ: (H, D + 2), or (H, D + 1) without a gain."""
        columns = [self.weight, self.bias[:, None]] + [self.gain[:, None]] * (self.norm != "none")
        return torch.cat(columns, dim=1)

    def with_parameters(self, parameters: Tensor) -> Model:
        """Return the same model with these ``parameters``."""
        size = self.weight.shape[1]
        gain = self.gain if self.norm == "none" else parameters[:, size + 1]
        return replace(self, weight=parameters[:, :size], bias=parameters[:, size], gain=gain)

    def normalized(self, inputs: Tensor) -> Tensor:
        """Return (a - μ)/σ (cases, H) for inputs (cases, D)."""
        mean, deviation = statistics(self.norm, self.weight, inputs)
        return (inputs @ self.weight.T - mean) / deviation

    def natural(self, inputs: Tensor) -> Tensor:
        """Return the natural parameters s (cases, H) for inputs (cases, D)."""
        normalized = self.normalized(inputs)
        return (normalized if self.norm == "none" else self.gain * normalized) + self.bias


def model(norm: str, family: str, outputs: int = 4, inputs: int = 6, seed: int = 0) -> Model:
    """Make a model with random weights, gains and biases in float64.

    Args:
        norm: one of ``NORMS``.
        family: a name of ``FAMILIES``.
        outputs: H.
        inputs: D.
        seed: seeds all parameters.

    Raises:
        ValueError: the norm or the family is unknown.

    Examples:
        >>> import torch
        >>> from layernorm.theory import model
        >>> m = model("layer", "Bernoulli")
        >>> m.natural(torch.randn(10, 6, dtype=torch.float64)).shape
        torch.Size([10, 4])
    """
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return Model(
        norm=norm,
        family=FAMILIES[family],
        weight=normal(outputs, inputs) / inputs**0.5,
        bias=0.5 * normal(outputs),
        gain=1 + 0.5 * torch.tanh(normal(outputs)),
    )


def features(cases: int = 100, inputs: int = 6, seed: int = 0) -> Tensor:
    """Draw cases (cases, inputs) in float64 whose features are correlated and not centered: x ~ P(x).

    Examples:
        >>> from layernorm.theory import features
        >>> features().shape
        torch.Size([100, 6])
    """
    generator = torch.Generator().manual_seed(seed + 1)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    independent = torch.randn(cases, inputs, generator=generator, dtype=torch.float64)
    means = torch.randn(inputs, generator=generator, dtype=torch.float64) / 2
    result: Tensor = independent @ mixing + means
    return result


def statistics(norm: str, weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return μ and σ of the summed inputs a = W x, each broadcasting to (cases, H) (paper eq. 2, 3 and §4).

    Batch norm takes them over the given cases, which stand for the distribution of the data.

    Args:
        norm: one of ``NORMS``.
        weight: W (H, D).
        inputs: (cases, D).
    """
    summed = inputs @ weight.T
    zero = torch.zeros_like(summed)
    match norm:
        case "batch":
            mean = summed.mean(0, keepdim=True)
            return mean, (summed - mean).square().mean(0, keepdim=True).sqrt()
        case "weight":
            return zero, weight.square().sum(1).sqrt()
        case "layer":
            mean = summed.mean(1, keepdim=True)
            return mean, (summed - mean).square().mean(1, keepdim=True).sqrt()
        case "rms":
            return zero, summed.square().mean(1, keepdim=True).sqrt()
        case _:
            return zero, torch.ones_like(summed)
