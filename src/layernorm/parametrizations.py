"""Weights of recurrent modules that are made of fewer: coupled gates, block-diagonal matrices.

They are parametrizations of ``torch.nn.utils.parametrize``: the parameters that are trained and saved are the
fewer ones, and every kernel, stream and export reads whole matrices. So a product costs what it cost before.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from layernorm.parameters import RecurrentParameters


class _Coupled(nn.Module):
    """Rows of the input gate, made of the forget gate's, before those of the forget gate."""

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, rows: Tensor) -> Tensor:
        size = rows.size(0) // 3
        return torch.cat([self.sign * rows[:size], rows])

    def right_inverse(self, rows: Tensor) -> Tensor:
        return rows[rows.size(0) // 4 :].clone()


class _BlockDiagonal(nn.Module):
    """The matrices of the gates, one above the other, from their blocks (G, blocks, H/blocks, P/blocks)."""

    def __init__(self, gates: int, blocks: int) -> None:
        super().__init__()
        self.gates, self.blocks = gates, blocks

    def forward(self, weight: Tensor) -> Tensor:
        return torch.cat([torch.block_diag(*gate) for gate in weight.unbind(0)])

    def right_inverse(self, weight: Tensor) -> Tensor:
        parts: Tensor = weight.unflatten(0, (self.gates, self.blocks, -1)).unflatten(-1, (self.blocks, -1))
        return parts.diagonal(dim1=1, dim2=3).movedim(-1, 1).clone()


def couple_gates(module: RecurrentParameters) -> RecurrentParameters:
    """Couple the input gate of an LSTM to its forget gate, i = 1 - f, in place (Greff et al. 2017, CIFG).

    The rows of the input gate follow from the forget gate's, as 1 - σ(a) = σ(-a): every layer has a quarter
    fewer parameters, those of f, g and o.

    Args:
        module: a ``LayerNormLSTM`` or ``LayerNormLSTMCell`` whose gates share no statistics: of a variant
            without a norm at the gates, or with ``scope="gate"``.

    Returns:
        The module itself.

    Raises:
        TypeError: the module is not an LSTM of this package.
        ValueError: its gates share statistics, or are coupled already.

    Examples:
        >>> import torch, layernorm
        >>> from layernorm.parametrizations import couple_gates
        >>> lstm = couple_gates(layernorm.LayerNormLSTM(10, 20, variant="tf1"))
        >>> lstm.parametrizations.weight_hh_l0.original.shape, lstm.weight_hh_l0.shape
        (torch.Size([60, 20]), torch.Size([80, 20]))
        >>> output, (h, c) = lstm(torch.randn(5, 3, 10))
    """
    name = "couple_gates"
    _check(name, module)
    if module.spec.cell != "lstm":
        raise TypeError(f"{name}: module must be an LSTM, got {type(module).__name__}")
    if module.variant.normalizes_gates and module.variant.scope != "gate":
        raise ValueError(
            f"{name}: the gates of {module.spec} share statistics, of which the input gate would be a part; "
            "use a variant with scope='gate', or without a norm at the gates"
        )
    for suffix, shapes in zip(module.suffixes, module.layer_shapes(), strict=True):
        for weight, shape in shapes.items():
            if shape[0] == 4 * module.hidden_size:
                _register(name, module, weight + suffix, _Coupled(1 if weight.startswith("gain") else -1))
    return module


def block_diagonal(module: RecurrentParameters, blocks: int) -> RecurrentParameters:
    """Make the recurrent matrices of a module block-diagonal, in place.

    The features of h fall into ``blocks`` groups, one after another, and a feature meets those of its own
    group alone. What the matrices have outside of the blocks is dropped.

    Args:
        module: a recurrent module of this package.
        blocks: how many; it divides hidden_size, and proj_size where there is a projection.

    Returns:
        The module itself.

    Raises:
        TypeError: the module is not of this package, or ``blocks`` not an int.
        ValueError: ``blocks`` is not positive or does not divide the sizes, or there are blocks already.

    Examples:
        >>> import torch, layernorm
        >>> from layernorm.parametrizations import block_diagonal
        >>> gru = block_diagonal(layernorm.LayerNormGRU(10, 32), blocks=8)
        >>> gru.parametrizations.weight_hh_l0.original.shape
        torch.Size([3, 8, 4, 4])
        >>> output, h = gru(torch.randn(5, 3, 10))
    """
    name = "block_diagonal"
    _check(name, module)
    if isinstance(blocks, bool) or not isinstance(blocks, int):
        raise TypeError(f"{name}: blocks must be an int, got {type(blocks).__name__}")
    sizes = {"hidden_size": module.hidden_size, "proj_size": module.proj_size}
    for size_name, size in sizes.items():
        if blocks < 1 or size % blocks:
            raise ValueError(f"{name}: blocks must be positive and divide {size_name}={size}, got {blocks}")
    made = partial(_BlockDiagonal, module.spec.gates, blocks)
    for suffix in module.suffixes:
        _register(name, module, "weight_hh" + suffix, made())
    return module


def _check(name: str, module: object) -> None:
    if not isinstance(module, RecurrentParameters):
        raise TypeError(
            f"{name}: module must be a recurrent module of layernorm, got {type(module).__name__}; "
            "layernorm.convert makes one of torch.nn's"
        )


def _register(name: str, module: RecurrentParameters, weight: str, made: nn.Module) -> None:
    if parametrize.is_parametrized(module, weight):
        raise ValueError(f"{name}: {weight} is parametrized already")
    parametrize.register_parametrization(module, weight, made)


__all__ = ["block_diagonal", "couple_gates"]
