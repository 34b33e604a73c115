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
