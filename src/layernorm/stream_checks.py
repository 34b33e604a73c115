"""Errors in the arguments of streams; see ``layernorm.checks``."""

from __future__ import annotations

from math import gcd
from typing import Final

import torch
from torch import Tensor

from layernorm.checks import as_list

#: What the matrices of a stream can be kept as; None is as they are.
WEIGHT_KINDS: Final = (None, "bfloat16", "int8")


def weight_kind(operator: str, kind: object, weight: Tensor) -> None:
    """Check that a stream's matrices can be kept as this kind; ``weight`` is one of them."""
    if not any(kind is known or kind == known for known in WEIGHT_KINDS):
        raise ValueError(f"{operator}: weights must be None, 'bfloat16' or 'int8', got {kind!r}")
    if kind is not None and weight.device.type != "cpu":
        raise ValueError(
            f"{operator}: weights={kind!r} is for modules on the CPU, and this one is on {weight.device}, "
            "where there is weights=None alone; convert the module itself, for example with module.bfloat16()"
        )
    if kind is not None and weight.dtype != torch.float32:
        raise ValueError(
            f"{operator}: weights={kind!r} is for modules of float32, and this one is of {weight.dtype}, for "
            "which there is weights=None alone"
        )


def step_argument(
    operator: str, name: str, tensor: object, batch_size: int, size: int, like: Tensor
) -> Tensor:
    """Return what a step reads or writes, if it is (batch_size, size), or (size) of a single row."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{operator}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")
    shapes = [(batch_size, size), *([(size,)] if batch_size == 1 else [])]
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(as_list(shape)) for shape in shapes)
        raise RuntimeError(
            f"{operator}: Expected {name} of shape {expected}, one row for each of the "
            f"batch_size={batch_size} sequences, but got {as_list(tuple(tensor.shape))}"
        )
    _dtype_and_device(operator, name, tensor, like)
    return tensor


def out_argument(operator: str, out: Tensor, input: Tensor) -> None:
    """Check that a step of ``input`` can be written to ``out``, whose size is right."""
    if out.dim() != input.dim():
        raise RuntimeError(f"{operator}: out must have {input.dim()} dimensions like x_t, got {out.dim()}")
    if _has_elements_that_share_memory(out):
        raise RuntimeError(
            f"{operator}: out must not have elements that share memory, got size {list(out.shape)} with "
            f"strides {out.stride()}; give a tensor that is not expanded, such as out.contiguous()"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{operator}: out must not require grad: no derivative is recorded; give out.detach(), or call "
            "it under torch.no_grad()"
        )


def _has_elements_that_share_memory(matrix: Tensor) -> bool:
    """Return whether a tensor of one or two dimensions has two elements at one place.

    Elements of a matrix meet where i rows are as far apart as j columns; the nearest such are the row stride
    divided out of the column stride, and the other way round, by what they have in common.
    """
    rows, columns = (1, *matrix.shape)[-2:]
    of_row, of_column = (0, *matrix.stride())[-2:]
    common: int = gcd(of_row, of_column)
    if common == 0:
        return bool(rows * columns > 1)
    return bool(of_column // common < rows and of_row // common < columns)


def state(operator: str, name: str, tensor: Tensor, held: Tensor) -> Tensor:
    """Return a part of the state if it can take the place of that held."""
    if tensor.shape != held.shape:
        raise RuntimeError(
            f"{operator}: Expected {name} of the state to have size {as_list(tuple(held.shape))}, "
            f"(num_layers, batch_size, features), got {as_list(tuple(tensor.shape))}"
        )
    _dtype_and_device(operator, f"{name} of the state", tensor, held)
    return tensor


def _dtype_and_device(operator: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise ValueError(
            f"{operator}: {name} must be of the parameters' dtype {like.dtype}, got {tensor.dtype}; convert "
            f"it, for example with {name.split()[0]}.to({like.dtype})"
        )
    if tensor.device != like.device:
        raise RuntimeError(
            f"{operator}: Expected all tensors to be on the same device, but the parameters are on "
            f"{like.device} and {name} on {tensor.device}"
        )
