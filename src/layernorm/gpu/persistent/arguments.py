"""The arguments of the persistent recurrent kernels, as their sources have them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Final

from torch import Tensor

from layernorm.variants import CellNorm, Inputs, Kind, Scope

#: The parameters besides weight_hh, in the order of the kernel. Where inputs are summed ``gain_ih`` is the
#: one ``gain``.
VECTORS: Final = ("bias_hh", "gain_ih", "gain_hh", "bias", "bias_hn", "gain_cell", "bias_cell")
#: Seconds that a block waits for its cluster before it stops the kernel, which CUDA then reports as a failed
#: launch. A step takes microseconds.
TIME_LIMIT: Final = 5.0
#: What is read or written 16 bytes at a time; backward reads ``cell_stats`` by 8.
_ALIGNED: Final = frozenset({"h0", "c0", "weight_hh", "output", "hn", "cn", "saved_c", "cell_stats"})
_SCOPES: Final = ("matrix", "all", "gate")
_CELL_NORMS: Final = ("none", "output", "carried")


class _Layer(ctypes.Structure):
    """What both directions are given, as ``layout.cuh`` has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "c0", "weight_hh", *VECTORS, "resets")),
        *((name, ctypes.c_void_p) for name in ("batch_sizes", "step_offsets", "saved_c", "stats", "error")),
        ("time_limit", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("batch", "steps", "stats_width", "stats_first")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("rms", "summed", "scope", "cell_norm", "relu", "reverse")),
    )


class Arguments(_Layer):
    """What the kernel is given, as ``forward.cuh`` has it."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("h0", "output", "hn", "cn", "normalized"))


class BackwardArguments(_Layer):
    """What the backward kernel is given, as ``backward.cuh`` has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("saved_h", "grad_output", "h_before", "cell_stats")),
        *((name, ctypes.c_void_p) for name in ("grad_gates", "grad_wh", "grad_own")),
        *((name, ctypes.c_void_p) for name in ("grad_cell", "normalized_cell", "grad_h", "grad_c")),
        ("base", ctypes.c_int64),
        ("kept", ctypes.c_int64),
        ("done", ctypes.c_int),
        ("count", ctypes.c_int),
    )


def groups_of(cell: str, scope: Scope) -> int:
    """How many groups of features share statistics."""
    if scope == "gate":
        return {"lstm": 4, "gru": 3}.get(cell, 1)
    return 2 if cell == "gru" and scope == "matrix" else 1


def make_arguments(
    cell: str,
    kind: Kind,
    inputs: Inputs,
    scope: Scope,
    cell_norm: CellNorm,
    eps: float,
    reverse: bool,
    steps: int,
    *,
    saved_h: Tensor | None,
    tensors: Mapping[str, Tensor | None],
) -> Arguments:
    """The kernel's arguments; ``persistent.forward`` has what they are, and the names of ``tensors``.

    Raises:
        ValueError: a tensor is not contiguous, or one of ``_ALIGNED`` does not begin at a multiple of 16
            bytes.
    """
    normalized = saved_h
    if inputs == "summed":
        normalized = tensors["x"] if tensors["stats"] is not None else None
    arguments = Arguments()
    h0 = tensors["h0"]
    arguments.batch = 0 if h0 is None else h0.size(0)
    arguments.eps = eps
    _set_layer(arguments, cell, kind, inputs, scope, cell_norm, reverse, steps)
    _set_tensors(arguments, dict(tensors) | {"normalized": normalized})
    return arguments


def make_backward_arguments(
    cell: str,
    kind: Kind,
    inputs: Inputs,
    scope: Scope,
    cell_norm: CellNorm,
    reverse: bool,
    steps: int,
    *,
    chunk: tuple[int, int, int, int],
    tensors: Mapping[str, Tensor | None],
) -> BackwardArguments:
    """As ``make_arguments`` of ``persistent.backward``; ``chunk`` is done, count, base and kept."""
    arguments = BackwardArguments()
    grad_h = tensors["grad_h"]
    arguments.batch = 0 if grad_h is None else grad_h.size(0)
    arguments.done, arguments.count, arguments.base, arguments.kept = chunk
    _set_layer(arguments, cell, kind, inputs, scope, cell_norm, reverse, steps)
    _set_tensors(arguments, tensors)
    return arguments


def _set_layer(
    arguments: _Layer,
    cell: str,
    kind: Kind,
    inputs: Inputs,
    scope: Scope,
    cell_norm: CellNorm,
    reverse: bool,
    steps: int,
) -> None:
    summed, groups = inputs == "summed", groups_of(cell, scope)
    arguments.steps, arguments.reverse = steps, reverse
    arguments.time_limit = int(TIME_LIMIT * 1e9)
    arguments.stats_width, arguments.stats_first = (groups, 0) if summed else (2 * groups, groups)
    arguments.rms, arguments.summed, arguments.relu = kind == "rms", summed, cell == "rnn_relu"
    arguments.scope = _SCOPES.index(scope)
    arguments.cell_norm = _CELL_NORMS.index(cell_norm) if cell == "lstm" else 0


def _set_tensors(arguments: _Layer, tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
        if name in _ALIGNED and tensor.data_ptr() % 16 != 0:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes; clone it")
        setattr(arguments, name, tensor.data_ptr())
