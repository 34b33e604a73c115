"""Gains and biases of float32 beside half precision, and autocast: one rule for every kernel."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import layernorm
from layernorm import backends
from layernorm import functional as LF
from tests.recurrent.cases import CELLS, FUNCTIONS, GATES_CELLS, HALVES, SEQUENCES, flat

KERNELS = ("native", "reference")
every_function = pytest.mark.parametrize(("cell", "variant"), FUNCTIONS)


def widened(module):
    """A copy whose gains and biases, its vectors, are of float32."""
    wide = copy.deepcopy(module)
    for name, parameter in list(wide.named_parameters()):
        if parameter.dim() == 1:
            setattr(wide, name, nn.Parameter(parameter.detach().float()))
    return wide


def drawn(kind, cell, variant, dtype, **options):
    module = kind[cell](5, 7, variant=variant, dtype=dtype, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "weight" not in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("gain" in name))
    return module


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_function
def test_the_same_numbers_in_float32_give_the_same_bits(cell, variant, dtype):
    # Half-precision gains are read as float32 by the kernels, so widening them changes no bit; a gradient in
    # float32 is what is rounded otherwise.
    half = drawn(SEQUENCES, cell, variant, dtype, num_layers=2, bidirectional=True)
    wide = widened(half)
    x = torch.randn(6, 3, 5, dtype=dtype)
    results = []
    for module in (half, wide):
        output, state = module(x)
        (output.float().square().sum() + sum(s.float().sum() for s in flat(state))).backward()
        results.append([output, *flat(state)])
    assert all(map(torch.equal, *results))
    for (name, rounded), exact in zip(half.named_parameters(), wide.parameters(), strict=True):
        assert exact.grad.dtype == exact.dtype, name
        assert torch.equal(rounded.grad, exact.grad.to(dtype)), name


@pytest.mark.parametrize("kernel", KERNELS)
@every_function
def test_gains_of_float32_are_used_as_they_are(cell, variant, kernel):
    if kernel == "native" and not backends.compiled_module():
        pytest.skip("no compiled kernels")
    exact = drawn(SEQUENCES, cell, variant, torch.float32)
    mixed = copy.deepcopy(exact)
    for name, parameter in list(mixed.named_parameters()):
        if parameter.dim() == 2:
            setattr(mixed, name, nn.Parameter(parameter.detach().bfloat16()))
    x = torch.randn(6, 3, 5).bfloat16()
    with backends.use(kernel):
        output, state = mixed(x)
        output.float().square().sum().backward()
        right, _ = exact(x.float())
        right.square().sum().backward()
    assert {t.dtype for t in (output, *flat(state))} == {torch.bfloat16}
    # 2^-8 of a number below 1, over six steps and both products.
    assert (output.float() - right).abs().max() < 0.1
    for one, other in zip(mixed.parameters(), exact.parameters(), strict=True):
        assert one.grad.dtype == one.dtype
        assert (one.grad.float() - other.grad).norm() < 0.1 * other.grad.norm() + 0.05
    # A change that bfloat16 would round away (1 + 2^-9, ties to even) reaches the output.
    with torch.no_grad(), backends.use(kernel):
        for parameter in mixed.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
        before = mixed(x)[0]
        for parameter in mixed.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1 + 2**-9)
        assert (mixed(x)[0] != before).sum() > 5


@pytest.mark.usefixtures("native")
@every_function
def test_cells_streams_and_gates_take_them(cell, variant):
    wide = widened(drawn(SEQUENCES, cell, variant, torch.bfloat16, num_layers=2))
    x = torch.randn(6, 3, 5).bfloat16()
    output, _ = wide(x)
    stream = wide.stream(3)
    assert stream.kernel == "native"
    assert torch.equal(torch.stack([stream.step(x_t) for x_t in x]), output)
    single = widened(drawn(CELLS, cell, variant, torch.bfloat16))
    found = flat(single(x[0]))
    with backends.use("reference"):
        for a, b in zip(found, flat(single(x[0])), strict=True):
            assert a.dtype == b.dtype == torch.bfloat16
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    if cell in GATES_CELLS:
        vectors = {n: p for n, p in single.named_parameters() if p.dim() == 1}
        h = torch.zeros(3, 7, dtype=torch.bfloat16)
        gates = x[0] @ single.weight_ih.T, h @ single.weight_hh.T
        outputs = flat(getattr(LF, f"{cell}_gates")(*gates, h, vectors, variant=variant))
        for a, b in zip(outputs, found, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
        sum(t.float().sum() for t in outputs).backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in vectors.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_hh_l0": torch.float32}, "weight_hh of the input's dtype torch.bfloat16, got torch.float32"),
        ({"bias_l0": torch.float64}, "bias of the input's dtype torch.bfloat16, got torch.float64"),
        ({"gain_hh_l0": torch.float16}, "gain_hh of the input's dtype torch.bfloat16, got torch.float16"),
    ],
)
def test_other_mixtures_are_refused_by_name(change, message):
    module = layernorm.LayerNormLSTM(5, 7, dtype=torch.bfloat16)
    for name, dtype in change.items():
        setattr(module, name, nn.Parameter(getattr(module, name).detach().to(dtype)))
    with pytest.raises(RuntimeError, match=message):
        module(torch.zeros(2, 1, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_function
def test_autocast_has_one_rule(cell, variant, dtype, kernel):
    if kernel == "native" and not backends.compiled_module():
        pytest.skip("no compiled kernels")
    for kind, x in ((SEQUENCES, torch.randn(6, 3, 5)), (CELLS, torch.randn(3, 5))):
        module = drawn(kind, cell, variant, torch.float32)
        with backends.use(kernel):
            found = flat(module(x))
            with torch.autocast("cpu", dtype):
                first = module(x)
                again = flat(module(x, first[1] if kind is SEQUENCES else first))
                lower = flat(first)
        assert {t.dtype for t in (*lower, *again)} == {dtype}
        for a, b in zip(lower, found, strict=True):
            assert (a.float() - b).abs().max() < 0.1
        sum(t.float().square().sum() for t in (*lower, *again)).backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


def test_autocast_leaves_float64_alone():
    module = layernorm.LayerNormGRU(5, 7, dtype=torch.float64)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x)[0], module(x)[0])
        assert module(x)[0].dtype == torch.float64


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("cell", "variant"), FUNCTIONS)
def test_the_kernels_for_gpus_refuse_what_they_would_misread(cell, variant):
    wide = widened(drawn(SEQUENCES, cell, variant, torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"must be of shape .* of torch\.bfloat16"):
        wide(torch.randn(4, 3, 5).bfloat16())


def test_on_a_gpu_the_reference_takes_mixed_dtypes(monkeypatch):
    monkeypatch.setattr(backends, "kernel_for", lambda *_: "triton")
    x = torch.zeros(2, 1, 5, dtype=torch.bfloat16)
    module = layernorm.LayerNormLSTM(5, 7, dtype=torch.bfloat16)
    assert backends.recurrent_kernel_for("lstm", x, list(module.parameters())) == "triton"
    assert backends.recurrent_kernel_for("lstm", x, list(widened(module).parameters())) == "reference"
