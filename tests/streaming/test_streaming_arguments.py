"""The arguments of streams: any layout of input and ``out``, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

import layernorm
from layernorm.spec import layer_spec
from tests.recurrent.cases import SEQUENCES, same
from tests.settings import thread_count
from tests.streaming.cases import STEPS, assert_alike, inputs, made, stepped

every_cell = pytest.mark.parametrize("cell", SEQUENCES)

# ---- layouts ----


@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in-place"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda: torch.empty(STEPS, 3, 13, dtype=torch.float64),
        lambda: torch.empty(3, STEPS, 13, dtype=torch.float64).transpose(0, 1),
        lambda: torch.empty(STEPS, 13, 3, dtype=torch.float64).mT,
        lambda: torch.empty(STEPS, 6, 26, dtype=torch.float64)[:, ::2, ::2],
    ],
    ids=["contiguous", "rows-apart", "columns", "apart"],
)
@every_cell
def test_out_is_written_and_returned(kernel, cell, layout, in_place):
    module = made(cell, (13, 13), num_layers=2, dtype=torch.float64)
    x = inputs(module, 3)
    stream, outputs = module.stream(3), layout().fill_(torch.nan)
    for x_t, out in zip(x, outputs, strict=True):
        assert stream.step(out.copy_(x_t) if in_place else x_t, out=out) is out
    assert_alike(kernel, outputs, stepped(module.stream(3), x))


@pytest.mark.parametrize("shift", [-9, -1, 0, 1, 12, 14])
def test_out_may_overlap_the_input_in_any_way(kernel, shift):
    module = made("gru", (13, 13), dtype=torch.float64)
    x = inputs(module, 3)[0]
    expected = module.stream(3).step(x)
    memory = torch.zeros(90, dtype=torch.float64)
    source = memory[20:59].view(3, 13).copy_(x)
    out = memory[20 + shift : 59 + shift].view(3, 13)
    assert_alike(kernel, module.stream(3).step(source, out), expected)


@pytest.mark.usefixtures("native")
def test_out_may_overlap_rows_that_other_threads_read():
    module = made("lstm", (256, 256))
    x = inputs(module, 64)[0]
    expected = module.stream(64).step(x)
    memory, stream = torch.zeros(96, 256), module.stream(64)
    with thread_count(8):  # more than there are processors, so that some begin late
        for _ in range(20):
            for source, out in ((memory[32:], memory[:64]), (memory[:64], memory[32:])):
                stream.reset()
                assert torch.equal(stream.step(source.copy_(x), out), expected)


def test_out_counts_as_changed_in_place(kernel):
    module = made("gru")
    out = torch.zeros(1, 13)
    weight = torch.randn(13, requires_grad=True)
    product = (out * weight).sum()
    module.stream().step(torch.randn(1, 7), out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


class Named(torch.Tensor):
    """A subclass without behaviour of its own."""


LAYOUTS = {
    "columns": lambda x: x.mT.contiguous().mT,
    "rows apart": lambda x: torch.cat([x, x], 1)[:, : x.size(1)],
    "apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "one row": lambda x: x[:1].expand(x.shape),
    "one column": lambda x: x[:, :1].expand(x.shape),
    "one number": lambda x: x[:1, :1].expand(x.shape),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "parameter": torch.nn.Parameter,
    "subclass": lambda x: x.clone().as_subclass(Named),
    "negative": lambda x: torch.complex(x, -x).conj().imag,
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_of_the_input(kernel, layout):
    module = made("lstm", dtype=torch.float64)
    given = layout(inputs(module, 3)[0])
    expected = module.stream(3).step(given.detach().as_subclass(torch.Tensor).resolve_neg().contiguous())
    result = module.stream(3).step(given)
    assert_alike(kernel, result.as_subclass(torch.Tensor), expected)
    assert not result.requires_grad


def test_one_sequence_without_its_dimension(kernel):
    module = made("lstm", num_layers=2, proj_size=5, dtype=torch.float64)
    x = inputs(module)
    stream, other = module.stream(), module.stream()
    out = torch.full((5,), torch.nan, dtype=torch.float64)
    for x_t in x:
        expected = other.step(x_t)
        assert expected.shape == (1, 5)
        state = stream.state
        assert_alike(kernel, stream.step(x_t[0]), expected[0])
        stream.state = state
        strided = torch.stack([x_t[0], x_t[0]], -1)[:, 1]
        assert stream.step(strided, out) is out
        assert_alike(kernel, out, expected[0])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "arguments", "error", "text"),
    [
        ({"bidirectional": True}, (), ValueError, "reverse direction begins at the end of the sequence"),
        ({}, (0,), ValueError, "batch_size must be positive, got 0"),
        ({}, (True,), TypeError, "batch_size must be an int, got bool"),
        ({}, (2.0,), TypeError, "batch_size must be an int, got float"),
        ({}, (1, torch.zeros(1, 1, 13)), TypeError, r"hx must be a tuple \(h_0, c_0\)"),
        ({}, (2, (torch.zeros(1, 2, 13), torch.zeros(1, 2, 12))), RuntimeError, r"Expected c .*\[1, 2, 13\]"),
        ({}, (2, (torch.zeros(2, 13), torch.zeros(2, 13))), RuntimeError, r"Expected h .*\[1, 2, 13\]"),
        ({}, (1, (torch.zeros(1, 1, 13).double(),) * 2), ValueError, "h of the state must be of .*float32"),
        ({}, (1, (torch.zeros(1, 1, 13, device="meta"),) * 2), RuntimeError, "same device.*meta"),
    ],
)
def test_bad_streams(options, arguments, error, text):
    with pytest.raises(error, match=text):
        made("lstm", **options).stream(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1.0],), TypeError, "x_t must be a Tensor, got list"),
        ((torch.zeros(1, 3, 7),), ValueError, "Expected x_t to be 1D or 2D, got 3D"),
        ((torch.zeros(2, 7),), RuntimeError, r"Expected x_t of shape \[3, 7\].*got \[2, 7\]"),
        ((torch.zeros(3, 8),), RuntimeError, r"Expected x_t of shape \[3, 7\].*got \[3, 8\]"),
        ((torch.zeros(7),), RuntimeError, r"Expected x_t of shape \[3, 7\].*got \[7\]"),
        ((torch.zeros(3, 7).double(),), ValueError, r"x_t must be of .*float32, got torch.float64; convert"),
        ((torch.zeros(3, 7, device="meta"),), RuntimeError, "parameters are on cpu and x_t on meta"),
        ((torch.zeros(3, 7), 1), TypeError, "out must be a Tensor, got int"),
        ((torch.zeros(3, 7), torch.zeros(3, 7)), RuntimeError, r"Expected out of shape \[3, 13\]"),
        ((torch.zeros(3, 7), torch.zeros(3, 13).half()), ValueError, r"out must be of .*float32"),
        ((torch.zeros(3, 7), torch.zeros(1, 13).expand(3, 13)), RuntimeError, "elements that share memory"),
        ((torch.zeros(3, 7), torch.zeros(3, 13, requires_grad=True)), RuntimeError, "not require grad"),
    ],
)
def test_bad_steps(kernel, arguments, error, text):
    stream = made("lstm").stream(3)
    stream.step(torch.randn(3, 7))
    state = stream.state
    with pytest.raises(error, match=text):
        stream.step(*arguments)
    assert same(stream.state, state)  # nothing half done


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_an_out_is_refused_exactly_where_its_elements_share_memory(kernel, batch_size):
    module = layernorm.LayerNormGRU(2, 5)
    stream, x_t = module.stream(batch_size), torch.randn(batch_size, 2)
    refused = 0
    for strides in itertools.product(range(8), range(8)):
        out = torch.zeros(100).as_strided((batch_size, 5), strides)
        places = {row * strides[0] + column * strides[1] for row in range(batch_size) for column in range(5)}
        stream.reset()
        if len(places) == batch_size * 5:
            expected = module.stream(batch_size).step(x_t)
            torch.testing.assert_close(stream.step(x_t, out), expected, rtol=0, atol=0)
            continue
        refused += 1
        with pytest.raises(RuntimeError, match=r"out must not have elements that share memory.*strides \("):
            stream.step(x_t, out)
    assert refused >= 8  # those of stride 0 between columns
    if batch_size == 1:
        with pytest.raises(RuntimeError, match="out must not have elements that share memory"):
            stream.step(x_t[0], torch.zeros(1).expand(5))


def test_an_out_of_other_dimensions(kernel):
    with pytest.raises(RuntimeError, match="out must have 1 dimensions like x_t, got 2"):
        made("gru").stream().step(torch.zeros(7), torch.zeros(1, 13))


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        ([True] * 3, TypeError, "resets must be a Tensor or None, got list"),
        (torch.full((3,), 0.5), ValueError, "resets must be 0 or 1, .* got 0.5"),
        (torch.ones(2).bool(), RuntimeError, r"Expected resets of shape \[3\], \(batch_size\).*got \[2\]"),
        (torch.ones(3, device="meta").bool(), RuntimeError, "is on cpu and resets on meta"),
    ],
)
def test_bad_masks(mask, error, text):
    with pytest.raises(error, match=text):
        made("gru").stream(3).reset(mask)


@pytest.mark.usefixtures("native")
def test_inside_transforms_it_refuses():
    stream = made("gru").stream()
    with pytest.raises(RuntimeError, match=r"takes plain tensors, got .*inside of transforms"):
        torch.func.vmap(stream.step)(torch.randn(2, 1, 7))


STATE, CODES = torch.zeros(1, 1, 3), layer_spec("gru", "paper").codes


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ([], None, None, (), 1e-5),
        ([], None, None, *["lstm"] * 2),
        ([[None] * 11], STATE, None, CODES, 1e-5),
        ([[]], STATE, None, CODES, 1e-5),
        ([3], STATE, None, CODES, 1e-5),
        ([[torch.zeros(9, 3)] * 11], STATE, None, list(CODES), 1e-5),
        ([[torch.zeros(9, 3)] * 11], STATE, None, ("gru", *CODES[1:]), 1e-5),
        ([[torch.zeros(9, 3)] * 2 + [None] * 9], STATE, None, CODES, 1e-5, 3),
        ([[torch.zeros(9, 3)] * 2 + [None] * 9], STATE, None, CODES, 1e-5, -1),
        ([[torch.zeros(9, 3).double()] * 2 + [None] * 9], STATE.double(), None, CODES, 1e-5, 1),
    ],
)
def test_the_compiled_type_checks_its_arguments(arguments):
    with pytest.raises((TypeError, RuntimeError)):
        layernorm.ops.native.Stream(*arguments)
