"""The compiled norms as operators: derivatives of any order, schemas, refusals, and what a node keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from layernorm import backends, reference
from layernorm import functional as LF

pytestmark = pytest.mark.usefixtures("native")

EPS32 = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_native_derivatives_of_both_orders(wanted, affine):
    tensors = [torch.randn(4, 33), torch.randn(33), torch.randn(33)]
    if not affine:
        tensors, wanted = tensors[:1], (1,)
    direction, second = torch.randn(4, 33), torch.randn(4, 33)

    def gradients(function, dtype):
        args = [t.to(dtype).detach().requires_grad_(bool(w)) for t, w in zip(tensors, wanted, strict=True)]
        leaves = [a for a in args if a.requires_grad]
        output = function(args[0], (33,), *args[1:])
        first = torch.autograd.grad(output, leaves, direction.to(dtype), create_graph=True)
        plain = torch.autograd.grad(function(args[0], (33,), *args[1:]), leaves, direction.to(dtype))
        found = [*first, *plain]
        if first[0].requires_grad and wanted[0]:
            found += torch.autograd.grad(first[0], leaves[:1], second.to(dtype))
        return found

    assert backends.choose("layer_norm", torch.device("cpu"), torch.float32).kernel == "native"
    actual = gradients(LF.layer_norm, torch.float32)
    expected = gradients(reference.layer_norm, torch.float64)
    for a, e in zip(actual, expected, strict=True):
        # Sums over 33 features and 4 rows of values of order 1 to 10.
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=33 * 4 * 10 * EPS32)


@pytest.mark.parametrize("affine", ["both", "gain", "bias", "neither"])
def test_native_derivatives_of_the_third_order(affine):
    # PyTorch's own operator goes wrong here: the third order (pytorch#175754), and the second with a bias
    # and no gain (pytorch#79705).
    x, weight, bias = torch.randn(2, 5), torch.randn(5), torch.randn(5)
    weights = (weight if affine in ("both", "gain") else None, bias if affine in ("both", "bias") else None)
    directions = torch.randn(3, 2, 5)

    def third(function, dtype):
        tensors = [None if t is None else t.to(dtype).requires_grad_() for t in (x.clone(), *weights)]
        leaves = [t for t in tensors if t is not None]
        value, found = function(tensors[0], (5,), *tensors[1:], eps=0.1), []
        for direction in directions.to(dtype):
            total = (value * direction).sum() + sum((leaf**2).sum() for leaf in leaves[1:])
            grads = torch.autograd.grad(total, leaves, create_graph=True)
            found += grads
            value = grads[0]
        return found

    found, expected = third(LF.layer_norm, torch.float32), third(reference.layer_norm, torch.float64)
    for a, e in zip(found, expected, strict=True):
        # Each order multiplies by up to 1/std, here under 1/√0.1 = 3.2, and adds roundings of about 30 terms.
        scale = max(1.0, e.abs().max().item())
        assert (a - e).abs().max() <= 3 * 30 * 3.2**3 * EPS32 * scale


def operator_calls(dtype, *, grad=False):
    """Yield every public operator with arguments of several kinds."""

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float32).to(dtype).requires_grad_(grad)

    for shape, tail in (((3, 2, 8), [8]), ((3, 2, 8), [2, 8]), ((0, 4), [4]), ((5,), [5])):
        x, residual, weight, bias = tensor(*shape), tensor(*shape), tensor(*tail), tensor(*tail)
        for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
            yield "layer_norm", (x, tail, w, b, 1e-5)
            yield "add_layer_norm", (x, residual, tail, w, b, 0.1)
        for w in (weight, None):
            yield "rms_norm", (x, tail, w, 1e-5)
            yield "add_rms_norm", (x, residual, tail, w, 0.1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators_pass_opcheck(dtype, grad):
    for name, args in operator_calls(dtype, grad=grad):
        torch.library.opcheck(getattr(torch.ops.layernorm, name).default, args)


@pytest.mark.parametrize(
    ("kernels", "double", "dtype", "dtypes", "residual"),
    [
        ("native", "Double", torch.int64, "the compiled kernels are for float32", "of the input's shape"),
        ("interpreted", "torch.float64", torch.float64, "the Triton kernels are for float32", "of shape"),
    ],
)
def test_operators_raise_in_place_of_crashing(kernels, double, dtype, dtypes, residual, request):
    request.getfixturevalue(kernels)
    ops = torch.ops.layernorm
    x, ones = torch.randn(2, 3), torch.ones(3)
    stats = torch.zeros(2, 2)
    wanted = [True] * 3
    for name, args, message in (
        ("layer_norm", (x, [4], None, None, 1e-5), "normalized_shape"),
        ("layer_norm", (x, [], None, None, 1e-5), "normalized_shape"),
        ("layer_norm", (x, [1, 2, 3], None, None, 1e-5), "normalized_shape"),
        ("layer_norm", (x, [3], torch.ones(2), None, 1e-5), "weight must be of shape"),
        ("layer_norm", (x, [3], None, ones.double(), 1e-5), f"bias must be .* {double}"),
        ("layer_norm", (x.to(dtype), [3], None, None, 1e-5), dtypes),
        ("rms_norm", (x, [3], torch.ones(3, 1), 1e-5), "weight must be of shape"),
        ("add_rms_norm", (x, x[:1], [3], None, 1e-5), f"residual must be {residual}"),
        ("add_layer_norm", (x, x.double(), [3], None, None, 1e-5), f"residual must be .* {double}"),
        ("norm_forward", (x, None, [3], ones, ones, 1e-5, False), "RMS norm has no bias"),
        ("norm_backward", (x[:1], None, x, stats, [3], None, None, True, wanted), "grad must be"),
        ("norm_backward", (x, x[:1], x, stats, [3], None, None, True, wanted), "grad_sum must be"),
        ("norm_backward", (x, None, x, stats[:1], [3], None, None, True, wanted), "stats must be"),
        ("norm_backward", (x, None, x, stats[:1], [3], None, None, False, wanted), "no bias"),
    ):
        with pytest.raises(RuntimeError, match=message):
            getattr(ops, name)(*args)


def test_operators_in_a_compiled_graph():
    # The compiled kernels inside torch.compile, on request: forward, backward, and dynamic sizes.
    for dynamic in (False, True):
        for name in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"):

            def function(*tensors, name=name):
                count = 2 if name.startswith("add") else 1
                with backends.use("native"):
                    found = getattr(LF, name)(*tensors[:count], (8,), *tensors[count:])
                return found if isinstance(found, Tensor) else found[0] * found[1]

            torch._dynamo.reset()
            compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
            for rows in (3, 7):
                tensors = [
                    torch.randn(rows, 8, requires_grad=True) for _ in range(1 + name.startswith("add"))
                ]
                tensors.append(torch.randn(8, requires_grad=True))
                expected, actual = function(*tensors), compiled(*tensors)
                assert torch.equal(actual, expected)
                grads = (torch.autograd.grad(y.sum(), tensors) for y in (actual, expected))
                assert all(torch.equal(a, e) for a, e in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_operator_and_type_has_a_compiled_kernel(dtype):
    names = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}
    names |= {f"add_{name}": f"Add{node}" for name, node in names.items()}
    for name, args in operator_calls(dtype, grad=True):
        found = getattr(LF, name)(*args)
        for output in (found,) if isinstance(found, Tensor) else found:
            assert output.grad_fn.name() == names[name] + "Backward"


def test_backward_keeps_the_input_and_two_numbers_for_each_row():
    x, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((64, 100), (100,), (100,)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LF.layer_norm(x.bfloat16(), (100,), weight, bias)
    assert sorted(t.nbytes for t in kept) == sorted([2 * 64 * 4, 400, 400, 64 * 100 * 2])
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LF.add_rms_norm(x, x, (100,))
    assert sorted(t.nbytes for t in kept) == [64 * 4, 64 * 100 * 4]


def test_the_node_behaves_as_torchs_do():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    y = LF.layer_norm(x, (6,), weight)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    y = LF.layer_norm(x * 1, (6,), weight)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    total = LF.add_rms_norm(x, x.detach(), (6,))[1]
    assert torch.equal(torch.autograd.grad(total, x, torch.ones_like(x))[0], torch.ones_like(x))
    assert torch.autograd.grad(LF.add_rms_norm(x, x, (6,))[0].sum(), x)[0].shape == x.shape
    checkpointed = torch.utils.checkpoint.checkpoint(LF.layer_norm, x, (6,), weight, use_reentrant=False)
    (a,) = torch.autograd.grad(checkpointed.sum(), x)
    (b,) = torch.autograd.grad(LF.layer_norm(x, (6,), weight).sum(), x)
    assert torch.equal(a, b)
    with torch.inference_mode():
        assert not LF.layer_norm(x, (6,), weight).requires_grad
    assert not LF.layer_norm(x.detach(), (6,), weight.detach()).requires_grad


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="tells of huge pages on Linux alone")
def test_large_outputs_ask_for_huge_pages():
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.is_file() or "[never]" in switch.read_text():
        pytest.skip("this system has no transparent huge pages")
    y = LF.layer_norm(torch.randn(2**14, 2**10), (2**10,))
    wanted, inside = y.data_ptr() + y.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(address, 16) for address in first.split("-"))
            inside = begin <= wanted < end
        elif inside and line.startswith("VmFlags"):
            assert "hg" in line.split()
            return
    pytest.fail("the output lies in no mapping")
