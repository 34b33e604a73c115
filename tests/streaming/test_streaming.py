"""Online inference: steps have the bits of the whole sequence, however it is cut into them."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from layernorm import backends, ops
from layernorm.variants import PRESETS
from tests.recurrent.cases import DTYPES, SEQUENCES, flat, same
from tests.settings import thread_count
from tests.streaming.cases import STEPS, assert_alike, inputs, made, stepped

VARIANTS = [(cell, name) for name, cells in PRESETS.items() for cell in cells]
every_cell = pytest.mark.parametrize("cell", SEQUENCES)


def assert_steps_are_the_sequence(module, batch_size, steps=STEPS):
    x = inputs(module, batch_size, steps)
    stream = module.stream(batch_size)
    output, state = module(x)
    assert same([stepped(stream, x), *flat(stream.state)], [output, *flat(state)])


@pytest.fixture(params=[1, 2, 3], ids="{}-threads".format)
def threads(request):
    with thread_count(request.param):
        yield request.param


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
    x, stream, outputs = inputs(module, 2, 6), module.stream(2), []
    for x_t, count in zip(x, (1, 2, 3, 1, 2, 2), strict=True):
        with thread_count(count):
            outputs.append(stream.step(x_t))
    assert torch.equal(torch.stack(outputs), module(x)[0])


@pytest.mark.usefixtures("native")
@every_cell
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


@every_cell
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


@every_cell
def test_the_state_can_be_taken_out_and_put_in(kernel, cell):
    module = made(cell, num_layers=2)
    x = inputs(module, 3, 6)
    stream = module.stream(3)
    stepped(stream, x[:3])
    middle = stream.state
    kept = [s.clone() for s in flat(middle)]
    expected = stepped(stream, x[3:])
    assert same(flat(middle), kept)  # a copy
    stream.state = middle
    assert torch.equal(stepped(stream, x[3:]), expected)
    other = module.stream(3, middle)
    assert torch.equal(stepped(other, x[3:]), expected)
    assert same(flat(other.state), flat(stream.state))
    for s in flat(middle):  # what was given is not written to
        s.fill_(7)
    assert not torch.equal(flat(other.state)[0], flat(middle)[0])


@pytest.mark.usefixtures("native")
@every_cell
def test_it_continues_from_the_modules_state(cell):
    module = made(cell, num_layers=2)
    x = inputs(module, 3, 6)
    expected = module(x)[0]
    stream = module.stream(3, module(x[:4])[1])
    assert torch.equal(stepped(stream, x[4:]), expected[4:])
    alone = module.stream(state=module(x[:4, 1])[1])  # of one sequence, without N
    assert torch.equal(stepped(alone, x[4:, 1]), expected[4:, 1])


@every_cell
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


@every_cell
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


@pytest.mark.usefixtures("native")
def test_a_step_allocates_nothing_but_its_result():
    assert ops.native.reached()["allocation"]
    module = made("lstm", (16, 64), num_layers=3)
    x, stream, out = inputs(module, 3), module.stream(3), torch.empty(3, 64)
    stream.step(x[0], out)  # the working memory is taken with the first step

    def allocated(*arguments):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            for _ in range(4):
                stream.step(*arguments)
        events = found.profiler.kineto_results.events()
        operators = [e.name() for e in events if e.name().startswith("aten::")]
        assert operators == []
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
    assert same([results[index] for index in range(3)], [expected] * 3)


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


def test_the_kernel_depends_on_the_types(native):
    module = made("gru")
    assert module.stream().kernel == "native"
    assert module.half().stream().kernel == "native"
    module.weight_ih_l0 = torch.nn.Parameter(module.weight_ih_l0.double())
    assert module.stream().kernel == "reference"
