"""Sigmoid and tanh as the compiled recurrent kernels compute them, over all exponents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layernorm import functional as LF

pytestmark = pytest.mark.usefixtures("native", "one_thread")


def activated(x: torch.Tensor, name: str) -> torch.Tensor:
    """Return sigmoid or tanh of a vector as the kernel computes it, each element a row with one feature."""
    one, zero = torch.ones(1, 1, dtype=x.dtype), torch.zeros(1, 1, dtype=x.dtype)
    rows = x.view(1, -1, 1)
    ones, zeros = torch.ones_like(rows[0]), torch.zeros_like(rows[0])
    if name == "tanh":  # h' = tanh(1·x + 0·h)
        weights = {"weight_ih": one, "weight_hh": zero}
        return LF.rnn(rows, zeros, weights, variant="none")[1].view(-1)
    if name == "forget gate":  # c' = sigmoid(x)·1 + sigmoid(0)·tanh(0)
        weights = {"weight_ih": torch.cat([zero, one, zero, zero]), "weight_hh": zero.expand(4, 1)}
        return LF.lstm(rows, (zeros, ones), weights, variant="none")[1][1].view(-1)
    # h' = (1 - sigmoid(x))·tanh(0) + sigmoid(x)·1
    weights = {"weight_ih": torch.cat([zero, one, zero]), "weight_hh": zero.expand(3, 1)}
    return LF.gru(rows, ones, weights, variant="none")[1].view(-1)


def all_exponents(dtype: torch.dtype) -> torch.Tensor:
    """Return numbers of either sign and every exponent but subnormal ones, most of them near 1."""
    limits = torch.finfo(dtype)
    least, most = (np.frexp(number)[1] - 1 for number in (limits.smallest_normal, limits.max))
    generator = torch.Generator().manual_seed(0)
    parts = []
    for exponent in range(least, most + 1):
        count = 20_000 if -14 <= exponent <= 9 else 200
        parts.append(
            torch.rand(count, generator=generator, dtype=torch.float64).add_(1) * 2.0 ** float(exponent)
        )
    magnitudes = torch.cat(parts).clamp_(max=limits.max).to(dtype)
    return torch.cat([magnitudes, -magnitudes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["tanh", "forget gate", "update gate"])
def test_activations_are_within_three_units_in_the_last_place(name, dtype):
    if dtype == torch.float64 and np.finfo(np.longdouble).nmant <= 60:
        pytest.skip("long double is no wider than float64 on this machine")
    x = all_exponents(dtype)
    wide = x.numpy().astype(np.longdouble)
    with np.errstate(over="ignore"):
        exact = np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))
    y = activated(x, name).numpy()
    # Of a sigmoid below e^-87, or e^-708 in float64, little more is known than that.
    least = 2 * torch.finfo(dtype).smallest_normal
    normal = np.abs(exact) >= (least if name != "tanh" else least / 2)
    unit = np.spacing(np.abs(exact[normal]).astype(y.dtype)).astype(np.longdouble)
    error = np.abs(y[normal] - exact[normal]) / unit
    worst = error.argmax()
    assert error[worst] <= 3, (error[worst], x.numpy()[normal][worst])
    assert (np.abs(y[~normal] - exact[~normal]) <= least).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_of_special_numbers(dtype):
    infinity, nan = float("inf"), float("nan")
    # As biases, for a product with another gate's weight of 0 would make infinity a NaN.
    special = torch.tensor([infinity, -infinity, 0.0, -0.0, 1e30, -1e30, nan, -nan], dtype=dtype)
    size = special.numel()
    least = 2 * torch.finfo(dtype).smallest_normal  # what is below e^-87, or e^-708 in float64, is that
    for cell, gates, gate in (("rnn", 1, 0), ("lstm", 4, 1), ("gru", 3, 1)):
        bias = torch.zeros(gates, size, dtype=dtype)
        bias[gate] = special
        weights = {
            "weight_ih": torch.zeros(gates * size, 1, dtype=dtype),
            "weight_hh": torch.zeros(gates * size, size, dtype=dtype),
            "bias_ih": bias.view(-1),
        }
        ones = torch.ones(1, size, dtype=dtype)
        state = (ones, ones) if cell == "lstm" else ones
        final = getattr(LF, cell)(ones[:, :1].unsqueeze(0), state, weights, variant="none")[1]
        y = (final[1] if cell == "lstm" else final).view(-1)
        expected = [1, -1, 0, 0, 1, -1] if cell == "rnn" else [1, 0, 0.5, 0.5, 1, 0]
        assert (y[:6] - torch.tensor(expected, dtype=dtype)).abs().max() <= least, cell
        assert y[6:].isnan().all()
