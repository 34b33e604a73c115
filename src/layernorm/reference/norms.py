"""Layer norm and RMS norm, and their forms with a residual added first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return (a - mean)·rstd·gain + bias, rstd = 1/√(var + eps), var = Σ(a - mean)²/H (paper eq. 3, 4).

    Args:
        input: (*, *normalized_shape), floating point.
        normalized_shape: the last dimensions, over which mean and var are taken; H is their product.
        weight: the gain, of shape normalized_shape, or None for 1.
        bias: of shape normalized_shape, or None for 0.
        eps: added to the variance.

    Returns:
        Tensor of the input's shape and dtype.

    Examples:
        >>> import torch
        >>> from layernorm import reference
        >>> reference.layer_norm(torch.tensor([1.0, 3.0]), (2,), eps=0.0)
        tensor([-1.,  1.])
    """
    a = _accumulating(input)
    dims = tuple(range(-len(normalized_shape), 0))
    centred = a - a.mean(dims, keepdim=True)
    var = centred.square().mean(dims, keepdim=True)
    output = centred * torch.rsqrt(var + eps)
    if weight is not None:
        output = output * weight
    if bias is not None:
        output = output + bias
    return output.to(input.dtype)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Return a·rstd·gain, rstd = 1/√(Σa²/H + eps).

    Args:
        input: (*, *normalized_shape), floating point.
        normalized_shape: the last dimensions, over which the mean square is taken.
        weight: the gain, of shape normalized_shape, or None for 1.
        eps: added to the mean square; None is the machine epsilon of the dtype computed in.

    Returns:
        Tensor of the input's shape and dtype.

    Examples:
        >>> import torch
        >>> from layernorm import reference
        >>> reference.rms_norm(torch.tensor([3.0, 4.0]), (2,), eps=0.0).square().mean()
        tensor(1.)
    """
    a = _accumulating(input)
    dims = tuple(range(-len(normalized_shape), 0))
    square = a.square().mean(dims, keepdim=True)
    output = a * torch.rsqrt(square + (torch.finfo(a.dtype).eps if eps is None else eps))
    if weight is not None:
        output = output * weight
    return output.to(input.dtype)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return ``(layer_norm(sum), sum)`` with sum = input + residual, rounded to its dtype first.

    With a half-precision input the residual may be float32; so is the sum then, and the output has the
    input's dtype.

    Examples:
        >>> import torch
        >>> from layernorm import reference
        >>> reference.add_layer_norm(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), (2,), eps=0.0)
        (tensor([-1.,  1.]), tensor([1., 3.]))
    """
    total = input + residual
    return layer_norm(total, normalized_shape, weight, bias, eps).to(input.dtype), total


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(rms_norm(sum), sum)`` with sum = input + residual, rounded to its dtype first.

    Examples:
        >>> import torch
        >>> from layernorm import reference
        >>> reference.add_rms_norm(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), (2,), eps=0.0)
        (tensor([1., 1.]), tensor([2., 2.]))
    """
    total = input + residual
    return rms_norm(total, normalized_shape, weight, eps).to(input.dtype), total


def _accumulating(a: Tensor) -> Tensor:
    """Return the numbers in the dtype of the statistics: float32 for float16 and bfloat16."""
    return a.float() if a.dtype in (torch.float16, torch.bfloat16) else a
