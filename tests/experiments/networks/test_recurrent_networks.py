"""The recurrent networks of the experiments with each of their norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layernorm.experiments.networks import recurrent
from layernorm.experiments.task import ExperimentError


@pytest.mark.parametrize("norm", [*recurrent.LSTM_NORMS, "fastrnns"])
def test_an_lstm_with_each_norm_trains_every_parameter(norm):
    network = recurrent.lstm(norm, 3, 4, num_layers=2, bidirectional=True, batch_first=True, max_length=5)
    output, (h, c) = network(torch.randn(4, 5, 3))
    assert output.shape == (4, 5, 8)
    assert h.shape == c.shape == (4, 4, 4)
    (output.square().sum() + c.sum()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("norm", recurrent.GRU_NORMS)
def test_a_gru_with_each_norm_trains_every_parameter(norm):
    network = recurrent.gru(norm, 3, 4)
    output, h = network(torch.randn(5, 4, 3))
    assert (output.shape, h.shape) == ((5, 4, 4), (1, 4, 4))
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(("make", "peer"), [(recurrent.lstm, nn.LSTM), (recurrent.gru, nn.GRU)])
def test_weight_norm_starts_as_the_network_without_and_follows_its_parameters(make, peer):
    torch.manual_seed(0)
    network = make("weight", 3, 4)
    torch.manual_seed(0)
    plain = peer(3, 4)
    x = torch.randn(5, 2, 3)
    # A row over its norm times its norm: two roundings more, carried through five steps.
    torch.testing.assert_close(network(x)[0], plain(x)[0], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        network.parametrizations.weight_hh_l0.original0.zero_()
        plain.weight_hh_l0.zero_()
    torch.testing.assert_close(network(x)[0], plain(x)[0], rtol=1e-5, atol=1e-6)


def test_an_unknown_norm_is_refused():
    with pytest.raises(
        ExperimentError, match="unknown norm 'batch' of the GRU; expected one of none, layer,"
    ):
        recurrent.gru("batch", 3, 4)
    with pytest.raises(
        ExperimentError, match="unknown norm 'group' of the LSTM; expected one of none, batch"
    ):
        recurrent.lstm("group", 3, 4)
