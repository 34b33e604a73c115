"""What may be loaded, in which forms, and what is said where it cannot."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import layernorm
from layernorm import interop


def sheeprl(bias=False):
    generator = torch.Generator().manual_seed(0)
    shapes = {"linear.weight": (15, 9), "layer_norm.weight": (15,), "layer_norm.bias": (15,)}
    if bias:
        shapes["linear.bias"] = (15,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same(a, b):
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_and_directions_of_torch_nn(kind, bidirectional, bias):
    theirs = getattr(torch.nn, kind.upper())(
        3, 5, num_layers=3, bidirectional=bidirectional, bias=bias, batch_first=True
    )
    ours = interop.load(theirs, "torch.nn")
    assert type(ours) is getattr(layernorm, f"LayerNorm{kind.upper()}")
    assert (ours.num_layers, ours.bidirectional, ours.bias) == (3, bidirectional, bias)
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-5, atol=1e-6)
    again = interop.export(ours, "torch.nn")
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in theirs.state_dict().items())
    loaded = interop.load(
        {f"rnn.{name}": value for name, value in again.items()} | {"head": x}, "torch.nn", prefix="rnn."
    )
    assert same(loaded, ours)


def test_a_module_tells_what_weights_do_not():
    theirs = torch.nn.RNN(3, 5, 2, nonlinearity="relu", batch_first=True, dropout=0.25).double().eval()
    ours = interop.load(theirs, "torch.nn")
    assert (ours.nonlinearity, ours.batch_first, ours.dropout, ours.training) == ("relu", True, 0.25, False)
    assert ours.weight_ih_l0.dtype == torch.float64

    class Cell(torch.nn.Module):
        def __init__(self, eps):
            super().__init__()
            self.linear, self.layer_norm = torch.nn.Linear(9, 15), torch.nn.LayerNorm(15, eps=eps)

    cell = interop.load(torch.nn.ModuleDict({"rnn": Cell(1e-5)}), "sheeprl", prefix="rnn.")
    assert cell.variant == layernorm.Variant(inputs="summed", scope="all", projection_bias=True)
    assert interop.load(sheeprl(), "sheeprl").variant.eps == 1e-3
    assert interop.load(sheeprl(), "sheeprl", eps=1e-4).variant.eps == 1e-4


@pytest.mark.parametrize("form", ["numpy", "nested", "tensorflow", "npz", "pt", "safetensors"])
def test_weights_come_in_many_forms(form, tmp_path):
    given = {"dense/kernel": (9, 15), "dense/bias": (15,)}
    given |= {f"layer_normalization/{name}": (15,) for name in ("gamma", "beta")}
    arrays = {
        name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        for name, shape in given.items()
    }
    expected = interop.load({name: torch.from_numpy(a) for name, a in arrays.items()}, "dreamerv2")
    tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
    if form == "numpy":
        weights = arrays
    elif form == "nested":
        weights = {"dense": {name.split("/")[1]: arrays[name] for name in list(arrays)[:2]}}
        weights["layer_normalization"] = {name.split("/")[1]: arrays[name] for name in list(arrays)[2:]}
    elif form == "tensorflow":
        weights = {f"{name}:0": a for name, a in arrays.items()}
    elif form == "npz":
        weights = tmp_path / "weights.npz"
        np.savez(weights, **arrays)
    elif form == "pt":
        weights = str(tmp_path / "weights.pt")
        torch.save(tensors, weights)
    else:
        weights = tmp_path / "weights.safetensors"
        pytest.importorskip("safetensors.torch").save_file(tensors, weights)
    assert same(interop.load(weights, "dreamerv2"), expected)


def test_a_list_is_in_the_order_of_the_description():
    arrays = [np.random.default_rng(0).standard_normal(shape) for shape in ((3, 20), (5, 20), (20,))]
    by_name = dict(zip(("kernel", "recurrent_kernel", "bias"), arrays, strict=True))
    assert same(interop.load(arrays, "keras"), interop.load(by_name, "keras"))
    with pytest.raises(RuntimeError, match="unexpected array 3"):
        interop.load([*arrays, arrays[2]], "keras", cell="lstm")


def test_a_cell_becomes_a_sequence_and_back():
    cell = interop.load(sheeprl(), "sheeprl")
    gru = interop.load(sheeprl(), "sheeprl", sequence=True)
    assert isinstance(cell, layernorm.LayerNormGRUCell)
    assert isinstance(gru, layernorm.LayerNormGRU)
    assert repr(cell) == "LayerNormGRUCell(4, 5, variant='sheeprl')"
    exported = interop.export(gru, "sheeprl", prefix="rnn.")
    for name, value in sheeprl().items():
        torch.testing.assert_close(exported[f"rnn.{name}"], value, rtol=0, atol=2**-23)  # of bias + 1 - 1


def test_constants_are_folded_and_taken_out():
    default, other = interop.load(sheeprl(), "sheeprl"), interop.load(sheeprl(), "sheeprl", update_bias=-2.0)
    z = slice(5, 10)
    torch.testing.assert_close(other.bias[z], default.bias[z] + 1)
    exported = interop.export(other, "sheeprl", update_bias=-2.0)
    torch.testing.assert_close(exported["layer_norm.bias"], sheeprl()["layer_norm.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_norm.bias": None}, "missing layer_norm.bias"),
        ({"norm.bias": torch.zeros(15)}, "unexpected norm.bias"),
        ({"layer_norm.bias": torch.zeros(14)}, r"layer_norm.bias must have the shape \(15,\) .* got \(14,\)"),
        (
            {"linear.weight": torch.zeros(16, 9)},
            r"linear.weight must have the shape \(15, 9\) for 4 inputs and a hidden size of 5, got \(16, 9\)",
        ),
        ({"linear.weight": torch.zeros(())}, "linear.weight must have the shape"),
    ],
)
def test_a_wrong_tensor_is_named(change, message):
    weights = {name: value for name, value in (sheeprl() | change).items() if value is not None}
    with pytest.raises(RuntimeError, match=r"weights are not those of sheeprl:\n\t.*") as raised:
        interop.load(weights, "sheeprl")
    assert re.search(message, str(raised.value))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: interop.load({}, "sheprl"),
            ValueError,
            "source must be one of torch.nn, haste, .* got 'sheprl'",
        ),
        (lambda: interop.describe("sheprl"), ValueError, "source must be one of"),
        (
            lambda: interop.load(sheeprl(), "sheeprl", cell="lstm"),
            ValueError,
            "sheeprl has no 'lstm'; its cells: gru",
        ),
        (lambda: interop.load({}, "sheeprl"), RuntimeError, "missing linear.weight"),
        (lambda: interop.load([], "keras", cell="lstm"), RuntimeError, "missing kernel"),
        (lambda: interop.load(3, "keras"), TypeError, "weights must be a module, a mapping of arrays"),
        (
            lambda: interop.load({"kernel": "x"}, "keras"),
            TypeError,
            r"weights\['kernel'\] must be an array, got str",
        ),
        (lambda: interop.load("weights.h5", "keras"), ValueError, "a file must be one of .safetensors, .npz"),
        (
            lambda: interop.load(sheeprl(), "sheeprl", forget_bias=1.0),
            TypeError,
            "sheeprl has update_bias, and not forget_bias",
        ),
        (
            lambda: interop.load(torch.nn.LSTM(3, 5, 2), "torch.nn", sequence=False),
            ValueError,
            "sequence must be True for weights of 2 layers",
        ),
        (
            lambda: interop.export(torch.nn.LSTM(3, 5), "keras"),
            TypeError,
            "module must be one of layernorm's recurrent modules, got LSTM",
        ),
        (
            lambda: interop.export(layernorm.LayerNormGRU(3, 5), "sheeprl"),
            ValueError,
            "the functions differ",
        ),
        (
            lambda: interop.export(layernorm.LayerNormGRU(3, 5, variant="none", num_layers=2), "keras"),
            ValueError,
            "one layer and direction to a module; this one has 2 layers and 1 directions",
        ),
        (lambda: interop.export(layernorm.LayerNormRNN(3, 5), "sheeprl"), ValueError, "sheeprl has no 'rnn'"),
    ],
)
def test_what_cannot_be_loaded_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_a_source_has_no_place_for_is_said():
    module = layernorm.LayerNormGRU(
        3, 5, variant=layernorm.Variant(inputs="summed", scope="all", projection_bias=True)
    )
    with torch.no_grad():
        module.bias_hh_l0.fill_(0.5)  # is added to bias_ih
        module.bias_ih_l0.fill_(0.25)
    assert torch.equal(interop.export(module, "sheeprl")["linear.bias"], torch.full((15,), 0.75))
    haste = layernorm.LayerNormGRU(3, 5, variant="haste")
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        haste.bias_l0.normal_()
    torch.testing.assert_close(
        interop.load(interop.export(haste, "haste"), "haste")(x)[0], haste(x)[0], rtol=1e-5, atol=1e-6
    )
    kiros = layernorm.LayerNormLSTM(3, 5, variant="kiros")
    with torch.no_grad():
        kiros.bias_hh_l0[3] = 1.0
    with pytest.raises(ValueError, match="kiros has no place for bias_hh of the module, which is not 0"):
        interop.export(kiros, "kiros")


def test_eps_that_differ_are_refused():
    module = torch.nn.Module()
    module.linear, module.layer_norm, module.other = (
        torch.nn.Linear(9, 15),
        torch.nn.LayerNorm(15, eps=1e-3),
        None,
    )
    module.layer_norm.extra = torch.nn.LayerNorm(15, eps=1e-5, elementwise_affine=False)
    with pytest.raises(ValueError, match=r"norms have different eps, 1e-05, 0\.001"):
        interop.load(module, "sheeprl")
