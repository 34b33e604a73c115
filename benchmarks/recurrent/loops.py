"""The paper's layer-normalized cells as people write them with PyTorch: a Python loop over time.

The product with the input, and its norm where that stands alone, are taken out of the loop. Everything here
goes through ``torch.jit.script`` too. Arguments are x (T, N, F), or one step of it, and the weights in
the order of ``layernorm.variants.parameter_shapes``. Written apart from ``layernorm.reference``, so that
the two can judge each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F


def lstm_project(x: Tensor, weight_ih: Tensor, gain_ih: Tensor, bias: Tensor) -> Tensor:
    """Return the normalized product with the input."""
    return F.layer_norm(F.linear(x, weight_ih), [weight_ih.size(0)], gain_ih, bias)


def lstm_step(
    x: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, gain_hh: Tensor, gain_cell: Tensor, bias_cell: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the next (h, c); x is the normalized product with the input."""
    size = h.size(-1)
    gates = x + F.layer_norm(F.linear(h, weight_hh), [4 * size], gain_hh)
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(F.layer_norm(c, [size], gain_cell, bias_cell))
    return h, c


def lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    gain_ih: Tensor,
    gain_hh: Tensor,
    bias: Tensor,
    gain_cell: Tensor,
    bias_cell: Tensor,
) -> Tensor:
    """Return the output of an LSTM from a state of zeros."""
    size = weight_hh.size(1)
    h = x.new_zeros([x.size(1), size])
    c = h
    projected = lstm_project(x, weight_ih, gain_ih, bias)
    outputs = []
    for x_t in projected.unbind(0):
        h, c = lstm_step(x_t, h, c, weight_hh, gain_hh, gain_cell, bias_cell)
        outputs.append(h)
    return torch.stack(outputs)


def lstm_cell(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    gain_ih: Tensor,
    gain_hh: Tensor,
    bias: Tensor,
    gain_cell: Tensor,
    bias_cell: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the next (h, c) of an LSTM."""
    projected = lstm_project(x, weight_ih, gain_ih, bias)
    return lstm_step(projected, h, c, weight_hh, gain_hh, gain_cell, bias_cell)


def gru_project(x: Tensor, weight_ih: Tensor, gain_ih: Tensor, bias: Tensor) -> Tensor:
    """Return the normalized product with the input, r and z together and n by itself."""
    size = weight_ih.size(0) // 3
    a = F.linear(x, weight_ih)
    rz = F.layer_norm(a[..., : 2 * size], [2 * size], gain_ih[: 2 * size], bias[: 2 * size])
    n = F.layer_norm(a[..., 2 * size :], [size], gain_ih[2 * size :], bias[2 * size :])
    return torch.cat([rz, n], -1)


def gru_step(x: Tensor, h: Tensor, weight_hh: Tensor, gain_hh: Tensor, bias_hn: Tensor) -> Tensor:
    """Return the next h; x is the normalized product with the input."""
    size = h.size(-1)
    b = F.linear(h, weight_hh)
    b_rz = F.layer_norm(b[..., : 2 * size], [2 * size], gain_hh[: 2 * size])
    b_n = F.layer_norm(b[..., 2 * size :], [size], gain_hh[2 * size :], bias_hn)
    r, z = torch.sigmoid(x[..., : 2 * size] + b_rz).chunk(2, -1)
    n = torch.tanh(x[..., 2 * size :] + r * b_n)
    return n + z * (h - n)


def gru(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    gain_ih: Tensor,
    gain_hh: Tensor,
    bias: Tensor,
    bias_hn: Tensor,
) -> Tensor:
    """Return the output of a GRU from a state of zeros."""
    h = x.new_zeros([x.size(1), weight_hh.size(1)])
    outputs = []
    for x_t in gru_project(x, weight_ih, gain_ih, bias).unbind(0):
        h = gru_step(x_t, h, weight_hh, gain_hh, bias_hn)
        outputs.append(h)
    return torch.stack(outputs)


def gru_cell(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    gain_ih: Tensor,
    gain_hh: Tensor,
    bias: Tensor,
    bias_hn: Tensor,
) -> tuple[Tensor]:
    """Return the next state of a GRU."""
    return (gru_step(gru_project(x, weight_ih, gain_ih, bias), h, weight_hh, gain_hh, bias_hn),)


def rnn_step(x: Tensor, h: Tensor, weight_hh: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Return the next h; x is the product with the input."""
    return torch.tanh(F.layer_norm(x + F.linear(h, weight_hh), [h.size(-1)], gain, bias))


def rnn(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Return the output of an RNN from a state of zeros."""
    h = x.new_zeros([x.size(1), weight_hh.size(1)])
    outputs = []
    for x_t in F.linear(x, weight_ih).unbind(0):
        h = rnn_step(x_t, h, weight_hh, gain, bias)
        outputs.append(h)
    return torch.stack(outputs)


def rnn_cell(
    x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, gain: Tensor, bias: Tensor
) -> tuple[Tensor]:
    """Return the next state of an RNN."""
    return (rnn_step(F.linear(x, weight_ih), h, weight_hh, gain, bias),)


#: Whole sequences by cell: x and weights to the output.
SEQUENCES: Final[dict[str, Callable[..., Tensor]]] = {"lstm": lstm, "gru": gru, "rnn": rnn}
#: Single steps by cell: x, the state and weights to the next state.
CELLS: Final[dict[str, Callable[..., tuple[Tensor, ...]]]] = {
    "lstm": lstm_cell,
    "gru": gru_cell,
    "rnn": rnn_cell,
}


@dataclass(frozen=True)
class Parts:
    """The parts of a cell: what is taken out of the loop over time, and what is in it.

    Attributes:
        project: x and its weights to what the steps take.
        step: that of one step, the state and its weights to the next state.
        states: how many tensors the state has; the first is the output.
        project_weights: the weights of ``project``, by name.
        step_weights: those of ``step``.
    """

    project: Callable[..., Tensor]
    step: Callable[..., Any]
    states: int
    project_weights: tuple[str, ...]
    step_weights: tuple[str, ...]


#: By cell.
PARTS: Final[dict[str, Parts]] = {
    "lstm": Parts(
        lstm_project,
        lstm_step,
        2,
        ("weight_ih", "gain_ih", "bias"),
        ("weight_hh", "gain_hh", "gain_cell", "bias_cell"),
    ),
    "gru": Parts(
        gru_project, gru_step, 1, ("weight_ih", "gain_ih", "bias"), ("weight_hh", "gain_hh", "bias_hn")
    ),
    "rnn": Parts(F.linear, rnn_step, 1, ("weight_ih",), ("weight_hh", "gain", "bias")),
}
_SCRIPTS: Final[dict[Callable[..., Any], Any]] = {}


def scripted(function: Callable[..., Any]) -> Any:
    """Return the function under TorchScript, scripted once."""
    if function not in _SCRIPTS:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, and in use all the same
            _SCRIPTS[function] = torch.jit.script(function)
    return _SCRIPTS[function]


__all__ = ["CELLS", "PARTS", "SEQUENCES", "Parts", "scripted"]
