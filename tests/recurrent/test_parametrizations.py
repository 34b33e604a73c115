"""Coupled gates and block-diagonal matrices, against their formulas written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layernorm import Variant
from layernorm.parametrizations import block_diagonal, couple_gates
from tests.recurrent.cases import CELLS, SEQUENCES, F, H, flat, made, same

T, N = 5, 3
UNSHARED = ["none", "tf1", "icefall", Variant(scope="gate"), Variant(kind="rms", inputs="plain")]


def test_coupled_gates_add_up_to_one():
    lstm = couple_gates(made("lstm", variant="none", dtype=torch.float64))
    x, (h, c) = torch.randn(N, F, dtype=torch.float64), torch.randn(2, N, H, dtype=torch.float64)
    _, (found, cell) = lstm(x.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0)))
    of_x, of_h = lstm.parametrizations.weight_ih_l0.original, lstm.parametrizations.weight_hh_l0.original
    bias = lstm.parametrizations.bias_ih_l0.original + lstm.parametrizations.bias_hh_l0.original
    f, g, o = (x @ of_x.T + h @ of_h.T + bias).chunk(3, -1)
    f = torch.sigmoid(f)
    c = f * c + (1 - f) * torch.tanh(g)
    torch.testing.assert_close(cell[0], c, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0], torch.sigmoid(o) * torch.tanh(c), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", UNSHARED)
def test_coupling_keeps_the_other_gates(variant):
    lstm = made("lstm", variant=variant, num_layers=2)
    before = copy.deepcopy(lstm).layer_weights()
    assert couple_gates(lstm) is lstm
    for weights, whole in zip(lstm.layer_weights(), before, strict=True):
        for name, weight in weights.items():
            rows = slice(H, None) if weight.size(0) == 4 * H else slice(None)
            assert torch.equal(weight[rows], whole[name][rows])


@pytest.mark.parametrize("variant", UNSHARED)
def test_gradients_of_coupled_gates_are_those_of_both(variant):
    torch.manual_seed(3)
    coupled = couple_gates(made("lstm", variant=variant, dtype=torch.float64))
    ordinary = SEQUENCES["lstm"](F, H, variant=variant, dtype=torch.float64)
    with torch.no_grad():
        for theirs, ours in zip(coupled.layer_weights()[0].values(), ordinary.parameters(), strict=True):
            ours.copy_(theirs)
    x, seeds = torch.randn(T, N, F, dtype=torch.float64), torch.randn(T, N, H, dtype=torch.float64)
    outputs = coupled(x)[0], ordinary(x)[0]
    assert torch.equal(*outputs)
    for output in outputs:
        (output * seeds).sum().backward()
    for name, parameter in ordinary.named_parameters():
        if parameter.size(0) != 4 * H:
            continue
        found = coupled.parametrizations[name].original.grad
        sign = 1 if name.startswith("gain") else -1
        expected = parameter.grad[H:].clone()
        expected[:H] += sign * parameter.grad[:H]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", SEQUENCES)
def test_blocks_are_networks_side_by_side(cell):
    whole = block_diagonal(made(cell, (F, 6), variant="none", dtype=torch.float64), 3)
    x = torch.randn(T, N, F, dtype=torch.float64)
    output, _ = whole(x)
    weights = whole.layer_weights()[0]
    for block in range(3):
        one = SEQUENCES[cell](F, 2, variant="none", dtype=torch.float64)
        here = slice(2 * block, 2 * block + 2)
        with torch.no_grad():
            for name, parameter in one.layer_weights()[0].items():
                rows = weights[name].unflatten(0, (-1, 6))[:, here].flatten(0, 1)
                parameter.copy_(rows[:, here] if name == "weight_hh" else rows)
        torch.testing.assert_close(one(x)[0], output[..., here], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "parametrized",
    [
        lambda: couple_gates(made("lstm", variant="icefall", num_layers=2, proj_size=2)),
        lambda: block_diagonal(made("lstm", num_layers=2, proj_size=2), 2),
        lambda: block_diagonal(made("gru", variant="icefall", num_layers=2), 2),
        lambda: block_diagonal(made("rnn", num_layers=2), 4),
    ],
)
def test_a_parametrized_module_trains_streams_copies_and_loads(parametrized):
    module, other, x = parametrized(), parametrized(), torch.randn(T, N, F)
    module(x)[0].square().sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    results = flat(module(x))
    stream = module.stream(N)
    assert torch.equal(torch.stack([stream.step(x_t) for x_t in x]), results[0])
    other.load_state_dict(module.state_dict())
    assert same(flat(other(x)), results)
    assert same(flat(copy.deepcopy(module)(x)), results)


def test_cells_have_them_too():
    for cell in (
        couple_gates(CELLS["lstm"](F, H, variant="none")),
        block_diagonal(CELLS["gru"](F, H), 2),
    ):
        assert flat(cell(torch.randn(N, F)))[0].shape == (N, H)


def test_nothing_passes_between_blocks():
    gru = block_diagonal(made("gru", (F, 6), variant="none"), 3)
    for gate in gru.weight_hh_l0.unflatten(0, (3, 6)):
        assert torch.equal(gate != 0, torch.block_diag(*torch.ones(3, 2, 2)) != 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: couple_gates(nn.LSTM(3, 4)), TypeError, "layernorm.convert makes one of torch.nn's"),
        (lambda: couple_gates(made("gru")), TypeError, "module must be an LSTM, got LayerNormGRU"),
        (lambda: couple_gates(made("lstm")), ValueError, "share statistics.*use a variant with scope='gate'"),
        (
            lambda: couple_gates(couple_gates(made("lstm", variant="tf1"))),
            ValueError,
            "weight_ih_l0 is parametrized already",
        ),
        (lambda: block_diagonal(nn.GRU(3, 4), 2), TypeError, "must be a recurrent module of layernorm"),
        (lambda: block_diagonal(made("gru"), 3), ValueError, "divide hidden_size=4, got 3"),
        (lambda: block_diagonal(made("gru"), 0), ValueError, "blocks must be positive"),
        (lambda: block_diagonal(made("gru"), 2.0), TypeError, "blocks must be an int, got float"),
        (lambda: block_diagonal(made("lstm", proj_size=3), 2), ValueError, "divide proj_size=3, got 2"),
    ],
)
def test_what_does_not_go_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()
