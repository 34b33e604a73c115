"""Streams whose matrices are kept as bfloat16 or int8."""

from __future__ import annotations

import copy

import pytest
import torch

import layernorm
from layernorm import backends, stream_checks
from tests.recurrent.cases import SEQUENCES
from tests.settings import CAPABILITIES, instruction_set, thread_count

KINDS = ("bfloat16", "int8")
every_kind = pytest.mark.parametrize("kind", KINDS)
# Depths of less and of more than the 512 numbers that are summed as integers, odd ones, and widths that are
# no whole panels.
SIZES = [(1, 1), (7, 5), (70, 64), (515, 33), (40, 519)]


def stepped(module, x, kind, **options):
    stream = module.stream(x.size(1), weights=kind, **options)
    return torch.stack([stream.step(x_t) for x_t in x])


def rounded(module, kind):
    """Return the module with the matrices that such a stream has."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() == 2 and kind == "bfloat16":
                parameter.copy_(parameter.bfloat16())
            elif parameter.dim() == 2:
                scale = parameter.abs().amax(1, keepdim=True) / 127
                parameter.copy_((parameter / scale).round() * scale)
    return other


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("features", "hidden"), SIZES)
@pytest.mark.parametrize("cell", SEQUENCES)
@pytest.mark.usefixtures("native")
def test_it_computes_what_the_rounded_matrices_do(cell, features, hidden, capability):
    options = {"proj_size": 31} if cell == "lstm" and hidden > 31 else {}
    module = SEQUENCES[cell](features, hidden, num_layers=2, **options)
    x = torch.randn(4, 9, features)
    with instruction_set(capability), torch.no_grad():
        for kind in KINDS:
            expected = rounded(module, kind).double()(x.double())[0]
            # Rows beside int8 are rounded too, to one in 32,767 of their largest number: what a few hundred
            # summands make of that, and the norms and four steps after them.
            tolerance = {"bfloat16": 2e-5, "int8": 2e-3}[kind]
            found = stepped(module, x, kind)
            assert (found - expected).abs().max() < tolerance
            assert (found - module(x)[0]).abs().max() > tolerance or hidden < 10  # rounding shows


@pytest.mark.usefixtures("native")
def test_int8_is_exact_where_its_numbers_are():
    # 127 steps of weights of 1/64, and rows whose largest number is 32767/1024: all are whole steps.
    module = layernorm.LayerNormRNN(600, 20, variant="none", nonlinearity="relu", bias=False)
    x = torch.randint(-3000, 3000, (1, 3, 600)) / 1024
    x[..., 0] = 32767 / 1024
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.randint(-20, 20, (20, 600)) / 64)
        module.weight_ih_l0[:, 0] = 127 / 64
        expected = (x.double() @ module.weight_ih_l0.double().T).relu()
    torch.testing.assert_close(stepped(module, x, "int8").double(), expected, rtol=1e-6, atol=1e-6)


@every_kind
@pytest.mark.usefixtures("native")
def test_a_row_has_its_bits_in_any_batch_and_thread(kind):
    for cell, (features, hidden) in zip(
        ("lstm", "gru", "rnn"), [(70, 64), (515, 33), (300, 300)], strict=True
    ):
        module = SEQUENCES[cell](features, hidden)
        x = torch.randn(3, 17, features)
        whole = stepped(module, x, kind)
        for rows in ([0], [16], [2, 5], [1, 3, 8, 9, 11]):
            assert torch.equal(stepped(module, x[:, rows], kind), whole[:, rows])
        with thread_count(2):
            assert torch.equal(stepped(module, x, kind), whole)
            assert torch.equal(stepped(module, x[:, 3:4], kind), whole[:, 3:4])


@pytest.mark.usefixtures("native")
def test_bfloat16_has_the_bits_of_the_rounded_module():
    module = layernorm.LayerNormLSTM(65, 130)
    x = torch.randn(4, 3, 65)
    assert torch.equal(stepped(module, x, "bfloat16"), stepped(rounded(module, "bfloat16"), x, None))


@every_kind
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_harms_no_other(kind, bad):
    module = layernorm.LayerNormGRU(33, 20)
    x = torch.randn(3, 5, 33)
    expected = stepped(module, x, kind)
    x[1, 2, 7] = bad
    found = stepped(module, x, kind)
    others = [0, 1, 3, 4]
    assert torch.equal(found[:, others], expected[:, others])
    assert torch.equal(found[0], expected[0])
    assert found[1:, 2].isnan().all()


@every_kind
def test_zero_and_tiny_numbers_are_zero(kind):
    module = layernorm.LayerNormRNN(5, 4, variant="none")
    with torch.no_grad():
        module.weight_ih_l0[1] = 0
        module.weight_hh_l0.zero_()
    x = torch.tensor([[[0.0] * 5], [[1e-38] * 5]])
    biases = (module.bias_ih_l0 + module.bias_hh_l0).tanh()
    torch.testing.assert_close(stepped(module, x, kind)[:, 0], biases.detach().expand(2, 4))


@every_kind
def test_without_kernels_the_reference_has_the_rounded_matrices(kind):
    module = layernorm.LayerNormGRU(12, 10)
    x = torch.randn(3, 2, 12)
    with backends.use("reference"):
        stream = module.stream(2, weights=kind)
        assert stream.kernel == "reference"
        found = torch.stack([stream.step(x_t) for x_t in x])
        expected = rounded(module, kind)(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@every_kind
def test_refresh_rounds_anew(kind):
    module = layernorm.LayerNormLSTM(6, 8)
    x = torch.randn(2, 1, 6)
    stream = module.stream(weights=kind)
    with torch.no_grad():
        module.weight_ih_l0.mul_(-1.5)
    stream.refresh()
    assert torch.equal(torch.stack([stream.step(x_t) for x_t in x]), stepped(module, x, kind))
    assert stream.weights == kind
    assert f"weights={kind!r}" in repr(stream)


@pytest.mark.parametrize("given", ["float16", "INT8", 8, torch.int8, ""])
def test_an_unknown_kind_is_refused(given):
    with pytest.raises(ValueError, match=r"weights must be None, 'bfloat16' or 'int8', got"):
        layernorm.LayerNormGRU(3, 4).stream(weights=given)


@every_kind
def test_other_dtypes_and_devices_have_none(kind):
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"is for modules of float32, and this one is of {dtype}"):
            layernorm.LayerNormGRU(3, 4, dtype=dtype).stream(weights=kind)
    with pytest.raises(ValueError, match=r"is for modules on the CPU, and this one is on meta"):
        stream_checks.weight_kind("stream", kind, torch.empty(3, device="meta"))
