"""The promises of the compiled recurrent kernels: to the bit, for bad rows, for extreme numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

import layernorm
from layernorm import Variant, backends
from tests.recurrent.cases import (
    DTYPES,
    FUNCTIONS,
    HALVES,
    Layer,
    assert_packed_rows_are_alone,
    assert_rows_are_alone,
    assert_same_results,
    every_function,
    every_function_and_type,
    same,
)
from tests.settings import CAPABILITIES, instruction_set, thread_count

pytestmark = pytest.mark.usefixtures("native", "one_thread")


def by_threads(count, call, *arguments, **options):
    """Return the result of a call with this many threads."""
    with thread_count(count):
        return call(*arguments, **options)


# ---- the same bits ----


@every_function_and_type
def test_for_any_number_of_threads_and_run_to_run(cell, variant, dtype):
    # 9·24·129·(65 + 129) products for each gate, over 2^21: threads have rows of their own.
    layer = Layer(cell, variant, 65, 129, dtype)
    given, resets = layer.drawn(9, 24), torch.rand(9, 24) < 0.1
    one, *others = (by_threads(n, layer, *given, resets=resets) for n in (1, 2, 2, 3))
    for other in others:
        assert_same_results(one, other)


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize(
    ("cell", "variant", "proj"),
    [
        ("lstm", "paper", 0),
        ("lstm", "icefall", 100),
        ("gru", "paper", 0),
        ("gru", "icefall", 0),
        ("rnn", "paper", 0),
    ],
)
def test_for_threads_that_share_the_columns_of_few_rows(cell, variant, proj, rows):
    # A team needs 2^17 weights of the state, and 2^21 products in all.
    hidden = {"lstm": 183, "gru": 213, "rnn": 367}[cell] * (1 + (proj > 0))
    for dtype, recompute in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        layer = Layer(cell, variant, 130, hidden, dtype, proj)
        given, resets = layer.drawn(17, rows), torch.rand(17, rows) < 0.1
        one, *others = (by_threads(n, layer, *given, resets=resets, recompute=recompute) for n in (1, 2, 3))
        for other in others:
            assert_same_results(one, other)


@every_function_and_type
def test_alone_and_in_any_batch(cell, variant, dtype):
    for features, hidden, rows in ((5, 7, 11), (33, 40, 6), (64, 65, 70)):
        layer = Layer(cell, variant, features, hidden, dtype)
        given = layer.drawn(6, rows)
        whole, some = layer(*given), [0, rows // 2, rows - 1]
        for part in (*([row] for row in some), some):
            assert_rows_are_alone(layer, *given, whole, part)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_alone_and_in_any_batch_on_every_instruction_set(capability):
    with instruction_set(capability):
        for dtype, function in itertools.product(DTYPES, FUNCTIONS[::3]):
            layer = Layer(*function, 33, 40, dtype)
            given = layer.drawn(6, 11)
            assert_rows_are_alone(layer, *given, layer(*given), [4])


@pytest.mark.parametrize("proj", [0, 17])
def test_alone_and_in_any_batch_with_a_projection(proj):
    for dtype in DTYPES:
        layer = Layer("lstm", Variant(), 20, 41, dtype, proj)
        given = layer.drawn(6, 9)
        assert_rows_are_alone(layer, *given, layer(*given), [4])


@every_function_and_type
def test_for_any_split_of_the_sequence_at_its_state(cell, variant, dtype):
    layer = Layer(cell, variant, 5, 35, dtype)
    steps, rows = 60, 4  # more rows than are projected together
    x, state, _ = layer.drawn(steps, rows)
    whole = layer.forward(x, state)
    for cut in (1, 24, 37, steps - 1):
        first, *between = layer.forward(x[:cut], state)
        second, *final = layer.forward(x[cut:], between)
        assert same([torch.cat([first, second]), *final], whole)
    # Without a derivative nothing is kept, and the state has a place of its own.
    with torch.no_grad():
        assert same(layer.forward(x, state), whole)
        pieces, between = [], state
        for step in x.split(1):
            output, *between = layer.forward(step, between)
            pieces.append(output)
    assert same([torch.cat(pieces), *between], whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_function
def test_gradients_for_any_split_of_the_sequence(cell, variant, dtype):
    layer = Layer(cell, variant, 5, 35, dtype)
    x, state, seeds = layer.drawn(12, 4)
    _, whole, _ = layer(x, state, seeds)
    leaves = [t.requires_grad_() for t in (x.clone(), *(s.clone() for s in state))]
    first, *between = layer.forward(leaves[0][:5], leaves[1:])
    second, *final = layer.forward(leaves[0][5:], between)
    assert same(torch.autograd.grad([torch.cat([first, second]), *final], leaves, seeds), whole)


@every_function
def test_in_reverse_as_flipped(cell, variant):
    layer = Layer(cell, variant, 5, 35)
    x, state, seeds = layer.drawn(30, 6)
    resets = torch.rand(30, 6) < 0.2
    # A reset parts its step from the one before; flipped, that is the one after.
    turned = torch.cat([torch.zeros(1, 6, dtype=torch.bool), resets[1:].flip(0)])
    outputs, grads, weights = layer(x, state, seeds, reverse=True, resets=resets)
    flipped = layer(x.flip(0), state, [seeds[0].flip(0), *seeds[1:]], resets=turned)
    assert same([flipped[0][0].flip(0), *flipped[0][1:]], outputs)
    assert same([flipped[1][0].flip(0), *flipped[1][1:]], grads)
    # Sums over the rows of a chunk have another order: as many roundings, √180 units of what is summed.
    for a, b in zip(flipped[2], weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=float(180 * 2**-24 * b.abs().max()))


@every_function_and_type
def test_with_what_forward_kept_and_recomputed(cell, variant, dtype):
    for rows in (5, 70):
        layer = Layer(cell, variant, 19, 35, dtype)
        given, resets = layer.drawn(20, rows), torch.rand(20, rows) < 0.2
        kept, computed = (layer(*given, resets=resets, recompute=r) for r in (False, True))
        if dtype not in HALVES:
            assert_same_results(kept, computed)
            continue
        assert same(kept[0], computed[0])
        # What is kept of a half precision is rounded to it, what is recomputed is not: a unit of each
        # normalized number, and as many units of a gradient as it passes steps.
        for a, b in zip((*kept[1], *kept[2]), (*computed[1], *computed[2]), strict=True):
            error = (a.float() - b.float()).abs().max()
            assert error <= 20 * torch.finfo(dtype).eps * (1 + b.float().abs().max())


@pytest.mark.parametrize("reverse", [False, True])
@every_function
def test_packed_as_each_row_alone(cell, variant, reverse):
    for dtype, recompute in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        layer = Layer(cell, variant, 6, 33, dtype)
        assert_packed_rows_are_alone(
            layer, [40, 40, 31, 17, 17, 9, 2, 1, 1], reverse=reverse, recompute=recompute
        )


# ---- bad rows, extreme numbers, lengths ----


@every_function_and_type
def test_a_bad_row_harms_no_other(cell, variant, dtype):
    layer = Layer(cell, variant, 6, 33, dtype)
    x, state, seeds = layer.drawn(5, 9)
    outputs, grads, _ = layer(x, state, seeds)
    bad, bad_state, bad_seeds = x.clone(), [s.clone() for s in state], [s.clone() for s in seeds]
    bad[2, 1, 0], bad[0, 4, 3], bad[4, 5, 5] = float("nan"), float("inf"), -float("inf")
    bad_state[0][2, 1] = float("nan")
    bad_seeds[0][3, 7] = float("nan")
    others = [0, 3, 6, 8]
    for recompute in (False, True):
        found, found_grads, _ = layer(bad, bad_state, bad_seeds, recompute=recompute)
        assert found[0][2:, 1].isnan().all()
        assert torch.equal(found[0][:2, 1], outputs[0][:2, 1])
        assert found[0][:, 2].isnan().all()
        assert same([t[..., others, :] for t in found], [t[..., others, :] for t in outputs])
        assert found_grads[0][:4, 7].isnan().any()
        if recompute and dtype in HALVES:
            grads = layer(x, state, seeds, recompute=True)[1]
        assert same([t[..., others, :] for t in found_grads], [t[..., others, :] for t in grads])


@every_function
def test_a_reset_forgets_what_a_row_had_even_nan(cell, variant):
    layer = Layer(cell, variant, 6, 33)
    x, state, seeds = layer.drawn(5, 3)
    state[0][1], state[-1][1], x[0, 2] = float("nan"), float("inf"), float("nan")
    resets = torch.zeros(5, 3, dtype=torch.bool)
    resets[0, 1] = resets[1, 2] = True
    seeds[0][0, 2] = 0
    for recompute in (False, True):
        outputs, grads, weights = layer(x, state, seeds, resets=resets, recompute=recompute)
        assert outputs[0][:, 1].isfinite().all()
        assert outputs[0][1:, 2].isfinite().all()
        assert grads[0][1:].isfinite().all()
        assert not grads[1][1].any()
        zeros = [s.clone() for s in state]
        for s in zeros:
            s[1] = 0
        clean = layer(x, zeros, seeds, resets=resets, recompute=recompute)
        assert same([t[:, :2] for t in outputs[:1]], [t[:, :2] for t in clean[0][:1]])
        assert torch.equal(weights[1].isnan(), clean[2][1].isnan())


def in_float64(layer, x, state, seeds):
    """Return the reference's results in float64 on the same numbers."""
    with backends.use("reference"):
        return layer.in_float64()(x.double(), [s.double() for s in state], [s.double() for s in seeds])


@pytest.mark.parametrize("size", [1e20, 1e30, 1e-20, 1e-38])
@every_function
def test_numbers_whose_squares_float32_cannot_hold(cell, variant, size):
    if not variant.normalizes_gates and size > 1:
        size = 1e10  # not normalized: a sum of products is as large as it is
    layer = Layer(cell, variant, 6, 33)
    # Every other row is ordinary: its bits do not change.
    x, state, seeds = layer.drawn(5, 6)
    ordinary = layer(x, state, seeds)
    x[:, ::2] *= size
    outputs, grads, _ = layer(x, state, seeds)
    assert same([t[..., 1::2, :] for t in outputs], [t[..., 1::2, :] for t in ordinary[0]])
    assert same([t[..., 1::2, :] for t in grads], [t[..., 1::2, :] for t in ordinary[1]])
    expected, expected_grads, _ = in_float64(layer, x, state, seeds)
    # 5 steps of sums of 39 products: √39·5 units of 6e-8, amplified up to ten times by the norms.
    for a, e in zip(outputs, expected, strict=True):
        assert a.isfinite().all()
        assert (a.double() - e).abs().max() <= 31 * 10 * 2**-24 * (1 + e.abs().max())
    for row in range(0, 6, 2):
        for a, e in zip(grads, expected_grads, strict=True):
            a, e = a[..., row, :], e[..., row, :]
            assert a.isfinite().all()
            # A saturated sigmoid is e^-87 and not 0; what is below float32's range is not there.
            largest = max(float(e.abs().max()), 1e-33)
            assert (a.double() - e).abs().max() <= 31 * 100 * 2**-24 * largest


def test_a_large_state_of_the_cell():
    for variant in ("paper", "fastrnns", "none"):
        layer = Layer("lstm", variant, 6, 33)
        x, state, seeds = layer.drawn(4, 3)
        state[1][1] *= 1e25
        outputs, grads, _ = layer(x, state, seeds)
        expected = in_float64(layer, x, state, seeds)
        for row in range(3):
            for a, e in zip((*outputs, *grads), (*expected[0], *expected[1]), strict=True):
                a, e = a[..., row, :], e[..., row, :]
                assert (a.double() - e).abs().max() <= 31 * 100 * 2**-24 * float(e.abs().max() + 1)


@pytest.mark.parametrize("steps", [1, 10_000])
@pytest.mark.parametrize(
    ("cell", "variant"), [("lstm", "paper"), ("gru", "paper"), ("rnn", "paper"), ("gru", "icefall")]
)
def test_lengths(cell, variant, steps):
    layer = Layer(cell, variant, 2, 5, torch.float64)
    x, state, seeds = layer.drawn(steps, 2)
    outputs, grads, weights = layer(x, state, seeds)
    assert_same_results((outputs, grads, weights), layer(x, state, seeds, recompute=True))
    # In pieces of 100 steps: the same outputs, and the same gradient of the last piece's input.
    pieces, between = [], state
    for part in x.split(100):
        output, *between = layer.forward(part, between)
        pieces.append(output.detach())
    assert same([torch.cat(pieces), *between], outputs)
    if steps > 100:
        between = [t.detach() for t in layer.forward(x[:-100], state)[1:]]
        _, tail, _ = layer(x[-100:], between, [seeds[0][-100:], *seeds[1:]])
        assert torch.equal(tail[0], grads[0][-100:])


def test_a_module_over_layers_directions_and_threads():
    lstm = layernorm.LayerNormLSTM(40, 65, 2, bidirectional=True)
    x = torch.randn(30, 9, 40, requires_grad=True)
    leaves = [x, *lstm.parameters()]
    found = []
    for threads in (1, 2, 3):
        output, (h, c) = by_threads(threads, lstm, x)
        loss = output.square().sum() + h.sum() + c.sum()
        found.append([output, *by_threads(threads, torch.autograd.grad, loss, leaves)])
    assert same(found[0], found[1])
    assert same(found[0], found[2])
