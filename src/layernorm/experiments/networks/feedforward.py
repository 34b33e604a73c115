"""The paper's kind of feed-forward network, with each norm in the place where the paper has it."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import layernorm
from layernorm.baselines import BatchNorm

#: What a feed-forward network can be normalized with.
NORMS: Final = ("none", "batch", "batch-hidden", "layer", "rms", "weight")


def network(sizes: tuple[int, ...], norm: str) -> nn.Sequential:
    """Return linear layers of these sizes with ReLU between them.

    Layer and RMS norm are on the hidden layers and not on the logits; "batch" is batch norm on all layers
    (paper §6.6, with its unbiased variance), with running mean and variance by momentum for inference, and
    "batch-hidden" on the hidden layers alone; weight norm is on the weights of all layers. Where a norm has
    a bias of its own, its linear layer has none.

    Args:
        sizes: features of the input, of each hidden layer, and of the output.
        norm: one of ``NORMS``.

    Examples:
        >>> from layernorm.experiments.networks.feedforward import network
        >>> network((64, 32, 10), "layer")
        Sequential(
          (0): Linear(in_features=64, out_features=32, bias=False)
          (1): LayerNorm((32,), eps=1e-05, elementwise_affine=True, bias=True)
          (2): ReLU()
          (3): Linear(in_features=32, out_features=10, bias=True)
        )
    """
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(sizes)):
        last = index == len(sizes) - 2
        if norm == "batch" or (norm == "batch-hidden" and not last):
            layers += [nn.Linear(before, after, bias=False), BatchNorm(after, unbiased=True)]
        elif norm == "layer" and not last:
            layers += [nn.Linear(before, after, bias=False), layernorm.LayerNorm(after)]
        elif norm == "rms" and not last:
            layers += [nn.Linear(before, after), layernorm.RMSNorm(after)]
        elif norm == "weight":
            layers.append(weight_norm(nn.Linear(before, after)))
        else:
            layers.append(nn.Linear(before, after))
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
