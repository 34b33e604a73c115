"""The arguments of the persistent recurrent kernels, as their sources have them."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping
from typing import Final, NamedTuple

from torch import Tensor

from layernorm.spec import PARAMETERS, LayerSpec

#: The parameters besides weight_hh, in the order of the kernel. Where inputs are summed ``gain_ih`` is the
#: one ``gain``.
VECTORS: Final = PARAMETERS[4:]
#: Names the seconds that a block waits for its cluster before it stops the kernel, which CUDA then reports as
#: a failed launch. A step takes microseconds, but much longer under a checker of races.
TIME_LIMIT_VARIABLE: Final = "LAYERNORM_TIME_LIMIT"
_TIME_LIMIT: Final = 5.0
#: What is read or written 16 bytes at a time; backward reads ``cell_stats`` by 8.
_ALIGNED: Final = frozenset({"h0", "c0", "weight_hh", "output", "hn", "cn", "saved_c", "cell_stats"})
_SCOPES: Final = ("matrix", "all", "gate")
_CELL_NORMS: Final = ("none", "output", "carried")


class _Layer(ctypes.Structure):
    """The arguments of both directions, as ``layout.cuh`` declares them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "c0", "weight_hh", *VECTORS, "resets")),
        *((name, ctypes.c_void_p) for name in ("batch_sizes", "step_offsets", "saved_c", "stats")),
        ("time_limit", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("batch", "steps", "stats_width", "stats_first")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("rms", "summed", "scope", "cell_norm", "relu", "reverse")),
    )


class Arguments(_Layer):
    """The arguments of forward, as ``forward.cuh`` declares them."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("h0", "output", "hn", "cn", "normalized"))


class BackwardArguments(_Layer):
    """The arguments of backward, as ``backward.cuh`` declares them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("saved_h", "grad_output", "h_before", "cell_stats")),
        *((name, ctypes.c_void_p) for name in ("grad_gates", "grad_wh", "grad_own")),
        *((name, ctypes.c_void_p) for name in ("grad_cell", "normalized_cell", "grad_h", "grad_c")),
        ("base", ctypes.c_int64),
        ("kept", ctypes.c_int64),
        ("done", ctypes.c_int),
        ("count", ctypes.c_int),
    )


class ChunkPlace(NamedTuple):
    """Which steps of a backward loop are taken.

    Attributes:
        done: steps of the loop before this chunk, counted from its end.
        steps: of the chunk.
        base: the first of the chunk's rows among those of all steps.
        kept: the row of all steps with which ``x``, ``saved_h`` and ``stats`` begin.
    """

    done: int
    steps: int
    base: int
    kept: int


def make_arguments(
    spec: LayerSpec, tensors: Mapping[str, Tensor | None], *, steps: int, reverse: bool
) -> Arguments:
    """Return the kernel's arguments; ``launches`` describes ``tensors``.

    Raises:
        ValueError: a tensor is not contiguous, or one of ``_ALIGNED`` does not begin at a multiple of 16
            bytes.
    """
    arguments = Arguments()
    given = {name: tensor for name, tensor in tensors.items() if name != "saved_h"}
    if spec.products == "summed":
        given["normalized"] = tensors["x"] if tensors["stats"] is not None else None
    else:
        given["normalized"] = tensors["saved_h"]
    arguments.eps = spec.eps
    _set_layer(arguments, spec, tensors["h0"], steps, reverse)
    _set_tensors(arguments, given)
    return arguments


def make_backward_arguments(
    spec: LayerSpec,
    tensors: Mapping[str, Tensor | None],
    *,
    steps: int,
    reverse: bool,
    chunk: ChunkPlace,
) -> BackwardArguments:
    """Return the backward kernel's arguments, as ``make_arguments`` does."""
    arguments = BackwardArguments()
    arguments.done, arguments.count, arguments.base, arguments.kept = chunk
    _set_layer(arguments, spec, tensors["grad_h"], steps, reverse)
    _set_tensors(arguments, tensors)
    return arguments


@functools.cache
def _time_limit() -> int:
    """Return the time limit in nanoseconds."""
    given = os.environ.get(TIME_LIMIT_VARIABLE) or _TIME_LIMIT
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"{TIME_LIMIT_VARIABLE} must be a positive number of seconds; got {given!r}")
    return int(seconds * 1e9)


def _set_layer(arguments: _Layer, spec: LayerSpec, state: Tensor | None, steps: int, reverse: bool) -> None:
    summed, groups = spec.products == "summed", len(spec.groups)
    arguments.batch = 0 if state is None else state.size(0)
    arguments.steps, arguments.reverse = steps, reverse
    arguments.time_limit = _time_limit()
    arguments.stats_width, arguments.stats_first = spec.statistics, 0 if summed else groups
    arguments.rms, arguments.summed = spec.variant.kind == "rms", summed
    arguments.relu = spec.nonlinearity == "relu"
    arguments.scope = _SCOPES.index(spec.variant.scope)
    arguments.cell_norm = _CELL_NORMS.index(spec.variant.cell) if spec.cell == "lstm" else 0


def _set_tensors(arguments: _Layer, tensors: Mapping[str, Tensor | None]) -> None:
    """Set the addresses of the tensors that the kernel has a name for."""
    for name, tensor in tensors.items():
        if tensor is None or not hasattr(type(arguments), name):
            continue
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
        if name in _ALIGNED and tensor.data_ptr() % 16 != 0:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes; clone it")
        setattr(arguments, name, tensor.data_ptr())
