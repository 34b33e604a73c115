"""Norms to be replaced by this package's, and whether they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import layernorm

TWINS = {nn.LayerNorm: layernorm.LayerNorm, nn.RMSNorm: layernorm.RMSNorm}


class Extended(nn.LayerNorm):
    """A subclass that adds a method and leaves what the norm computes."""

    def doubled(self, x):
        return 2 * super().forward(x)


class ExtendedRMS(nn.RMSNorm):
    def doubled(self, x):
        return 2 * super().forward(x)


class Halving:
    def forward(self, input):
        return super().forward(input) / 2


class ByMixin(Halving, nn.LayerNorm):
    pass


def is_replaced(module):
    """Return whether a call reaches this package's operator, known by its message for an integer input."""
    with pytest.raises((RuntimeError, TypeError)) as caught:
        module(torch.ones(2, 4, dtype=torch.int64))
    return "_norm: input must be of a floating-point dtype" in str(caught.value)
