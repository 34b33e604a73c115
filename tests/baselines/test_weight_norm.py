"""The data-dependent initialization of weight norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from layernorm.baselines import start_weight_norm


def test_weight_norm_starts_with_standardized_features():
    network = nn.Sequential(
        weight_norm(nn.Conv2d(2, 4, 3)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
        weight_norm(nn.Linear(5, 3)),
    )
    directions = [network[i].parametrizations.weight.original1.clone() for i in (0, 4)]
    middle = network[3].weight.clone()
    x = torch.randn(50, 2, 4, 4) * 3 + 1
    start_weight_norm(network, x)
    for output, dims in ((network[0](x), (0, 2, 3)), (network(x), 0)):
        # Of sums of at most 200 numbers about 1.
        torch.testing.assert_close(output.mean(dims), torch.zeros(output.size(1)), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            output.std(dims, correction=0), torch.ones(output.size(1)), rtol=0, atol=1e-5
        )
    assert all(
        torch.equal(network[i].parametrizations.weight.original1, v)
        for i, v in zip((0, 4), directions, strict=True)
    )
    assert torch.equal(network[3].weight, middle)
    assert not network[0]._forward_hooks


def test_the_start_of_weight_norm_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match=r"network must be a torch\.nn\.Module, got function"):
        start_weight_norm(lambda x: x, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must have layers with weight norm, got none"):
        start_weight_norm(nn.Linear(3, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="with a bias, got ParametrizedLinear"):
        start_weight_norm(weight_norm(nn.Linear(3, 4, bias=False)), torch.zeros(2, 3))
    network = weight_norm(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="the same in all cases"):
        start_weight_norm(network, torch.zeros(2, 3))
    assert not network._forward_hooks
