"""The norm kernels against float64: compiled, on every instruction set that the machine can execute; in
Triton, interpreted and on a GPU."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from layernorm import functional as LF
from tests.norms.exact import (
    IS_WIDER_THAN_FLOAT64,
    array,
    exact,
    exact_gradients,
    forward_bound,
    statistics_dtype,
)
from tests.settings import CAPABILITIES, instruction_set, thread_count

INTERPRETED = ("interpreted", "looped")
TRITON = (*INTERPRETED, "on_gpu")
DTYPES = (
    torch.float32,
    *((torch.float64,) if IS_WIDER_THAN_FLOAT64 else ()),
    torch.bfloat16,
    torch.float16,
)
# Around the sizes of vectors, pairs of vectors and chunks; more than one chunk; a prime; a large one.
WIDTHS = (1, 2, 3, 15, 16, 17, 31, 33, 127, 128, 1000, 1024, 1025, 4097)
AFFINE = ("both", "gain", "bias", "neither")


@pytest.fixture(params=[*CAPABILITIES, *TRITON])
def capability(request):
    if request.param in TRITON:
        given = request.node.callspec.params
        if given.get("dtype") == torch.float64:
            pytest.skip("the Triton kernels have no float64")
        if request.param in INTERPRETED:
            request.getfixturevalue("native")  # for the CPU PyTorch's norms would serve without them
        if request.param == "looped" and not 512 < given.get("width", 1000) < 2000:
            pytest.skip("this width tells nothing new of loops")
        if request.param == "looped" and given.get("dtype") == torch.float16 and given.get("width") != 1025:
            pytest.skip("the interpreter is slow, and takes this type at one width")
        request.getfixturevalue(request.param)
        yield request.param
        return
    request.getfixturevalue("native")
    with instruction_set(request.param):
        yield request.param


def dtypes(capability):
    return [dtype for dtype in DTYPES if capability not in TRITON or dtype != torch.float64]


def affine_of(dtype):
    """Yield which parameters there are, and whether they are of float32 with a half dtype."""
    for affine, wide in itertools.product(AFFINE, (False, True)):
        if not wide or (dtype in (torch.bfloat16, torch.float16) and affine != "neither"):
            yield affine, wide


def parameters(dtype, width, affine, wide):
    """Return gain and bias of the dtype, or of float32."""
    of = torch.float32 if wide else dtype
    gain = torch.randn(width).to(of) if affine in ("both", "gain") else None
    bias = torch.randn(width).to(of) if affine in ("both", "bias") else None
    return gain, bias


def leaf(t: torch.Tensor) -> torch.Tensor:
    return t.detach().clone().requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 65537])
@pytest.mark.usefixtures("poisoned")
def test_forward(capability, dtype, width):
    torch.manual_seed(width)
    rows = 7 if width < 2000 else 2  # some together and some alone
    x = (torch.randn(rows, width) * 3 + 1).to(dtype)
    for affine, wide in affine_of(dtype):
        gain, bias = parameters(dtype, width, affine, wide)
        y, offset, _ = exact(x, gain, bias)
        actual = LF.layer_norm(x, (width,), gain, bias)
        assert actual.dtype == dtype
        assert (np.abs(array(actual) - y) <= forward_bound(y, gain, offset, dtype)).all()
        if bias is None:
            y, offset, _ = exact(x, gain, eps=1e-5, centred=False)
            actual = LF.rms_norm(x, (width,), gain, eps=1e-5)
            assert (np.abs(array(actual) - y) <= forward_bound(y, gain, offset, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("poisoned")
def test_backward(capability, dtype, width):
    torch.manual_seed(width)
    rows = 71 if width < 200 else 7  # some in a second block
    x = (torch.randn(rows, width) * 2 + 0.5).to(dtype)
    grad = torch.randn(rows, width).to(dtype)
    unit = torch.finfo(statistics_dtype(dtype)).eps
    for (affine, wide), centred in itertools.product(affine_of(dtype), (True, False)):
        gain, bias = parameters(dtype, width, affine, wide)
        if bias is not None and not centred:
            continue
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, gain, bias)]
        if centred:
            output = LF.layer_norm(leaves[0], (width,), *leaves[1:], eps=0.01)
        else:
            output = LF.rms_norm(leaves[0], (width,), leaves[1], eps=0.01)
        output.backward(grad)
        expected, terms = exact_gradients(x, grad, gain, 0.01, centred)
        for leaf, e, size in zip(leaves, expected, terms, strict=True):
            if leaf is None:
                continue
            actual = array(leaf.grad)
            assert leaf.grad.dtype == leaf.dtype
            half = torch.finfo(leaf.dtype).eps / 2 * np.abs(e)
            least = torch.finfo(leaf.dtype).smallest_normal * torch.finfo(leaf.dtype).eps
            # Each term carries about 8 roundings, and a sum of 71 rows, or of parts, at most 71 more,
            # of which the root is typical: 16 in all.
            assert (np.abs(actual - e) <= 16 * unit * size + half + least).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 33, 300])
@pytest.mark.usefixtures("poisoned")
def test_add_forms(capability, dtype, width):
    x, residual, grad, grad_sum = (torch.randn(6, width).to(dtype) for _ in range(4))
    for centred in (True, False):
        gain, bias = parameters(dtype, width, "both" if centred else "gain", False)
        affine = (gain, bias) if centred else (gain,)
        norm = LF.layer_norm if centred else LF.rms_norm
        add_norm = LF.add_layer_norm if centred else LF.add_rms_norm
        leaves = [t.clone().requires_grad_() for t in (x, residual, *affine)]
        output, total = add_norm(leaves[0], leaves[1], (width,), *leaves[2:], eps=0.1)
        torch.autograd.backward([output, total], [grad, grad_sum])
        # The same kernels without the addition: the same bits, but for the gradients' sum, whose parts
        # are rounded once here and twice there.
        twins = [t.clone().requires_grad_() for t in (x + residual, *affine)]
        expected = norm(twins[0], (width,), *twins[1:], eps=0.1)
        expected.backward(grad)
        assert torch.equal(total, x + residual)
        assert torch.equal(output, expected)
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        for leaf, twin in zip(leaves[2:], twins[1:], strict=True):
            assert torch.equal(leaf.grad, twin.grad)
        expected = twins[0].grad.double() + grad_sum.double()
        tol = torch.finfo(dtype).eps * (twins[0].grad.double().abs() + expected.abs())
        assert ((leaves[0].grad.double() - expected).abs() <= tol).all()


def test_halves_are_read_and_written_as_torch_does(capability):
    if capability in INTERPRETED:
        pytest.skip("the interpreter's conversions are tests/conftest.py's")
    # Every bit pattern of both types once as input of the addition, which reads and rounds and no more.
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        for other in (torch.zeros_like(values), values.flip(0), torch.full_like(values, 3e-6)):
            for width in (64, 32, 7):  # pairs of vectors, vectors, parts of one
                a, b = (t[: t.numel() // width * width].view(-1, width) for t in (values, other))
                total = LF.add_layer_norm(a, b, (width,))[1]
                assert torch.equal(total.isnan(), (a + b).isnan())
                assert torch.equal(total.nan_to_num(0), (a + b).nan_to_num(0))


def kinds_of_rows(width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(width)
    normal = torch.randn(64, width, generator=generator)
    return {
        "random": normal,
        "offset": normal * 1e-3 + 1e4,
        "some offset": normal + 30,
        "tiny": normal * 1e-12,
        "subnormal": normal * 1e-40,
        "large": normal * 1e15,
        "huge": normal * 1e25,
        "an outlier": torch.where(torch.arange(width) == width // 2, 1e4, normal),
        "a first outlier": torch.where(torch.arange(width) == 0, 1e6, normal),
        "sorted": normal.sort(-1).values,
    }


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("width", [3, 33, 127, 1000, 4097])
def test_error_is_no_larger_than_torchs(capability, width, eps):
    averages = []
    for name, rows in kinds_of_rows(width).items():
        rows = rows[:4] if capability in INTERPRETED else rows
        x = rows if eps else rows[rows.amax(-1) > rows.amin(-1)]  # 0/0 is NaN
        y, offset, _ = exact(x, eps=eps)
        ours = np.abs(array(LF.layer_norm(x, (width,), eps=eps)) - y)
        torchs = np.abs(array(torch.nn.functional.layer_norm(x, (width,), eps=eps)) - y)
        # Where the normalized value is large, its own rounding is.
        assert (ours <= 4 * 2**-23 * np.maximum(1 + offset, np.abs(y))).all(), name
        if CAPABILITIES[-1] != capability:
            continue  # PyTorch uses what the machine has
        # In units of the last place of 1, or of the value itself where that is larger. The largest of
        # thousands of errors is chance: half a unit, one rounding, is allowed it.
        unit = 2**-23 * np.maximum(1, np.abs(y))
        torchs = np.minimum(np.nan_to_num(torchs / unit, nan=2**24), 2**24)
        assert (ours / unit).max() <= max(1, torchs.max()) + 0.5, name
        averages.append(((ours / unit).mean(), torchs.mean()))
    if averages:
        assert np.median([ours / torchs for ours, torchs in averages if torchs > 0]) <= 1


def test_rows_are_alike_alone_in_any_batch_and_in_any_layout(capability):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    count = 3 if capability in INTERPRETED else 11
    widths = (1, 40, 1040) if capability in INTERPRETED else (1, 7, 40, 64, 700, 1030, 2048, 33000)
    repeats = 3 if capability in INTERPRETED else 60
    for dtype, width in itertools.product(dtypes(capability), widths):
        x = torch.randn(count, width, generator=generator).to(dtype)
        gain, bias = parameters(dtype, width, "both", False)
        grad = torch.randn(count, width).to(dtype)

        def both(a, g, gain=gain, bias=bias):
            a = a.detach().requires_grad_()
            y = LF.layer_norm(a, a.shape[-1:], gain, bias)
            return y.detach(), torch.autograd.grad(y, a, g)[0]

        whole = both(x, grad)
        alone = [both(row.unsqueeze(0), g.unsqueeze(0)) for row, g in zip(x, grad, strict=True)]
        for found, rows in zip(whole, zip(*alone, strict=True), strict=True):
            assert torch.equal(found, torch.cat(rows))
        wider = torch.empty(count, 2 * width + 3, dtype=dtype)
        wider[:, 1 : width + 1], wider[:, width + 1 : 2 * width + 1] = x, grad
        strided = both(wider[:, 1 : width + 1], wider[:, width + 1 : 2 * width + 1])
        many = both(x.repeat(repeats, 1), grad.repeat(repeats, 1))
        for found, again, repeated in zip(whole, strided, many, strict=True):
            assert torch.equal(found, again)
            assert torch.equal(repeated, found.repeat(repeats, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_written_past_the_caches_have_the_same_bits(capability, dtype):
    if capability in INTERPRETED:
        pytest.skip("it has no caches")
    width = 512
    rows = (9 << 20) // (width * dtype.itemsize)
    x = torch.randn(rows, width).to(dtype).requires_grad_()
    y = LF.layer_norm(x, (width,))
    grad = torch.randn(rows, width).to(dtype)
    (found,) = torch.autograd.grad(y, x, grad)
    for begin in range(0, rows, 3000):
        part = x.detach()[begin : begin + 100].requires_grad_()
        small = LF.layer_norm(part, (width,))
        assert torch.equal(small, y[begin : begin + 100])
        assert torch.equal(
            torch.autograd.grad(small, part, grad[begin : begin + 100])[0], found[begin : begin + 100]
        )


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("native")
def test_the_same_bits_for_any_number_of_threads(dtype):
    rows, width = 1003, 257
    x, grad = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    gain, bias = parameters(dtype, width, "both", False)
    results = []
    for count in (1, 2, 3):
        with thread_count(count):
            leaves = [t.clone().requires_grad_() for t in (x, gain, bias)]
            y = LF.layer_norm(leaves[0], (width,), *leaves[1:])
            results.append((y, *torch.autograd.grad(y, leaves, grad)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_a_hundred_thousand_rows(capability):
    x = torch.randn(5_000 if capability in INTERPRETED else 100_000, 8)
    leaf = x.clone().requires_grad_()
    gain = torch.ones(8, requires_grad=True)
    LF.layer_norm(leaf, (8,), gain, eps=0.01).backward(torch.ones_like(x) * x)
    expected, terms = exact_gradients(x, x, gain.detach(), 0.01, True)
    assert (np.abs(array(leaf.grad) - expected[0]) <= 16 * 2**-23 * terms[0]).all()
    # 64 blocks of 1,563 rows, added one after another: each sum of n has at most n roundings, and about
    # their root where they are random.
    assert (np.abs(array(gain.grad) - expected[1]) <= 64 * 2**-23 * terms[1]).all()


def test_rows_with_nan_or_infinity_harm_no_other(capability):
    for dtype, width in itertools.product(dtypes(capability), (3, 65, 700)):
        x, grad = torch.randn(9, width).to(dtype), torch.randn(9, width).to(dtype)
        clean, bad = x.clone().requires_grad_(), x.clone()
        bad[2, 1], bad[5, -1], bad[6, 0] = float("nan"), float("inf"), -float("inf")
        bad.requires_grad_()
        y, expected = LF.layer_norm(bad, (width,)), LF.layer_norm(clean, (width,))
        (g,) = torch.autograd.grad(y, bad, grad)
        (e,) = torch.autograd.grad(expected, clean, grad)
        others = [0, 1, 3, 4, 7, 8]
        assert torch.equal(y[others], expected[others])
        assert torch.equal(g[others], e[others])
        assert y[[2, 5, 6]].isnan().all()
        assert g[[2, 5, 6]].isnan().all()


def test_rows_of_one_element_have_no_gradient_but_the_biass(capability):
    # pytorch#188372
    for dtype in dtypes(capability):
        x, gain, bias = leaf(torch.randn(70, 1).to(dtype) * 100), leaf(torch.ones(1)), leaf(torch.ones(1))
        gain, bias = (leaf(t.to(dtype)) for t in (gain, bias))
        y = LF.layer_norm(x, (1,), gain, bias)
        assert torch.equal(y, torch.ones_like(y))
        y.sum().backward()
        assert not x.grad.any()
        assert not gain.grad.any()
        assert bias.grad.item() == 70


@pytest.mark.parametrize("size", [1e19, 1e25, 3e38, 1e-30, 1e-44])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_squares_float32_cannot_hold(capability, dtype, size):
    # pytorch#162489. Between ordinary rows, whose bits do not change.
    if size < torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps:
        pytest.skip("zero in this dtype")
    width = 300
    ordinary, grad = torch.randn(6, width).to(dtype), torch.randn(6, width).to(dtype)
    x = ordinary.clone()
    x[1] = (torch.rand(width, dtype=torch.float64) * 2 - 1).mul(size).to(dtype)
    x[4] = x[1].flip(0)
    eps = 1e-5 if size > 1 else 0.0
    a, b = leaf(x), leaf(ordinary)
    gain, bias = leaf(torch.randn(width).to(dtype)), leaf(torch.randn(width).to(dtype))
    y = LF.layer_norm(a, (width,), gain, bias, eps=eps)
    expected, offset, _ = exact(x, gain, bias, eps)
    assert (np.abs(array(y) - expected) <= forward_bound(expected, gain, offset, dtype)).all()
    others = [0, 2, 3, 5]
    assert torch.equal(y[others], LF.layer_norm(b, (width,), gain, bias, eps=eps)[others])
    if size > 1:  # else the gradients are too large for the dtype
        (found, found_gain, _) = torch.autograd.grad(y, (a, gain, bias), grad)
        (dx, dgain, _), (terms, gain_terms, _) = exact_gradients(x, grad, gain, eps, True)
        # rstd, kept in float32, may be subnormal: then it has as many units as it has.
        least = 2**-149
        relative = 16 * 2**-23 + np.maximum(0, least * size)
        error = np.abs(array(found) - dx)
        half = torch.finfo(dtype).eps / 2 * np.abs(dx) + torch.finfo(dtype).smallest_normal
        assert (error <= relative * terms + half).all()
        half = torch.finfo(dtype).eps / 2 * np.abs(dgain)
        assert (np.abs(array(found_gain) - dgain) <= relative * gain_terms + half).all()


def test_gradients_of_rows_whose_differences_float32_cannot_hold(capability):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((3, 100), -3e38).to(dtype)
        x[:, ::20] = 3e38  # 5.7e38 from the mean
        x[1] = torch.randn(100).to(dtype)
        grad, a = torch.randn(3, 100).to(dtype), leaf(x)
        (found,) = torch.autograd.grad(LF.layer_norm(a, (100,)), a, grad)
        (dx, _, _), (terms, _, _) = exact_gradients(x, grad, None, 1e-5, True)
        # rstd, near 1e-38 and kept in float32, may be subnormal: then it has as many units as it has.
        relative = 16 * 2**-23 + 2**-149 * 3e38
        least = torch.finfo(dtype).smallest_normal
        bound = relative * terms + torch.finfo(dtype).eps / 2 * np.abs(dx) + least
        assert (np.abs(array(found) - dx) <= bound).all()


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_half_rows_whose_sum_or_square_overflows_half(capability, name):
    # onnxruntime#29034, #17692, keras#22586
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.full((5, 4096), 300.0).to(dtype)
        x[:, ::2] = 60000 if dtype == torch.float16 else 1e18
        y, offset, _ = exact(x, centred=name == "layer_norm")
        actual = array(getattr(LF, name)(x, (4096,), eps=1e-5))
        assert (np.abs(actual - y) <= forward_bound(y, None, offset, dtype)).all()


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_large_offsets_lose_what_the_inputs_rounding_lost_and_no_more(capability, offset):
    # pytorch#51102, #40302, burn#5607. The input as it is, rounded, is normalized to the last bits.
    for width in (7, 256, 5000):
        x = torch.randn(9, width) * 1e-3 + offset
        y, _, _ = exact(x, eps=1e-12)
        error = np.abs(array(LF.layer_norm(x, (width,), eps=1e-12)) - y)
        assert (error <= 4 * 2**-23 * np.maximum(1, np.abs(y))).all()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.usefixtures("native")
def test_any_strides_without_a_copy(dims):
    base = torch.randn(3, 4, 5, 6, 2, 14)
    views = [
        base[::2, 1:, :, ::3],
        base.permute(3, 0, 2, 1, 4, 5),
        base[:, :, :1].expand(-1, -1, 5, -1, -1, -1),
        base[..., 0, 3:11],
        base.transpose(-1, -2),  # the last dimension is not contiguous: a copy
        base.view(3, 4, 5, 1, 6, 1, 2, 14).transpose(0, 4)[:, 1:, ::2],
        base[:0],
    ]
    for view in views:
        shape = view.shape[-dims:]
        gain = torch.randn(shape)
        a, b = view.detach().requires_grad_(), leaf(view.contiguous())
        y, expected = LF.layer_norm(a, shape, gain), LF.layer_norm(b, shape, gain)
        assert y.is_contiguous()
        assert torch.equal(y, expected)
        grad = torch.randn(y.shape[::-1]).permute(*range(y.dim())[::-1])
        (found,) = torch.autograd.grad(y, a, grad, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, b, grad.contiguous())
        assert torch.equal(found, wanted)
        y.sum().backward()  # a gradient without strides
        residual = torch.randn_like(y)
        found, total = LF.add_rms_norm(view, residual, shape, gain)
        assert torch.equal(total, view + residual)
        assert torch.equal(found, LF.rms_norm(total, shape, gain))
