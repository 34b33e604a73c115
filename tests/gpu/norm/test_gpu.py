"""The norms on a GPU with graphs, streams, autocast and compiled programs; ``make gpu`` runs these.

``test_norm_kernels.py`` has their numerics there.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from layernorm import backends, reference
from layernorm import functional as LF

pytestmark = pytest.mark.usefixtures("on_gpu")


def call(x, residual, weight, bias):
    output, total = LF.add_layer_norm(x, residual, (x.size(-1),), weight, bias)
    return LF.rms_norm(output, (x.size(-1),), weight) + total


def tensors(rows=33, width=1000, dtype=torch.bfloat16, **options):
    return [
        torch.randn(*shape, **options).to(dtype)
        for shape in ((rows, width), (rows, width), (width,), (width,))
    ]


def test_in_a_cuda_graph():
    given = tensors()
    expected = call(*given)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(*given)
    for _ in range(2):
        output.zero_()
        graph.replay()
        assert torch.equal(output, expected)


def test_training_in_a_cuda_graph():
    given = [t.requires_grad_() for t in tensors(dtype=torch.float32)]
    expected = torch.autograd.grad(call(*given).sum(), given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(call(*given).sum(), given)
    graph.replay()
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a, e)


def test_on_a_stream_of_its_own():
    given = tensors()
    expected = call(*given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = call(*given)
    stream.synchronize()
    assert torch.equal(found, expected)


def test_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    given = tensors()
    found = call(*(t.to("cuda:1") for t in given))
    assert found.device == torch.device("cuda", 1)
    assert torch.equal(found.cpu(), call(*given).cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_under_autocast_are_torchs(dtype):
    x, _, weight, bias = tensors(dtype=dtype)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for ours, theirs in (
            (LF.layer_norm(x, (1000,), weight, bias), F.layer_norm(x, (1000,), weight, bias)),
            (LF.rms_norm(x, (1000,), weight), F.rms_norm(x, (1000,), weight)),
        ):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_programs_have_the_same_bits(dynamic):
    # Liger-Kernel#871: zeros from a compiled program.
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for rows in (5, 40):
        given = [t.requires_grad_() for t in tensors(rows, 768)]
        expected, found = call(*given), compiled(*given)
        torch.testing.assert_close(
            found, expected, rtol=2**-7, atol=2**-6
        )  # Inductor keeps the sum in float32
        for a, e in zip(*(torch.autograd.grad(out.sum(), given) for out in (found, expected)), strict=True):
            torch.testing.assert_close(a, e, rtol=2**-6, atol=2**-4)


def test_more_elements_than_32_bits_count():
    # pytorch#181555, Liger-Kernel#1483
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("24 GiB are not free")
    x = torch.randn(2**31 // 4096 + 5, 4096, dtype=torch.bfloat16)
    for rows in (slice(0, 3), slice(-3, None)):
        assert torch.equal(LF.layer_norm(x, (4096,))[rows], LF.layer_norm(x[rows].clone(), (4096,)))


@pytest.mark.parametrize("width", [1000, 20_000, 131_072])
def test_the_same_bits_in_every_run_and_batch(width):
    # flash-attention#781
    x, _, weight, bias = (t.requires_grad_() for t in tensors(300, width, torch.float32))
    grad = torch.randn_like(x)
    runs = [
        torch.autograd.grad(LF.layer_norm(x, (width,), weight, bias), (x, weight, bias), grad)
        for _ in range(3)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    alone = LF.layer_norm(x[7:8], (width,), weight, bias)
    assert torch.equal(alone, LF.layer_norm(x, (width,), weight, bias)[7:8])
    (grad_alone,) = torch.autograd.grad(alone, x, grad[7:8])
    assert torch.equal(grad_alone[7], runs[0][0][7])


def test_a_float32_residual_stream_with_half_inputs():
    x, _, weight, _ = tensors()
    residual = torch.randn(33, 1000)
    output, total = LF.add_rms_norm(x, residual, (1000,), weight)
    with backends.use("reference"):
        expected, exact_total = reference.add_rms_norm(x, residual, (1000,), weight)
    assert (output.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, exact_total)
    torch.testing.assert_close(output, expected, rtol=2**-7, atol=0)
