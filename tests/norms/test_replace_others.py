"""``replace_norms`` on the norms that model libraries write themselves, which are tried on rows."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import layernorm
from layernorm import replace_norms

H = 8


class OneGain(nn.Module):
    """What all have: a gain and an eps."""

    def __init__(self, size=H, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(size) + 0.5), eps

    def mean_square(self, x):
        return x.float().square().mean(-1, keepdim=True)


class LlamaRMSNorm(OneGain):
    """Float32, cast, scale."""

    def forward(self, x):
        return self.weight * (x.float() * torch.rsqrt(self.mean_square(x) + self.variance_epsilon)).to(
            x.dtype
        )


class GemmaRMSNorm(nn.Module):
    """The gain is 1 + weight."""

    def __init__(self, size=H):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(size) / 4), 1e-6

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class T5LayerNorm(LlamaRMSNorm):
    """A root mean square under another name."""


class RMSNorm(nn.Module):
    """torchtune's, with a scale."""

    def __init__(self):
        super().__init__()
        self.scale, self.eps, self.normalized_shape = nn.Parameter(torch.rand(H)), 1e-6, [H]

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.scale


class CohereLayerNorm(OneGain):
    """A layer norm without a bias."""

    def forward(self, x):
        y = x.float() - x.float().mean(-1, keepdim=True)
        return (self.weight.float() * y * torch.rsqrt(self.mean_square(y) + self.variance_epsilon)).to(
            x.dtype
        )


FORMS = {
    LlamaRMSNorm: "RMSNorm",
    GemmaRMSNorm: "RMSNorm",
    T5LayerNorm: "RMSNorm",
    RMSNorm: "RMSNorm",
    CohereLayerNorm: "LayerNorm",
}


@pytest.mark.parametrize("cls", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_norm_of_another_library_is_replaced(cls, dtype):
    norm = cls().to(dtype)
    model = nn.Sequential(nn.Linear(H, H), norm)
    x = torch.randn(3, 5, H).to(dtype).requires_grad_()
    expected = norm(x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    weight = next(norm.parameters())
    report = replace_norms(model)
    assert report.replaced == {"1": FORMS[cls]}
    assert report.left == {}
    assert model[1] is norm
    assert isinstance(norm, cls)
    assert type(norm).__name__ == cls.__name__
    assert next(norm.parameters()) is weight
    output = norm(x)
    assert output.dtype == dtype
    # Theirs round to half precision before the gain, ours once; and theirs compute float64 in float32.
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    (grad,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=2 * tolerance)
    assert replace_norms(model) == ({}, {})
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(again) is type(norm)
        assert torch.equal(again(x), output)
    with torch.no_grad():
        weight.add_(1)
    assert not torch.equal(norm(x), output)


def test_where_dtypes_meet_their_own_forward_serves():
    norm, x = LlamaRMSNorm(), torch.randn(4, H, dtype=torch.bfloat16)
    expected = norm(x)
    replace_norms(norm)
    assert norm(x).dtype == expected.dtype == torch.float32
    assert torch.equal(norm(x), expected)


def test_further_arguments_go_to_their_own_forward():
    class RMSNorm(LlamaRMSNorm):
        def forward(self, x, residual=None):
            return super().forward(x) if residual is None else (super().forward(x + residual), x + residual)

    norm, x = RMSNorm(), torch.randn(4, H)
    expected = norm(x, x)
    assert replace_norms(norm).replaced == {"": "RMSNorm"}
    assert all(torch.equal(a, b) for a, b in zip(norm(x, residual=x), expected, strict=True))


class UnbiasedRmsNorm(OneGain):
    """Older timm's: the variance, with n - 1, of rows that are not centred."""

    def forward(self, x):
        return x * torch.rsqrt(x.var(-1, keepdim=True) + self.variance_epsilon) * self.weight


class OutsideRMSNorm(OneGain):
    """The eps beside the root."""

    def forward(self, x):
        return x / (self.mean_square(x).sqrt() + self.variance_epsilon) * self.weight


class FirstRMSNorm(OneGain):
    """The channels are the second dimension."""

    def forward(self, x):
        y = x.movedim(1, -1)
        return (y * torch.rsqrt(self.mean_square(y) + self.variance_epsilon) * self.weight).movedim(-1, 1)


class PairRMSNorm(LlamaRMSNorm):
    """Returns something else."""

    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("cls", [UnbiasedRmsNorm, OutsideRMSNorm, FirstRMSNorm, PairRMSNorm])
def test_another_formula_is_left_and_said(cls):
    report = replace_norms(nn.Sequential(cls()))
    assert report.replaced == {}
    assert report.left["0"].startswith(
        f"{cls.__name__} of {__name__} is no torch.nn norm, and computes something"
    )


def test_what_cannot_be_tried_is_left_and_said():
    class OlmoLayerNorm(nn.Module):  # which has no weight and no eps
        pass

    class TwoRMSNorm(OneGain):
        def __init__(self):
            super().__init__()
            self.other = nn.Parameter(torch.ones(H))

    class AdaLayerNorm(nn.Module):  # which is made of others
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(H), nn.Linear(H, H)

    patched = LlamaRMSNorm()
    patched.forward = lambda x: x
    given = [
        OlmoLayerNorm(),
        TwoRMSNorm(),
        AdaLayerNorm(),
        patched,
        LlamaRMSNorm().to("meta"),
        nn.BatchNorm1d(H),
    ]
    report = replace_norms(nn.Sequential(*given))
    assert report.replaced == {"2.norm": "LayerNorm"}
    assert set(report.left) == {"0", "1", "3", "4"}
    assert "has no eps" in report.left["0"]
    assert "other parameters than a gain" in report.left["1"]
    assert "meta device" in report.left["4"]


def test_in_a_compiled_program():
    model = nn.Sequential(LlamaRMSNorm(), GemmaRMSNorm())
    x = torch.randn(3, H)
    expected = model(x)
    replace_norms(model)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    assert isinstance(model[0], LlamaRMSNorm)
    assert not isinstance(model[0], layernorm.RMSNorm)
