"""The persistent recurrent kernel: what it serves, and its launch.

``persistent.cu`` is compiled when a shape is met first, by NVRTC (``persistent_compile``), for the plan that
``persistent_plan`` finds. It needs the package ``cuda-bindings``, which is imported by the first call that
launches, and a device of compute capability 9.0 or later. It is forward alone; what backward needs it keeps.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from layernorm.kernels import persistent_compile
from layernorm.kernels.persistent_plan import plan
from layernorm.variants import Cell, CellNorm, Inputs, Kind, Scope

#: The parameters besides weight_hh, in the order of the kernel. Where inputs are summed ``gain_ih`` is the
#: one ``gain``.
VECTORS: Final = ("bias_hh", "gain_ih", "gain_hh", "bias", "bias_hn", "gain_cell", "bias_cell")
#: Seconds that a block waits for its cluster before it stops the kernel, which CUDA then reports as a failed
#: launch. A step takes microseconds.
TIME_LIMIT: Final = 5.0
_POINTERS: Final = (
    *("x", "h0", "c0", "weight_hh", *VECTORS, "resets", "batch_sizes", "step_offsets"),
    *("output", "hn", "cn", "saved_c", "normalized", "stats", "error"),
)
#: What is read or written 16 bytes at a time.
_ALIGNED: Final = frozenset({"h0", "c0", "weight_hh", "output", "hn", "cn", "saved_c"})
_SCOPES: Final = ("matrix", "all", "gate")
_CELL_NORMS: Final = ("none", "output", "carried")


class Arguments(ctypes.Structure):
    """What the kernel is given, as ``persistent.cu`` has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("time_limit", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("batch", "steps", "stats_width", "stats_first")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("rms", "summed", "scope", "cell_norm", "relu", "reverse")),
    )


def problem(
    cell: str,
    kind: Kind,
    inputs: Inputs,
    scope: Scope,
    cell_norm: CellNorm,
    hidden: int,
    projected: bool,
    dtype: torch.dtype,
    architecture: int,
) -> str | None:
    """Why the kernel cannot serve, in one line and without compiling it; None if it can.

    Args:
        cell: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        kind: to ``cell_norm``: the variant's fields.
        inputs: see above.
        scope: see above.
        cell_norm: see above.
        hidden: H.
        projected: whether h is projected.
        dtype: of states and weights.
        architecture: of the device, as in ``sm_90``.
    """
    if kind == "none":
        return "the variant has no norm"
    if projected:
        return "h is projected"
    if cell == "gru" and inputs == "summed" and scope != "all":
        return "the GRU's candidate is summed after the reset, which is one exchange more"
    found = plan(_cell(cell), hidden, _name(dtype), architecture, groups=groups_of(cell, scope))
    if isinstance(found, str):
        return found
    return persistent_compile.problem(architecture)


def groups_of(cell: str, scope: Scope) -> int:
    """How many groups of features share statistics."""
    if scope == "gate":
        return {"lstm": 4, "gru": 3}.get(cell, 1)
    return 2 if cell == "gru" and scope == "matrix" else 1


def forward(
    cell: str,
    kind: Kind,
    inputs: Inputs,
    scope: Scope,
    cell_norm: CellNorm,
    eps: float,
    reverse: bool,
    *,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_hh: Tensor,
    vectors: Mapping[str, Tensor | None],
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    step_offsets: Tensor | None,
    steps: int,
    output: Tensor,
    hn: Tensor,
    cn: Tensor | None,
    saved_c: Tensor | None,
    saved_h: Tensor | None,
    stats: Tensor | None,
) -> None:
    """One layer and direction over a sequence, on the current stream of the tensors' device.

    All tensors are contiguous; those without a dtype below are of one, bfloat16 or float16. G is the number
    of gates, H the hidden size, rows those of all steps.

    Args:
        cell: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        kind: ``"layer"`` or ``"rms"``.
        inputs: ``"separate"`` or ``"summed"``.
        scope: of the statistics.
        cell_norm: of an LSTM; ``"none"`` of others, whatever is given.
        eps: of the variant.
        reverse: steps are taken from the last to the first.
        x: (rows, G·H): N(W_ih x) without gain where inputs are separate, else W_ih x + bias_ih. Where inputs
            are summed and ``stats`` is given it is overwritten by the norm of the sum.
        h0: (N, H).
        c0: (N, H), of an LSTM.
        weight_hh: (G·H, H).
        vectors: by the names of ``VECTORS``; those that are missing or None have no effect.
        resets: bool or uint8 (rows), or None.
        batch_sizes: int64 (steps), on the device, of a packed sequence, or None.
        step_offsets: int64 (steps), the first row of each step; None where ``batch_sizes`` is.
        steps: T.
        output: (rows, H).
        hn: (N, H).
        cn: (N, H), of an LSTM.
        saved_c: (rows, H), of an LSTM, c as it is carried on; or None.
        saved_h: (rows, G·H), N(W_hh h) without gain where inputs are separate; or None.
        stats: float32 (rows, groups), or where inputs are separate (rows, 2·groups), of which the second
            half is written: rstd; or None.

    Raises:
        ValueError: the kernel cannot serve this, or a tensor is not contiguous, or a state, weight_hh or
            output does not begin at a multiple of 16 bytes.
        RuntimeError: NVRTC or the driver failed.
    """
    if steps == 0 or h0.size(0) == 0:
        hn.copy_(h0)
        if cn is not None and c0 is not None:
            cn.copy_(c0)
        return
    device, groups = x.device.index or 0, groups_of(cell, scope)
    chosen = plan(_cell(cell), h0.size(1), _name(h0.dtype), _architecture(device), h0.size(0), groups)
    if isinstance(chosen, str):
        raise ValueError(f"the persistent recurrent kernel cannot serve this: {chosen}")
    given = {"x": x, "h0": h0, "c0": c0, "weight_hh": weight_hh, "resets": resets, "output": output}
    given |= {"batch_sizes": batch_sizes, "step_offsets": step_offsets, "hn": hn, "cn": cn}
    given |= {"saved_c": saved_c, "stats": stats} | {name: vectors.get(name) for name in VECTORS}
    arguments = make_arguments(
        *(cell, kind, inputs, scope, cell_norm, eps, reverse, steps), saved_h=saved_h, tensors=given
    )
    loaded = persistent_compile.load(chosen, device, groups)
    persistent_compile.launch(loaded, chosen, -(-h0.size(0) // chosen.rows), arguments, device)


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
    """The kernel's arguments; ``forward`` has what they are, and the names of ``tensors``.

    Raises:
        ValueError: a tensor is not contiguous, or one of ``_ALIGNED`` does not begin at a multiple of 16
            bytes.
    """
    summed, groups = inputs == "summed", groups_of(cell, scope)
    normalized = saved_h
    if summed:
        normalized = tensors["x"] if tensors["stats"] is not None else None
    arguments = Arguments()
    for name, tensor in (*tensors.items(), ("normalized", normalized)):
        if tensor is None:
            continue
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
        if name in _ALIGNED and tensor.data_ptr() % 16 != 0:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes; clone it")
        setattr(arguments, name, tensor.data_ptr())
    h0 = tensors["h0"]
    arguments.batch = 0 if h0 is None else h0.size(0)
    arguments.steps, arguments.eps, arguments.reverse = steps, eps, reverse
    arguments.time_limit = int(TIME_LIMIT * 1e9)
    arguments.stats_width, arguments.stats_first = (groups, 0) if summed else (2 * groups, groups)
    arguments.rms, arguments.summed, arguments.relu = kind == "rms", summed, cell == "rnn_relu"
    arguments.scope = _SCOPES.index(scope)
    arguments.cell_norm = _CELL_NORMS.index(cell_norm) if cell == "lstm" else 0
    return arguments


@functools.cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _cell(cell: str) -> Cell:
    names: Mapping[str, Cell] = {"lstm": "lstm", "gru": "gru"}
    return names.get(cell, "rnn")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["VECTORS", "Arguments", "forward", "groups_of", "make_arguments", "problem"]
