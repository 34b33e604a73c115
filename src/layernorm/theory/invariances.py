"""Table 1 of the paper: which normalized networks are invariant to which changes of weights or data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import layernorm

#: The rows: those of the paper, then RMS norm and, as a control, a network without a norm.
NORMS: Final = ("batch", "weight", "layer", "rms", "none")

_Transformation: TypeAlias = Callable[[nn.Module, Tensor, torch.Generator], Tensor]
# The relative size of the perturbations that measure how much a network amplifies errors: small enough for
# the network to respond linearly, and far above rounding.
_PERTURBATION: Final = 2.0**-24
# A deviation this many times the tolerance cannot be rounding.
_CLEARLY: Final = 1e6


@dataclass(frozen=True)
class Invariance:
    """One cell of table 1, decided numerically.

    Attributes:
        norm: the row, one of ``NORMS``.
        transformation: the column, one of ``TRANSFORMATIONS``.
        deviation: the largest change of an output, in standard deviations of the outputs.
        tolerance: the largest deviation that rounding explains.
        invariant: whether the outputs stayed the same.
        paper: the entry of table 1, or None if it has no such row.
    """

    norm: str
    transformation: str
    deviation: float
    tolerance: float
    invariant: bool
    paper: bool | None


def network(norm: str, sizes: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    """Return a network in which every layer is h = tanh(gain/σ·(a - μ) + bias), a = W h (paper eq. 5).

    It is in float64 with eps = 0, as in the paper. Batch norm takes its statistics from the given cases,
    which are the whole data set here; since PyTorch requires a positive eps, it gets the smallest positive
    number, which vanishes next to any variance. Gains and biases are random, so that no symmetry of their
    initial values hides a change; RMS norm has no bias.

    Args:
        norm: one of ``NORMS``.
        sizes: features of the input and of each layer.
        generator: draws all parameters.

    Raises:
        ValueError: the norm is unknown.

    Examples:
        >>> import torch
        >>> from layernorm.theory import network
        >>> network("layer", (3, 4), torch.Generator().manual_seed(0))
        Sequential(
          (0): Linear(in_features=3, out_features=4, bias=False)
          (1): LayerNorm((4,), eps=0.0, elementwise_affine=True, bias=True)
          (2): Tanh()
        )
    """
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        linear = nn.utils.skip_init(nn.Linear, before, after, bias=norm in ("none", "weight"))
        layers.append(parametrizations.weight_norm(linear) if norm == "weight" else linear)
        if norm == "batch":
            layers.append(nn.BatchNorm1d(after, eps=torch.finfo(torch.float64).tiny))
        elif norm == "layer":
            layers.append(layernorm.LayerNorm(after, eps=0.0))
        elif norm == "rms":
            layers.append(layernorm.RMSNorm(after, eps=0.0))
        layers.append(nn.Tanh())
    result = nn.Sequential(*layers).double()
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            fresh = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            gain = name.endswith("original0") or (parameter.dim() == 1 and not name.endswith("bias"))
            # Weights that give outputs of about 1; gains in (0.5, 1.5); biases of about 0.5.
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.5
            parameter.copy_(1 + 0.5 * torch.tanh(fresh) if gain else scale * fresh)
    return result


def weights(network: nn.Module) -> list[Tensor]:
    """Return the weights W (outputs, inputs) of the linear layers, under weight norm the unnormalized ones.

    Examples:
        >>> import torch
        >>> from layernorm.theory import network, weights
        >>> [w.shape for w in weights(network("weight", (3, 4, 2), torch.Generator()))]
        [torch.Size([4, 3]), torch.Size([2, 4])]
    """
    names = ("weight", "parametrizations.weight.original1")
    return [
        parameter
        for module in network.modules()
        if isinstance(module, nn.Linear)
        for name, parameter in module.named_parameters()
        if name in names
    ]


def _factors(generator: torch.Generator, *size: int) -> Tensor:
    """Draw factors between 1.5 and 3; an exact power of two, which causes no rounding, is unlikely."""
    return 1.5 + 1.5 * torch.rand(*size, generator=generator, dtype=torch.float64)


def _matrix_rescaling(network: nn.Module, inputs: Tensor, generator: torch.Generator) -> Tensor:
    for weight in weights(network):
        weight.mul_(_factors(generator, 1))
    return inputs


def _matrix_recentering(network: nn.Module, inputs: Tensor, generator: torch.Generator) -> Tensor:
    for weight in weights(network):
        weight.add_(weight.std() * torch.randn(weight.shape[1], generator=generator, dtype=torch.float64))
    return inputs


def _vector_rescaling(network: nn.Module, inputs: Tensor, generator: torch.Generator) -> Tensor:
    for weight in weights(network):
        neuron = int(torch.randint(len(weight), (), generator=generator))
        weight[neuron].mul_(_factors(generator, 1))
    return inputs


def _dataset_rescaling(network: nn.Module, inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs * _factors(generator, 1)


def _dataset_recentering(network: nn.Module, inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs + torch.randn(inputs.shape[1], generator=generator, dtype=torch.float64)


def _case_rescaling(network: nn.Module, inputs: Tensor, generator: torch.Generator) -> Tensor:
    factors = torch.ones(len(inputs), 1, dtype=torch.float64)
    factors[int(torch.randint(len(inputs), (), generator=generator))] = _factors(generator, 1)
    return inputs * factors


_FUNCTIONS: Final[dict[str, _Transformation]] = {
    "weight matrix re-scaling": _matrix_rescaling,
    "weight matrix re-centering": _matrix_recentering,
    "weight vector re-scaling": _vector_rescaling,
    "dataset re-scaling": _dataset_rescaling,
    "dataset re-centering": _dataset_recentering,
    "single training case re-scaling": _case_rescaling,
}
#: The columns: in every layer W' = δW, W' = W + 1γᵀ, and w_i' = δw_i for one neuron; x' = δx and
#: x' = x + γ for all cases; x' = δx for one case. All δ are positive.
TRANSFORMATIONS: Final = tuple(_FUNCTIONS)
#: Table 1 as printed, in the order of ``TRANSFORMATIONS``.
PAPER: Final = MappingProxyType(
    {
        "batch": (True, False, True, True, True, False),
        "weight": (True, False, True, False, False, False),
        "layer": (True, True, False, True, False, True),
    }
)


def invariance(
    norm: str, transformation: str, seed: int = 0, sizes: tuple[int, ...] = (12, 16, 16, 8), cases: int = 32
) -> Invariance:
    """Decide one cell of table 1 by changing a network and comparing its outputs.

    Args:
        norm: one of ``NORMS``.
        transformation: one of ``TRANSFORMATIONS``.
        seed: seeds the weights, the data and the transformation.
        sizes: features of the input and of each layer.
        cases: the size of the data set.

    Raises:
        ValueError: the norm or the transformation is unknown.
        ArithmeticError: the deviation is larger than rounding explains, but not clearly so.

    Examples:
        >>> from layernorm.theory import invariance
        >>> invariance("layer", "weight matrix re-centering").invariant
        True
        >>> invariance("layer", "weight vector re-scaling").invariant
        False
    """
    if transformation not in TRANSFORMATIONS:
        raise ValueError(
            f"transformation: expected one of {', '.join(TRANSFORMATIONS)}, got {transformation!r}"
        )
    generator = torch.Generator().manual_seed(seed)
    original = network(norm, sizes, generator)
    # The features have means other than zero, so that re-centering does not start at zero.
    inputs = torch.randn(cases, sizes[0], generator=generator, dtype=torch.float64)
    inputs += torch.randn(sizes[0], generator=generator, dtype=torch.float64)
    changed = copy.deepcopy(original)
    with torch.no_grad():
        changed_inputs = _FUNCTIONS[transformation](changed, inputs, generator)
        outputs = original(inputs)
        deviation = float((changed(changed_inputs) - outputs).abs().max() / outputs.std())
        # A computed sum of n products is the exact sum for factors that are off by n roundings (Higham 2002,
        # §3.1). So rounding moves an output by n roundings, amplified as the network amplifies errors.
        longest = max(*sizes, cases)
        amplification = _amplification(original, inputs, generator) + _amplification(
            changed, changed_inputs, generator
        )
    tolerance = longest * torch.finfo(torch.float64).eps * amplification
    if tolerance < deviation < _CLEARLY * tolerance:
        raise ArithmeticError(
            f"{norm} norm, {transformation}, seed {seed}: a deviation of {deviation:.1e} is neither rounding "
            f"(at most {tolerance:.1e}) nor clearly above; try another seed"
        )
    paper = PAPER[norm][TRANSFORMATIONS.index(transformation)] if norm in PAPER else None
    return Invariance(norm, transformation, deviation, tolerance, deviation <= tolerance, paper)


def invariance_table(
    seed: int = 0, sizes: tuple[int, ...] = (12, 16, 16, 8), cases: int = 32
) -> list[Invariance]:
    """Return all cells of table 1 row by row, including the rows that the paper does not have.

    The arguments and errors are those of ``invariance``.

    Examples:
        >>> from layernorm.theory import invariance_table
        >>> cells = invariance_table()
        >>> len(cells), all(cell.invariant == cell.paper for cell in cells if cell.paper is not None)
        (30, True)
    """
    return [
        invariance(norm, transformation, seed, sizes, cases)
        for norm in NORMS
        for transformation in TRANSFORMATIONS
    ]


def _amplification(network: nn.Module, inputs: Tensor, generator: torch.Generator) -> float:
    """Return the change of the outputs, in standard deviations, per relative change of inputs and weights."""

    def perturbed(tensor: Tensor) -> Tensor:
        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        return tensor * (1 + _PERTURBATION * signs)

    outputs = network(inputs)
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.copy_(perturbed(parameter))
    return float((other(perturbed(inputs)) - outputs).abs().max() / outputs.std() / _PERTURBATION)
