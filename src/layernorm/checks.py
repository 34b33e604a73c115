"""Argument errors: each names the argument, what was expected, what came, and the likely fix.

The exception types are PyTorch's, and so is the wording where code in the wild may match it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from layernorm.pytorch_internals import is_jit_tracing
from layernorm.spec import Nonlinearity

_HALF = (torch.float16, torch.bfloat16)


def norm_arguments(
    operator: str,
    input: Tensor,
    shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> None:
    """Raise what PyTorch would for arguments that do not fit together; ``shape`` is ``normalized_shape``."""
    tensor(operator, "input", input)
    _eps(operator, eps)
    if not shape:
        raise RuntimeError(
            f"{operator}: Expected normalized_shape to be at least 1-dimensional, i.e., containing at "
            "least one element, but got normalized_shape = []"
        )
    if list(input.shape[-len(shape) :]) != shape:
        expected = ", ".join(map(str, ["*", *shape]))
        raise RuntimeError(
            f"{operator}: Given normalized_shape={shape}, expected input with shape [{expected}], but "
            f"got input of size{list(input.shape)}"
        )
    # PyTorch's RMS norm takes complex numbers, with gains of any dtype; its layer norm does not.
    is_complex = input.is_complex() and operator.endswith("rms_norm")
    if not is_complex:
        floating_point(operator, "input", input)
    if weight is not None:
        _affine(operator, "weight", weight, input, shape, is_complex)
    if bias is not None:
        _affine(operator, "bias", bias, input, shape, is_complex)


def _affine(
    operator: str, name: str, given: Tensor, input: Tensor, shape: list[int], any_dtype: bool
) -> None:
    tensor(operator, name, given, " or None")
    if list(given.shape) != shape:
        raise RuntimeError(
            f"{operator}: Expected {name} to be of same shape as normalized_shape, but got {name} of "
            f"shape {list(given.shape)} and normalized_shape = {shape}"
        )
    same_device(operator, "input", input, name, given)
    is_float_of_half = given.dtype == torch.float32 and input.dtype in _HALF
    if given.dtype != input.dtype and not is_float_of_half and not any_dtype:
        raise RuntimeError(
            f"{operator}: expected {name} of the input's dtype {input.dtype}, or float32 beside a half "
            f"input, but got {given.dtype}; convert one, for example with {name}.to(input.dtype)"
        )


def _eps(operator: str, eps: Any) -> None:
    """Check that PyTorch would take eps as a float."""
    if eps is None and operator.endswith("rms_norm"):
        return
    if isinstance(eps, (numbers.Real, torch.SymFloat, torch.SymInt)):
        return
    if isinstance(eps, Tensor) and eps.dim() == 0 and not eps.is_complex() and not eps.requires_grad:
        return
    raise TypeError(
        f"{operator}: eps must be a float{' or None' if operator.endswith('rms_norm') else ''}, got "
        f"{type(eps).__name__}; give a number such as 1e-5"
    )


def tensor(operator: str, name: str, given: object, otherwise: str = "") -> Tensor:
    """Return the argument if it is a tensor; ``otherwise`` says what else it may be."""
    if isinstance(given, Tensor):
        return given
    fix = ""
    if isinstance(given, PackedSequence):
        fix = "; give its data, and its batch_sizes where there is such an argument"
    elif isinstance(given, (int, float, list, tuple)) or hasattr(given, "__array__"):
        fix = "; convert it, for example with torch.as_tensor"
    raise TypeError(f"{operator}: {name} must be a Tensor{otherwise}, got {type(given).__name__}{fix}")


def sizes(operator: str, name: str, given: Any) -> list[int]:
    """Return a sequence of ints as a list."""
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        example = f"({given},)" if isinstance(given, int) else "(64,)"
        raise TypeError(
            f"{operator}: {name} must be a sequence of ints such as {example}, got {type(given).__name__}"
        )
    return [_size(operator, name, at, size) for at, size in enumerate(given)]


def _size(operator: str, name: str, at: int, size: Any) -> Any:
    if type(size) is int or isinstance(size, torch.SymInt):
        return size
    if isinstance(size, Tensor) and is_jit_tracing():
        return size  # what stands for a size of a traced tensor
    try:
        if not isinstance(size, bool):
            return index(size)
    except TypeError:
        pass
    raise TypeError(f"{operator}: {name} must be a sequence of ints, but {name}[{at}] is {size!r}")


def is_wide_vector(tensor: Tensor, rows: torch.dtype) -> bool:
    """Return whether a tensor is a gain or bias of float32 beside rows of half precision."""
    return rows in _HALF and tensor.dtype == torch.float32 and tensor.dim() == 1


def floating_point(operator: str, name: str, given: Tensor) -> None:
    """Check that a tensor is of a real floating-point dtype."""
    if given.is_floating_point():
        return
    fix = "give real and imaginary parts, for example torch.view_as_real({0})"
    fix = fix if given.is_complex() else "convert it, for example with {0}.float()"
    raise RuntimeError(
        f"{operator}: {name} must be of a floating-point dtype, got {given.dtype}; {fix.format(name)}"
    )


def same_device(operator: str, first: str, like: Tensor, name: str, given: Tensor) -> None:
    """Check that two tensors are on one device."""
    if given.device != like.device:
        raise RuntimeError(
            f"{operator}: Expected all tensors to be on the same device, but {first} is on {like.device} "
            f"and {name} on {given.device}; move one, for example with {name}.to({first}.device)"
        )


def residual_argument(operator: str, residual: Tensor | None, input: Tensor) -> None:
    """Check that ``residual`` is like ``input``, or float32 with a half-precision one."""
    tensor(operator, "residual", residual)
    for what in ("shape", "dtype", "device"):
        got, expected = getattr(residual, what), getattr(input, what)
        if got == expected or (what == "dtype" and got == torch.float32 and expected in _HALF):
            continue
        beside = ", or float32 beside a half input," if what == "dtype" else ","
        raise RuntimeError(
            f"{operator}: Expected residual to be of the input's {what} {as_list(expected)}{beside} but "
            f"got {as_list(got)}"
        )


def as_list(value: object) -> object:
    """Return a shape as a list, as PyTorch's messages show it."""
    return list(value) if isinstance(value, tuple) else value


def recurrent_sizes(
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    proj_size: int = 0,
) -> None:
    """Raise what ``torch.nn.RNNBase`` would for its constructor's arguments."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element "
            f"being zeroed, got {dropout!r}"
        )
    flag("bias", bias)
    flag("batch_first", batch_first)
    for name, size in (
        ("input_size", input_size),
        ("hidden_size", hidden_size),
        ("num_layers", num_layers),
        ("proj_size", proj_size),
    ):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if size <= 0 and name != "proj_size":
            raise ValueError(f"{name} must be greater than zero, got {size}")
    if proj_size < 0:
        raise ValueError(
            f"proj_size should be a positive integer or zero to disable projections, got {proj_size}"
        )
    if proj_size >= hidden_size:
        raise ValueError(f"proj_size has to be smaller than hidden_size, got {proj_size} and {hidden_size}")


def cell_sizes(input_size: int, hidden_size: int) -> None:
    """Check the sizes of a single step's module; as in ``torch.nn`` they may be 0."""
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if size < 0:
            raise ValueError(f"{name} must not be negative, got {size}")


def no_projection(proj_size: object) -> None:
    """Raise what ``torch.nn.GRU`` and ``torch.nn.RNN`` would for ``proj_size``."""
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def finite(name: str, value: object) -> float:
    """Return the value as a float if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def flag(name: str, value: bool) -> bool:
    """Return the value if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    return value


def nonlinearity(name: str) -> Nonlinearity:
    """Return the name if it is one that an RNN knows."""
    if not isinstance(name, str):
        raise TypeError(f"nonlinearity must be 'tanh' or 'relu', got {type(name).__name__}")
    if name not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{name}'. Select from 'tanh' or 'relu'.")
    return "tanh" if name == "tanh" else "relu"


def module_argument(operator: str, model: object) -> None:
    """Check that ``model`` is a module."""
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        raise TypeError(
            f"{operator}: model must be a torch.nn.Module, got the class {model.__name__}; make an instance "
            "of it first"
        )
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"{operator}: model must be a torch.nn.Module, got {type(model).__name__}; give the module that "
            "holds the norms"
        )
