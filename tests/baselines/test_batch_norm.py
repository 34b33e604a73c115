"""Batch norm against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layernorm.baselines import BatchNorm
from layernorm.baselines.statistics import BatchStandardized, Steps

# Sums of at most 100 products of numbers about 1, in another order: 100 · 2^-53 ≈ 1e-14, with room.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize(
    ("peer", "shape"), [(nn.BatchNorm1d, (5, 3)), (nn.BatchNorm1d, (5, 3, 4)), (nn.BatchNorm2d, (5, 3, 4, 2))]
)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}]
)
def test_batch_norm_is_pytorchs(peer, shape, options):
    ours, theirs = BatchNorm(3, **options), peer(3, **options)
    for _ in range(2):
        x = torch.randn(shape) * 3 + 2
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        grad = torch.randn(shape)
        found, expected = ours(left), theirs(right)
        assert torch.equal(found, expected)
        assert torch.equal(
            torch.autograd.grad(found, left, grad)[0], torch.autograd.grad(expected, right, grad)[0]
        )
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    fresh = peer(3, **options)
    fresh.load_state_dict(state)
    ours.load_state_dict(fresh.state_dict())
    x = torch.randn(shape)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(fresh.eval()(x), theirs(x))


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_the_unbiased_variance_normalizes_where_it_is_asked_for(shape, affine):
    norm = BatchNorm(3, affine=affine, unbiased=True, eps=0.1).double()
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 2
    channels = x.movedim(1, -1).reshape(-1, 3)
    expected = (channels - channels.mean(0)) / (channels.var(0, correction=1) + 0.1).sqrt()
    if affine:
        expected = expected * norm.weight + norm.bias
    torch.testing.assert_close(norm(x).movedim(1, -1).reshape(-1, 3), expected, **CLOSE)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * channels.var(0, correction=1), **CLOSE)
    assert norm.eps == 0.1


def test_the_running_variance_of_a_small_batch_is_the_unbiased_one():
    norm = BatchNorm(1, momentum=1.0)
    norm(torch.tensor([[0.0], [2.0]]))
    assert norm.running_var.item() == 2.0


def test_batch_norm_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"input must be \(N, 3\) or \(N, 3, \*\), got \[2, 4\]"):
        BatchNorm(3)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        BatchNorm(3)(torch.zeros(1, 3))


def test_standardized_rows_of_steps_of_different_sizes():
    steps = Steps.of([4, 4, 2, 1], None, torch.zeros(1))
    rows = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)

    def standardized(rows: Tensor) -> Tensor:
        return BatchStandardized.apply(rows, mean, var, steps, 1e-3)[0]

    expected = [(p - p.mean(0)) / (p.var(0, correction=0) + 1e-3).sqrt() for p in rows.split([4, 4, 2, 1])]
    expected[3] = (rows[10:] - mean[3]) / (var[3] + 1e-3).sqrt()
    torch.testing.assert_close(standardized(rows), torch.cat(expected), **CLOSE)
    assert torch.autograd.gradcheck(standardized, (rows,))
