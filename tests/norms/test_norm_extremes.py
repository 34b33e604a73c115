"""The norms on rows whose squares their type cannot hold, around every threshold of the kernels, and on rows
of one element: forward, gradients and second derivatives against float64."""

from __future__ import annotations

import math

import pytest
import torch

import layernorm
from layernorm import functional as LF

pytestmark = pytest.mark.usefixtures("native", "one_thread")

# By kind of range: where the backward of a row leaves the fast path (1/M for its rstd), where forward does
# (M² for variance and sum of squares), and the ends of the type.
SINGLE = [2.0**30, 2.0**-30, 2.0**-50, 2.0**63, 2.0**-149, 2.0**-140, 1e-38, 1e38, 1.7e9, 1e-12]
DOUBLE = [2.0**300, 2.0**-300, 2.0**-480, 2.0**511, 2.0**-1074, 2.0**-1060, 1e-308, 1e307]
MAGNITUDES = {
    torch.float32: SINGLE,
    torch.bfloat16: [*SINGLE[:4], 2.0**-133, *SINGLE[6:]],
    torch.float16: [2.0**-24, 2.0**-14, 1.0, 2.0**14],
    torch.float64: DOUBLE,
}
every_dtype = pytest.mark.parametrize("dtype", list(MAGNITUDES), ids=lambda d: str(d).removeprefix("torch."))
every_norm = pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])


def near_one(x, eps, centred):
    """Return rows near 1, the power of two that they were scaled by, and 1/√(var + eps) of them."""
    most = x.detach().abs().amax(-1, keepdim=True)
    exponent = torch.frexp(torch.where(most > 0, most, 1.0).clamp_min(math.sqrt(eps)))[1].clamp(-1000, 1000)
    scale = torch.ldexp(torch.ones_like(most), -exponent)
    a = x * scale
    if centred:
        a = a - a.mean(-1, keepdim=True)
    return a, scale, 1 / (a.square().mean(-1, keepdim=True) + eps * scale * scale).sqrt()


def exact(x, gain, bias, eps, centred):
    """Return layer norm or RMS norm in float64, whose numbers stay in its range on the way."""
    a, _, rstd = near_one(x, eps, centred)
    n = a * rstd
    return n * gain if bias is None else n * gain + bias


def exact_rstd(x, eps, centred):
    """Return 1/√(var + eps)."""
    _, scale, rstd = near_one(x, eps, centred)
    return scale * rstd


def least_eps(magnitude):
    """Return an eps that matters to such rows; below 1e-77 it counts as 0 in float32's backward."""
    return min(max(magnitude, 1e-30), 1e30) ** 2


def call(name, x, gain, bias, eps):
    """Return the output of a norm of ``x``, which the add forms get as a sum with 0."""
    arguments = [torch.zeros_like(x)] if name.startswith("add") else []
    biases = [] if bias is None else [bias]
    found = getattr(LF, name)(x, *arguments, x.shape[-1:], gain, *biases, eps=eps)
    return found[0] if name.startswith("add") else found


def case(name, dtype, magnitude, factor, width):
    """Return rows of this magnitude among ordinary ones, with gain, bias and gradient."""
    scale = torch.ones(9, 1, dtype=torch.float64)
    scale[[0, 1, 2, 5, 7, 8]] = magnitude * factor
    x = (torch.randn(9, width, dtype=torch.float64) * scale).to(dtype)
    gain, bias, grad = (torch.randn(*shape).to(dtype) for shape in ((width,), (width,), (9, width)))
    return x, gain, None if "rms" in name else bias, grad


@every_dtype
@every_norm
def test_gradients_are_those_of_float64(name, dtype):
    u = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    tried = 0
    for magnitude in MAGNITUDES[dtype]:
        for factor in (0.5, 0.9, 1.1, 2.0):
            for width, eps in (
                (1, max(magnitude, 1e-5)),
                (3, 0.0),
                (17, 1e-5),
                (64, 0.0),
                (150, least_eps(magnitude)),
            ):
                x, gain, bias, grad = case(name, dtype, magnitude, factor, width)
                if not x.isfinite().all() or (eps == 0 and width < 4 and not x.abs().amax(-1).all()):
                    continue
                leaves = [t.requires_grad_() for t in (x, gain, bias) if t is not None]
                output = call(name, x, gain, bias, eps)
                found = torch.autograd.grad(output, leaves, grad)
                wide = [t.detach().double().requires_grad_() for t in leaves]
                centred = bias is not None
                right = exact(wide[0], wide[1], wide[2] if centred else None, eps, centred)
                wanted = torch.autograd.grad(right, wide, grad.double())
                a = wide[0].detach()
                rstd = exact_rstd(a, eps, centred)
                # What n = (a - mean)·rstd consists of: the mean is rounded to the statistics' type.
                n = exact(a, torch.ones_like(wide[1]), None, eps, centred).detach().abs()
                n = n + (a.mean(-1, keepdim=True).abs() * rstd).nan_to_num() * centred
                t = (grad.double() * gain.double()).abs().detach()
                # What cancels in a gradient, times some roundings in each of the sums; then the result's own
                # rounding, where denormal numbers have an absolute one.
                terms = t + t.mean(-1, keepdim=True) + n * (t * n).mean(-1, keepdim=True)
                bounds = [terms * rstd, (grad.double().abs() * (n + 1)).sum(0), grad.double().abs().sum(0)]
                own = torch.finfo(dtype)
                for what, f, w, bound in zip("xgb", found, wanted, bounds, strict=False):
                    w = w.to(dtype).double()  # what overflows there may be infinite
                    close = (
                        f.double() - w
                    ).abs() <= 32 * u * bound + own.eps * w.abs() + own.smallest_normal * own.eps
                    same = (f.double() == w) | (f.isnan() & w.isnan())
                    assert (close | same).all(), (what, magnitude, factor, width, eps)
                tried += 1
    assert tried > 40


@every_dtype
@every_norm
def test_second_derivatives_are_those_of_float64(name, dtype):
    for magnitude in MAGNITUDES[dtype]:
        if not 1e-37 < magnitude * (1.0 if dtype != torch.float64 else 1e270) < 1e300:
            continue  # their derivatives leave the type's range
        for factor, width, eps in ((0.9, 3, 0.0), (1.1, 24, least_eps(magnitude)), (1.1, 70, 1e-5)):
            x, gain, bias, grad = case(name, dtype, magnitude, factor, width)
            x = x[[0, 1, 2]]
            # So large that no derivative leaves the range, nor a sum of them.
            size = max(magnitude, math.sqrt(eps)) / 1024
            grad = (grad[:3].double() * size).to(dtype).requires_grad_()
            along = (torch.randn(3, width, dtype=torch.float64) * size).to(dtype)
            if not all(t.isfinite().all() for t in (x, grad, along)):
                continue
            leaves = [t.requires_grad_() for t in (x, gain, grad)]
            wide = [t.detach().double().requires_grad_() for t in leaves]
            (first,) = torch.autograd.grad(call(name, x, gain, bias, eps), x, grad, create_graph=True)
            found = torch.autograd.grad(first, leaves, along)
            right = exact(wide[0], wide[1], None if bias is None else bias.double(), eps, bias is not None)
            (first,) = torch.autograd.grad(right, wide[0], wide[2], create_graph=True)
            wanted = torch.autograd.grad(first, wide, along.double())
            # Sums of a few products each, all of the size of the result: relative to the greatest.
            tolerance = 200 * max(torch.finfo(dtype).eps, 1e-7 if dtype != torch.float64 else 0)
            for f, w in zip(found, wanted, strict=True):
                if not w.to(dtype).isfinite().all():
                    continue
                least = torch.finfo(dtype).smallest_normal
                assert (f.double() - w).abs().max() <= tolerance * (w.abs().max() + least), (
                    magnitude,
                    width,
                    eps,
                )


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(
    ("dtype", "magnitude", "gradient"),
    [
        (torch.float32, 1e9, 1e-26),
        (torch.float32, 0.9e9, 1e30),
        (torch.float32, 1e-9, 1e-36),
        (torch.float32, 1.0, 1e-36),
        (torch.bfloat16, 1e8, 1e33),
        (torch.float64, 1e90, 1e-145),
        (torch.float64, 1e80, 1e235),
    ],
)
def test_gradients_may_be_of_any_size(name, dtype, magnitude, gradient):
    # Their products with an ordinary row leave the range of float32, which the result does not. Among them
    # rows without gradient and with ordinary numbers.
    rows, width = 70, 40
    x = torch.randn(rows, width, dtype=torch.float64) * magnitude
    grad = torch.randn(rows, width, dtype=torch.float64) * gradient
    grad[3], grad[4:6] = 0, torch.randn(2, width)
    x, grad = x.to(dtype).requires_grad_(), grad.to(dtype)
    gain = torch.randn(width).to(dtype).requires_grad_()
    found = torch.autograd.grad(call(name, x, gain, None, 0.0), (x, gain), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, gain)]
    wanted = torch.autograd.grad(exact(*wide, None, 0.0, name == "layer_norm"), wide, grad.double())
    # Of a row relative to its greatest gradient, of the gain to the sum of its terms; sums of `width` and
    # `rows` terms, rounded as the statistics are, then to the type itself.
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = 4 * torch.finfo(dtype).eps + 16 * torch.finfo(kept).eps
    error, size = (found[0].double() - wanted[0]).abs(), wanted[0].abs()
    assert (error.amax(-1) <= tolerance * size.amax(-1) + torch.finfo(dtype).smallest_normal).all()
    n = exact(wide[0].detach(), torch.ones(width).double(), None, 0.0, name == "layer_norm")
    assert ((found[1].double() - wanted[1]).abs() <= tolerance * (grad.double() * n).abs().sum(0)).all()
    # The rows have the bits that each has by itself.
    for row in (0, 3, 4, 69):
        alone = x.detach()[row : row + 1].requires_grad_()
        output = call(name, alone, gain, None, 0.0)
        assert torch.equal(torch.autograd.grad(output, alone, grad[row : row + 1])[0][0], found[0][row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_constant_rows_have_derivatives_of_any_order(dtype):
    largest = 1e4 if dtype == torch.float16 else 1e22
    x = torch.full((3, 4), largest, dtype=dtype, requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 4.0, -3.0], dtype=dtype).expand(3, 4).clone().requires_grad_()
    for eps in (1.0, 1e-2):
        (first,) = torch.autograd.grad(LF.layer_norm(x, (4,), eps=eps), x, grad, create_graph=True)
        wanted = (grad - grad.mean(-1, keepdim=True)) / math.sqrt(eps)
        assert torch.allclose(first, wanted, rtol=1e-3)
        of_x, of_grad = torch.autograd.grad(first.square().sum(), (x, grad))
        assert not of_x.any()
        assert of_grad.isfinite().all()


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e25])
def test_a_float32_residual_may_be_of_any_size(name, magnitude):
    x = torch.randn(5, 12).bfloat16()
    residual = (torch.randn(5, 12) * magnitude).requires_grad_()
    gain = torch.randn(12).bfloat16()
    output, total = getattr(LF, name)(x, residual, (12,), gain, eps=1e-5)
    wide = (x.double() + residual.detach().double()).requires_grad_()
    wanted = exact(wide, gain.double(), None, 1e-5, name == "add_layer_norm")
    assert output.dtype == torch.bfloat16
    assert total.dtype == torch.float32
    # n is a few units, rounded to bfloat16 once.
    assert (output.double() - wanted).abs().max() <= 2.0**-8 * wanted.abs().max()
    (found,) = torch.autograd.grad(output.sum(), residual)
    (right,) = torch.autograd.grad(wanted.sum(), wide)
    assert (found.double() - right).abs().max() <= 1e-5 * exact_rstd(wide.detach(), 1e-5, True).max() * 12


def test_a_constant_row_is_the_bias():
    for dtype, largest in ((torch.float64, [1e155, 1e200, 1e300]), (torch.float32, [1e25, 3e38])):
        bias = torch.randn(5, dtype=dtype)
        for value in largest:
            x = torch.full((2, 5), value, dtype=dtype)
            for eps in (1e-12, 1e-5, 1.0):
                assert torch.equal(
                    LF.layer_norm(x, (5,), torch.ones(5, dtype=dtype), bias, eps), bias.expand(2, 5)
                )


def test_one_element_has_no_second_derivative_with_any_eps():
    x, gain = torch.tensor([[3.0]], requires_grad=True), torch.ones(1, requires_grad=True)
    grad = torch.ones(1, 1, requires_grad=True)
    for eps in (1e-45, 1e-30, 1e-5):
        firsts = torch.autograd.grad(
            LF.layer_norm(x, (1,), gain, eps=eps), (x, gain), grad, create_graph=True
        )
        second = torch.autograd.grad(firsts, (x, grad), [torch.ones(1, 1), torch.ones(1)])
        assert not any(t.any() for t in (*firsts, *second))


@every_dtype
@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm"])
def test_a_row_of_one_element_has_no_gradient(name, dtype):
    x = torch.randn(300, 1).to(dtype).requires_grad_()
    gain, bias = (torch.randn(1).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(300, 1).to(dtype)
    of_x, of_gain, of_bias = torch.autograd.grad(call(name, x, gain, bias, 1e-5), (x, gain, bias), grad)
    assert not of_x.any()
    assert not of_gain.any()
    total = grad.double().sum()
    assert (of_bias.double() - total).abs() <= torch.finfo(dtype).eps * total.abs() + 300 * 2.0**-24


def test_a_recurrent_layer_of_one_feature_has_no_gradient_through_its_norms():
    for module in (
        layernorm.LayerNormRNN(3, 1),
        layernorm.LayerNormGRU(3, 1),
        layernorm.LayerNormLSTM(3, 1, variant="fastrnns"),
    ):
        x = torch.randn(6, 5, 3, requires_grad=True)
        wide = type(module)(3, 1, variant=module.variant).double()
        wide.load_state_dict(module.state_dict())
        wide(x.double())[0].sum().backward()
        exact_zero = {name for name, p in wide.named_parameters() if not p.grad.any()}
        module(x)[0].sum().backward()
        for name, parameter in module.named_parameters():
            if name in exact_zero:
                assert not parameter.grad.any(), (type(module).__name__, name)
