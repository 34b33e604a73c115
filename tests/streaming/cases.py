"""Modules with streams, their inputs, and what steps give."""

from __future__ import annotations

import torch

from tests.recurrent import cases

STEPS = 5


def made(cell, sizes=(7, 13), **options):
    """Return a module with random parameters."""
    return cases.made(cell, sizes, **options)


def inputs(module, batch_size=1, steps=STEPS):
    """Return a random input of the module's dtype."""
    return torch.randn(steps, batch_size, module.input_size, dtype=next(module.parameters()).dtype)


def stepped(stream, x):
    """Return the outputs of all steps."""
    return torch.stack([stream.step(x_t) for x_t in x])


def assert_alike(kernel, actual, expected):
    """Check that numbers in float64 are equal to the bit, or to rounding on the reference."""
    # On the reference the products of a step have other shapes and other places in memory than those of the
    # sequence, and so may round otherwise: 5 steps and 2 layers of sums of at most 13 float64 products,
    # amplified as in test_resets.py, whose bound for 7 steps is 1e-11.
    tolerance = 0 if kernel == "native" else 1e-11
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
