"""The spec, and every preset against its source's formulas written out in NumPy.

Each source below is one step as that code computes it, with its own layout of weights; the mapping to this
package's parameters is what importing its weights means.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import layernorm
from layernorm import Variant
from layernorm import functional as LF
from layernorm.variants import PRESETS, parameter_shapes, resolve

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


def reorder(a, theirs: str, ours: str, axis=0):
    """Gates in our order from an array whose gates are in theirs along an axis."""
    parts = dict(zip(theirs, np.split(a, len(theirs), axis), strict=True))
    return np.concatenate([parts[gate] for gate in ours], axis)


def run(cell: str, preset: str, xs, state, weights):
    weights = {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()}
    state = tuple(torch.from_numpy(s) for s in state)
    function = getattr(LF, cell)
    output, _ = function(torch.from_numpy(xs), state if cell == "lstm" else state[0], weights, variant=preset)
    return output.numpy()


def lstm_states():
    return draw(T, N, F), (draw(N, H), draw(N, H))


def haste_lstm():
    """i, g, f, o; gains only on the products, one bias after; raw c carried."""
    xs, (h, c) = lstm_states()
    kernel, recurrent = draw(F, 4 * H), draw(H, 4 * H)
    gamma, b, gamma_h, beta_h = draw(2, 4 * H), draw(4 * H), draw(H), draw(H)
    ours = {
        "weight_ih": reorder(kernel.T, "igfo", "ifgo"),
        "weight_hh": reorder(recurrent.T, "igfo", "ifgo"),
        "gain_ih": reorder(gamma[0], "igfo", "ifgo"),
        "gain_hh": reorder(gamma[1], "igfo", "ifgo"),
        "bias": reorder(b, "igfo", "ifgo"),
        "gain_cell": gamma_h,
        "bias_cell": beta_h,
    }
    actual, expected = run("lstm", "haste", xs, (h, c), ours), []
    for x in xs:
        v = ln(x @ kernel, gamma[0]) + ln(h @ recurrent, gamma[1]) + b
        i, g, f, o = np.split(v, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(ln(c, gamma_h, beta_h))
        expected.append(h)
    return actual, expected


def haste_gru():
    """z, r, g over all 3H; a bias after each norm; z keeps the old h."""
    xs, (h, _) = lstm_states()
    kernel, recurrent, gamma = draw(F, 3 * H), draw(H, 3 * H), draw(2, 3 * H)
    b, b_r = draw(3 * H), draw(3 * H)
    bias = reorder(b, "zrn", "rzn")
    bias[: 2 * H] += reorder(b_r, "zrn", "rzn")[: 2 * H]
    ours = {
        "weight_ih": reorder(kernel.T, "zrn", "rzn"),
        "weight_hh": reorder(recurrent.T, "zrn", "rzn"),
        "gain_ih": reorder(gamma[0], "zrn", "rzn"),
        "gain_hh": reorder(gamma[1], "zrn", "rzn"),
        "bias": bias,
        "bias_hn": b_r[2 * H :],
    }
    actual, expected = run("gru", "haste", xs, (h,), ours), []
    for x in xs:
        a, r_all = ln(x @ kernel, gamma[0]) + b, ln(h @ recurrent, gamma[1]) + b_r
        (az, ar, ag), (rz, rr, rg) = np.split(a, 3, -1), np.split(r_all, 3, -1)
        z, r = sigmoid(az + rz), sigmoid(ar + rr)
        h = z * h + (1 - z) * np.tanh(ag + r * rg)
        expected.append(h)
    return actual, expected


def kiros_lstm():
    """i, f, o, g; one b both inside the input's norm and after; raw c carried."""
    xs, (h, c) = lstm_states()
    w, u, b = draw(F, 4 * H), draw(H, 4 * H), draw(4 * H)
    (s1, b1, s2, b2), (s3, b3) = draw(4, 4 * H), draw(2, H)
    ours = {
        "weight_ih": reorder(w.T, "ifog", "ifgo"),
        "weight_hh": reorder(u.T, "ifog", "ifgo"),
        "bias_ih": reorder(b, "ifog", "ifgo"),
        "gain_ih": reorder(s1, "ifog", "ifgo"),
        "gain_hh": reorder(s2, "ifog", "ifgo"),
        "bias": reorder(b1 + b2 + b, "ifog", "ifgo"),
        "gain_cell": s3,
        "bias_cell": b3,
    }
    actual, expected = run("lstm", "kiros", xs, (h, c), ours), []
    for x in xs:
        i, f, o, g = np.split(ln(x @ w + b, s1, b1) + ln(h @ u, s2, b2) + b, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(ln(c, s3, b3))
        expected.append(h)
    return actual, expected


def kiros_gru():
    """r, u over 2H, the candidate over H; u keeps the old h."""
    xs, (h, _) = lstm_states()
    w, u, wx, ux = draw(F, 2 * H), draw(H, 2 * H), draw(F, H), draw(H, H)
    b, bx = draw(2 * H), draw(H)
    (s1, b1, s3, b3), (s2, b2, s4, b4) = draw(4, 2 * H), draw(4, H)
    ours = {
        "weight_ih": np.concatenate([w, wx], 1).T,
        "weight_hh": np.concatenate([u, ux], 1).T,
        "bias_ih": np.concatenate([b, bx]),
        "gain_ih": np.concatenate([s1, s2]),
        "gain_hh": np.concatenate([s3, s4]),
        "bias": np.concatenate([b1 + b3, b2]),
        "bias_hn": b4,
    }
    actual, expected = run("gru", "kiros", xs, (h,), ours), []
    for x in xs:
        r, z = np.split(sigmoid(ln(x @ w + b, s1, b1) + ln(h @ u, s3, b3)), 2, -1)
        n = np.tanh(ln(x @ wx + bx, s2, b2) + r * ln(h @ ux, s4, b4))
        h = z * h + (1 - z) * n
        expected.append(h)
    return actual, expected


def paper_gru():
    """Equations 26-28: z takes the candidate, so ours has its gain and bias negated."""
    xs, (h, _) = lstm_states()
    wh, wx, u, w = draw(2 * H, H), draw(2 * H, F), draw(H, H), draw(H, F)
    (a1, b1, a2, b2), (a3, b3, a4, b4) = draw(4, 2 * H), draw(4, H)

    def flip(rz):
        z, r = np.split(rz, 2)
        return np.concatenate([r, -z])

    ours = {
        "weight_ih": np.concatenate([wx[H:], wx[:H], w]),
        "weight_hh": np.concatenate([wh[H:], wh[:H], u]),
        "gain_ih": np.concatenate([flip(a2), a3]),
        "gain_hh": np.concatenate([flip(a1), a4]),
        "bias": np.concatenate([flip(b1 + b2), b3]),
        "bias_hn": b4,
    }
    actual, expected = run("gru", "paper", xs, (h,), ours), []
    for x in xs:
        z, r = np.split(ln(h @ wh.T, a1, b1) + ln(x @ wx.T, a2, b2), 2, -1)
        candidate = np.tanh(ln(x @ w.T, a3, b3) + sigmoid(r) * ln(h @ u.T, a4, b4))
        h = (1 - sigmoid(z)) * h + sigmoid(z) * candidate
        expected.append(h)
    return actual, expected


def paper_lstm():
    """Equations 20-22."""
    xs, (h, c) = lstm_states()
    wh, wx = draw(4 * H, H), draw(4 * H, F)
    (a1, b1, a2, b2, b), (a3, b3) = draw(5, 4 * H), draw(2, H)
    ours = {
        "weight_ih": reorder(wx, "fiog", "ifgo"),
        "weight_hh": reorder(wh, "fiog", "ifgo"),
        "gain_ih": reorder(a2, "fiog", "ifgo"),
        "gain_hh": reorder(a1, "fiog", "ifgo"),
        "bias": reorder(b1 + b2 + b, "fiog", "ifgo"),
        "gain_cell": a3,
        "bias_cell": b3,
    }
    actual, expected = run("lstm", "paper", xs, (h, c), ours), []
    for x in xs:
        f, i, o, g = np.split(ln(h @ wh.T, a1, b1) + ln(x @ wx.T, a2, b2) + b, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(ln(c, a3, b3))
        expected.append(h)
    return actual, expected


def paper_rnn():
    """Equation 4."""
    xs, (h, _) = lstm_states()
    wh, wx, gain, bias = draw(H, H), draw(H, F), draw(H), draw(H)
    ours = {"weight_ih": wx, "weight_hh": wh, "gain": gain, "bias": bias}
    actual, expected = run("rnn", "paper", xs, (h,), ours), []
    for x in xs:
        h = np.tanh(ln(h @ wh.T + x @ wx.T, gain, bias))
        expected.append(h)
    return actual, expected


def fastrnns_lstm(preset="fastrnns", eps=1e-5, b=0.0):
    """i, f, g, o; a LayerNorm with bias on each product; the normalized c is carried."""
    xs, (h, c) = lstm_states()
    w, u = draw(4 * H, F), draw(4 * H, H)
    (g1, b1, g2, b2), (g3, b3) = draw(4, 4 * H), draw(2, H)
    ours = {
        "weight_ih": w,
        "weight_hh": u,
        "gain_ih": g1,
        "gain_hh": g2,
        "bias": b1 + b2 + b,
        "gain_cell": g3,
        "bias_cell": b3,
    }
    actual, expected = run("lstm", preset, xs, (h, c), ours), []
    for x in xs:
        gates = ln(x @ w.T, g1, b1, eps) + ln(h @ u.T, g2, b2, eps) + b
        i, f, g, o = np.split(gates, 4, -1)
        c = ln(sigmoid(f) * c + sigmoid(i) * np.tanh(g), g3, b3, eps)
        h = sigmoid(o) * np.tanh(c)
        expected.append(h)
    return actual, expected


def nemo_lstm():
    return fastrnns_lstm("nemo")


def tfa_lstm():
    """Keras i, f, c, o; a bias of its own after both norms; eps 1e-3."""
    return fastrnns_lstm("tfa", 1e-3, draw(4 * H))


def tfa_rnn():
    """A gain inside, the bias after."""
    xs, (h, _) = lstm_states()
    kernel, recurrent, gamma, bias = draw(F, H), draw(H, H), draw(H), draw(H)
    ours = {"weight_ih": kernel.T, "weight_hh": recurrent.T, "gain": gamma, "bias": bias}
    actual, expected = run("rnn", "tfa", xs, (h,), ours), []
    for x in xs:
        h = np.tanh(ln(x @ kernel + h @ recurrent, gamma) + bias)
        expected.append(h)
    return actual, expected


def torchaudio_lstm():
    """i, f, c, o; one norm over 4H of the sum; the normalized c is carried."""
    xs, (h, c) = lstm_states()
    w, u, g, b = draw(4 * H, F), draw(4 * H, H), draw(4 * H), draw(4 * H)
    cg, cb = draw(2, H)
    ours = {"weight_ih": w, "weight_hh": u, "gain": g, "bias": b, "gain_cell": cg, "bias_cell": cb}
    actual, expected = run("lstm", "torchaudio", xs, (h, c), ours), []
    for x in xs:
        i, f, cand, o = np.split(ln(x @ w.T + h @ u.T, g, b), 4, -1)
        c = ln(sigmoid(f) * c + sigmoid(i) * np.tanh(cand), cg, cb)
        h = sigmoid(o) * np.tanh(c)
        expected.append(h)
    return actual, expected


def per_gate(v, gains, biases, eps=1e-5):
    parts = np.split(v, len(gains), -1)
    return [ln(p, g, b, eps) for p, g, b in zip(parts, gains, biases, strict=True)]


def icefall_lstm():
    """i, f, g, o; per gate on the sum with the biases inside; the normalized c is carried."""
    xs, (h, c) = lstm_states()
    w, u, b_ih, b_hh = draw(4 * H, F), draw(4 * H, H), draw(4 * H), draw(4 * H)
    gains, biases, (cg, cb) = draw(4, H), draw(4, H), draw(2, H)
    ours = {
        "weight_ih": w,
        "weight_hh": u,
        "bias_ih": b_ih,
        "bias_hh": b_hh,
        "gain": gains.ravel(),
        "bias": biases.ravel(),
        "gain_cell": cg,
        "bias_cell": cb,
    }
    actual, expected = run("lstm", "icefall", xs, (h, c), ours), []
    for x in xs:
        i, f, g, o = per_gate(x @ w.T + b_ih + h @ u.T + b_hh, gains, biases)
        c = ln(sigmoid(f) * c + sigmoid(i) * np.tanh(g), cg, cb)
        h = sigmoid(o) * np.tanh(c)
        expected.append(h)
    return actual, expected


def icefall_gru():
    """r, z, n; per gate on the sum; n is normalized after r·h_n."""
    xs, (h, _) = lstm_states()
    w, u, b_ih, b_hh = draw(3 * H, F), draw(3 * H, H), draw(3 * H), draw(3 * H)
    gains, biases = draw(3, H), draw(3, H)
    ours = {
        "weight_ih": w,
        "weight_hh": u,
        "bias_ih": b_ih,
        "bias_hh": b_hh,
        "gain": gains.ravel(),
        "bias": biases.ravel(),
    }
    actual, expected = run("gru", "icefall", xs, (h,), ours), []
    for x in xs:
        (ir, iz, i_n), (hr, hz, h_n) = np.split(x @ w.T + b_ih, 3, -1), np.split(h @ u.T + b_hh, 3, -1)
        r, z = sigmoid(ln(ir + hr, gains[0], biases[0])), sigmoid(ln(iz + hz, gains[1], biases[1]))
        n = np.tanh(ln(i_n + r * h_n, gains[2], biases[2]))
        h = n + z * (h - n)
        expected.append(h)
    return actual, expected


def tf1_lstm():
    """i, j, f, o; per gate on the sum; a forget bias of 1 at run time; the normalized c is carried."""
    xs, (h, c) = lstm_states()
    kernel, gains, biases, (cg, cb) = draw(F + H, 4 * H), draw(4, H), draw(4, H), draw(2, H)
    shifted = biases.copy()
    shifted[2] += 1.0
    ours = {
        "weight_ih": reorder(kernel[:F].T, "igfo", "ifgo"),
        "weight_hh": reorder(kernel[F:].T, "igfo", "ifgo"),
        "gain": reorder(gains.ravel(), "igfo", "ifgo"),
        "bias": reorder(shifted.ravel(), "igfo", "ifgo"),
        "gain_cell": cg,
        "bias_cell": cb,
    }
    actual, expected = run("lstm", "tf1", xs, (h, c), ours), []
    for x in xs:
        i, j, f, o = per_gate(np.concatenate([x, h], -1) @ kernel, gains, biases, 1e-12)
        c = ln(c * sigmoid(f + 1.0) + sigmoid(i) * np.tanh(j), cg, cb, 1e-12)
        h = np.tanh(c) * sigmoid(o)
        expected.append(h)
    return actual, expected


def sheeprl_gru():
    """reset, candidate, update over 3H of W[h, x]; update = σ(· - 1) takes the candidate."""
    xs, (h, _) = lstm_states()
    w, gamma, beta = draw(3 * H, H + F), draw(3 * H), draw(3 * H)
    negate_z = np.repeat([1.0, -1.0, 1.0], H)
    ours = {
        "weight_ih": reorder(w[:, H:], "rnz", "rzn"),
        "weight_hh": reorder(w[:, :H], "rnz", "rzn"),
        "gain": reorder(gamma, "rnz", "rzn") * negate_z,
        "bias": (reorder(beta, "rnz", "rzn") - np.repeat([0.0, 1.0, 0.0], H)) * negate_z,
    }
    actual, expected = run("gru", "sheeprl", xs, (h,), ours), []
    for x in xs:
        reset, candidate, update = np.split(ln(np.concatenate([h, x], -1) @ w.T, gamma, beta, 1e-3), 3, -1)
        update = sigmoid(update - 1)
        h = update * np.tanh(sigmoid(reset) * candidate) + (1 - update) * h
        expected.append(h)
    return actual, expected


def tflite_lstm():
    """Gates apart: input, forget, cell, output; coefficient and bias after each norm; c not normalized."""
    xs, (h, c) = lstm_states()
    ws, us, coefficients, biases = draw(4, H, F), draw(4, H, H), draw(4, H), draw(4, H)
    ours = {
        "weight_ih": ws.reshape(4 * H, F),
        "weight_hh": us.reshape(4 * H, H),
        "gain": coefficients.ravel(),
        "bias": biases.ravel(),
    }
    actual, expected = run("lstm", "tflite", xs, (h, c), ours), []
    for x in xs:
        sums = [x @ w.T + h @ u.T for w, u in zip(ws, us, strict=True)]
        i, f, g, o = [ln(s, k, b, 1e-8) for s, k, b in zip(sums, coefficients, biases, strict=True)]
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        expected.append(h)
    return actual, expected


SOURCES = {
    name: function
    for name, function in list(globals().items())
    if callable(function) and name.rsplit("_", 1)[-1] in ("lstm", "gru", "rnn")
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_preset_gives_its_sources_numbers(source):
    actual, expected = SOURCES[source]()
    # float64, 6 steps, sums of at most 9 products; eps 1e-12 of TF1 amplifies by at most 1/std.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-11)


def test_every_preset_is_tested_against_its_source():
    named = {(name, cell) for name, cells in PRESETS.items() for cell in cells}
    beside = {("none", "lstm"), ("none", "gru"), ("none", "rnn")}  # test_recurrent.py
    beside |= {("rms", "lstm"), ("rms", "gru"), ("rms", "rnn")}  # below
    tested = {(name.rsplit("_", 1)[0], name.rsplit("_", 1)[1]) for name in SOURCES}
    assert named - beside == tested


def test_rms_is_layer_norm_without_the_mean():
    # Centred rows have mean 0, so both normalizers agree on them.
    weights = {
        name: torch.randn(s).double()
        for name, s in parameter_shapes("rnn", resolve("paper", "rnn"), F, H).items()
    }
    for name in ("weight_ih", "weight_hh"):
        weights[name] -= weights[name].mean(0)
    x, h = torch.randn(T, N, F).double(), torch.randn(N, H).double()
    layer, _ = LF.rnn(x, h, weights, variant="paper")
    rms, _ = LF.rnn(x, h, weights, variant="rms")
    torch.testing.assert_close(layer, rms, rtol=0, atol=1e-12)
    weights["weight_ih"] += 1
    assert not torch.allclose(LF.rnn(x, h, weights)[0], LF.rnn(x, h, weights, variant="rms")[0])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"kind": "batch"}, ValueError, "kind must be one of 'layer', 'rms', 'none'; got 'batch'"),
        ({"inputs": "both"}, ValueError, "inputs must be one of"),
        ({"scope": None}, ValueError, "scope must be one of .* got None"),
        ({"cell": "input"}, ValueError, "cell must be one of"),
        ({"projection_bias": 1}, TypeError, "projection_bias must be a bool, got int"),
        ({"eps": -1e-5}, ValueError, "eps must be finite and not negative, got -1e-05"),
        ({"eps": float("nan")}, ValueError, "eps must be finite"),
        ({"eps": "1e-5"}, TypeError, "eps must be a float, got str"),
    ],
)
def test_a_field_of_an_unknown_value_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        Variant(**fields)


def test_a_variant_is_frozen_hashable_and_without_norm_has_one_form():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Variant().eps = 1.0
    assert {Variant(): 1}[Variant()] == 1
    assert Variant(kind="none") == Variant(kind="none", cell="carried", eps=3.0) == resolve("none", "gru")


@pytest.mark.parametrize(
    ("variant", "cell", "error", "message"),
    [
        ("papr", "lstm", ValueError, "unknown variant 'papr'; expected one of paper, rms, none, haste"),
        ("tf1", "gru", ValueError, "'tf1' has no GRU; its cells: LSTM. Variants with a GRU: paper, rms"),
        (3, "rnn", TypeError, "a preset's name or a layernorm.Variant, got int"),
    ],
)
def test_an_unknown_variant_is_refused(variant, cell, error, message):
    with pytest.raises(error, match=message):
        resolve(variant, cell)
    with pytest.raises(error, match=message):
        getattr(layernorm, f"LayerNorm{cell.upper()}")(3, 4, variant=variant)


def test_an_unknown_cell_is_refused():
    for call in (
        lambda: resolve("paper", "cnn"),
        lambda: parameter_shapes("cnn", resolve("paper", "lstm"), 3, 5),
    ):
        with pytest.raises(ValueError, match="cell must be one of 'lstm', 'gru', 'rnn'; got 'cnn'"):
            call()
