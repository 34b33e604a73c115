"""The variants of recurrent cells: their fields, their errors, and RMS norm, which has no source."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import layernorm
from layernorm import Variant
from layernorm import functional as LF
from layernorm.spec import layer_spec
from layernorm.variants import parameter_shapes, resolve
from tests.recurrent.cases import F, H, weights_of

T, N = 6, 3


def test_rms_is_layer_norm_without_the_mean():
    # Centred rows have mean 0, so both normalizers agree on them.
    weights = weights_of("rnn", "paper", F, H, needs_grad=False)
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
        ({"inputs": "both"}, ValueError, "inputs must be one of 'separate', 'summed', 'plain'"),
        ({"inputs": "plain", "cell": "none"}, ValueError, "normalizes nothing; give kind='none' for that"),
        ({"cell_clip": 0}, ValueError, "cell_clip must be positive, or None for no clipping; got 0"),
        ({"cell_clip": -1.0}, ValueError, "cell_clip must be finite and not negative, got -1.0"),
        ({"cell_clip": "1"}, TypeError, "cell_clip must be a float, got str"),
        ({"cell_eps": float("inf")}, ValueError, "cell_eps must be finite and not negative, got inf"),
        ({"scope": None}, ValueError, "scope must be one of .* got None"),
        ({"cell": "input"}, ValueError, "cell must be one of"),
        ({"projection_bias": 1}, TypeError, "projection_bias must be a bool, got int"),
        ({"reset_after": 0}, TypeError, "reset_after must be a bool, got int"),
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


def test_fields_without_a_meaning_have_one_value():
    assert Variant(cell="none", cell_eps=1.0) == Variant(cell="none")
    assert Variant(eps=1e-3, cell_eps=1e-3) == Variant(eps=1e-3)
    plain = Variant(inputs="plain", scope="gate", projection_bias=False, cell_eps=0.5)
    assert plain == Variant(inputs="plain")
    assert plain.projection_bias
    assert not plain.normalizes_gates
    assert Variant(kind="none", inputs="plain", cell_clip=2) == Variant(kind="none", cell_clip=2)
    assert repr(Variant()) == "Variant()"
    assert repr(Variant(inputs="plain", cell_clip=2.0)) == (
        "Variant(inputs='plain', projection_bias=True, cell_clip=2.0)"
    )


def test_a_gru_may_have_a_relu():
    weights = weights_of("gru", "none", F, H, needs_grad=False)
    x, h = torch.randn(T, N, F).double(), torch.randn(N, H).double()
    output, _ = LF.gru(x, h, weights, variant="none", nonlinearity="relu")
    for x_t, actual in zip(x, output, strict=True):
        a = x_t @ weights["weight_ih"].T + weights["bias_ih"]
        b = h @ weights["weight_hh"].T + weights["bias_hh"]
        r, z = torch.sigmoid(a[:, : 2 * H] + b[:, : 2 * H]).chunk(2, -1)
        h = (1 - z) * torch.relu(a[:, 2 * H :] + r * b[:, 2 * H :]) + z * h
        torch.testing.assert_close(actual, h, rtol=0, atol=1e-12)
    gru = layernorm.LayerNormGRU(F, H, variant="none", nonlinearity="relu")
    assert (gru.mode, gru.nonlinearity) == ("GRU", "relu")
    assert repr(gru).endswith("nonlinearity='relu')")
    assert "no GRU with a relu" in layernorm.convert(torch.nn.Sequential(gru), "torch.nn").left["0"]
    cell = layernorm.LayerNormGRUCell(F, H, nonlinearity="relu")
    assert "nonlinearity='relu'" in repr(cell)
    gates, state = torch.randn(2, N, 3 * H), torch.randn(N, H)
    vectors = {name: p.detach() for name, p in cell.named_parameters() if not name.startswith("weight")}
    x_side, h_side = gates
    expected = layernorm.reference.gates_step(
        layer_spec("gru", "paper", "relu"), x_side, h_side, state, vectors
    )
    found = LF.gru_gates(x_side, h_side, state, vectors, nonlinearity="relu")
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-6)


def test_an_lstm_may_have_a_relu():
    weights = weights_of("lstm", "none", F, H, needs_grad=False)
    x, h, c = torch.randn(T, N, F).double(), torch.randn(N, H).double(), torch.randn(N, H).double()
    output, _ = LF.lstm(x, (h, c), weights, variant="none", nonlinearity="relu")
    for x_t, actual in zip(x, output, strict=True):
        a = x_t @ weights["weight_ih"].T + weights["bias_ih"] + h @ weights["weight_hh"].T
        i, f, g, o = (a + weights["bias_hh"]).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.relu(g)
        h = torch.sigmoid(o) * torch.relu(c)
        torch.testing.assert_close(actual, h, rtol=0, atol=1e-12)
    lstm = layernorm.LayerNormLSTM(F, H, variant="none", nonlinearity="relu")
    assert (lstm.mode, lstm.nonlinearity) == ("LSTM", "relu")
    assert "no LSTM with a relu" in layernorm.convert(torch.nn.Sequential(lstm), "torch.nn").left["0"]
    cell = layernorm.LayerNormLSTMCell(F, H, nonlinearity="relu")
    assert "nonlinearity='relu'" in repr(cell)
    (x_side, h_side), state = torch.randn(2, N, 4 * H), torch.randn(N, H)
    vectors = {name: p.detach() for name, p in cell.named_parameters() if not name.startswith("weight")}
    spec = layer_spec("lstm", "paper", "relu")
    expected = layernorm.reference.gates_step(spec, x_side, h_side, state, vectors)
    found = LF.lstm_gates(x_side, h_side, state, vectors, nonlinearity="relu")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_reset_gate_may_come_before_the_product():
    variant = Variant(kind="none", reset_after=False)
    weights = weights_of("gru", variant, F, H, needs_grad=False)
    x, h = torch.randn(T, N, F).double(), torch.randn(N, H).double()
    start = h
    output, _ = LF.gru(x, h, weights, variant=variant)
    for x_t, actual in zip(x, output, strict=True):
        a = x_t @ weights["weight_ih"].T + weights["bias_ih"] + weights["bias_hh"]
        of_h = weights["weight_hh"]
        r, z = torch.sigmoid(a[:, : 2 * H] + h @ of_h[: 2 * H].T).chunk(2, -1)
        h = (1 - z) * torch.tanh(a[:, 2 * H :] + (r * h) @ of_h[2 * H :].T) + z * h
        torch.testing.assert_close(actual, h, rtol=0, atol=1e-12)
    gru = layernorm.LayerNormGRU(F, H, variant=variant, dtype=torch.float64)
    gru.load_state_dict({f"{name}_l0": weight for name, weight in weights.items()}, strict=False)
    stream = gru.stream(N, start.unsqueeze(0))
    assert stream.kernel == "reference"
    torch.testing.assert_close(torch.stack([stream.step(x_t) for x_t in x]), output, rtol=0, atol=1e-12)
    assert "comes before the product" in layernorm.convert(torch.nn.Sequential(gru), "torch.nn").left["0"]
    twin = layernorm.LayerNormGRU(F, H, variant=variant)
    twin.load_state_dict(gru.state_dict())
    with pytest.raises(ValueError, match="comes after the reset gate"):
        LF.gru_gates(a, a, h, {}, variant=variant)


def test_a_reset_before_is_of_a_gru_whose_candidate_has_its_own_norm():
    with pytest.raises(ValueError, match="reset_after is of a GRU, which has a reset gate; this is of LSTM"):
        layer_spec("lstm", Variant(reset_after=False))
    with pytest.raises(ValueError, match="use scope='matrix' or 'gate'"):
        Variant(scope="all", reset_after=False)
    assert "bias_hn" not in parameter_shapes("gru", Variant(reset_after=False), F, H)


@pytest.mark.parametrize("cell", ["gru", "rnn"])
@pytest.mark.parametrize("fields", [{"inputs": "plain"}, {"cell_clip": 1.0}])
def test_what_is_of_an_lstm_is_of_no_other_cell(cell, fields):
    with pytest.raises(ValueError, match=f"are of an LSTM, which has a cell; this is of {cell.upper()}"):
        layer_spec(cell, Variant(**fields))


@pytest.mark.parametrize(
    ("variant", "cell", "error", "message"),
    [
        ("papr", "lstm", ValueError, "unknown variant 'papr'; expected one of paper, rms, none, haste"),
        ("tf1", "gru", ValueError, "'tf1' has no GRU; its cells: LSTM. Variants with a GRU: paper, rms"),
        (3, "rnn", TypeError, "a preset's name or a layernorm.Variant, got int"),
        (None, "rnn", TypeError, "a preset's name or a layernorm.Variant, got NoneType"),
        (["paper"], "gru", TypeError, "a preset's name or a layernorm.Variant, got list"),
    ],
)
def test_an_unknown_variant_is_refused(variant, cell, error, message):
    for call in (
        lambda: resolve(variant, cell),
        lambda: layer_spec(cell, variant),
        lambda: getattr(layernorm, f"LayerNorm{cell.upper()}")(3, 4, variant=variant),
    ):
        with pytest.raises(error, match=message):
            call()


def test_an_unknown_cell_is_refused():
    for call in (
        lambda: resolve("paper", "cnn"),
        lambda: layer_spec("cnn", "paper"),
        lambda: parameter_shapes("cnn", resolve("paper", "lstm"), 3, 5),
    ):
        with pytest.raises(ValueError, match="cell must be one of 'lstm', 'gru', 'rnn'; got 'cnn'"):
            call()
