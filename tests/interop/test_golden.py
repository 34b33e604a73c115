"""Numbers that the sources' own tests publish."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layernorm import interop


def keras_weights(gates, units, features, bias):
    """Return the constants of Keras's tests: kernel 0.01, recurrent kernel 0.02, and the given bias."""
    kernel, recurrent = np.full((features, gates * units), 0.01), np.full((units, gates * units), 0.02)
    return [a.astype(np.float32) for a in (kernel, recurrent, np.asarray(bias))]


def lstm_bias(units, forget=1.0):
    return np.repeat([0.03, forget, 0.03, 0.03], units)


def batch(*shape):
    return torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize(
    ("cell", "gates", "units", "shape", "bias", "expected"),
    [
        ("lstm", 4, 3, (3, 6, 4), lstm_bias(3), [0.6288687, 0.86899155, 0.9460773]),
        ("lstm", 4, 3, (3, 6, 4), lstm_bias(3, 0.03), [0.57019705, 0.8661914, 0.9459622]),
        ("lstm", 4, 3, (3, 6, 4), None, [0.54986924, 0.86226785, 0.9443936]),
        ("gru", 3, 3, (3, 6, 4), np.full((2, 9), 0.03), [0.5217289, 0.6371659, 0.39384964]),
        ("gru", 3, 3, (3, 6, 4), None, [0.49988455, 0.64701194, 0.4103359]),
        ("rnn", 1, 4, (2, 3, 4), np.full(4, 0.03), [0.405432, 0.73605347]),
    ],
)
def test_keras(cell, gates, units, shape, bias, expected):
    # keras/src/layers/rnn/{lstm,gru,simple_rnn}_test.py, to its tolerance: float32 sums up to some 70 inputs.
    weights = keras_weights(gates, units, shape[2], 0.0 if bias is None else bias)
    module = interop.load(weights[: 2 if bias is None else 3], "keras", cell=cell, batch_first=True)
    with torch.no_grad():
        last = module(batch(*shape))[0][:, -1]
    np.testing.assert_allclose(last, np.repeat(np.array(expected)[:, None], units, 1), rtol=1e-5, atol=1e-6)


def test_keras_from_a_state():
    module = interop.load(keras_weights(4, 2, 3, lstm_bias(2)), "keras", cell="lstm", batch_first=True)
    state = torch.arange(4.0).reshape(1, 2, 2)
    with torch.no_grad():
        last = module(batch(2, 4, 3), (state, state))[0][:, -1]
    expected = [[0.20574439, 0.3558822], [0.64930826, 0.66276]]
    np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-6)


def test_keras_bidirectional():
    # keras/src/layers/rnn/bidirectional_test.py: Bidirectional(LSTM(2)), as get_weights() lists it.
    one = keras_weights(4, 2, 3, lstm_bias(2))
    module = interop.load([*one, *one], "keras", cell="lstm", batch_first=True)
    assert module.bidirectional
    with torch.no_grad():
        _, (h, c) = module(batch(2, 4, 3))
    expected_h = [[0.1990008, 0.52335435], [0.12659755, 0.44717982]]
    expected_c = [[0.35567185, 1.0492687], [0.2501858, 0.941473]]
    for actual, expected in ((h, expected_h), (c, expected_c)):
        np.testing.assert_allclose(
            actual, np.repeat(np.array(expected)[..., None], 2, -1), rtol=1e-5, atol=1e-6
        )


# tensorflow/lingvo, lingvo/core/rnn_cell_test.py: [x, m]·wm of its tests with two units, by rows; gates are
# candidate, input, forget, output. The weights themselves come from a generator of TensorFlow's.
LINGVO_SUMS = [
    [-0.74310219, 1.10182762, 0.67478961, 0.62169313, 0.77394271, -0.1691505, -0.39185536, 0.87572402],
    [-0.78952235, 0.04464795, 0.00245538, -0.34931657, 0.22463873, 0.02745318, 0.15253648, 0.14931624],
    [-1.58246589, 0.03950393, 0.18513964, -0.25745165, 0.73317981, 0.68082684, 0.08576801, 0.62040436],
]
LINGVO_C = [[0.14834785, 0.3804915], [-0.00927538, 0.38059634], [-0.01014781, 0.46336061]]
LINGVO_M = [[0.03960676, 0.26547235], [-0.00677715, 0.09782403], [-0.00272907, 0.31641623]]
LINGVO_LEAN_M = [[-0.20482419, 0.55676991], [-0.55648255, 0.20511301], [-0.20482422, 0.55676997]]


@pytest.mark.parametrize("source", ["lingvo", "lingvo-simple", "lingvo-lean"])
def test_lingvo(source):
    rng = np.random.RandomState(12345)
    x, c, m = (rng.uniform(size=(3, 2)).astype(np.float32).astype(np.float64) for _ in range(3))
    joint = np.concatenate([x, m], 1)
    weights = {"wm": np.linalg.pinv(joint) @ np.array(LINGVO_SUMS)}
    np.testing.assert_allclose(joint @ weights["wm"], LINGVO_SUMS, rtol=1e-10)
    if source == "lingvo":
        weights["b"] = np.zeros(16)
    elif source == "lingvo-simple":
        weights |= {"b": np.zeros(8), "ln_scale": np.ones(8)}
    else:
        names = [
            f"{name}_{gate}" for name in ("ln_scale", "bias") for gate in ("i_i", "i_g", "f_g", "o_g", "c")
        ]
        weights |= {name: np.zeros(2) for name in names}
    cell = interop.load(weights, source)
    with torch.no_grad():
        h, c = cell(torch.from_numpy(x), (torch.from_numpy(m), torch.from_numpy(c)))
    # The sums are printed to 8 places, and two that are near one another are 3e-3 apart: 1e-5 of a norm.
    np.testing.assert_allclose(c, LINGVO_C, rtol=0, atol=2e-5)
    np.testing.assert_allclose(h, LINGVO_LEAN_M if source == "lingvo-lean" else LINGVO_M, rtol=0, atol=2e-5)


def gates_of_ones(names, size=2):
    return {
        f"{name}/{end}": np.full(size, value)
        for name in names
        for end, value in (("gamma", 1.0), ("beta", 0.0))
    }


def test_tensorflow_1():
    # tensorflow/contrib/rnn/python/kernel_tests/rnn_cell_test.py, LayerNormBasicLSTMCellTest.
    weights = {"kernel": np.full((5, 8), 0.5)}
    weights |= gates_of_ones(("input", "transform", "forget", "output", "state"))
    cell = interop.load(weights, "tf1")
    x, h, c = (torch.tensor(a, dtype=torch.float64) for a in ([[1.0, 1, 1]], [[0.2, 0.3]], [[0.0, 0.1]]))
    with torch.no_grad():
        h, c = cell(x, (h, c))
    np.testing.assert_allclose(h, [[-0.38079708, 0.38079708]], rtol=1e-5)
    np.testing.assert_allclose(c, [[-1.0, 1.0]], rtol=1e-5)


def test_tensorflow_addons():
    # tensorflow_addons/rnn/tests/layer_norm_lstm_cell_test.py, test_cell_output, with its eps.
    weights = {"kernel": np.full((3, 8), 0.5), "recurrent_kernel": np.full((2, 8), 0.5)}
    weights |= {"bias": np.array([0.5, 0.5, 1, 1, 0.5, 0.5, 0.5, 0.5])}
    weights |= gates_of_ones(("kernel_norm", "recurrent_norm"), 8) | gates_of_ones(("state_norm",))
    cell = interop.load(weights, "tfa", cell="lstm", eps=1e-12)
    x, h, c = (torch.tensor(a, dtype=torch.float64) for a in ([[1.0, 1, 1]], [[0.2, 0.3]], [[0.0, 0.1]]))
    with torch.no_grad():
        h, c = cell(x, (h, c))
    np.testing.assert_allclose(h, [[-0.47406167, 0.47406143]], rtol=1e-5)
    np.testing.assert_allclose(c, [[-1.0, 1.0]], rtol=1e-5)
