"""State dicts say which function their weights are of; a module of another function refuses them."""

from __future__ import annotations

import io
import json
import warnings

import pytest
import torch

import layernorm
from layernorm import Variant
from tests.recurrent.cases import CELLS, FUNCTIONS, SEQUENCES

KEY = "_extra_state"  # which is what all of PyTorch's files have
every_kind = pytest.mark.parametrize("kinds", [SEQUENCES, CELLS], ids=["sequence", "cell"])


def read_back(state):
    """Save a state dict and load it again, with nothing but tensors allowed in it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_kind
@pytest.mark.parametrize(("cell", "variant"), FUNCTIONS)
def test_a_state_dict_says_its_function(kinds, cell, variant):
    module = kinds[cell](3, 4, variant=variant)
    state = read_back(module.state_dict())
    assert (KEY in state) == (variant.kind != "none")
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    if variant.kind != "none":
        said = json.loads(bytes(state[KEY].tolist()))
        assert (said["kind"], said["scope"], said["eps"]) == (variant.kind, variant.scope, variant.eps)
    other = kinds[cell](3, 4, variant=variant)
    assert not any(other.load_state_dict(state))
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


@every_kind
@pytest.mark.parametrize("strict", [True, False])
def test_another_function_is_refused_by_both_names(kinds, strict):
    network = torch.nn.ModuleDict({"body": kinds["lstm"](3, 4, variant="fastrnns")})
    other = torch.nn.ModuleDict({"body": kinds["lstm"](3, 4)})
    message = r"body\._extra_state says .* of LSTM 'fastrnns' or 'nemo', but this module is LSTM 'paper'"
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(network.state_dict(), strict=strict)
    eps = kinds["lstm"](3, 4, variant=Variant(eps=1e-3))
    with pytest.raises(RuntimeError, match=r"Variant\(.*eps=0.001\), but this module is LSTM 'paper'"):
        kinds["lstm"](3, 4).load_state_dict(eps.state_dict())
    with pytest.raises(RuntimeError, match="RNN_RELU 'paper' or 'tfa', but this module is RNN_TANH"):
        kinds["rnn"](3, 4).load_state_dict(kinds["rnn"](3, 4, nonlinearity="relu").state_dict())


def test_weights_of_a_norm_do_not_load_without_one():
    plain = layernorm.LayerNormLSTM(3, 4, variant="none")
    with pytest.raises(RuntimeError, match="but this module is LSTM 'none'"):
        plain.load_state_dict(layernorm.LayerNormLSTM(3, 4, variant="kiros").state_dict(), strict=False)


def test_a_state_dict_without_it_loads_with_one_warning():
    module, other = layernorm.LayerNormGRU(3, 4, 2), layernorm.LayerNormGRU(3, 4, 2)
    state = dict(module.named_parameters())
    with pytest.warns(UserWarning, match="does not say which function .* loaded as variant 'paper'") as seen:
        other.load_state_dict(state)
    assert len(seen) == 1
    assert torch.equal(other.weight_hh_l1, module.weight_hh_l1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict({"unrelated": torch.ones(1)}, strict=False)
        plain = layernorm.LayerNormGRU(3, 4, variant="none")
        plain.load_state_dict(torch.nn.GRU(3, 4).state_dict())
        torch.nn.GRU(3, 4).load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    "entry",
    [torch.tensor([123], dtype=torch.uint8), torch.ones(2, 2), {"a": 1}, "paper"]
    + [
        torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
        for text in ([], {}, {"cell": "lstm", "new_field": 1}, {"cell": "lstm", "kind": "batch"})
    ],
    ids=str,
)
def test_an_entry_of_no_sense_is_refused(entry):
    lstm = layernorm.LayerNormLSTM(3, 4)
    with pytest.raises(RuntimeError, match="_extra_state must say which function the weights are of, but: "):
        lstm.load_state_dict(lstm.state_dict() | {KEY: entry})


def test_the_variant_of_a_module_cannot_be_changed():
    for module in (layernorm.LayerNormLSTM(3, 4), layernorm.LayerNormLSTMCell(3, 4)):
        with pytest.raises(AttributeError, match="variant"):
            module.variant = "fastrnns"
