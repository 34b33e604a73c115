"""The norm operators against their definitions, against PyTorch's own, and against float64."""

from __future__ import annotations

import importlib
import warnings

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db

import layernorm
from layernorm import backends, reference
from layernorm import functional as LF
from tests.norms.exact import exact
from tests.settings import TORCH, needs_torch

EPS32 = torch.finfo(torch.float32).eps
WIDTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 1000, 4097)
OP_INFOS = {
    "layer_norm": next(op for op in op_db if op.name == "nn.functional.layer_norm"),
    "rms_norm": next(op for op in op_db if op.name == "nn.functional.rms_norm"),
    # The operator behind layer_norm, which has the error inputs.
    "native_layer_norm": next(op for op in op_db if op.name == "native_layer_norm"),
}
KERNELS = pytest.mark.parametrize("kernel", ["default", "torch", "reference"])


def run(kernel: str, function, *args, **kwargs):
    if kernel == "default":
        return function(*args, **kwargs)
    with backends.use(kernel):
        return function(*args, **kwargs)


@KERNELS
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_torch_on_its_own_samples(name, dtype, kernel):
    info = OP_INFOS[name]
    count = 0
    for sample in info.sample_inputs("cpu", dtype):
        eps = sample.kwargs.get("eps")
        if eps is not None and eps < 0:
            continue  # below
        expected = getattr(F, name)(sample.input, *sample.args, **sample.kwargs)
        actual = run(kernel, getattr(LF, name), sample.input, *sample.args, **sample.kwargs)
        # Rows of at most 6 elements: each of about 10 roundings is worth one eps of the normalized
        # value (at most √6), of the gain (at most 9) and of the bias.
        tol = 1e-12 if dtype == torch.float64 else 10 * 9 * 6**0.5 * EPS32
        torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)
        count += 1
    assert count >= 5


@KERNELS
def test_negative_eps_is_taken_as_torch_takes_it(kernel):
    x = torch.tensor([[1.0, 3.0, 5.0]])
    expected = F.layer_norm(x, (3,), eps=-0.5)
    actual = run(kernel, LF.layer_norm, x, (3,), eps=-0.5)
    torch.testing.assert_close(actual, expected)
    x = torch.tensor([[0.1, 0.2, 0.3]])  # var + eps is negative
    assert run(kernel, LF.layer_norm, x, (3,), eps=-0.5).isnan().all()
    assert F.layer_norm(x, (3,), eps=-0.5).isnan().all()


@pytest.mark.parametrize(("name", "info"), [("layer_norm", "native_layer_norm"), ("rms_norm", "rms_norm")])
def test_raises_for_torchs_error_inputs(name, info):
    count = 0
    for error in OP_INFOS[info].error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            getattr(LF, name)(sample.input, *sample.args, **sample.kwargs)
        count += 1
    assert count >= 3


@KERNELS
@pytest.mark.parametrize("affine", ["both", "gain", "bias", "neither"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("poisoned")
def test_layer_norm_is_its_definition(width, affine, kernel):
    x = torch.randn(5, width) * 3 + 1
    weight = torch.randn(width) if affine in ("both", "gain") else None
    bias = torch.randn(width) if affine in ("both", "bias") else None
    actual = run(kernel, LF.layer_norm, x, (width,), weight, bias)
    expected = torch.from_numpy(exact(x, weight, bias)[0].astype(np.float64))
    # The mean is off by a few eps of the largest |x|, its effect on y grows by rstd; the product with
    # the gain and the sum with the bias round once each.
    std = (x.double().var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    gain = 1 if weight is None else weight.abs()
    bound = 8 * EPS32 * ((1 + x.abs().amax(-1, keepdim=True) / std) * gain + expected.abs())
    assert ((actual - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@KERNELS
def test_half_precision_keeps_its_statistics_in_float32(name, dtype, kernel):
    x = (torch.randn(7, 300) + 2).to(dtype)
    weight = torch.randn(300).to(dtype)
    if (kernel, name) == ("torch", "rms_norm") and TORCH < (2, 8):
        pytest.skip("the RMS norm of this PyTorch rounds more than once")
    actual = run(kernel, getattr(LF, name), x, (300,), weight, eps=1e-5)
    assert actual.dtype == dtype
    exact = getattr(reference, name)(x.double(), (300,), weight.double(), eps=1e-5)
    # One rounding to the dtype, half an ulp; before it the float32 error bounded above.
    close = {"rtol": 0.5 * torch.finfo(dtype).eps + 16 * EPS32, "atol": 64 * EPS32}
    torch.testing.assert_close(actual.double(), exact, **close)


def test_a_float32_gain_with_a_half_input():
    x, weight = torch.randn(4, 32).bfloat16(), torch.randn(32)
    for function in (LF.layer_norm, LF.rms_norm):
        assert function(x, (32,), weight).dtype == torch.bfloat16


@KERNELS
@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_add_forms_are_the_sum_and_its_norm(name, kernel):
    x, residual, weight = torch.randn(3, 5, 17), torch.randn(3, 5, 17), torch.randn(17)
    output, total = run(kernel, getattr(LF, name), x, residual, (17,), weight)
    assert torch.equal(total, x + residual)
    expected = getattr(F, name.removeprefix("add_"))(x + residual, (17,), weight)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=64 * EPS32)


@KERNELS
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_several_normalized_dimensions(shape, kernel):
    x = torch.randn(5, 2, 3, 4, dtype=torch.float32)
    weight, bias = torch.randn(shape), torch.randn(shape)
    expected = F.layer_norm(x.double(), shape, weight.double(), bias.double())
    actual = run(kernel, LF.layer_norm, x, shape, weight, bias)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=64 * EPS32)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[::2],
        lambda x: x[:, ::3],
        lambda x: x.t().contiguous().t(),
        lambda x: x[:1].expand(6, -1),
        lambda x: x[3:3],
    ],
    ids=["transposed", "every second row", "every third column", "column-major", "expanded", "empty"],
)
@pytest.mark.usefixtures("poisoned")
def test_any_strides(view):
    x = view(torch.randn(12, 12))
    expected = F.layer_norm(x.contiguous(), x.shape[-1:])
    actual = LF.layer_norm(x, x.shape[-1:])
    torch.testing.assert_close(actual, expected, rtol=0, atol=16 * EPS32)
    assert actual.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
def test_empty_inputs(shape):
    x = torch.empty(shape, requires_grad=True)
    output = LF.layer_norm(x, shape[-1:], torch.ones(shape[-1:]))
    assert output.shape == shape
    output.sum().backward()
    assert x.grad.shape == shape


@KERNELS
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_derivatives_of_both_orders_in_float64(name, kernel):
    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    inputs = [tensor(3, 5)] + [tensor(3, 5)] * name.startswith("add") + [tensor(5)]
    if "layer" in name:
        inputs.append(tensor(5))

    def function(*tensors):
        count = 2 if name.startswith("add") else 1
        return run(kernel, getattr(LF, name), *tensors[:count], (5,), *tensors[count:], eps=0.1)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@needs_torch(2, 6, "cannot trace a norm in one graph")
def test_works_under_the_transforms_of_torch():
    x, w = torch.randn(4, 5, 8), torch.randn(8)
    expected = F.layer_norm(x, (8,), w)

    def ours(t):
        return LF.layer_norm(t, (8,), w)

    close = {"rtol": 1e-5, "atol": 64 * EPS32}
    torch.testing.assert_close(torch.func.vmap(ours)(x), expected, **close)
    torch.testing.assert_close(torch.func.jacrev(ours)(x[0, 0]), torch.func.jacfwd(ours)(x[0, 0]), **close)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, **close)
    exported = torch.export.export(layernorm.LayerNorm(8), (x,))
    torch.testing.assert_close(exported.module()(x), F.layer_norm(x, (8,)), **close)
    assert LF.layer_norm(x.to("meta"), (8,)).shape == x.shape


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: LF.layer_norm([1.0], (1,)), TypeError, "input must be a Tensor, got list"),
        (lambda x: LF.layer_norm(x, 3), TypeError, r"normalized_shape must be a sequence .*\(3,\)"),
        (lambda x: LF.layer_norm(x.long(), (3,)), RuntimeError, r"torch\.int64.*input\.float\(\)"),
        (lambda x: LF.layer_norm(x, (3,), 1.0), TypeError, "weight must be a Tensor or None, got float"),
        (lambda x: LF.layer_norm(x, (3,), torch.ones(3).double()), RuntimeError, "float64; convert one"),
        (lambda x: LF.rms_norm(x, (3,), torch.ones(3).half()), RuntimeError, "float16; convert one"),
        (
            lambda x: LF.layer_norm(x, (3,), torch.ones(3, device="meta")),
            RuntimeError,
            "weight on meta",
        ),
        (
            lambda x: LF.add_layer_norm(x, x[:1], (3,)),
            RuntimeError,
            r"shape \[2, 3\], but got \[1, 3\]",
        ),
        (lambda x: LF.add_rms_norm(x, x.double(), (3,)), RuntimeError, "residual .* dtype torch.float32"),
        (lambda x: LF.add_rms_norm(x, None, (3,)), TypeError, "residual must be a Tensor, got NoneType"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3))


@pytest.mark.parametrize("wanted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0)])
def test_only_the_gradients_that_are_wanted(wanted):
    tensors = [torch.randn(5, 9), torch.randn(5, 9), torch.randn(9), torch.randn(9)]
    some = [t.clone().requires_grad_(bool(w)) for t, w in zip(tensors, wanted, strict=True)]
    every = [t.clone().requires_grad_() for t in tensors]
    for leaves in (some, every):
        y, total = LF.add_layer_norm(*leaves[:2], (9,), *leaves[2:])
        (y * total).sum().backward()
    for a, b, w in zip(some, every, wanted, strict=True):
        assert torch.equal(a.grad, b.grad) if w else a.grad is None


def test_dtypes_under_autocast_are_torchs():
    weight, bias = torch.ones(8), torch.zeros(8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 8).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = F.layer_norm(x, (8,), weight, bias)
            assert LF.layer_norm(x, (8,), weight, bias).dtype == expected.dtype == dtype
            mixed = torch.nn.Sequential(torch.nn.Linear(8, 8), layernorm.LayerNorm(8), torch.nn.Linear(8, 8))
            assert mixed(x.float()).dtype == torch.bfloat16


def onnx_node_tests():
    """Yield ONNX's own tests of its two norms: (name, attributes, inputs, expected outputs)."""
    pytest.importorskip("onnx", reason="its node tests are of the package onnx")
    import onnx.backend.test.case.node as node_tests
    from onnx import helper, numpy_helper

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("onnx.backend.test.case.node.layernormalization")
        importlib.import_module("onnx.backend.test.case.node.rmsnormalization")
    for case in node_tests._NodeTestCases:
        node = case.model.graph.node[0]
        if node.op_type not in ("LayerNormalization", "RMSNormalization") or len(case.model.graph.node) > 1:
            continue  # others are the same computations, written out as graphs
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        for inputs, outputs in case.data_sets:
            arrays = [
                torch.from_numpy(numpy_helper.to_array(t) if hasattr(t, "raw_data") else t)
                for t in (*inputs, *outputs)
            ]
            yield node.op_type, attributes, arrays[: len(inputs)], arrays[len(inputs) :]


@KERNELS
def test_agrees_with_onnxs_node_tests(kernel):
    count = 0
    for name, attributes, inputs, outputs in onnx_node_tests():
        x, weight, *bias = inputs
        shape = x.shape[attributes.get("axis", -1) :]
        eps = attributes.get("epsilon", 1e-5)
        function = LF.layer_norm if name == "LayerNormalization" else LF.rms_norm
        actual = run(
            kernel, function, x, shape, weight.reshape(shape), *(b.reshape(shape) for b in bias), eps=eps
        )
        # At most 120 elements, summed in two orders, of values of at most 11 times a gain of about 4.
        torch.testing.assert_close(actual, outputs[0], rtol=1e-5, atol=11 * 4 * 8 * EPS32)
        count += 1
    assert count >= 19 + 19
