"""Norms without gains: the same as with gains of 1, wherever they are computed."""

from __future__ import annotations

import pytest
import torch

from layernorm import functional as LF
from layernorm import interop
from tests.recurrent.cases import CELLS, FUNCTIONS, SEQUENCES, F, H, flat, weights_of

T, N = 5, 3
NORMALIZED = [(cell, variant) for cell, variant in FUNCTIONS if variant.kind != "none"]
every_function = pytest.mark.parametrize(("cell", "variant"), NORMALIZED)


def pair(kinds, cell, variant, dtype=torch.float64, **options):
    """Return a module without gains and one whose gains are 1, with the same other parameters."""
    without = kinds[cell](F, H, variant=variant, gain=False, dtype=dtype, **options)
    given = kinds[cell](F, H, variant=variant, dtype=dtype, **options)
    assert not any("gain" in name for name, _ in without.named_parameters())
    with torch.no_grad():
        for name, parameter in without.named_parameters():
            parameter.normal_()
            given.get_parameter(name).copy_(parameter)
    return without, given


@every_function
def test_they_are_gains_of_one(cell, variant):
    without, given = pair(SEQUENCES, cell, variant, num_layers=2, bidirectional=True)
    x = torch.randn(T, N, F, dtype=torch.float64)
    for module_x in (x, x[:, :0]):
        found, expected = flat(without(module_x)), flat(given(module_x))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    wanted = dict(without.named_parameters())
    grads = torch.autograd.grad(without(x)[0].square().sum(), list(wanted.values()))
    others = torch.autograd.grad(given(x)[0].square().sum(), [given.get_parameter(name) for name in wanted])
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert "gain=False" in repr(without)
    assert "gain=False" not in repr(given)


@every_function
def test_cells_and_streams(cell, variant):
    without, given = pair(CELLS, cell, variant, torch.float32)
    x = torch.randn(N, F)
    assert all(torch.equal(a, b) for a, b in zip(flat(without(x)), flat(given(x)), strict=True))
    without, given = pair(SEQUENCES, cell, variant, torch.float32)
    xs = torch.randn(T, N, F)
    stream = without.stream(N)
    torch.testing.assert_close(torch.stack([stream.step(x) for x in xs]), given(xs)[0], rtol=1e-6, atol=1e-6)


@every_function
def test_derivatives_of_second_order(cell, variant):
    without, _ = pair(SEQUENCES, cell, variant)
    x = torch.randn(2, 1, F, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: without(x)[0], x, atol=1e-4)


def test_the_functions_take_all_gains_or_none():
    weights = {name: w for name, w in weights_of("lstm", needs_grad=False).items() if "gain" not in name}
    x, state = torch.randn(T, N, F).double(), (torch.zeros(N, H).double(),) * 2
    ones = {"gain_ih": torch.ones(4 * H), "gain_hh": torch.ones(4 * H), "gain_cell": torch.ones(H)}
    given = weights | {name: one.double() for name, one in ones.items()}
    assert torch.equal(LF.lstm(x, state, weights)[0], LF.lstm(x, state, given)[0])
    with pytest.raises(ValueError, match="missing: gain_ih, gain_cell"):
        LF.lstm(x, state, weights | {"gain_hh": given["gain_hh"]})
    vectors = {name: w for name, w in weights.items() if not name.startswith("weight")}
    gates = torch.randn(2, N, 4 * H).double()
    found = LF.lstm_gates(*gates, state[1], vectors)
    expected = LF.lstm_gates(*gates, state[1], vectors | {name: given[name] for name in ones})
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_they_are_written_as_ones():
    cell = CELLS["gru"](F, H, variant="sheeprl", gain=False)
    expected = torch.ones(3 * H)
    expected[2 * H :] = -1  # the update gate, last there, takes the candidate
    assert torch.equal(interop.export(cell, "sheeprl")["layer_norm.weight"], expected)


def test_a_gain_that_is_no_flag():
    with pytest.raises(TypeError, match="gain should be of type bool, got: float"):
        SEQUENCES["lstm"](F, H, gain=0.5)
