"""The compiled module by itself: every way of reaching PyTorch, odd tensors, threads, and the C interface."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import Tensor

import layernorm
from layernorm import functional as LF
from layernorm import ops
from layernorm.pytorch_internals import used_by_the_kernels
from layernorm.variants import GATES
from tests.recurrent.cases import CELLS, GATES_CELLS, flat
from tests.settings import thread_count

pytestmark = pytest.mark.usefixtures("native")

# What an older PyTorch, or one for another system, may lack.
LACKING = {
    "exchange": {"exchange": None},
    "threads": {"parallel_for": "no_such_function"},
    "allocation": {"empty_strided": "no_such_function"},
    "libraries": {"cpu_library": "/no/such/library", "python_library": "/no/such/library"},
    "everything": {"exchange": None, "cpu_library": "/no/such/library", "python_library": "/no/such/library"},
}


@pytest.fixture(params=LACKING)
def lacking(request):
    assert ops.native is not None
    ops.native.connect(used_by_the_kernels() | LACKING[request.param])
    yield request.param
    ops.native.connect(used_by_the_kernels())


def everything() -> list[Tensor]:
    """Return results and gradients of every entry."""
    torch.manual_seed(0)
    found: list[Tensor] = []
    x = torch.randn(70, 300, requires_grad=True)
    weight, bias = torch.randn(300, requires_grad=True), torch.randn(300, requires_grad=True)
    for rows in (x, x.mT.contiguous().mT, x[:, None].expand(70, 2, 300), x[:0]):
        y = LF.layer_norm(rows, (300,), weight, bias)
        z, total = LF.add_rms_norm(rows, rows, (300,), weight)
        found += [y, z, total]
        found += torch.autograd.grad((y.square().sum() + z.sum() + total.sum()), (x, weight, bias))
    for name in ("LSTM", "GRU", "RNN"):
        for dtype in (torch.float32, torch.bfloat16):
            module = getattr(layernorm, f"LayerNorm{name}")(24, 40, num_layers=2).to(dtype)
            x = torch.randn(9, 13, 24, dtype=dtype)
            output, _ = module(x)
            output.sum().backward()
            found += [output, *(p.grad for p in module.parameters())]
            stream = module.stream(13)
            found += [stream.step(x_t) for x_t in x]
            out = torch.empty(40, 13, dtype=dtype).mT
            found.append(stream.step(x[0].mT.contiguous().mT, out))
    for name in GATES_CELLS:
        vectors = {n: p for n, p in CELLS[name](24, 40).named_parameters() if not n.startswith("weight")}
        products, state = torch.randn(2, 5, GATES[name] * 40), torch.randn(5, 40)
        after = flat(getattr(LF, f"{name}_gates")(*products, state, vectors))
        found += [*after, *torch.autograd.grad([t.sum() for t in after], list(vectors.values()))]
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_every_way_of_reaching_pytorch_gives_the_same_bits(lacking, threads):
    with thread_count(threads):
        found = everything()
        ops.native.connect(used_by_the_kernels())
        expected = everything()
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def test_results_are_tensors_like_any_other(lacking):
    x = torch.randn(3, 8)
    y = LF.layer_norm(x, (8,))
    assert type(y) is Tensor
    assert not y.requires_grad
    assert y.untyped_storage().resizable()
    y.resize_(30)
    with torch.inference_mode():
        assert LF.layer_norm(x, (8,)).is_inference()


def negative(x: Tensor) -> Tensor:
    """Return a view that holds -x in memory, as the imaginary part of a conjugate has it."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("size", [1, 6])
def test_negative_views_are_read_as_what_they_are(lacking, size):
    x, weight = torch.randn(3, 6)[:, :size], torch.randn(size)
    found = LF.layer_norm(negative(x), (size,), negative(weight))
    assert torch.equal(found, LF.layer_norm(x, (size,), weight))
    module = layernorm.LayerNormGRU(size, 4)
    sequence = x[:, None]
    assert torch.equal(module(negative(sequence))[0], module(sequence)[0])
    stream, other = module.stream(), module.stream()
    assert torch.equal(stream.step(negative(sequence[0])), other.step(sequence[0]))


def test_tensors_without_memory_are_left_to_pytorch(lacking):
    zeros = torch._efficientzerotensor((2, 4))
    assert torch.equal(LF.rms_norm(zeros, (4,)), torch.zeros(2, 4))
    assert LF.layer_norm(torch.empty(2, 4, device="meta"), (4,)).device.type == "meta"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors", UserWarning)
        nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    assert LF.layer_norm(nested, (4,), torch.ones(4), torch.zeros(4)).is_nested
    with pytest.raises((RuntimeError, NotImplementedError)):
        LF.layer_norm(torch.eye(4).to_sparse(), (4,))


def test_eight_threads_at_once(lacking):
    module, x = layernorm.LayerNormLSTM(64, 64), torch.randn(20, 8, 64)
    rows = torch.randn(256, 512)
    expected = module(x)[0], LF.layer_norm(rows, (512,))
    problems = []

    def run():
        for _ in range(20):
            output, y = module(x)[0], LF.layer_norm(rows, (512,))
            output.sum().backward()
            if not (torch.equal(output, expected[0]) and torch.equal(y, expected[1])):
                problems.append("other bits")

    runners = [threading.Thread(target=run) for _ in range(8)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert problems == []


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_nothing_leaks(lacking):
    module = layernorm.LayerNormLSTM(8, 8)
    x, stream = torch.randn(2, 3, 8), module.stream(3)
    norm = layernorm.LayerNorm(8)

    def steps(count: int) -> None:
        for _ in range(count):
            stream.step(x[0])
            norm(module(x)[0]).sum().backward()
            module.zero_grad()
            with pytest.raises(RuntimeError):
                torch.ops.layernorm.layer_norm(x, [7], None, None, 1e-5)

    grown = []
    for _ in range(4):
        before = resident()
        steps(500)
        gc.collect()
        grown.append(resident() - before)
    # A tensor that leaked at each step would be 150 bytes or more of its own, each time; what the memory's
    # management takes it takes once.
    assert min(grown) < 500 * 100, grown


def test_a_child_of_fork_has_threads_of_its_own():
    script = """
import os, torch, layernorm
from layernorm import ops, functional as LF
from layernorm.pytorch_internals import used_by_the_kernels
ops.native.connect(used_by_the_kernels() | {"cpu_library": "/no/such/library"})
torch.set_num_threads(2)
x = torch.randn(512, 512)
expected = LF.layer_norm(x, (512,))
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(LF.layer_norm(x, (512,)), expected) else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork()")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# ---- the C interface, on plain pointers ----

DIMS = 6


class Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dims", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * DIMS),
        ("strides", ctypes.c_int64 * DIMS),
    )


class Norm(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("dtype", ctypes.c_int),
        ("parameter_dtype", ctypes.c_int),
        ("centred", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("gain", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class NormForwardCall(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("input", Rows),
        ("residual", Rows),
        ("output", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("rstd", ctypes.c_void_p),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("dtype", ctypes.c_int),
        ("parameter_dtype", ctypes.c_int),
        ("reverse", ctypes.c_int32),
        ("spec", ctypes.POINTER(ctypes.c_int64)),
        ("spec_count", ctypes.c_int64),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("steps", "batch", "input_size", "hidden_size", "output_size")),
        ("batch_sizes", ctypes.c_void_p),
        ("input", ctypes.c_void_p),
        ("input_step_stride", ctypes.c_int64),
        ("input_row_stride", ctypes.c_int64),
        ("h0", ctypes.c_void_p),
        ("c0", ctypes.c_void_p),
        ("resets", ctypes.c_void_p),
        ("reset_h", ctypes.c_void_p),
        ("reset_c", ctypes.c_void_p),
        ("weights", ctypes.c_void_p * 11),
    )


class LayerOutputs(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("output", "hn", "cn", "x", "h", "c", "stats")),
    )


@pytest.fixture
def library():
    loaded = ctypes.CDLL(ops.native.__file__)
    loaded.layernorm_last_error.restype = ctypes.c_char_p
    return loaded


def layer_of(module, x: Tensor, state: list[Tensor]) -> tuple[Layer, list[object]]:
    """Return the struct of a module's first layer, and what it points to."""
    weights = module.spec.listed(module.layer_weights()[0])
    codes = (ctypes.c_int64 * len(module.spec.codes))(*module.spec.codes)
    layer = Layer(ctypes.sizeof(Layer), 0, 0, 0, codes, len(codes), module.spec.eps)
    layer.steps, layer.batch, layer.input_size = x.shape
    layer.hidden_size = layer.output_size = module.hidden_size
    layer.input, layer.input_step_stride, layer.input_row_stride = x.data_ptr(), x.stride(0), x.stride(1)
    layer.h0 = state[0].data_ptr()
    layer.c0 = state[1].data_ptr() if len(state) > 1 else None
    for i, weight in enumerate(weights):
        layer.weights[i] = None if weight is None else weight.data_ptr()
    return layer, [weights, codes, x, state]


def test_a_norm_by_the_c_interface(library):
    assert library.layernorm_version() == 1
    x, gain, bias = torch.randn(5, 33), torch.randn(33), torch.randn(33)
    output, mean, rstd = torch.empty(5, 33), torch.empty(5), torch.empty(5)
    norm = Norm(ctypes.sizeof(Norm), 0, 0, 1, 5, 33, 1e-5, gain.data_ptr(), bias.data_ptr())
    call = NormForwardCall(ctypes.sizeof(NormForwardCall))
    call.input.data, call.input.dims, call.input.strides[0] = x.data_ptr(), 1, 33
    call.output, call.mean, call.rstd = output.data_ptr(), mean.data_ptr(), rstd.data_ptr()
    assert library.layernorm_norm_forward(ctypes.byref(norm), ctypes.byref(call)) == 0
    assert torch.equal(output, LF.layer_norm(x, (33,), gain, bias))
    torch.testing.assert_close(mean, x.mean(1))
    norm.struct_size -= 8
    assert library.layernorm_norm_forward(ctypes.byref(norm), ctypes.byref(call)) == 1
    assert b"struct_size" in library.layernorm_last_error()


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_layer_and_a_stream_by_the_c_interface(library, name):
    module = getattr(layernorm, f"LayerNorm{name}")(6, 8).requires_grad_(False)
    x = torch.randn(4, 3, 6)
    state = [torch.zeros(3, 8) for _ in range(2 if name == "LSTM" else 1)]
    layer, held = layer_of(module, x, state)
    output, hn, cn = torch.empty(4, 3, 8), torch.empty(3, 8), torch.empty(3, 8)
    outputs = LayerOutputs(ctypes.sizeof(LayerOutputs), output.data_ptr(), hn.data_ptr(), cn.data_ptr())
    assert library.layernorm_recurrent_forward(ctypes.byref(layer), ctypes.byref(outputs)) == 0
    expected, final = module(x)
    assert torch.equal(output, expected)
    assert torch.equal(hn, (final[0] if name == "LSTM" else final)[0])
    stream, y = ctypes.c_void_p(), torch.empty(3, 8)
    assert library.layernorm_stream_create(ctypes.byref(layer), 1, ctypes.byref(stream)) == 0
    step = library.layernorm_stream_step
    step.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64 * 2, ctypes.c_void_p, ctypes.c_int64 * 2]
    for x_t, wanted in zip(x, expected, strict=True):
        strides = (ctypes.c_int64 * 2)(6, 1), (ctypes.c_int64 * 2)(8, 1)
        assert step(stream, x_t.data_ptr(), strides[0], y.data_ptr(), strides[1]) == 0
        assert torch.equal(y, wanted)
    library.layernorm_stream_destroy(stream)
    assert held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 9}, b"dtype is no layernorm_dtype"),
        ({"spec_count": 2}, b"spec must have 8 codes, got 2"),
        ({"steps": 0}, b"Expected sequence length to be larger than 0"),
        ({"hidden_size": -8}, b"hidden_size must be positive"),
        ({"output_size": 7}, b"weight_hh must have hidden_size=8 columns"),
        ({"c0": None}, b"an LSTM's state has a cell, c"),
    ],
)
def test_bad_layers_are_errors_of_the_c_interface(library, change, message):
    module = layernorm.LayerNormLSTM(6, 8).requires_grad_(False)
    layer, held = layer_of(module, torch.randn(4, 3, 6), [torch.zeros(3, 8), torch.zeros(3, 8)])
    for name, value in change.items():
        setattr(layer, name, value)
    outputs = LayerOutputs(ctypes.sizeof(LayerOutputs))
    assert library.layernorm_recurrent_forward(ctypes.byref(layer), ctypes.byref(outputs)) == 1
    assert message in library.layernorm_last_error()
    assert held
