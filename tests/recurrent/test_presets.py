"""Every preset against its source's formulas written out in NumPy.

Each source below draws weights in that code's own layout. It returns this package's parameters for them,
which is what importing its weights means, and one step as that code computes it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layernorm.variants import PRESETS
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


def haste_lstm():
    """Draw Haste's LSTM: i, g, f, o; gains only on the products, one bias after; raw c carried."""
    kernel, recurrent = draw(F, 4 * H), draw(H, 4 * H)
    gamma, b, gamma_h, beta_h = draw(2, 4 * H), draw(4 * H), draw(H), draw(H)
    ours = in_our_order(
        "igfo", weight_ih=kernel.T, weight_hh=recurrent.T, gain_ih=gamma[0], gain_hh=gamma[1], bias=b
    )
    ours |= {"gain_cell": gamma_h, "bias_cell": beta_h}

    def step(x, h, c):
        v = ln(x @ kernel, gamma[0]) + ln(h @ recurrent, gamma[1]) + b
        i, g, f, o = np.split(v, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(ln(c, gamma_h, beta_h)), c

    return ours, step


def haste_gru():
    """Draw Haste's GRU: z, r, g over all 3H; a bias after each norm; z keeps the old h."""
    kernel, recurrent, gamma = draw(F, 3 * H), draw(H, 3 * H), draw(2, 3 * H)
    b, b_r = draw(3 * H), draw(3 * H)
    bias = reorder(b, "zrn")
    bias[: 2 * H] += reorder(b_r, "zrn")[: 2 * H]
    ours = in_our_order("zrn", weight_ih=kernel.T, weight_hh=recurrent.T, gain_ih=gamma[0], gain_hh=gamma[1])
    ours |= {"bias": bias, "bias_hn": b_r[2 * H :]}

    def step(x, h):
        a, r_all = ln(x @ kernel, gamma[0]) + b, ln(h @ recurrent, gamma[1]) + b_r
        (az, ar, ag), (rz, rr, rg) = np.split(a, 3, -1), np.split(r_all, 3, -1)
        z, r = sigmoid(az + rz), sigmoid(ar + rr)
        return (z * h + (1 - z) * np.tanh(ag + r * rg),)

    return ours, step


def kiros_lstm():
    """Draw Kiros's LSTM: i, f, o, g; one b both inside the input's norm and after; raw c carried."""
    w, u, b = draw(F, 4 * H), draw(H, 4 * H), draw(4 * H)
    (s1, b1, s2, b2), (s3, b3) = draw(4, 4 * H), draw(2, H)
    ours = in_our_order(
        "ifog", weight_ih=w.T, weight_hh=u.T, bias_ih=b, gain_ih=s1, gain_hh=s2, bias=b1 + b2 + b
    )
    ours |= {"gain_cell": s3, "bias_cell": b3}

    def step(x, h, c):
        i, f, o, g = np.split(ln(x @ w + b, s1, b1) + ln(h @ u, s2, b2) + b, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(ln(c, s3, b3)), c

    return ours, step


def kiros_gru():
    """Draw Kiros's GRU: r, u over 2H, the candidate over H; u keeps the old h."""
    w, u, wx, ux = draw(F, 2 * H), draw(H, 2 * H), draw(F, H), draw(H, H)
    b, bx = draw(2 * H), draw(H)
    (s1, b1, s3, b3), (s2, b2, s4, b4) = draw(4, 2 * H), draw(4, H)
    ours = {"weight_ih": np.concatenate([w, wx], 1).T, "weight_hh": np.concatenate([u, ux], 1).T}
    ours |= {"bias_ih": np.concatenate([b, bx]), "gain_ih": np.concatenate([s1, s2])}
    ours |= {"gain_hh": np.concatenate([s3, s4]), "bias": np.concatenate([b1 + b3, b2]), "bias_hn": b4}

    def step(x, h):
        r, z = np.split(sigmoid(ln(x @ w + b, s1, b1) + ln(h @ u, s3, b3)), 2, -1)
        n = np.tanh(ln(x @ wx + bx, s2, b2) + r * ln(h @ ux, s4, b4))
        return (z * h + (1 - z) * n,)

    return ours, step


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


def fastrnns_lstm(eps=1e-5, b=0.0):
    """Draw fastrnns's LSTM: i, f, g, o; a LayerNorm with bias on each product; normalized c carried."""
    w, u = draw(4 * H, F), draw(4 * H, H)
    (g1, b1, g2, b2), (g3, b3) = draw(4, 4 * H), draw(2, H)
    ours = {"weight_ih": w, "weight_hh": u, "gain_ih": g1, "gain_hh": g2, "bias": b1 + b2 + b}
    ours |= {"gain_cell": g3, "bias_cell": b3}

    def step(x, h, c):
        gates = ln(x @ w.T, g1, b1, eps) + ln(h @ u.T, g2, b2, eps) + b
        i, f, g, o = np.split(gates, 4, -1)
        c = ln(sigmoid(f) * c + sigmoid(i) * np.tanh(g), g3, b3, eps)
        return sigmoid(o) * np.tanh(c), c

    return ours, step


def nemo_lstm():
    return fastrnns_lstm()


def tfa_lstm():
    """Draw TensorFlow Addons' LSTM: Keras i, f, c, o; a bias of its own after both norms; eps 1e-3."""
    return fastrnns_lstm(1e-3, draw(4 * H))


def tfa_rnn():
    """Draw TensorFlow Addons' RNN: a gain inside, the bias after."""
    kernel, recurrent, gamma, bias = draw(F, H), draw(H, H), draw(H), draw(H)
    ours = {"weight_ih": kernel.T, "weight_hh": recurrent.T, "gain": gamma, "bias": bias}

    def step(x, h):
        return (np.tanh(ln(x @ kernel + h @ recurrent, gamma) + bias),)

    return ours, step


def torchaudio_lstm():
    """Draw torchaudio's LSTM: i, f, c, o; one norm over 4H of the sum; normalized c carried."""
    w, u, g, b = draw(4 * H, F), draw(4 * H, H), draw(4 * H), draw(4 * H)
    cg, cb = draw(2, H)
    ours = {"weight_ih": w, "weight_hh": u, "gain": g, "bias": b, "gain_cell": cg, "bias_cell": cb}

    def step(x, h, c):
        i, f, cand, o = np.split(ln(x @ w.T + h @ u.T, g, b), 4, -1)
        c = ln(sigmoid(f) * c + sigmoid(i) * np.tanh(cand), cg, cb)
        return sigmoid(o) * np.tanh(c), c

    return ours, step


def per_gate(v, gains, biases, eps=1e-5):
    parts = np.split(v, len(gains), -1)
    return [ln(p, g, b, eps) for p, g, b in zip(parts, gains, biases, strict=True)]


def icefall_lstm():
    """Draw icefall's LSTM: i, f, g, o; per gate on the sum, biases inside; normalized c carried."""
    w, u, b_ih, b_hh = draw(4 * H, F), draw(4 * H, H), draw(4 * H), draw(4 * H)
    gains, biases, (cg, cb) = draw(4, H), draw(4, H), draw(2, H)
    ours = {"weight_ih": w, "weight_hh": u, "bias_ih": b_ih, "bias_hh": b_hh, "gain": gains.ravel()}
    ours |= {"bias": biases.ravel(), "gain_cell": cg, "bias_cell": cb}

    def step(x, h, c):
        i, f, g, o = per_gate(x @ w.T + b_ih + h @ u.T + b_hh, gains, biases)
        c = ln(sigmoid(f) * c + sigmoid(i) * np.tanh(g), cg, cb)
        return sigmoid(o) * np.tanh(c), c

    return ours, step


def icefall_gru():
    """Draw icefall's GRU: r, z, n; per gate on the sum; n is normalized after r·h_n."""
    w, u, b_ih, b_hh = draw(3 * H, F), draw(3 * H, H), draw(3 * H), draw(3 * H)
    gains, biases = draw(3, H), draw(3, H)
    ours = {"weight_ih": w, "weight_hh": u, "bias_ih": b_ih, "bias_hh": b_hh, "gain": gains.ravel()}
    ours |= {"bias": biases.ravel()}

    def step(x, h):
        (ir, iz, i_n), (hr, hz, h_n) = np.split(x @ w.T + b_ih, 3, -1), np.split(h @ u.T + b_hh, 3, -1)
        r, z = sigmoid(ln(ir + hr, gains[0], biases[0])), sigmoid(ln(iz + hz, gains[1], biases[1]))
        n = np.tanh(ln(i_n + r * h_n, gains[2], biases[2]))
        return (n + z * (h - n),)

    return ours, step


def tf1_lstm():
    """Draw TensorFlow 1's LSTM: i, j, f, o; per gate on the sum; a forget bias of 1; normalized c carried."""
    kernel, gains, biases, (cg, cb) = draw(F + H, 4 * H), draw(4, H), draw(4, H), draw(2, H)
    shifted = biases.copy()
    shifted[2] += 1.0
    ours = in_our_order(
        "igfo", weight_ih=kernel[:F].T, weight_hh=kernel[F:].T, gain=gains.ravel(), bias=shifted.ravel()
    )
    ours |= {"gain_cell": cg, "bias_cell": cb}

    def step(x, h, c):
        i, j, f, o = per_gate(np.concatenate([x, h], -1) @ kernel, gains, biases, 1e-12)
        c = ln(c * sigmoid(f + 1.0) + sigmoid(i) * np.tanh(j), cg, cb, 1e-12)
        return np.tanh(c) * sigmoid(o), c

    return ours, step


def sheeprl_gru():
    """Draw SheepRL's GRU: reset, candidate, update over 3H; update = σ(· - 1) takes the candidate."""
    w, gamma, beta = draw(3 * H, H + F), draw(3 * H), draw(3 * H)
    negate_z = np.repeat([1.0, -1.0, 1.0], H)
    ours = in_our_order("rnz", weight_ih=w[:, H:], weight_hh=w[:, :H])
    ours |= {"gain": reorder(gamma, "rnz") * negate_z}
    ours |= {"bias": (reorder(beta, "rnz") - np.repeat([0.0, 1.0, 0.0], H)) * negate_z}

    def step(x, h):
        reset, candidate, update = np.split(ln(np.concatenate([h, x], -1) @ w.T, gamma, beta, 1e-3), 3, -1)
        update = sigmoid(update - 1)
        return (update * np.tanh(sigmoid(reset) * candidate) + (1 - update) * h,)

    return ours, step


def tflite_lstm():
    """Draw TensorFlow Lite's LSTM: i, f, g, o, each gate apart; coefficient and bias after; raw c."""
    ws, us, coefficients, biases = draw(4, H, F), draw(4, H, H), draw(4, H), draw(4, H)
    ours = {"weight_ih": ws.reshape(4 * H, F), "weight_hh": us.reshape(4 * H, H)}
    ours |= {"gain": coefficients.ravel(), "bias": biases.ravel()}

    def step(x, h, c):
        sums = [x @ w.T + h @ u.T for w, u in zip(ws, us, strict=True)]
        i, f, g, o = [ln(s, k, b, 1e-8) for s, k, b in zip(sums, coefficients, biases, strict=True)]
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

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


def test_every_preset_is_tested_against_its_source():
    named = {(name, cell) for name, cells in PRESETS.items() for cell in cells}
    elsewhere = {("none", "lstm"), ("none", "gru"), ("none", "rnn")}  # test_recurrent.py
    elsewhere |= {("rms", "lstm"), ("rms", "gru"), ("rms", "rnn")}  # test_variants.py
    tested = {(name.rsplit("_", 1)[0], name.rsplit("_", 1)[1]) for name in SOURCES}
    assert named - elsewhere == tested
