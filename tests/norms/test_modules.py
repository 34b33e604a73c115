"""LayerNorm and RMSNorm as torch.nn's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

import layernorm

TWINS = {nn.LayerNorm: layernorm.LayerNorm, nn.RMSNorm: layernorm.RMSNorm}
INFOS = {info.module_cls: info for info in module_db if info.module_cls in TWINS}
BOTH = pytest.mark.parametrize("twin", TWINS, ids=lambda c: c.__name__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@BOTH
def test_agrees_with_torch_on_its_own_samples(twin, dtype):
    info = INFOS[twin]
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    assert samples
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs, ours = twin(*args, **kwargs, dtype=dtype), TWINS[twin](*args, **kwargs, dtype=dtype)
        ours.load_state_dict(theirs.state_dict())
        (x,) = sample.forward_input.args
        expected, actual = theirs(x), ours(x)
        # Rows of up to 100 elements: sums in two orders differ by at most log2(100) + 8 roundings of a
        # normalized value, which is at most √100; gains are 1.
        tol = 1e-12 if dtype == torch.float64 else 15 * 10 * torch.finfo(dtype).eps
        torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)
        if x.numel() == 0:
            continue
        direction = torch.randn_like(expected)
        grads = [torch.autograd.grad(out, [x], direction)[0] for out in (actual, expected)]
        scale = max(1.0, grads[1].abs().max().item())
        torch.testing.assert_close(grads[0], grads[1], rtol=100 * tol, atol=100 * tol * scale)


@BOTH
def test_is_torchs_with_its_constructor_state_and_repr(twin):
    ours = TWINS[twin]
    for args, kwargs in (((5,), {}), (([2, 5],), {"eps": 1e-3}), ((5,), {"elementwise_affine": False})):
        a, b = twin(*args, **kwargs), ours(*args, **kwargs)
        assert isinstance(b, twin)
        assert repr(a) == repr(b)
        assert list(a.state_dict()) == list(b.state_dict())
    assert ours(5, device="meta", dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    module = ours(5)
    assert torch.equal(copy.deepcopy(module)(torch.ones(2, 5)), module(torch.ones(2, 5)))


def test_layer_norm_without_bias():
    module = layernorm.LayerNorm(5, bias=False)
    assert [n for n, _ in module.named_parameters()] == ["weight"]


@BOTH
def test_wrong_shapes_are_refused_in_words(twin):
    with pytest.raises(RuntimeError, match=r"Given normalized_shape=\[5\].*got input of size\[2, 4\]"):
        TWINS[twin](5)(torch.ones(2, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_layer_norm_of_ragged_rows(layout):
    rows = [torch.randn(2, 5), torch.randn(3, 5)]
    output = layernorm.LayerNorm(5)(torch.nested.nested_tensor(rows, layout=layout))
    for actual, row in zip(output.unbind(), rows, strict=True):
        # Sums of 5 in two orders differ by at most 3 + 8 roundings of a value, which is at most √5.
        tol = 11 * 5**0.5 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(actual, nn.LayerNorm(5)(row), rtol=0, atol=tol)
