"""Table 1 of the paper: which normalized networks stay the same under which change of weights or data."""

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

#: The rows: those of the paper, then RMS norm and, as a control, a network without any norm.
NORMS: Final = ("batch", "weight", "layer", "rms", "none")

_Transformation: TypeAlias = Callable[[nn.Module, Tensor, torch.Generator], Tensor]
# Relative size of the perturbations that tell how much a network amplifies errors: small enough for the
# network to be linear in them, far above rounding.
_PERTURBATION: Final = 2.0**-24
# A deviation of so many times the tolerance is no rounding.
_CLEARLY: Final = 1e6


@dataclass(frozen=True)
class Invariance:
    """One cell of table 1, decided numerically.

    Attributes:
        norm: the row, one of ``NORMS``.
        transformation: the column, one of ``TRANSFORMATIONS``.
        deviation: greatest change of an output, in standard deviations of the outputs.
        tolerance: greatest deviation that rounding explains.
        invariant: whether the outputs stayed the same.
        paper: what table 1 says, or None where it has no such row.
    """

    norm: str
    transformation: str
    deviation: float
    tolerance: float
    invariant: bool
    paper: bool | None


def network(norm: str, sizes: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    """Return a network in which every layer is h = tanh(gain/σ·(a - μ) + bias), a = W h (paper eq. 5).

    In float64 and with eps = 0, as the paper has it. Batch norm takes its statistics from the cases given,
    which are the whole data set here; for eps it has the least positive number, since PyTorch wants one,
    which any variance swallows. Gains and biases are random, so that no symmetry of the initial ones hides
    a change; RMS norm has no bias.

    Args:
        norm: one of ``NORMS``.
        sizes: features of the input and of each layer.
        generator: of all parameters.

    Raises:
        ValueError: an unknown norm.

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
            # Weights of about unit outputs; gains in (0.5, 1.5); biases of about a half.
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.5
            parameter.copy_(1 + 0.5 * torch.tanh(fresh) if gain else scale * fresh)
    return result


def weights(network: nn.Module) -> list[Tensor]:
    """Return the weight matrices W (outputs, inputs) of the linear layers; under weight norm those before it.

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
    """Positive factors away from 1 that are no powers of two: those would be free of rounding."""
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
#: The columns. W' = δW; W' = W + 1γᵀ; w_i' = δw_i of one neuron, these in every layer; x' = δx and
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
        seed: of the weights, the data and the transformation.
        sizes: features of the input and of each layer.
        cases: size of the data set.

    Raises:
        ValueError: an unknown norm or transformation.
        ArithmeticError: the deviation is above what rounding explains, but not clearly.

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
    # Features with means of their own: re-centering must not be from zero to something.
    inputs = torch.randn(cases, sizes[0], generator=generator, dtype=torch.float64)
    inputs += torch.randn(sizes[0], generator=generator, dtype=torch.float64)
    changed = copy.deepcopy(original)
    with torch.no_grad():
        changed_inputs = _FUNCTIONS[transformation](changed, inputs, generator)
        outputs = original(inputs)
        deviation = float((changed(changed_inputs) - outputs).abs().max() / outputs.std())
        # A sum of n products as computed is the exact one of factors that are off by n roundings (Higham,
        # 2002, §3.1). So rounding moves an output by n roundings, amplified as a network amplifies errors.
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
    """Return all cells of table 1, row by row, and those of the rows that the paper does not have.

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
    """Return how much the outputs change, in standard deviations, for a relative change of the inputs."""

    def perturbed(tensor: Tensor) -> Tensor:
        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        return tensor * (1 + _PERTURBATION * signs)

    outputs = network(inputs)
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.copy_(perturbed(parameter))
    return float((other(perturbed(inputs)) - outputs).abs().max() / outputs.std() / _PERTURBATION)
