"""The persistent recurrent kernels: what they serve, and their launches.

``forward.cu`` is compiled when a shape is met first, by NVRTC (``compiling``), for the plan that
``plan`` finds. It needs the package ``cuda-bindings``, which is imported by the first call that
launches, and a device of compute capability 9.0 or later. It keeps what backward needs, whose time loop is
``backward.cu``, with plans of its own: a size may fit forward and not backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from layernorm.gpu.persistent import compiling as persistent_compile
from layernorm.gpu.persistent.arguments import (
    VECTORS,
    Arguments,
    BackwardArguments,
    groups_of,
    make_arguments,
    make_backward_arguments,
)
from layernorm.gpu.persistent.backward_plan import plan as backward_plan
from layernorm.gpu.persistent.plan import Layout, plan
from layernorm.variants import Cell, CellNorm, Inputs, Kind, Scope


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
    return _problem(plan, cell, kind, inputs, scope, hidden, projected, dtype, architecture)


def backward_problem(
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
    """As ``problem``, of the backward kernel."""
    return _problem(backward_plan, cell, kind, inputs, scope, hidden, projected, dtype, architecture)


def _problem(
    plan: Callable[..., Layout | str],
    cell: str,
    kind: Kind,
    inputs: Inputs,
    scope: Scope,
    hidden: int,
    projected: bool,
    dtype: torch.dtype,
    architecture: int,
) -> str | None:
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


def backward(
    cell: str,
    kind: Kind,
    inputs: Inputs,
    scope: Scope,
    cell_norm: CellNorm,
    reverse: bool,
    *,
    x: Tensor,
    c0: Tensor | None,
    weight_hh: Tensor,
    vectors: Mapping[str, Tensor | None],
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    step_offsets: Tensor | None,
    saved_h: Tensor | None,
    saved_c: Tensor | None,
    stats: Tensor,
    grad_output: Tensor | None,
    h_before: Tensor | None,
    cell_stats: Tensor | None,
    grad_gates: Tensor,
    grad_wh: Tensor,
    grad_own: Tensor | None,
    grad_cell: Tensor | None,
    normalized_cell: Tensor | None,
    grad_h: Tensor,
    grad_c: Tensor | None,
    steps: int,
    done: int,
    count: int,
    base: int,
    kept: int,
) -> None:
    """Some steps of a layer and direction's backward loop, on the current stream of the tensors' device.

    As ``forward`` has it where nothing else is said. A chunk's rows are those of its steps in the order of
    the data, ``base`` the first of them among those of all steps.

    Args:
        cell: as in ``forward``.
        kind: likewise.
        inputs: likewise.
        scope: likewise.
        cell_norm: likewise.
        reverse: likewise.
        x: (rows, G·H), as forward left it: N(W_ih x) without gain, or the norm of the sum; begins with row
            ``kept`` of all steps.
        c0: as in ``forward``.
        weight_hh: likewise.
        vectors: likewise.
        resets: likewise.
        batch_sizes: likewise.
        step_offsets: likewise.
        saved_h: (rows, G·H), where inputs are separate; begins as x does.
        saved_c: (rows of all steps, H), of an LSTM.
        stats: float32, as forward left them; begins as x does.
        grad_output: (rows of all steps, H), or None for zeros.
        h_before: (rows of the chunk, H), of a GRU: what each row started from, zeros after a reset.
        cell_stats: float32 (rows of the chunk, 2), of an LSTM whose cell is normalized: mean and rstd of c
            before that norm; the mean 0 where kind is ``"rms"``.
        grad_gates: (rows of the chunk, G·H), written: of the gates before their nonlinearities.
        grad_wh: (rows of the chunk, G·H), written: of W_hh h.
        grad_own: (rows of the chunk, H), written, of a GRU whose inputs are separate: of the candidate's part
            of h, with gain and bias.
        grad_cell: (rows of the chunk, H), written where the cell is normalized: of that with gain and bias.
        normalized_cell: (rows of the chunk, H), written where the cell is normalized: without these.
        grad_h: float32 (N, H), of the state after the chunk's steps; replaced by that before them. Rows that
            take part in no step keep theirs; a reset before the loop's first step is left to the caller.
        grad_c: float32 (N, H), likewise, of an LSTM.
        steps: T, of the sequence.
        done: steps of the loop behind this chunk, counted from its end.
        count: steps of the chunk.
        base: see above.
        kept: see ``x``.

    Raises:
        ValueError: as ``forward``.
        RuntimeError: NVRTC or the driver failed.
    """
    if count == 0 or grad_h.size(0) == 0:
        return
    device, groups = x.device.index or 0, groups_of(cell, scope)
    chosen = backward_plan(
        *(_cell(cell), grad_h.size(1), _name(x.dtype), _architecture(device), grad_h.size(0), groups)
    )
    if isinstance(chosen, str):
        raise ValueError(f"the persistent recurrent kernel cannot serve this: {chosen}")
    given = {"x": x, "c0": c0, "weight_hh": weight_hh, "resets": resets, "batch_sizes": batch_sizes}
    given |= {"step_offsets": step_offsets, "saved_h": saved_h, "saved_c": saved_c, "stats": stats}
    given |= {"grad_output": grad_output, "h_before": h_before, "cell_stats": cell_stats}
    given |= {"grad_gates": grad_gates, "grad_wh": grad_wh, "grad_own": grad_own, "grad_cell": grad_cell}
    given |= {"normalized_cell": normalized_cell, "grad_h": grad_h, "grad_c": grad_c}
    arguments = make_backward_arguments(
        *(cell, kind, inputs, scope, cell_norm, reverse, steps),
        chunk=(done, count, base, kept),
        tensors=given | {name: vectors.get(name) for name in VECTORS},
    )
    loaded = persistent_compile.load(chosen, device, groups)
    persistent_compile.launch(loaded, chosen, -(-grad_h.size(0) // chosen.rows), arguments, device)


@functools.cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _cell(cell: str) -> Cell:
    names: Mapping[str, Cell] = {"lstm": "lstm", "gru": "gru"}
    return names.get(cell, "rnn")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = [
    "VECTORS",
    "Arguments",
    "BackwardArguments",
    "backward",
    "backward_problem",
    "forward",
    "groups_of",
    "make_arguments",
    "make_backward_arguments",
    "problem",
]
