"""Recurrent sequences for every variant: one time loop that takes a small cell function.

Shapes: T time, N batch, F input, H hidden, G gates, P the size of h (``proj_size`` or H). A cell takes
what the input contributes to the gates at one step, ``x`` (N, G·H), which has been computed for all steps at
once, and the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from layernorm.reference.norms import layer_norm, rms_norm
from layernorm.spec import LayerSpec

Weights = Mapping[str, Tensor]
State = tuple[Tensor, ...]


class Masks(NamedTuple):
    """What steps multiply with, and what stays as it was.

    ``hidden`` (T or 1, N, P) is multiplied with what meets W_hh, and ``candidate`` (T or 1, N, H) with the
    candidate. ``stays`` are masks of bool, (T, N, P) and (T, N, H): where true, h (and c) stay as they were.
    """

    hidden: Tensor | None = None
    candidate: Tensor | None = None
    stays: tuple[Tensor | None, ...] = (None, None)

    def at(self, step: int, rows: int) -> Masks:
        """Return those of the rows of one step."""

        def of(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else mask[step if mask.size(0) > 1 else 0, :rows]

        return Masks(of(self.hidden), of(self.candidate), tuple(map(of, self.stays)))


def recurrent_layer(
    spec: LayerSpec,
    input: Tensor,
    state: Sequence[Tensor],
    weights: Weights,
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    resets: Tensor | None = None,
    reset_state: Sequence[Tensor] | None = None,
    masks: Masks | None = None,
) -> tuple[Tensor, State]:
    """Compute one layer and direction (paper eq. 4, 20-22, 26-28 for the variant "paper").

    Args:
        spec: what the layer computes.
        input: (T, N, F), or the (ΣN_t, F) data of a packed sequence with its ``batch_sizes``.
        state: h (N, P), and for an LSTM c (N, H).
        weights: by the names of ``layernorm.variants.parameter_shapes``; a bias may be absent.
        reverse: run from the last step to the first; outputs stay in the input's order.
        batch_sizes: rows at each step, not increasing; None when all steps have N.
        resets: bool (T, N), or (ΣN_t,): where true, nothing passes between this step and the one
            before. Forward the state is zero before the step; in reverse it is zero after it.
        reset_state: what it is there instead of zero, of the state's shapes; None for zeros.
        masks: what steps multiply with, in training.

    Returns:
        output (T, N, P), or (ΣN_t, P); and the final state.

    Examples:
        >>> import torch
        >>> from layernorm import reference
        >>> from layernorm.spec import LayerSpec
        >>> from layernorm.variants import resolve
        >>> spec = LayerSpec("gru", resolve("paper", "gru"))
        >>> weights = {name: torch.randn(shape) for name, shape in spec.parameter_shapes(3, 5).items()}
        >>> output, (h,) = reference.recurrent_layer(spec, torch.randn(7, 2, 3), [torch.zeros(2, 5)], weights)
        >>> output.shape
        torch.Size([7, 2, 5])
    """
    cell = partial(_STEPS[spec.cell], spec=spec, weights=weights)
    x = _of_input(_product(input, weights["weight_ih"], weights.get("bias_ih")), weights, spec)
    starts = None if reset_state is None else tuple(reset_state)
    return _scan(cell, x, tuple(state), reverse, batch_sizes, resets, starts, masks)


def gates_step(
    spec: LayerSpec, input_gates: Tensor, hidden_gates: Tensor, state: Tensor, weights: Weights
) -> State:
    """Compute the part of an LSTM's or a GRU's step after its products W_ih x and W_hh h (N, G·H).

    ``state`` (N, H) is an LSTM's c, or a GRU's h; ``weights`` are the parameters but for the matrices, and a
    bias may be absent. Returns h, and for an LSTM c (N, H).
    """
    x = _of_input(_plus(input_gates, weights.get("bias_ih")), weights, spec)
    hidden = _plus(hidden_gates, weights.get("bias_hh"))
    found = (_lstm_state if spec.cell == "lstm" else _gru_state)(x, hidden, state, weights, spec)
    return tuple(new.to(state.dtype) for new in found)


def _lstm_step(x: Tensor, state: State, masks: Masks, *, spec: LayerSpec, weights: Weights) -> State:
    h, c = state
    hidden = _product(_masked(h, masks.hidden), weights["weight_hh"], weights.get("bias_hh"))
    h, c = _lstm_state(x, hidden, c, weights, spec, masks.candidate)
    if "weight_hr" in weights:
        h = linear(h.to(weights["weight_hr"].dtype), weights["weight_hr"])
    return h, c


def _lstm_state(
    x: Tensor, hidden: Tensor, c: Tensor, weights: Weights, spec: LayerSpec, mask: Tensor | None = None
) -> State:
    i, f, g, o = _gates(x, hidden, weights, spec).chunk(4, -1)
    nonlinear = getattr(torch, spec.nonlinearity)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * _masked(nonlinear(g), mask)
    if spec.variant.cell_clip is not None:
        c = c.clamp(-spec.variant.cell_clip, spec.variant.cell_clip)
    normalized = _normalized_cell(c, weights, spec) if spec.normalizes_cell else c
    carried = normalized if spec.variant.cell == "carried" else c
    return torch.sigmoid(o) * nonlinear(normalized), carried


def _gru_step(x: Tensor, state: State, masks: Masks, *, spec: LayerSpec, weights: Weights) -> State:
    (h,) = state
    if not spec.variant.reset_after:
        return _reset_before(x, h, masks, spec, weights)
    hidden = _product(_masked(h, masks.hidden), weights["weight_hh"], weights.get("bias_hh"))
    return _gru_state(x, hidden, h, weights, spec, masks.candidate)


def _gru_state(
    x: Tensor, hidden: Tensor, h: Tensor, weights: Weights, spec: LayerSpec, mask: Tensor | None = None
) -> State:
    """Take h' = (1 - z)·n + z·h, which is PyTorch's convention."""
    size, nonlinear = h.size(-1), getattr(torch, spec.nonlinearity)
    if spec.products == "separate":
        hidden = _normalized(hidden, spec.groups, weights.get("gain_hh"), None, spec)
        x = _plus(x, weights.get("bias"))
        r, z = torch.sigmoid(x[..., : 2 * size] + hidden[..., : 2 * size]).chunk(2, -1)
        reset = r * _plus(hidden[..., 2 * size :], weights.get("bias_hn"))
        n = nonlinear(x[..., 2 * size :] + reset)
    elif spec.products == "summed":
        gates = _gates(x, hidden, weights, spec)
        r, z = torch.sigmoid(gates[..., : 2 * size]).chunk(2, -1)
        n = nonlinear(r * gates[..., 2 * size :])
    else:
        (x_rz, x_n), (h_rz, h_n) = (a.split([2 * size, size], -1) for a in (x, hidden))
        (gain_rz, gain_n), (bias_rz, bias_n) = (
            weights[name].split([2 * size, size]) if name in weights else (None, None)
            for name in ("gain", "bias")
        )
        rz = _normalized(x_rz + h_rz, spec.groups[:-1], gain_rz, bias_rz, spec)
        r, z = torch.sigmoid(rz).chunk(2, -1)
        n = nonlinear(_normalized(x_n + r * h_n, spec.groups[-1:], gain_n, bias_n, spec))
    return ((1 - z) * _masked(n, mask) + z * h,)


def _reset_before(x: Tensor, h: Tensor, masks: Masks, spec: LayerSpec, weights: Weights) -> State:
    """Take a GRU's step whose reset gate meets h before the product (Cho et al. 2014)."""
    size = h.size(-1)
    is_separate = spec.variant.inputs == "separate"

    def gates(h: Tensor, groups: Sequence[int], of: slice) -> Tensor:
        part = {name: weight[of] for name, weight in weights.items() if name != "weight_ih"}
        b = _product(_masked(h, masks.hidden), part["weight_hh"], part.get("bias_hh"))
        a, bias = x[..., of], part.get("bias")
        if is_separate:
            return _plus(a + _normalized(b, groups, part.get("gain_hh"), None, spec), bias)
        return _normalized(a + b, groups, part.get("gain"), bias, spec)

    r, z = torch.sigmoid(gates(h, spec.groups[:-1], slice(2 * size))).chunk(2, -1)
    n = getattr(torch, spec.nonlinearity)(gates(r * h, spec.groups[-1:], slice(2 * size, None)))
    return ((1 - z) * _masked(n, masks.candidate) + z * h,)


def _rnn_step(x: Tensor, state: State, masks: Masks, *, spec: LayerSpec, weights: Weights) -> State:
    (h,) = state
    hidden = _product(_masked(h, masks.hidden), weights["weight_hh"], weights.get("bias_hh"))
    gates = _gates(x, hidden, weights, spec)
    return (getattr(torch, spec.nonlinearity)(gates),)


_STEPS: Final[Mapping[str, Callable[..., State]]] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn": _rnn_step,
}


def _scan(
    cell: Callable[[Tensor, State, Masks], State],
    x: Tensor,
    state: State,
    reverse: bool,
    batch_sizes: Sequence[int] | None,
    resets: Tensor | None,
    starts: State | None = None,
    masks: Masks | None = None,
) -> tuple[Tensor, State]:
    """Run the one time loop: ``cell(x_t, state, masks)`` gives the next state, whose first tensor is h.

    With ``batch_sizes`` rows end (forward) or begin (reverse) on the way: the first ``batch_sizes[t]``
    rows take part in step t. A row that has ended keeps its state as final, one that has not begun
    keeps its initial state. A reset parts its step from the one before, in either direction; so in
    reverse the first step's, which has none before it, does nothing.
    """
    steps = _steps(x, batch_sizes)
    parted = None if resets is None else _steps(resets, batch_sizes)
    outputs: list[Tensor] = []
    resting: State = tuple(s[:0] for s in state)  # the rows after those that take part
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        rows, live = steps[t].size(0), state[0].size(0)
        if rows != live:
            whole = tuple(torch.cat(pair) for pair in zip(state, resting, strict=True))
            state = tuple(s[:rows] for s in whole)
            resting = tuple(s[rows:] for s in whole)
        if parted is not None and not reverse:
            state = _begun(state, parted[t], starts)
        # In the state's dtype, whatever gains and biases of float32 have made of it.
        at = Masks() if masks is None else masks.at(t, rows)
        new = cell(steps[t], state, at)
        state = tuple(map(_next, new, state, at.stays))
        outputs.append(state[0])
        if parted is not None and reverse and t > 0:
            state = _begun(state, parted[t], starts)
    if resting[0].size(0):
        state = tuple(torch.cat(pair) for pair in zip(state, resting, strict=True))
    if reverse:
        outputs.reverse()
    return (torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)), state


def _next(new: Tensor, old: Tensor, stays: Tensor | None) -> Tensor:
    return new.to(old.dtype) if stays is None else torch.where(stays, old, new.to(old.dtype))


def _masked(a: Tensor, mask: Tensor | None) -> Tensor:
    return a if mask is None else a * mask.to(a.dtype)


def _steps(sequence: Tensor, batch_sizes: Sequence[int] | None) -> Sequence[Tensor]:
    return sequence.unbind(0) if batch_sizes is None else sequence.split(list(batch_sizes))


def _begun(state: State, reset: Tensor, starts: State | None) -> State:
    """Return the state with its start in the rows of ``reset``: chosen; a product would let NaN through."""
    mask = reset.unsqueeze(-1)
    if starts is None:
        return tuple(s.masked_fill(mask, 0) for s in state)
    rows = reset.size(0)
    return tuple(torch.where(mask, start[:rows], s) for start, s in zip(starts, state, strict=True))


def _of_input(product: Tensor, weights: Weights, spec: LayerSpec) -> Tensor:
    """Return what W_ih x contributes to the gates: normalized where inputs are separate."""
    if spec.variant.inputs == "separate":
        return _normalized(product, spec.groups, weights.get("gain_ih"), None, spec)
    return product


def _gates(x: Tensor, hidden: Tensor, weights: Weights, spec: LayerSpec) -> Tensor:
    """Return all gates before their nonlinearity, for cells whose gates are made alike; hidden is W_hh h."""
    bias = weights.get("bias")
    if spec.variant.inputs == "separate":
        return _plus(x + _normalized(hidden, spec.groups, weights.get("gain_hh"), None, spec), bias)
    return _normalized(x + hidden, spec.groups, weights.get("gain"), bias, spec)


def _normalized(
    a: Tensor,
    groups: Sequence[int],
    gain: Tensor | None,
    bias: Tensor | None,
    spec: LayerSpec,
    eps: float | None = None,
) -> Tensor:
    """Return N(a)·gain + bias, each group by itself; groups are in gates, or in whatever a has of them."""
    if groups:
        eps = spec.eps if eps is None else eps
        norm = layer_norm if spec.variant.kind == "layer" else rms_norm
        size = a.size(-1) // sum(groups)
        parts = a.split([size * count for count in groups], -1)
        a = torch.cat([norm(part, part.shape[-1:], eps=eps) for part in parts], -1)
    return _plus(a if gain is None else a * gain, bias)


def _normalized_cell(c: Tensor, weights: Weights, spec: LayerSpec) -> Tensor:
    return _normalized(c, (1,), weights.get("gain_cell"), weights.get("bias_cell"), spec, spec.cell_eps)


def _product(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None or bias.dtype == weight.dtype:
        return linear(a, weight, bias)
    return linear(a, weight) + bias


def _plus(a: Tensor, bias: Tensor | None) -> Tensor:
    return a if bias is None else a + bias
