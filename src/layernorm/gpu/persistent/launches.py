"""The persistent recurrent kernels: which layers they take, and their launches.

``forward.cu`` is compiled by NVRTC (``compiling``) when a shape is first used, for the plan that ``plan``
finds. It needs the package ``cuda-bindings``, which is imported by the first call that
launches, and a device of compute capability 9.0 or later. It keeps what backward needs, whose time loop is
``backward.cu``, with plans of its own: a size may fit forward and not backward.

Both functions take their tensors by the names of the kernels' arguments (``arguments``). All are contiguous;
a name that is missing or None has no effect. Those without a dtype below have one in common, bfloat16 or
float16. G is the number of gates, H the hidden size, rows those of all steps:

- ``x`` (rows, G·H): N(W_ih x) without gain where inputs are separate, else W_ih x + bias_ih. Where inputs are
  summed and ``stats`` is given, forward overwrites it with the norm of the sum, and backward reads that;
- ``h0`` (N, H); ``c0`` (N, H), of an LSTM; ``weight_hh`` (G·H, H); the vectors of ``arguments.VECTORS``;
- ``resets``: bool or uint8 (rows);
- ``batch_sizes``, ``step_offsets``: int64 (steps), on the device, of a packed sequence: the rows of each
  step, and the first;
- ``output`` (rows, H); ``hn`` (N, H); ``cn`` (N, H), of an LSTM;
- ``saved_c`` (rows, H), of an LSTM, c as it is carried on; ``saved_h`` (rows, G·H), N(W_hh h) without gain
  where inputs are separate;
- ``stats``: float32 (rows, groups), or where inputs are separate (rows, 2·groups), of which the second half
  is written: rstd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from layernorm.gpu.persistent import compiling
from layernorm.gpu.persistent.arguments import (
    VECTORS,
    Arguments,
    BackwardArguments,
    ChunkPlace,
    make_arguments,
    make_backward_arguments,
)
from layernorm.gpu.persistent.backward_plan import plan as backward_plan
from layernorm.gpu.persistent.plan import Layout
from layernorm.gpu.persistent.plan import plan as forward_plan
from layernorm.spec import LayerSpec

Tensors = Mapping[str, Tensor | None]


def problem(
    spec: LayerSpec,
    hidden: int,
    dtype: torch.dtype,
    architecture: int,
    *,
    projected: bool = False,
    backward: bool = False,
) -> str | None:
    """Return why the kernel cannot take a layer, in one line and without compiling it; None if it can.

    Args:
        spec: what the layer computes.
        hidden: H.
        dtype: of states and weights.
        architecture: of the device, as in ``sm_90``.
        projected: whether h is projected.
        backward: whether the backward kernel is asked about.
    """
    if not spec.groups:
        return "the variant has no norm"
    if projected:
        return "h is projected"
    if spec.cell != "rnn" and spec.nonlinearity == "relu":
        return "it has a relu in place of the tanh"
    if spec.variant.cell_clip is not None or spec.variant.cell_eps is not None:
        return "its cell is clipped, or has an eps of its own"
    if spec.products == "late":
        return "the GRU's candidate is summed after the reset, which is one exchange more"
    found = _plan(spec, hidden, dtype, architecture, backward)
    return found if isinstance(found, str) else compiling.problem(architecture)


def device_problem(
    spec: LayerSpec, hidden: int, dtype: torch.dtype, device: torch.device, *, backward: bool = False
) -> str | None:
    """Return why a device cannot run the kernel of a layer for which there is no ``problem``; None if it can.

    The first call for a device and size of clusters loads a kernel there.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _plan(spec, hidden, dtype, _architecture(index), backward)
    return found if isinstance(found, str) else compiling.device_problem(index, found.blocks)


def _plan(
    spec: LayerSpec, hidden: int, dtype: torch.dtype, architecture: int, backward: bool
) -> Layout | str:
    """Return the plan for one row, whose number of blocks is that for more rows too; or why there is none."""
    plan = backward_plan if backward else forward_plan
    return plan(spec.cell, hidden, _name(dtype), architecture, groups=len(spec.groups))


def forward(spec: LayerSpec, tensors: Tensors, *, steps: int, reverse: bool) -> None:
    """Run one layer and direction over a sequence, on the current stream of the tensors' device.

    Args:
        spec: what the layer computes.
        tensors: see above; ``h0``, ``x``, ``weight_hh``, ``output`` and ``hn`` must be there.
        steps: T.
        reverse: whether steps are taken from the last to the first.

    Raises:
        ValueError: the kernel cannot take this, or a tensor is not contiguous, or a state, weight_hh or
            output does not begin at a multiple of 16 bytes.
        RuntimeError: NVRTC or the driver failed.
    """
    h0, c0 = tensors["h0"], tensors.get("c0")
    if h0 is None:
        raise ValueError("the persistent recurrent kernel needs h0")
    if steps == 0 or h0.size(0) == 0:
        for state, final in ((h0, tensors["hn"]), (c0, tensors.get("cn"))):
            if state is not None and final is not None:
                final.copy_(state)
        return
    arguments = make_arguments(spec, tensors, steps=steps, reverse=reverse)
    _run(forward_plan, spec, h0, h0.dtype, arguments)


def backward(spec: LayerSpec, tensors: Tensors, *, steps: int, reverse: bool, chunk: ChunkPlace) -> None:
    """Run some steps of a layer and direction's backward loop, on the current stream of the tensors' device.

    A chunk's rows are those of its steps in the order of the data. Besides the tensors above:

    - ``x``, ``saved_h`` and ``stats`` begin with row ``chunk.kept`` of all steps, ``saved_c`` with the first;
    - ``grad_output`` (rows of all steps, H), or None for zeros;
    - ``h_before`` (rows of the chunk, H), of a GRU: what each row started from, zeros after a reset;
    - ``cell_stats``: float32 (rows of the chunk, 2), of an LSTM whose cell is normalized: mean and rstd of c
      before that norm; the mean is 0 for RMS norm;
    - ``grad_gates``, ``grad_wh`` (rows of the chunk, G·H), written: of the gates before their nonlinearities,
      and of W_hh h;
    - ``grad_own`` (rows of the chunk, H), written, of a GRU whose inputs are separate: of the candidate's
      part of h, with gain and bias;
    - ``grad_cell``, ``normalized_cell`` (rows of the chunk, H), written where the cell is normalized: the
      gradient of that with gain and bias, and that without these;
    - ``grad_h``, ``grad_c``: float32 (N, H), of the state after the chunk's steps; replaced by that before
      them. Rows that take part in no step keep theirs; a reset before the loop's first step is left to the
      caller.

    Args:
        spec: what the layer computes.
        tensors: see above.
        steps: T, of the sequence.
        reverse: as in ``forward``.
        chunk: which steps.

    Raises:
        ValueError: as ``forward``.
        RuntimeError: NVRTC or the driver failed.
    """
    grad_h, x = tensors["grad_h"], tensors["x"]
    if grad_h is None or x is None:
        raise ValueError("the persistent recurrent kernel needs grad_h and x")
    if chunk.steps == 0 or grad_h.size(0) == 0:
        return
    arguments = make_backward_arguments(spec, tensors, steps=steps, reverse=reverse, chunk=chunk)
    _run(backward_plan, spec, grad_h, x.dtype, arguments)


def _run(
    plan: Callable[..., Layout | str],
    spec: LayerSpec,
    state: Tensor,
    dtype: torch.dtype,
    arguments: Arguments | BackwardArguments,
) -> None:
    """Launch the kernel of the plan for a state (N, H)."""
    device, groups = state.device.index or 0, len(spec.groups)
    batch, hidden = state.shape
    chosen = plan(spec.cell, hidden, _name(dtype), _architecture(device), batch, groups)
    if isinstance(chosen, str):
        raise ValueError(f"the persistent recurrent kernel cannot serve this: {chosen}")
    loaded = compiling.load(chosen, device, groups)
    compiling.launch(loaded, chosen, -(-batch // chosen.rows), arguments, device)


@functools.cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = [
    "VECTORS",
    "Arguments",
    "BackwardArguments",
    "ChunkPlace",
    "backward",
    "forward",
    "make_arguments",
    "make_backward_arguments",
    "problem",
]
