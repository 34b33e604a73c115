"""The presets: the paper's against its equations written out in NumPy, others against ``layernorm.interop``.

Each function below draws weights as the paper has them. It returns this package's parameters for them, and
one step as the paper computes it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from layernorm import interop
from layernorm.variants import GATES, PRESETS
from tests.recurrent.cases import called

T, N, F, H = 6, 3, 4, 5
RNG = np.random.default_rng(0)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def ln(a, gain=1.0, bias=0.0, eps=1e-5):
    mean = a.mean(-1, keepdims=True)
    var = ((a - mean) ** 2).mean(-1, keepdims=True)
    return (a - mean) / np.sqrt(var + eps) * gain + bias


def draw(*shape):
    return RNG.standard_normal(shape)


def reorder(a, theirs: str):
    """Return an array's gates along its first axis in our order, from theirs."""
    parts = dict(zip(theirs, np.split(a, len(theirs)), strict=True))
    return np.concatenate([parts[gate] for gate in ("ifgo" if "i" in theirs else "rzn")])


def in_our_order(theirs: str, **weights):
    """Return these weights with their gates in our order."""
    return {name: reorder(a, theirs) for name, a in weights.items()}


def paper_gru():
    """Draw the paper's GRU: equations 26-28: z takes the candidate, so ours has its gain and bias negated."""
    wh, wx, u, w = draw(2 * H, H), draw(2 * H, F), draw(H, H), draw(H, F)
    (a1, b1, a2, b2), (a3, b3, a4, b4) = draw(4, 2 * H), draw(4, H)

    def flip(rz):
        z, r = np.split(rz, 2)
        return np.concatenate([r, -z])

    ours = {"weight_ih": np.concatenate([wx[H:], wx[:H], w])}
    ours |= {"weight_hh": np.concatenate([wh[H:], wh[:H], u]), "gain_ih": np.concatenate([flip(a2), a3])}
    ours |= {"gain_hh": np.concatenate([flip(a1), a4]), "bias": np.concatenate([flip(b1 + b2), b3])}
    ours |= {"bias_hn": b4}

    def step(x, h):
        z, r = np.split(ln(h @ wh.T, a1, b1) + ln(x @ wx.T, a2, b2), 2, -1)
        candidate = np.tanh(ln(x @ w.T, a3, b3) + sigmoid(r) * ln(h @ u.T, a4, b4))
        return ((1 - sigmoid(z)) * h + sigmoid(z) * candidate,)

    return ours, step


def paper_lstm():
    """Draw the paper's LSTM: equations 20-22."""
    wh, wx = draw(4 * H, H), draw(4 * H, F)
    (a1, b1, a2, b2, b), (a3, b3) = draw(5, 4 * H), draw(2, H)
    ours = in_our_order("fiog", weight_ih=wx, weight_hh=wh, gain_ih=a2, gain_hh=a1, bias=b1 + b2 + b)
    ours |= {"gain_cell": a3, "bias_cell": b3}

    def step(x, h, c):
        f, i, o, g = np.split(ln(h @ wh.T, a1, b1) + ln(x @ wx.T, a2, b2) + b, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(ln(c, a3, b3)), c

    return ours, step


def paper_rnn():
    """Draw the paper's RNN: equation 4."""
    wh, wx, gain, bias = draw(H, H), draw(H, F), draw(H), draw(H)
    ours = {"weight_ih": wx, "weight_hh": wh, "gain": gain, "bias": bias}

    def step(x, h):
        return (np.tanh(ln(h @ wh.T + x @ wx.T, gain, bias)),)

    return ours, step


SOURCES = {
    name: function
    for name, function in list(globals().items())
    if callable(function) and name.rsplit("_", 1)[-1] in ("lstm", "gru", "rnn")
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_preset_gives_its_sources_numbers(source):
    preset, cell = source.rsplit("_", 1)
    weights, step = SOURCES[source]()
    xs, state = draw(T, N, F), [draw(N, H) for _ in range(1 + (cell == "lstm"))]
    given = {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()}
    actual, *_ = called(cell, torch.from_numpy(xs), [*map(torch.from_numpy, state)], given, variant=preset)
    expected = []
    for x in xs:
        state = step(x, *state)
        expected.append(state[0])
    # float64, 6 steps, sums of at most 9 products; eps 1e-12 of TF1 amplifies by at most 1/std.
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-11)


def test_every_other_preset_is_a_sources():
    # tests/interop compares these with the sources' formulas, and loads biases inside norms where there are.
    named = {(name, cell) for name, cells in PRESETS.items() for cell in cells}
    elsewhere = {("none", cell) for cell in GATES}  # test_recurrent.py
    elsewhere |= {("rms", cell) for cell in GATES}  # test_variants.py
    elsewhere |= {tuple(name.rsplit("_", 1)) for name in SOURCES}
    for name, cell in named - elsewhere:
        preset, source = PRESETS[name][cell], interop.SOURCES[name][cell].variant
        assert preset == dataclasses.replace(source, projection_bias=preset.projection_bias)
