"""Recurrent sequences for every variant: one time loop that takes a small cell function.

Shapes: T time, N batch, F input, H hidden, G gates, P the size of h (``proj_size`` or H). A cell takes
what the input contributes to the gates at one step, ``x`` (N, G·H), which ``_project`` has computed
for all steps at once, and the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from layernorm.reference.norms import layer_norm, rms_norm
from layernorm.variants import GATES, Cell, Variant

Weights = Mapping[str, Tensor]
State = tuple[Tensor, ...]


def lstm(
    input: Tensor,
    state: tuple[Tensor, Tensor],
    weights: Weights,
    variant: Variant,
    *,
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer and direction of an LSTM (paper eq. 20-22 for the variant "paper").

    Args:
        input: (T, N, F), or the (ΣN_t, F) data of a packed sequence with its ``batch_sizes``.
        state: h (N, P) and c (N, H).
        weights: by the names of ``layernorm.variants.parameter_shapes``; a bias may be absent.
        variant: the spec.
        reverse: run from the last step to the first; outputs stay in the input's order.
        batch_sizes: rows at each step, not increasing; None when all steps have N.
        resets: bool (T, N), or (ΣN_t,): where true, nothing passes between this step and the one
            before. Forward the state is zero before the step; in reverse it is zero after it.
        recompute: of the compiled kernels; without effect here, where autograd decides what is kept.

    Returns:
        output (T, N, P), or (ΣN_t, P); and the final (h, c).
    """
    cell = partial(_lstm_step, weights=weights, variant=variant)
    x = _project(input, weights, variant, _groups("lstm", variant, state[1].size(-1)))
    output, (h, c) = _scan(cell, x, state, reverse, batch_sizes, resets)
    return output, (h, c)


def gru(
    input: Tensor,
    state: Tensor,
    weights: Weights,
    variant: Variant,
    *,
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer and direction of a GRU (paper eq. 26-28); h' = (1 - z)·n + z·h as in PyTorch.

    Arguments and results as those of ``lstm``, with the state h (N, H).
    """
    cell = partial(_gru_step, weights=weights, variant=variant)
    x = _project(input, weights, variant, _groups("gru", variant, state.size(-1)))
    output, (h,) = _scan(cell, x, (state,), reverse, batch_sizes, resets)
    return output, h


def rnn(
    input: Tensor,
    state: Tensor,
    weights: Weights,
    variant: Variant,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer and direction of an RNN (paper eq. 4); ``nonlinearity`` is "tanh" or "relu".

    Other arguments and results as those of ``lstm``, with the state h (N, H).
    """
    cell = partial(_rnn_step, weights=weights, variant=variant, nonlinearity=nonlinearity)
    x = _project(input, weights, variant, _groups("rnn", variant, state.size(-1)))
    output, (h,) = _scan(cell, x, (state,), reverse, batch_sizes, resets)
    return output, h


def lstm_gates(
    input_gates: Tensor, hidden_gates: Tensor, c: Tensor, weights: Weights, variant: Variant
) -> State:
    """The part of an LSTM's step after its products: W_ih x, W_hh h (N, 4H) and c (N, H) to h and c (N, H).

    ``weights`` are the parameters but for the matrices; a bias may be absent.
    """
    groups = _groups("lstm", variant, c.size(-1))
    x = _of_input(_plus(input_gates, weights.get("bias_ih")), weights, variant, groups)
    gates = _gates(x, _plus(hidden_gates, weights.get("bias_hh")), weights, variant, groups)
    return _lstm_state(gates, c, weights, variant)


def _lstm_step(x: Tensor, state: State, weights: Weights, variant: Variant) -> State:
    h, c = state
    hidden = linear(h, weights["weight_hh"], weights.get("bias_hh"))
    gates = _gates(x, hidden, weights, variant, _groups("lstm", variant, c.size(-1)))
    h, c = _lstm_state(gates, c, weights, variant)
    if "weight_hr" in weights:
        h = linear(h, weights["weight_hr"])
    return h, c


def _lstm_state(gates: Tensor, c: Tensor, weights: Weights, variant: Variant) -> State:
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    if variant.cell == "carried":
        c = _normalized_cell(c, weights, variant)
    seen = _normalized_cell(c, weights, variant) if variant.cell == "output" else c
    return torch.sigmoid(o) * torch.tanh(seen), c


def _gru_step(x: Tensor, state: State, weights: Weights, variant: Variant) -> State:
    (h,) = state
    size = h.size(-1)
    groups = _groups("gru", variant, size)
    if variant.inputs == "separate":
        hidden = linear(h, weights["weight_hh"], weights.get("bias_hh"))
        hidden = _normalized(hidden, groups, weights.get("gain_hh"), None, variant)
        x = _plus(x, weights.get("bias"))
        r, z = torch.sigmoid(x[..., : 2 * size] + hidden[..., : 2 * size]).chunk(2, -1)
        reset = r * _plus(hidden[..., 2 * size :], weights.get("bias_hn"))
        n = torch.tanh(x[..., 2 * size :] + reset)
    elif variant.scope == "all":
        hidden = linear(h, weights["weight_hh"], weights.get("bias_hh"))
        gates = _gates(x, hidden, weights, variant, groups)
        r, z = torch.sigmoid(gates[..., : 2 * size]).chunk(2, -1)
        n = torch.tanh(r * gates[..., 2 * size :])
    else:
        hidden = linear(h, weights["weight_hh"], weights.get("bias_hh"))
        (x_rz, x_n), (h_rz, h_n) = (a.split([2 * size, size], -1) for a in (x, hidden))
        gain_rz, gain_n = weights["gain"].split([2 * size, size])
        bias_rz, bias_n = weights["bias"].split([2 * size, size]) if "bias" in weights else (None, None)
        rz = _normalized(x_rz + h_rz, groups[:-1], gain_rz, bias_rz, variant)
        r, z = torch.sigmoid(rz).chunk(2, -1)
        n = torch.tanh(_normalized(x_n + r * h_n, groups[-1:], gain_n, bias_n, variant))
    return ((1 - z) * n + z * h,)


def _rnn_step(x: Tensor, state: State, weights: Weights, variant: Variant, nonlinearity: str) -> State:
    (h,) = state
    hidden = linear(h, weights["weight_hh"], weights.get("bias_hh"))
    gates = _gates(x, hidden, weights, variant, _groups("rnn", variant, h.size(-1)))
    return (torch.tanh(gates) if nonlinearity == "tanh" else torch.relu(gates),)


def _scan(
    cell: Callable[[Tensor, State], State],
    x: Tensor,
    state: State,
    reverse: bool,
    batch_sizes: Sequence[int] | None,
    resets: Tensor | None,
) -> tuple[Tensor, State]:
    """The one time loop. ``cell(x_t, state)`` gives the next state, whose first tensor is h.

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
            state = _cleared(state, parted[t])
        state = cell(steps[t], state)
        outputs.append(state[0])
        if parted is not None and reverse and t > 0:
            state = _cleared(state, parted[t])
    if resting[0].size(0):
        state = tuple(torch.cat(pair) for pair in zip(state, resting, strict=True))
    if reverse:
        outputs.reverse()
    return (torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)), state


def _steps(sequence: Tensor, batch_sizes: Sequence[int] | None) -> Sequence[Tensor]:
    return sequence.unbind(0) if batch_sizes is None else sequence.split(list(batch_sizes))


def _cleared(state: State, reset: Tensor) -> State:
    """Zeros in the rows of ``reset``: filled, for a product would let NaN through, and its gradient."""
    return tuple(s.masked_fill(reset.unsqueeze(-1), 0) for s in state)


def _project(x: Tensor, weights: Weights, variant: Variant, groups: list[int]) -> Tensor:
    """What the input contributes to the gates: W_ih x, normalized where ``inputs`` is separate."""
    return _of_input(linear(x, weights["weight_ih"], weights.get("bias_ih")), weights, variant, groups)


def _of_input(product: Tensor, weights: Weights, variant: Variant, groups: list[int]) -> Tensor:
    if variant.inputs == "separate":
        return _normalized(product, groups, weights.get("gain_ih"), None, variant)
    return product


def _gates(x: Tensor, hidden: Tensor, weights: Weights, variant: Variant, groups: list[int]) -> Tensor:
    """All gates before their nonlinearity, for cells whose gates are made alike; hidden is W_hh h."""
    bias = weights.get("bias")
    if variant.inputs == "separate":
        return _plus(x + _normalized(hidden, groups, weights.get("gain_hh"), None, variant), bias)
    return _normalized(x + hidden, groups, weights.get("gain"), bias, variant)


def _groups(cell: Cell, variant: Variant, size: int) -> list[int]:
    """How many neighbouring features share statistics, group by group; size is H."""
    if variant.scope == "gate":
        return [size] * GATES[cell]
    if variant.scope == "matrix" and cell == "gru":
        return [2 * size, size]
    return [GATES[cell] * size]


def _normalized(
    a: Tensor,
    groups: list[int],
    gain: Tensor | None,
    bias: Tensor | None,
    variant: Variant,
) -> Tensor:
    """N(a)·gain + bias, each group of features by itself; a is (..., sum(groups))."""
    if variant.kind != "none":
        norm = layer_norm if variant.kind == "layer" else rms_norm
        parts = a.split(groups, -1)
        a = torch.cat([norm(part, part.shape[-1:], eps=variant.eps) for part in parts], -1)
    return _plus(a if gain is None else a * gain, bias)


def _normalized_cell(c: Tensor, weights: Weights, variant: Variant) -> Tensor:
    gain, bias = weights["gain_cell"], weights.get("bias_cell")
    return _normalized(c, [c.size(-1)], gain, bias, variant)


def _plus(a: Tensor, bias: Tensor | None) -> Tensor:
    return a if bias is None else a + bias
