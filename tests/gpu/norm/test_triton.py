"""The Triton norms: what only they have, in Triton's interpreter; and compiled without a GPU.

``test_norm_kernels.py`` has their numerics, interpreted and on a GPU.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db

from layernorm import backends, reference
from layernorm import functional as LF
from layernorm.gpu import settings
from layernorm.gpu.launching import recording

pytest.importorskip("triton", reason="Triton is not installed: pip install 'layernorm[triton]'")


from layernorm.gpu.norm import backward_kernels, operators

EPS32 = 2.0**-23
HALVES = (torch.bfloat16, torch.float16)


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_agrees_with_torch_on_its_own_samples(name):
    info = next(op for op in op_db if op.name == f"nn.functional.{name}")
    count = 0
    for sample in info.sample_inputs("cpu", torch.float32):
        expected = getattr(F, name)(sample.input, *sample.args, **sample.kwargs)
        actual = getattr(LF, name)(sample.input, *sample.args, **sample.kwargs)
        # As in test_norms.py.
        torch.testing.assert_close(actual, expected, rtol=540 * EPS32, atol=540 * EPS32, equal_nan=True)
        count += 1
    assert count >= 5


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("grad", [False, True])
def test_operators_pass_opcheck(grad):
    for dtype in (torch.float32, torch.bfloat16):

        def tensor(*shape, dtype=dtype):
            return torch.randn(*shape).to(dtype).requires_grad_(grad)

        x, residual, weight, bias = tensor(3, 2, 8), tensor(3, 2, 8), tensor(8), tensor(8)
        wide = torch.randn(3, 2, 8, requires_grad=grad)  # a residual stream in float32
        for operator, args in (
            ("layer_norm", (x, [8], weight, bias, 1e-5)),
            ("layer_norm", (x, [2, 8], None, None, 1e-5)),
            ("rms_norm", (x, [8], weight, 1e-5)),
            ("add_layer_norm", (x, residual, [8], None, bias, 0.1)),
            ("add_layer_norm", (x, wide, [8], weight, bias, 0.1)),
            ("add_rms_norm", (x, wide, [8], weight, 0.1)),
        ):
            torch.library.opcheck(getattr(torch.ops.layernorm, operator).default, args)


@pytest.mark.usefixtures("looped")
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("width", [7, 64, 600])
def test_a_float32_residual_stream_with_half_inputs(width, centred):
    # The operators themselves: on the CPU the functions give such sums to the reference.
    norm = getattr(torch.ops.layernorm, "add_layer_norm" if centred else "add_rms_norm")
    definition = reference.layer_norm if centred else reference.rms_norm
    for dtype, wide_gain in itertools.product(HALVES, (False, True)):
        x, residual = torch.randn(3, width).to(dtype), torch.randn(3, width)
        weight = torch.randn(width).to(torch.float32 if wide_gain else dtype)
        grads = torch.randn(3, width).to(dtype), torch.randn(3, width)
        leaves = [leaf(t) for t in (x, residual, weight)]
        affine = (leaves[2], None) if centred else (leaves[2],)
        output, total = norm(leaves[0], leaves[1], [width], *affine, 0.1)
        assert output.dtype == dtype
        assert torch.equal(total, x + residual)
        torch.autograd.backward((output, total), grads)
        doubles = [leaf(t.double()) for t in (x, residual, weight)]
        exact_total = doubles[0] + doubles[1]
        exact = definition(exact_total, (width,), doubles[2], eps=0.1)
        torch.autograd.backward((exact, exact_total), [g.double() for g in grads])
        unit = torch.finfo(dtype).eps
        # One rounding to the dtype; in float32 about 16 roundings of values of order 10.
        torch.testing.assert_close(output.double(), exact, rtol=unit / 2 + 16 * EPS32, atol=160 * EPS32)
        assert [a.grad.dtype for a in leaves] == [dtype, torch.float32, weight.dtype]
        for a, e in zip(leaves, doubles, strict=True):
            close = unit / 2 if a.dtype == dtype else 0.0
            torch.testing.assert_close(a.grad.double(), e.grad, rtol=close + 64 * EPS32, atol=640 * EPS32)


@pytest.mark.usefixtures("looped")
@pytest.mark.parametrize("width", [7, 64, 600])
def test_any_strides(width):
    base = torch.randn(3, 2, 2, 2 * width + 5)
    for view in (
        base[..., :width],
        base[..., 3 : width + 3],  # not aligned
        base[::2, :, 1, :width],
        base.transpose(0, 1)[..., :width],
        base.permute(2, 0, 1, 3)[..., :width],  # three strides: a copy
        base[:1, :1, :, :width].expand(2, 3, -1, -1),
        base[0].expand(2, -1, -1, -1)[..., 5 : width + 5],
    ):
        a, b = leaf(view), leaf(view.contiguous())
        a.data = view  # the leaf keeps the strides
        gain = torch.randn(2 * width)[1 : width + 1]  # not aligned
        y, expected = LF.layer_norm(a, (width,), gain), LF.layer_norm(b, (width,), gain)
        assert y.is_contiguous()
        assert torch.equal(y, expected)
        grad = torch.randn(2, *y.shape).transpose(0, 1)[:, 1] if y.dim() > 3 else torch.randn(y.shape)
        (found,), (wanted,) = (
            torch.autograd.grad(out, of, g) for out, of, g in ((y, a, grad), (expected, b, grad.contiguous()))
        )
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("interpreted")
def test_more_elements_than_32_bits_count():
    # pytorch#181555, Liger-Kernel#1483. The third row begins after 2³¹ elements that nobody touches.
    width, stride = 48, 2**30 + 16
    try:
        storage = torch.empty(2 * stride + width, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4 GiB of address space are not to be had")
    x = storage.as_strided((3, width), (stride, 1))
    x.copy_(torch.randn(3, width))
    for row in range(3):
        assert torch.equal(
            LF.layer_norm(x, (width,))[row], LF.layer_norm(x[row : row + 1].clone(), (width,))[0]
        )
    a = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(LF.layer_norm(a, (width,)).sum(), a)
    b = leaf(x.contiguous())
    (expected,) = torch.autograd.grad(LF.layer_norm(b, (width,)).sum(), b)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("looped")
@pytest.mark.parametrize("width", [33, 600])
def test_gradients_of_gain_and_bias_have_the_same_bits_each_time(width):
    # flash-attention#781
    x, gain, bias = torch.randn(40, width), leaf(torch.ones(width)), leaf(torch.ones(width))
    grad = torch.randn(40, width)
    found = [
        torch.autograd.grad(LF.layer_norm(x, (width,), gain, bias), (gain, bias), grad) for _ in range(2)
    ]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    # They are sums over all rows: alone a part of them is another sum.
    doubles = leaf(gain.double()), leaf(bias.double())
    output = reference.layer_norm(x.double(), (width,), *doubles)
    for a, e in zip(found[0], torch.autograd.grad(output, doubles, grad.double()), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=40 * 4 * EPS32)


def test_sums_over_rows_are_spread_over_the_multiprocessors():
    # Of an H100 with its 132: a program for few columns of one gradient, whatever the number of rows.
    x, gain = (torch.empty(*shape, device="meta") for shape in ((3000, 1024), (1024,)))
    stats = torch.empty(2, 3000, device="meta")
    for wanted in ((True, True, True), (False, True, False), (False, False, True)):
        with recording() as launches:
            operators.norm_backward(x, None, x, stats, [1024], gain, gain, True, wanted)
        assert launches[-1].kernel is backward_kernels.sum_parts
        assert launches[-1].grid == (64, sum(wanted[1:]))


def in_triton(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in which Triton compiles what it interprets here."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_width_has_a_tile():
    for width in (1, 2, 3, 1023, 1024, 1025, 2**15, 2**15 + 1, 2**20, 2**31 - 2**16):
        for tile in (
            settings.forward_tile(settings.DEFAULT, width),
            settings.backward_tile(settings.DEFAULT, width),
        ):
            assert tile.whole == (tile.block >= width)
            assert tile.rows * tile.block <= 2**15
            assert tile.whole or tile.rows == 1
        tile = settings.backward_tile(settings.DEFAULT, width)
        for rows in (1, 7, 1000, 10**6):
            assert settings.rows_per_part(settings.DEFAULT, tile, rows, width) % tile.rows == 0


def test_a_capture_comes_after_the_first_call(monkeypatch):
    from layernorm.gpu import launching
    from layernorm.gpu.norm import operators

    class OnGpu:
        """Stands in for a tensor on a GPU."""

        is_cuda, device, dtype = True, torch.device("cuda", 0), torch.bfloat16

    def call(wrap=None, width=8):
        called = SimpleNamespace(wrap=wrap, is_nested=False, input=OnGpu)
        with operators._compiled("forward", called, (OnGpu, None), width, True):
            pass

    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(launching, "_ran", set())
    call()
    capturing = True
    call()
    call(wrap=lambda kernel: kernel, width=9)  # while a program is traced nothing is compiled
    with pytest.raises(
        RuntimeError, match="first call of a layer or norm, which is not possible while a CUDA"
    ):
        call(width=9)


def test_the_choice_on_gpus(monkeypatch, pretend_architecture):
    gpu, half = torch.device("cuda", 0), torch.bfloat16
    pretend_architecture(9, 0)
    choice = backends.choose("layer_norm", gpu, half)
    assert choice.kernel == "torch"
    assert "not been measured on compute capability 9.0" in choice.reason
    monkeypatch.setitem(settings.FASTER, (9, 0), {("layer_norm", "bfloat16"): 4096})
    pretend_architecture(9, 0)
    assert backends.choose("layer_norm", gpu, half).kernel == "triton"
    assert backends.choose("layer_norm", gpu, half, 2048).kernel == "triton"
    assert "from 4096 bytes" in backends.choose("layer_norm", gpu, half, 2048).reason
    assert backends.choose("layer_norm", gpu, half, 2047).kernel == "torch"
    assert "measured as faster" in backends.choose("layer_norm", gpu, half, 2047).reason
    assert backends.choose("layer_norm", gpu, torch.float32, 10**6).kernel == "torch"
    assert backends.choose("rms_norm", gpu, half).kernel == "torch"
    assert "float32, bfloat16" in backends.choose("layer_norm", gpu, torch.float64).reason
    with backends.use("triton"):
        assert backends.choose("rms_norm", gpu, half).kernel == "triton"
    with backends.use("triton"), pytest.raises(RuntimeError, match="no kernel for cpu"):
        LF.layer_norm(torch.zeros(2, 3), (3,))


def test_dtypes_under_autocast_are_torchs():
    # RMS norm is on autocast's list in some versions and not in others. No GPU is needed to see dtypes.
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            for dtype in (torch.float32, *HALVES):
                x, weight = (torch.empty(*shape, dtype=dtype, device="cuda") for shape in ((2, 8), (8,)))
                ops = torch.ops.layernorm
                assert ops.layer_norm(x, [8], weight, None, 0.1).dtype == F.layer_norm(x, (8,), weight).dtype
                assert ops.rms_norm(x, [8], weight, 0.1).dtype == F.rms_norm(x, (8,), weight).dtype
    finally:
        torch.set_autocast_enabled("cuda", before)


def test_the_choice_is_told_the_width_of_a_row_and_not_their_number(monkeypatch):
    asked = []
    monkeypatch.setattr(backends, "kernel_for", lambda *of: asked.append(of) or "reference")
    for rows in (2, 200):
        x = torch.zeros(rows, 3, 4, device="meta")
        LF.add_rms_norm(x, x, (3, 4))
        assert asked.pop() == ("add_rms_norm", x, 12)


@pytest.mark.usefixtures("native")
def test_traced_programs_hold_the_kernels_themselves():
    # Liger-Kernel#871. What torch.compile sees, on tensors that need no GPU.
    done = in_triton("""
import torch
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
import layernorm

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

def function(x, residual, weight):
    ops = torch.ops.layernorm
    shape = [x.size(-1)]
    output, total, stats = ops.norm_forward(x, residual, shape, weight, None, 1e-5, False)
    grads = ops.norm_backward(
        output, None, total, stats, shape, weight, None, False, [True, True, False]
    )
    return ops.layer_norm(grads[0], shape, None, None, 1e-5), grads[1]

driver.set_active(Driver())
shapes = ShapeEnv()

def unknown(size):
    symbol = shapes.create_symbol(size, ConstantSource(f"size_{size}"), DimDynamic.DYNAMIC)
    return shapes.create_symintnode(symbol, hint=size)

for rows, width in ((6, 64), (unknown(6), unknown(64))):
    with FakeTensorMode(shape_env=shapes), torch.no_grad():
        tensors = [torch.empty(*s, device="cuda") for s in ((rows, width), (rows, width), (width,))]
        graph = aot_export_joint_simple(function, tensors, trace_joint=False)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    print(sum("triton_kernel_wrapper_functional" in name for name in names))
    print(sum("layernorm" in name for name in names))
""")
    assert done.returncode == 0, done.stderr
    # Two norms forward; backward those of the input and a sum of parts.
    assert done.stdout.split() == ["4", "0"] * 2


# Every cell and dtype on some architecture.
@pytest.mark.parametrize(
    ("architecture", "dtypes", "cells"),
    [(80, "[1:]", "('gru',)"), (90, "[:1]", "('lstm', 'gru')"), (100, "[:1]", "('lstm',)")],
    ids=["80", "90", "100"],
)
@pytest.mark.parametrize(
    ("rows_of", "kernels"),
    [
        # A width for each kind of tile.
        (
            "norms({}, (64, 2048, 8192, 32768), dtypes=resources.DTYPES{})",
            {"forward", "backward", "row_sums", "sum_parts"},
        ),
        # What reads most, at the widths that take most shared memory.
        (
            "norms({}, (8192, 32768), residual=True, dtypes=resources.DTYPES{})",
            {"forward", "backward", "row_sums", "sum_parts"},
        ),
        (
            "recurrent({}, (2048,), dtypes=resources.DTYPES{}, cells={})",
            {
                "product",
                "step_product",
                "cell_forward",
                "cell_backward",
                "normalize_rows",
                "rows_backward",
                "gather_before",
                "column_sums",
            },
        ),
    ],
    ids=["norms", "residual", "recurrent"],
)
def test_the_kernels_compile_and_fit_into_registers(architecture, dtypes, cells, rows_of, kernels):
    done = in_triton(
        "from tools import resources\n"
        f"for row in resources.{rows_of.format(architecture, dtypes, cells)}: print(*row, sep='\\t')"
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} == kernels
    for name, of, _, width, _, _, stack, shared, copies, programs in rows:
        # Some assemblers keep two registers there rather than lose a program for them.
        assert int(stack) <= 8, (name, width)
        # At least one program has room on a multiprocessor, and on one that has 99 KiB.
        assert int(programs) >= 1, (name, width)
        assert int(shared) <= 99 * 1024, (name, width)
        if of.endswith("layer_norm") and int(width) > 8192:
            # What waits for memory does so beside another, and a loop's loads are ahead of it.
            assert int(programs) >= 2, (name, width)
            assert int(copies) > 0 or name == "sum_parts", (name, width)


def test_where_a_tensor_begins_and_how_many_rows_it_has_change_no_program():
    # Else a row's bits could depend on them. Where the width is no multiple of 16, rows begin anywhere, and
    # so may input, residual and gradients; all else is aligned.
    done = in_triton("""
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from layernorm.gpu.norm import backward_kernels, forward_kernels

constants = dict(CENTRED=True, NESTED=False, WHOLE=True, ROWS=2, BLOCK=1024, STAGES=2, CHUNK=256)
for kernel in (forward_kernels.forward, backward_kernels.backward):
    assert kernel.params[kernel.arg_names.index("rows")].do_not_specialize
    codes = set()
    for aligned in (True, False):
        signature, constexprs, attributes = {}, {}, {}
        for index, name in enumerate(kernel.arg_names):
            if name in constants or name == "sums":
                signature[name], constexprs[(index,)] = "constexpr", constants.get(name)
            elif name.startswith("rows") or name == "width" or name[-6:] in ("_inner", "_outer", "stride"):
                signature[name] = "i32"
            elif name == "eps":
                signature[name] = "fp32"
            else:
                signature[name] = "*fp32"
                if aligned or name not in ("input", "residual", "grad", "grad_sum"):
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constexprs, attributes)
        ptx = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4}).asm["ptx"]
        body = ptx[ptx.index(".reg") : ptx.index(".section")]
        lines = (line.strip() for line in body.splitlines())
        codes.add("|".join(line for line in lines if not line.startswith((".loc", ".file", "//", "$"))))
    print(len(codes))
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.usefixtures("interpreted")
def test_empty_inputs():
    for shape in ((0, 4), (3, 0)):
        a = torch.empty(shape, requires_grad=True)
        weight = torch.ones(shape[1], requires_grad=True)
        output = torch.ops.layernorm.layer_norm(a, shape[1:], weight, None, 1e-5)
        grads = torch.autograd.grad(output.sum(), (a, weight))
        assert output.shape == grads[0].shape == shape
        assert not grads[1].any()
