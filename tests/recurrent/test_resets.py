"""Episodes that end inside a sequence: a reset is a cut, and its pieces are sequences of their own."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import layernorm
from layernorm import Variant
from layernorm import functional as LF
from tests.recurrent import cases
from tests.recurrent.cases import (
    ALL_FUNCTIONS,
    CELLS,
    RESET_BEFORE,
    SEQUENCES,
    F,
    H,
    as_function,
    as_hx,
    called,
    flat,
    module_state,
    of_functions,
    same,
    state_of,
    weights_of,
)

VARIANTS = [
    *(("lstm", name) for name in ("paper", "rms", "none", "fastrnns", "icefall", "tflite")),
    *(("gru", name) for name in ("paper", "haste", "icefall", "sheeprl")),
    *(("rnn", name) for name in ("paper", "none")),
]

# Two ways to compute the same float64 numbers differ in the order of their sums. Every number here is below
# 20 (|h| <= 1, |c| <= 7, gains and weights under 2); 2 layers of 7 steps, each a sum of at most 13 products
# whose norm may amplify by gain/std, under 10: 2·7·13·10·20 roundings of 2.2e-16 in all, 8e-12. A derivative
# passes the same sums once more, and sums over all 28 rows.
TOL = 1e-11
GRAD_TOL = 30 * TOL

T, N = 7, 4
# Rows with a reset at the first step, at the last, at neighbours, and without any.
RESETS = torch.tensor(
    [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
).bool()


NO_RESETS = torch.zeros_like(RESETS)
with_and_without = pytest.mark.parametrize("resets", [RESETS, None], ids=["resets", "no resets"])


def made(cell, variant="paper", **options):
    """Return a float64 module with random parameters."""
    return cases.made(cell, dtype=torch.float64, variant=variant, **options)


def drawn(module):
    """Return a random input and initial state."""
    return torch.randn(T, N, F, dtype=torch.float64, requires_grad=True), module_state(module, N)


def in_pieces(module, x, resets, state):
    """Run one sequence x (T, F) cut before every reset, each piece by itself without any resets.

    A forward direction has the initial state in the first piece, unless there is a reset at its first step,
    and its final state is the last piece's; for a reverse direction it is the other way round.
    """
    cuts = [0, *(t for t in range(1, len(x)) if resets[t]), len(x)]
    backward = torch.zeros(module.num_layers * (1 + module.bidirectional), 1, dtype=torch.bool)
    backward[1::2] = module.bidirectional
    outputs, finals = [], []
    for begin, end in itertools.pairwise(cuts):
        entered = (~backward & (begin == 0 and not resets[0])) | (backward & (end == len(x)))
        hx = None if state is None else [torch.where(entered, s, torch.zeros_like(s)) for s in state]
        output, final = module(x[begin:end], as_hx(hx))
        outputs.append(output)
        finals.append(flat(final))
    final = [torch.where(backward, a, b) for a, b in zip(finals[0], finals[-1], strict=True)]
    return torch.cat(outputs), final


def expected_rows(module, x, resets, state, lengths=None):
    """Return the padded output (T, N, ·) and final states, computed row by row and piece by piece."""
    outputs, finals = [], []
    for row in range(x.size(1)):
        length = lengths[row] if lengths else len(x)
        alone = None if state is None else [s[:, row] for s in state]
        output, final = in_pieces(module, x[:length, row], resets[:length, row], alone)
        outputs.append(torch.nn.functional.pad(output, (0, 0, 0, len(x) - length)))
        finals.append(final)
    return torch.stack(outputs, 1), [torch.stack(parts, 1) for parts in zip(*finals, strict=True)]


def assert_alike(module, actual, expected, inputs):
    """Check outputs, final states, and the derivatives of a random sum of them all."""
    results = [[output, *final] for output, final in (actual, expected)]
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=TOL)
    seeds = [torch.randn_like(e) for e in results[1]]
    wanted = [*inputs, *module.parameters()]
    grads = [torch.autograd.grad(r, wanted, seeds, materialize_grads=True) for r in results]
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=GRAD_TOL, atol=GRAD_TOL)


@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "given"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "deep"])
@pytest.mark.parametrize(("cell", "variant"), VARIANTS)
def test_a_reset_cuts_the_sequence(cell, variant, options, initial):
    module = made(cell, variant, **options)
    x, state = drawn(module)
    state = state if initial else None
    output, final = module(x, as_hx(state), resets=RESETS)
    expected = expected_rows(module, x, RESETS, state)
    assert_alike(module, (output, flat(final)), expected, [x, *(state or [])])


@with_and_without
@pytest.mark.parametrize("cell", SEQUENCES)
def test_layouts(cell, resets):
    module = made(cell, num_layers=2, bidirectional=True)
    x, state = drawn(module)
    output, final = module(x, as_hx(state), resets=resets)
    first = copy.deepcopy(module)
    first.batch_first = True
    turned, last = first(x.transpose(0, 1), as_hx(state), resets=None if resets is None else resets.T)
    assert torch.equal(turned.transpose(0, 1), output)
    assert same(flat(last), flat(final))
    for row in range(N):
        mask = None if resets is None else resets[:, row]
        alone, last = module(x[:, row], as_hx([s[:, row] for s in state]), resets=mask)
        torch.testing.assert_close(alone, output[:, row], rtol=0, atol=TOL)
        for a, b in zip(flat(last), flat(final), strict=True):
            torch.testing.assert_close(a, b[:, row], rtol=0, atol=TOL)


@with_and_without
@pytest.mark.parametrize("lengths", [[7, 6, 6, 1], [4, 7, 3, 6]], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "given"])
@pytest.mark.parametrize("cell", SEQUENCES)
def test_packed_sequences(cell, initial, bidirectional, lengths, resets):
    module = made(cell, num_layers=2, bidirectional=bidirectional)
    x, state = drawn(module)
    state = state if initial else None
    is_sorted = lengths == sorted(lengths, reverse=True)
    mask = NO_RESETS if resets is None else resets
    packed, packed_mask = (pack_padded_sequence(a, lengths, enforce_sorted=is_sorted) for a in (x, mask))
    output, final = module(packed, as_hx(state), resets=None if resets is None else packed_mask)
    expected = expected_rows(module, x, mask, state, lengths)
    padded, found_lengths = pad_packed_sequence(output)
    assert found_lengths.tolist() == lengths
    assert_alike(module, (padded, flat(final)), expected, [x, *(state or [])])


def test_a_projection_is_reset_too():
    module = made("lstm", num_layers=2, bidirectional=True, proj_size=2)
    x, state = drawn(module)
    output, final = module(x, as_hx(state), resets=RESETS)
    assert_alike(module, (output, flat(final)), expected_rows(module, x, RESETS, state), [x, *state])


@pytest.mark.parametrize("cell", SEQUENCES)
def test_no_gradient_crosses_a_boundary(cell):
    module = made(cell, num_layers=2, bidirectional=True)
    x, state = drawn(module)
    resets = torch.zeros(T, N, dtype=torch.bool)
    resets[3] = True
    output, _ = module(x, as_hx(state), resets=resets)
    before, after = slice(3), slice(3, None)
    # The forward direction's initial state enters before the boundary, the reverse one's after it.
    for own, other, near, far in ((before, after, 0, 1), (after, before, 1, 0)):
        seed = torch.randn_like(output[own])  # at random, so that no zero comes from a cancelling sum
        of_x, *of_state = torch.autograd.grad(output[own], [x, *state], seed, retain_graph=True)
        assert (of_x[other] == 0).all()
        assert (of_x[own] != 0).any()
        for grad in of_state:
            assert (grad[far::2] == 0).all()
            assert (grad[near::2] != 0).any()
    # Without the boundary it does cross, both ways.
    output, _ = module(x, as_hx(state))
    assert (torch.autograd.grad(output[:3].sum(), x, retain_graph=True)[0][3:] != 0).any()
    assert (torch.autograd.grad(output[3:].sum(), x)[0][:3] != 0).any()


def operands(cell):
    """Return a random input, state and weights of one layer."""
    x = torch.randn(T, N, F, dtype=torch.float64)
    return x, [t.detach() for t in state_of(cell, N)], weights_of(cell)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", SEQUENCES)
def test_no_reset_changes_no_bit(cell, reverse):
    x, state, weights = operands(cell)
    plain = called(cell, x, state, weights, reverse=reverse)
    assert same(called(cell, x, state, weights, reverse=reverse, resets=NO_RESETS), plain)


@pytest.mark.parametrize("cell", SEQUENCES)
def test_a_reset_at_the_first_step(cell):
    x, state, weights = operands(cell)
    first = torch.zeros(T, N, dtype=torch.bool)
    first[0] = True
    # In reverse there is nothing beyond it to part from.
    plain = called(cell, x, state, weights, reverse=True)
    assert same(called(cell, x, state, weights, reverse=True, resets=first), plain)
    # Forward it sets the initial state aside, whatever is in it.
    zeros = called(cell, x, [torch.zeros_like(s) for s in state], weights)
    broken = [torch.full_like(s, float("nan"), requires_grad=True) for s in state]
    broken[0].data[0] = float("inf")
    results = called(cell, x, broken, weights, resets=first)
    assert same(results, zeros)
    total = sum(r.sum() for r in results)
    *grads, of_weight = torch.autograd.grad(total, [*broken, weights["weight_hh"]])
    assert all((g == 0).all() for g in grads)
    assert of_weight.isfinite().all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", SEQUENCES)
def test_a_nan_stays_in_its_episode(cell, reverse):
    x, state, weights = operands(cell)
    resets = torch.zeros(T, N, dtype=torch.bool)
    resets[3, 1] = True
    clean = called(cell, x, state, weights, reverse=reverse, resets=resets)
    x[4 if reverse else 1, 1] = float("nan")
    output, *final = called(cell, x, state, weights, reverse=reverse, resets=resets)
    broken = torch.zeros(T, N, dtype=torch.bool)
    broken[slice(3, 5) if reverse else slice(1, 3), 1] = True
    assert output[broken].isnan().all()
    assert torch.equal(output[~broken], clean[0][~broken])
    assert same(final, clean[1:])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("cell", "variant"),
    [
        ("lstm", Variant(eps=0.5)),
        ("lstm", Variant(inputs="summed", scope="gate", cell="carried", projection_bias=True, eps=0.5)),
        ("gru", Variant(eps=0.5)),
        ("gru", Variant(inputs="summed", scope="all", eps=0.5)),
        ("rnn", Variant(kind="rms", inputs="summed", eps=0.5)),
    ],
)
def test_derivatives_of_both_orders(cell, variant, reverse, packed):
    # A large eps keeps curvature within what finite differences of two orders can resolve.
    x = torch.randn(*((5,) if packed else (5, 1)), F, dtype=torch.float64, requires_grad=True)
    resets = torch.tensor([0, 1, 1, 0, 0] if packed else [0, 0, 1, 1, 0]).bool().view(x.shape[:-1])
    options = {"variant": variant, "reverse": reverse, "resets": resets}
    if packed:
        options["batch_sizes"] = [2, 2, 1]
    state, weights = state_of(cell, 2 if packed else 1), weights_of(cell, variant)
    function, leaves = as_function(cell, weights, **options), (x, *state, *weights.values())
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves, fast_mode=True)


@with_and_without
@of_functions([*ALL_FUNCTIONS, *RESET_BEFORE, *VARIANTS])
def test_a_sequence_is_its_cell_step_by_step(cell, variant, resets):
    sequence = made(cell, variant)
    single = CELLS[cell](F, H, dtype=torch.float64, variant=variant)
    single.load_state_dict({n.removesuffix("_l0"): p for n, p in sequence.state_dict().items()})
    x, state = drawn(sequence)
    output, final = sequence(x, as_hx(state), resets=resets)
    hx = as_hx([s[0] for s in state])
    alone = as_hx([s[0, 2] for s in state])
    for t in range(T):
        hx = single(x[t], hx, resets=None if resets is None else resets[t])
        alone = single(x[t, 2], alone, resets=None if resets is None else resets[t, 2])
        torch.testing.assert_close(flat(hx)[0], output[t], rtol=0, atol=TOL)
        torch.testing.assert_close(flat(alone)[0], output[t, 2], rtol=0, atol=TOL)
    for a, b in zip(flat(hx), flat(final), strict=True):
        torch.testing.assert_close(a, b[0], rtol=0, atol=TOL)


@pytest.mark.parametrize("cell", SEQUENCES)
def test_a_single_step_discards_a_nan_state(cell):
    single = CELLS[cell](F, H)
    x = torch.randn(N, F)
    state = as_hx([torch.full((N, H), float("nan")) for _ in range(1 + (cell == "lstm"))])
    resets = torch.tensor([True, False, True, True])
    for a, zeros in zip(flat(single(x, state, resets=resets)), flat(single(x)), strict=True):
        assert torch.equal(a[resets], zeros[resets])
        assert a[~resets].isnan().all()
    assert same(flat(single(x, resets=resets)), flat(single(x)))


def test_an_empty_batch_is_taken():
    output, _ = made("gru")(torch.zeros(5, 0, F).double(), resets=torch.zeros(5, 0).bool())
    assert output.shape == (5, 0, H)


X = torch.zeros(5, 2, F)
MASK = torch.zeros(5, 2).bool()
PACKED = pack_padded_sequence(X, [5, 3])
UNSORTED = pack_padded_sequence(X, [3, 5], enforce_sorted=False)
META = PackedSequence(torch.zeros(8).bool().to("meta"), PACKED.batch_sizes)


def packed_mask(lengths, is_sorted):
    return pack_padded_sequence(MASK[: max(lengths)], lengths, enforce_sorted=is_sorted)


def lstm(input, resets):
    return LF.lstm(input, (torch.zeros(2, H),) * 2, weights_of("lstm", dtype=torch.float32), resets=resets)


def packed_gru(input, resets):
    weights, sizes = weights_of("gru", dtype=torch.float32), [2, 2, 2, 1, 1]
    return LF.gru(input.data, torch.zeros(2, H), weights, batch_sizes=sizes, resets=resets)


ERRORS = {
    lstm: [
        (X, [True], TypeError, r"lstm: resets must be a Tensor .* list; .*as_tensor\(resets\)"),
        (X, MASK.float() + 0.5, ValueError, r"lstm: resets must be 0 or 1, .* got 0.5 in torch.float32; .*>"),
        (X, MASK.int() - 1, ValueError, r"lstm: resets must be 0 or 1, .* got -1 in torch.int32"),
        (X, MASK.float() * torch.nan, ValueError, r"lstm: resets must be 0 or 1, .* got nan"),
        (X, MASK[:4], RuntimeError, r"lstm: Expected resets of shape \[5, 2\], .* got \[4, 2\]"),
        (X, MASK[None], RuntimeError, r"without its features, with or without a last 1, but got \[1, 5, 2\]"),
        (X, MASK[:, 0], RuntimeError, r"\[5, 2\].* but got \[5\]"),
        (X, MASK.to("meta"), RuntimeError, r"on cpu and resets on meta; .* resets.to\(input.device\)"),
    ],
    packed_gru: [
        (PACKED, MASK, RuntimeError, r"gru: Expected resets of shape \[8\], .* but got \[5, 2\]"),
    ],
    layernorm.LayerNormGRU(F, H): [
        (X, 1, TypeError, "GRU: resets must be a Tensor or None, got int"),
        (X, META, TypeError, "GRU: resets must be a Tensor or None, got PackedSequence"),
        (X, MASK.T, RuntimeError, r"GRU: Expected resets of shape \[5, 2\], .* but got \[2, 5\]"),
        (X[:, 0], MASK, RuntimeError, r"GRU: Expected resets of shape \[5\], .* but got \[5, 2\]"),
        (PACKED, MASK, TypeError, "resets must be a PackedSequence .*, got Tensor; pack it"),
        (PACKED, PACKED, RuntimeError, r"GRU: Expected resets of shape \[8\], .* but got \[8, 3\]"),
        (PACKED, META, RuntimeError, "input is on cpu and resets on meta"),
        (PACKED, packed_mask([4, 3], True), RuntimeError, r"resets of shape \[8\], .* but got \[7\]"),
        (
            PACKED,
            packed_mask([4, 4], True),
            RuntimeError,
            r"sizes \[2, 2, 2, 1, 1\], .* \[2, 2, 2, 2\]",
        ),
        (PACKED, packed_mask([3, 5], False), RuntimeError, r"sorted_indices None, .* \[1, 0\]; pack both"),
        (UNSORTED, packed_mask([5, 3], False), RuntimeError, r"sorted_indices \[1, 0\], but got \[0, 1\]"),
    ],
    layernorm.LayerNormGRU(F, H, batch_first=True): [
        (
            *(X.transpose(0, 1), MASK, RuntimeError),
            r"shape \[2, 5\], .* but got \[5, 2\]; .* in the input's order of batch and time",
        ),
    ],
    layernorm.LayerNormLSTMCell(F, H): [
        (X[0], True, TypeError, "LayerNormLSTMCell: resets must be a Tensor or None, got bool"),
        (X[0], torch.ones(2) * 2, ValueError, "LayerNormLSTMCell: resets must be 0 or 1, .* got 2.0"),
        (X[0], MASK[0, 0], RuntimeError, r"Cell: Expected resets of shape \[2\], .* but got \[\]"),
        (X[0, 0], MASK[0], RuntimeError, r"Cell: Expected resets of shape \[\], .* but got \[2\]"),
    ],
}


@pytest.mark.parametrize(
    ("call", "input", "resets", "error", "message"),
    [(call, *case) for call, given in ERRORS.items() for case in given],
)
def test_errors(call, input, resets, error, message):
    with pytest.raises(error, match=message):
        call(input, resets=resets)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["flat", "last"])
def test_masks_as_people_have_them(dtype, last):
    mask = torch.tensor([[0, 1], [1, 0], [0, 0]]).bool()

    def theirs(mask):
        return mask.to(dtype)[..., None] if last else mask.to(dtype)

    x, state = torch.randn(3, 2, F), torch.randn(1, 2, H)
    for module, of in (
        (layernorm.LayerNormGRU(F, H), lambda a: a),
        (layernorm.LayerNormGRU(F, H, batch_first=True), lambda a: a.transpose(0, 1)),
    ):
        expected = module(of(x), state, resets=of(mask))[0]
        assert torch.equal(module(of(x), state, resets=theirs(of(mask)))[0], expected)
        one = module(x[:, 0], state[:, 0], resets=mask[:, 0])[0]
        assert torch.equal(module(x[:, 0], state[:, 0], resets=theirs(mask[:, 0]))[0], one)
    packed, packed_mask = pack_padded_sequence(x, [3, 2]), pack_padded_sequence(theirs(mask), [3, 2])
    gru = layernorm.LayerNormGRU(F, H)
    expected = gru(packed, resets=pack_padded_sequence(mask, [3, 2]))[0]
    assert torch.equal(gru(packed, resets=packed_mask)[0].data, expected.data)
    cell = layernorm.LayerNormGRUCell(F, H)
    assert torch.equal(cell(x[0], state[0], theirs(mask[0])), cell(x[0], state[0], mask[0]))
    weights = weights_of("gru", dtype=torch.float32)
    expected = LF.gru(x, state[0], weights, resets=mask)[0]
    assert torch.equal(LF.gru(x, state[0], weights, resets=theirs(mask))[0], expected)
    stream = gru.stream(2)
    stream.state = state
    stream.reset(theirs(mask[0]))
    assert torch.equal(stream.state, state.masked_fill(mask[0, :, None], 0))


def test_masks_of_numbers_in_a_compiled_program():
    gru, x = layernorm.LayerNormGRU(F, H), torch.randn(3, 2, F)
    mask = torch.tensor([[0, 1], [1, 0], [0, 0]])
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(gru, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, resets=mask)[0], gru(x, resets=mask)[0])


# ---- resets to a state that is given ----

START = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def pieces(cell, x, state, weights, starts, variant, reverse):
    """Compute every row alone, episode by episode, each from its start."""
    outputs, finals = [], []
    for n in range(N):
        cuts = sorted({0, T, *(t for t in range(T) if RESETS[t, n])})
        spans = list(itertools.pairwise(cuts))
        held = [s[n : n + 1] for s in state]
        if not reverse and RESETS[0, n]:
            held = [s[n : n + 1] for s in starts]
        found = []
        for begin, end in reversed(spans) if reverse else spans:
            output, *final = called(
                cell, x[begin:end, n : n + 1], held, weights, variant=variant, reverse=reverse
            )
            found.append(output)
            held = [s[n : n + 1] for s in starts]
        if reverse:
            found.reverse()
            final = held if RESETS[0, n] else final
        outputs.append(torch.cat(found))
        finals.append(final)
    return [torch.cat(outputs, 1), *(torch.cat(parts) for parts in zip(*finals, strict=True))]


@START
@pytest.mark.parametrize("kernel", ["native", "reference"])
@pytest.mark.parametrize(("cell", "variant"), cases.FUNCTIONS)
def test_a_reset_to_a_state_begins_a_sequence_there(cell, variant, kernel, reverse):
    if kernel == "native" and not layernorm.backends.compiled_module():
        pytest.skip("no compiled kernels")
    proj = 2 if cell == "lstm" and variant.scope == "gate" else 0
    weights = weights_of(cell, variant, proj=proj)
    x = torch.randn(T, N, F, dtype=torch.float64, requires_grad=True)
    state, starts = state_of(cell, N, proj), state_of(cell, N, proj)
    leaves = [x, *state, *starts, *weights.values()]
    options = {"variant": variant, "reverse": reverse}
    results = []
    for function in (
        lambda: called(cell, x, state, weights, resets=RESETS, reset_state=as_hx(starts), **options),
        lambda: pieces(cell, x, state, weights, starts, variant, reverse),
    ):
        with layernorm.backends.use(kernel):
            found = function()
            torch.manual_seed(0)
            loss = sum((t * torch.randn_like(t)).sum() for t in found[:1])
            results.append([*found[:1], *torch.autograd.grad(loss, leaves)])
    for found, expected in zip(*results, strict=True):
        assert cases.largest(found - expected) < GRAD_TOL * (1 + cases.largest(expected))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("cell", "variant"), cases.FUNCTIONS)
def test_starts_of_zeros_change_no_bit(cell, variant):
    weights, state = weights_of(cell, variant), state_of(cell, N)
    x = torch.randn(T, N, F, dtype=torch.float64)
    zeros = as_hx([torch.zeros(H, dtype=torch.float64) for _ in state])
    options = {"variant": variant, "resets": RESETS}
    assert same(
        called(cell, x, state, weights, **options),
        called(cell, x, state, weights, reset_state=zeros, **options),
    )


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("cell", "variant"), cases.FUNCTIONS)
def test_modules_reset_every_layer_and_direction(cell, variant, packed):
    module = cases.made(cell, num_layers=2, bidirectional=True, dtype=torch.float64, variant=variant)
    x = torch.randn(T, N, F, dtype=torch.float64)
    resets = RESETS
    if packed:
        lengths = [3, 7, 1, 5]
        x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        resets = pack_padded_sequence(RESETS, lengths, enforce_sorted=False)
    hx, starts = module_state(module, N), module_state(module, N)
    leaves = [*module.parameters(), *hx, *starts]
    results = []
    for kernel in ("native", "reference"):
        with layernorm.backends.use(kernel):
            found = flat(module(x, as_hx(hx), resets=resets, reset_state=as_hx(starts)))
            torch.manual_seed(0)
            loss = sum((t * torch.randn_like(t)).sum() for t in found)
            results.append([*found, *torch.autograd.grad(loss, leaves)])
    for found, expected in zip(*results, strict=True):
        assert cases.largest(found - expected) < GRAD_TOL * (1 + cases.largest(expected))
    # Any shape that broadcasts to the state's.
    one = [torch.randn(s.size(-1), dtype=torch.float64, requires_grad=True) for s in starts]
    whole = [s.expand(4, N, -1) for s in one]
    a, b = (flat(module(x, resets=resets, reset_state=as_hx(s))) for s in (one, whole))
    assert same(a, b)
    assert all(g.any() for g in torch.autograd.grad(sum(t.sum() for t in a), one))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("cell", SEQUENCES)
def test_derivatives_of_both_orders_to_a_start(cell):
    variant = Variant(eps=0.5)
    weights, state = weights_of(cell, variant, needs_grad=False), state_of(cell, 2)
    starts = state_of(cell, 2)
    x = torch.randn(4, 2, F, dtype=torch.float64, requires_grad=True)
    resets = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1]]).bool()

    def function(x, *tensors):
        state, starts = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        options = {"variant": variant, "resets": resets, "reset_state": as_hx(starts)}
        return tuple(called(cell, x, state, weights, **options))

    gradcheck(function, (x, *state, *starts))
    gradgradcheck(function, (x, *state, *starts))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("cell", SEQUENCES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_cells_and_streams_begin_from_the_same_start(cell, dtype):
    module = cases.made(cell, num_layers=1, dtype=dtype)
    single = CELLS[cell](F, H, dtype=dtype)
    single.load_state_dict({name.removesuffix("_l0"): w for name, w in module.state_dict().items()})
    x = torch.randn(T, N, F).to(dtype)
    start = [torch.randn(H).to(dtype) for _ in range(2 if cell == "lstm" else 1)]
    with torch.no_grad():
        output, final = module(x, resets=RESETS, reset_state=as_hx(start))
        stream, state, steps = module.stream(N), None, []
        for t, x_t in enumerate(x):
            stream.reset(RESETS[t], as_hx(start))
            steps.append(stream.step(x_t))
            state = single(x_t, state, resets=RESETS[t], reset_state=as_hx(start))
            assert torch.equal(flat(state)[0], output[t])
    assert torch.equal(torch.stack(steps), output)
    assert same(flat(stream.state), flat(final))
    stream.reset(reset_state=as_hx(start))
    assert all((s == v).all() for s, v in zip(flat(stream.state), start, strict=True))
    one = module(x[:, 0], resets=RESETS[:, 0], reset_state=as_hx([s.expand(1, -1) for s in start]))
    assert torch.equal(one[0], output[:, 0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g, x, r: g(x, reset_state=torch.zeros(H)), ValueError, "but resets is None; give both"),
        (
            lambda g, x, r: g(x, resets=r, reset_state=[1.0]),
            TypeError,
            "reset_state must be a Tensor, got list",
        ),
        (
            lambda g, x, r: g(x, resets=r, reset_state=torch.zeros(H + 1)),
            RuntimeError,
            r"Expected reset_state to broadcast to the state's shape \[1, 4, 4\], but got \[5\]",
        ),
        (
            lambda g, x, r: g(x, resets=r, reset_state=torch.zeros(H).double()),
            RuntimeError,
            "expected reset_state.* of the input's dtype torch.float32, got torch.float64",
        ),
    ],
)
def test_a_wrong_start_is_named(call, error, message):
    x = torch.randn(T, N, F)
    with pytest.raises(error, match=message):
        call(layernorm.LayerNormGRU(F, H), x, RESETS)


def test_an_lstm_starts_from_two_tensors():
    with pytest.raises(
        TypeError, match="reset_state must be a tuple of two Tensors like the state, got Tensor"
    ):
        layernorm.LayerNormLSTM(F, H)(torch.randn(T, N, F), resets=RESETS, reset_state=torch.zeros(H))
