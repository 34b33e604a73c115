"""Online inference: steps have the bits of the whole sequence, however it is cut into them."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import layernorm
from layernorm import backends
from layernorm.variants import PRESETS

MODULES = {"lstm": layernorm.LayerNormLSTM, "gru": layernorm.LayerNormGRU, "rnn": layernorm.LayerNormRNN}
VARIANTS = [(cell, name) for name, cells in PRESETS.items() for cell in cells]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
T = 5


def made(cell, sizes=(7, 13), **options):
    """A module with gains and biases away from their initial 1 and 0."""
    module = MODULES[cell](*sizes, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def inputs(module, batch_size=1, steps=T):
    return torch.randn(steps, batch_size, module.input_size, dtype=next(module.parameters()).dtype)


def flat(state):
    return list(state) if isinstance(state, tuple) else [state]


def stepped(stream, x):
    return torch.stack([stream.step(x_t) for x_t in x])


def assert_same_bits(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def assert_steps_are_the_sequence(module, batch_size, steps=T):
    x = inputs(module, batch_size, steps)
    stream = module.stream(batch_size)
    output, state = module(x)
    assert_same_bits([stepped(stream, x), *flat(stream.state)], [output, *flat(state)])


# On the reference the products of a step have other shapes and other places in memory than those of the
# sequence, and so may round otherwise: 5 steps and 2 layers of sums of at most 13 float64 products, amplified
# as in test_resets.py, whose bound for 7 steps is 1e-11.
def assert_alike(kernel, actual, expected):
    tolerance = 0 if kernel == "native" else 1e-11
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(params=["native", "reference"])
def kernel(request):
    if request.param == "native":
        request.getfixturevalue("native")
    with backends.use(request.param):
        yield request.param


@pytest.fixture(params=[1, 2, 3], ids="{}-threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cell", "variant"), VARIANTS)
def test_steps_have_the_bits_of_the_sequence(cell, variant, dtype):
    projections = [{}, {"proj_size": 5}] if cell == "lstm" else [{}]
    for sizes, layers, projection in itertools.product(((7, 13), (16, 32), (1, 6)), (1, 3), projections):
        module = made(cell, sizes, num_layers=layers, variant=variant, dtype=dtype, **projection)
        for batch_size in (1, 3, 17):
            assert_steps_are_the_sequence(module, batch_size)


@pytest.mark.usefixtures("native", "threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("cell", "options", "batch_size"),
    [
        # More than 2 MiB of weights, or 2^21 products in a step: one team, or ranges of rows.
        ("lstm", {"sizes": (513, 515)}, 1),
        ("lstm", {"sizes": (384, 384), "num_layers": 2, "proj_size": 77}, 3),
        ("gru", {"sizes": (333, 515)}, 2),
        ("rnn", {"sizes": (700, 700), "num_layers": 3, "nonlinearity": "relu"}, 1),
        ("lstm", {"sizes": (200, 201), "num_layers": 2}, 17),
        ("gru", {"sizes": (64, 65)}, 131),
    ],
)
def test_the_bits_do_not_depend_on_threads(cell, options, batch_size, dtype):
    assert_steps_are_the_sequence(made(cell, dtype=dtype, **options), batch_size, steps=3)


@pytest.mark.usefixtures("native")
def test_the_number_of_threads_may_change_between_steps():
    module = made("lstm", (384, 384), num_layers=2)
    x, before = inputs(module, 2, 6), torch.get_num_threads()
    stream, outputs = module.stream(2), []
    try:
        for x_t, count in zip(x, (1, 2, 3, 1, 2, 2), strict=True):
            torch.set_num_threads(count)
            outputs.append(stream.step(x_t))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.stack(outputs), module(x)[0])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("cell", MODULES)
def test_without_biases_and_in_inference_mode(cell):
    module = made(cell, bias=False)
    x = inputs(module, 3)
    expected = module(x)[0]
    with torch.inference_mode():
        stream = module.stream(3)
        first = stepped(stream, x[:2])
        stream.reset(torch.zeros(3, dtype=torch.bool))
    stream.reset(torch.zeros(3, dtype=torch.bool))
    stream.state = stream.state
    assert torch.equal(torch.cat([first, stepped(stream, x[2:])]), expected)


@pytest.mark.parametrize("cell", MODULES)
def test_on_the_reference_steps_are_the_sequence_to_rounding(cell):
    module = made(cell, num_layers=2, dtype=torch.float64, variant="rms")
    x = inputs(module, 3)
    with backends.use("reference"):
        stream = module.stream(3)
        output, state = module(x)
    assert stream.kernel == "reference"
    actual = [stepped(stream, x), *flat(stream.state)]
    for a, e in zip(actual, [output, *flat(state)], strict=True):
        assert_alike("reference", a, e)


@pytest.mark.parametrize("cell", MODULES)
def test_the_state_can_be_taken_out_and_put_in(kernel, cell):
    module = made(cell, num_layers=2)
    x = inputs(module, 3, 6)
    stream = module.stream(3)
    stepped(stream, x[:3])
    middle = stream.state
    kept = [s.clone() for s in flat(middle)]
    expected = stepped(stream, x[3:])
    assert_same_bits(flat(middle), kept)  # a copy
    stream.state = middle
    assert torch.equal(stepped(stream, x[3:]), expected)
    other = module.stream(3, middle)
    assert torch.equal(stepped(other, x[3:]), expected)
    assert_same_bits(flat(other.state), flat(stream.state))
    for s in flat(middle):  # what was given is not written to
        s.fill_(7)
    assert not torch.equal(flat(other.state)[0], flat(middle)[0])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("cell", MODULES)
def test_it_goes_on_from_the_modules_state(cell):
    module = made(cell, num_layers=2)
    x = inputs(module, 3, 6)
    expected = module(x)[0]
    stream = module.stream(3, module(x[:4])[1])
    assert torch.equal(stepped(stream, x[4:]), expected[4:])
    alone = module.stream(state=module(x[:4, 1])[1])  # of one sequence, without N
    assert torch.equal(stepped(alone, x[4:, 1]), expected[4:, 1])


@pytest.mark.parametrize("cell", MODULES)
def test_a_reset_is_a_reset_of_the_sequence(kernel, cell):
    module = made(cell, num_layers=2, dtype=torch.float64)
    x = inputs(module, 4, 6)
    resets = torch.rand(6, 4) < 0.4
    stream, outputs = module.stream(4), []
    for x_t, mask in zip(x, resets, strict=True):
        stream.reset(mask)
        outputs.append(stream.step(x_t))
    assert_alike(kernel, torch.stack(outputs), module(x, resets=resets)[0])
    stream.reset()
    assert all(not s.any() for s in flat(stream.state))


@pytest.mark.parametrize("cell", MODULES)
def test_a_nan_stays_in_its_row_until_a_reset(kernel, cell):
    module = made(cell, num_layers=2)
    x = inputs(module, 3, 4)
    stream, clean = module.stream(3), module.stream(3)
    spoiled = x.clone()
    spoiled[0, 1, 2] = torch.nan
    outputs, expected = stepped(stream, spoiled[:2]), stepped(clean, x[:2])
    assert outputs[:, 1].isnan().all()
    assert torch.equal(outputs[:, ::2], expected[:, ::2])
    mask = torch.tensor([False, True, False])
    for one in (stream, clean):
        one.reset(mask)
    assert torch.equal(stepped(stream, x[2:]), stepped(clean, x[2:]))


def test_parameters_are_those_of_the_last_refresh(kernel):
    module = made("lstm", num_layers=2)
    x = inputs(module)
    stream, before = module.stream(), stepped(module.stream(), x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    assert torch.equal(stepped(stream, x), before)
    stream.reset()
    stream.refresh()
    expected = stepped(module.stream(), x)
    assert torch.equal(stepped(stream, x), expected)
    assert not torch.equal(expected, before)


def test_refresh_keeps_the_state_and_refuses_another_dtype():
    module = made("gru")
    stream = module.stream()
    stream.step(inputs(module)[0])
    state = stream.state
    stream.refresh()
    assert torch.equal(stream.state, state)
    module.double()
    with pytest.raises(RuntimeError, match=r"was torch.float32 .* now torch.float64.*make another"):
        stream.refresh()


def test_it_keeps_working_when_its_module_and_state_are_gone(kernel):
    module = made("lstm")
    x = inputs(module)
    expected = stepped(module.stream(), x)
    stream = module.stream(state=tuple(torch.zeros(1, 1, 13) for _ in range(2)))
    for parameter in module.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)  # its memory is given back
    del module
    assert torch.equal(stepped(stream, x), expected)


def test_dropout_and_autocast_have_no_effect(kernel):
    module = made("lstm", num_layers=3, dropout=0.5)
    x = inputs(module, 3)
    stream = module.stream(3)
    module.eval()
    expected = stepped(module.stream(3), x)
    assert torch.equal(stepped(stream, x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stepped(module.stream(3), x), expected)


@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in-place"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda: torch.empty(T, 3, 13, dtype=torch.float64),
        lambda: torch.empty(3, T, 13, dtype=torch.float64).transpose(0, 1),
        lambda: torch.empty(T, 13, 3, dtype=torch.float64).mT,
        lambda: torch.empty(T, 6, 26, dtype=torch.float64)[:, ::2, ::2],
    ],
    ids=["contiguous", "rows-apart", "columns", "apart"],
)
@pytest.mark.parametrize("cell", MODULES)
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
    memory, before = torch.zeros(96, 256), torch.get_num_threads()
    torch.set_num_threads(8)  # more than there are processors, so that some begin late
    try:
        stream = module.stream(64)
        for _ in range(20):
            stream.reset()
            assert torch.equal(stream.step(memory[32:].copy_(x), memory[:64]), expected)
            stream.reset()
            assert torch.equal(stream.step(memory[:64].copy_(x), memory[32:]), expected)
    finally:
        torch.set_num_threads(before)


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


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x, x], 1)[:, : x.size(1)],
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.clone().requires_grad_(),
        torch.nn.Parameter,
        lambda x: x.clone().as_subclass(Named),
        lambda x: torch.complex(x, -x).conj().imag,
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    ],
    ids=["columns", "rows-apart", "apart", "requires-grad", "parameter", "subclass", "negative", "unaligned"],
)
def test_any_layout_of_the_input(kernel, layout):
    module = made("lstm", dtype=torch.float64)
    x = inputs(module, 3)[0]
    expected = module.stream(3).step(x)
    given = layout(x)
    assert torch.equal(given, x)
    result = module.stream(3).step(given)
    assert_alike(kernel, result.as_subclass(torch.Tensor), expected)
    assert not result.requires_grad


@pytest.mark.parametrize("shape", [(1, 7), (3, 1), (1, 1)])
def test_expanded_input(kernel, shape):
    module = made("lstm", dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64).expand(3, 7)
    assert_alike(kernel, module.stream(3).step(x), module.stream(3).step(x.contiguous()))


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


@pytest.mark.usefixtures("native")
def test_a_step_allocates_nothing_but_its_result():
    module = made("lstm", (16, 64), num_layers=3)
    x, stream, out = inputs(module, 3), module.stream(3), torch.empty(3, 64)
    stream.step(x[0], out)  # the working memory is taken with the first step

    def allocated(*arguments):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            for _ in range(4):
                stream.step(*arguments)
        events = found.profiler.kineto_results.events()
        assert not [e.name() for e in events if e.name().startswith("aten::")]
        return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]

    assert allocated(x[0], out) == []
    assert allocated(x[0].mT.contiguous().mT, out.mT.contiguous().mT) == []
    assert allocated(x[0]) == [3 * 64 * 4] * 4


@pytest.mark.usefixtures("native")
def test_threads_with_a_stream_each():
    module = made("lstm", (64, 512), num_layers=2)
    x = inputs(module, 2, 20)
    expected, results = module(x)[0], {}

    def run(index):
        results[index] = stepped(module.stream(2), x)

    runners = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert_same_bits([results[index] for index in range(3)], [expected] * 3)


@pytest.mark.usefixtures("native")
def test_a_second_thread_in_the_same_step_is_refused():
    module = made("lstm", (256, 256))
    stream, x = module.stream(256), torch.randn(256, 256)
    stop, errors = threading.Event(), []

    def run():
        while not stop.is_set():
            try:
                stream.step(x)
            except RuntimeError as error:
                errors.append(str(error))
                stop.set()

    runners = [threading.Thread(target=run) for _ in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(timeout=60)
    stop.set()
    assert errors
    assert "another thread is taking a step; give each thread a stream" in errors[0]
    stream.step(x)


def test_it_is_not_copied():
    stream = made("gru").stream()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(
            TypeError, match=r"neither copied nor pickled.*module.stream\(batch_size, state\)"
        ):
            attempt(stream)


def test_it_shows_what_it_is(kernel):
    text = repr(made("lstm", num_layers=2).stream(3))
    assert text.startswith(
        f"<LayerNormLSTM.stream: batch_size=3, kernel='{kernel}', LayerNormLSTM(7, 13, num"
    )


def test_which_kernel_serves(native):
    module = made("gru")
    assert module.stream().kernel == "native"
    assert module.half().stream().kernel == "native"
    module.weight_ih_l0 = torch.nn.Parameter(module.weight_ih_l0.double())
    assert module.stream().kernel == "reference"


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
    assert_same_bits(stream.state, state)  # nothing half done


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
        ([True] * 3, TypeError, "mask must be a bool Tensor or None, got list"),
        (torch.ones(3), ValueError, "mask must be of dtype torch.bool, got torch.float32"),
        (torch.ones(2).bool(), RuntimeError, r"Expected mask of shape \[3\].*got \[2\]"),
        (torch.ones(3, device="meta").bool(), RuntimeError, "state is on cpu and mask on meta"),
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


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ([], None, None, *["lstm"] * 5, 1.0),
        ([[None] * 11], torch.zeros(1, 1, 3), None, "gru", "layer", "separate", "matrix", "none", 1e-5),
        ([[]], torch.zeros(1, 1, 3), None, "gru", "layer", "separate", "matrix", "none", 1e-5),
        ([3], torch.zeros(1, 1, 3), None, "gru", "layer", "separate", "matrix", "none", 1e-5),
    ],
)
def test_the_compiled_type_checks_its_arguments(arguments):
    with pytest.raises((TypeError, RuntimeError)):
        layernorm.ops.native.Stream(*arguments)
