"""What the compiled recurrent kernels promise to the bit, and what a bad row or an extreme number does."""

from __future__ import annotations

import itertools

import pytest
import torch

import layernorm
from layernorm import Variant, backends, ops
from layernorm import functional as LF
from layernorm.variants import parameter_shapes, resolve

pytestmark = pytest.mark.usefixtures("native", "one_thread")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CAPABILITIES = ops.native.capabilities() if ops.native is not None else ("none",)
FUNCTIONS = [
    ("lstm", Variant()),
    ("lstm", Variant(kind="rms", cell="carried", projection_bias=True)),
    ("lstm", Variant(inputs="summed", scope="gate", cell="carried", projection_bias=True)),
    ("lstm", Variant(inputs="summed", scope="gate", cell="none", eps=1e-8)),
    ("lstm", Variant(kind="none")),
    ("gru", Variant()),
    ("gru", Variant(kind="rms", scope="gate", projection_bias=True)),
    ("gru", Variant(inputs="summed", scope="gate", projection_bias=True)),
    ("gru", Variant(inputs="summed", scope="all", eps=1e-3)),
    ("gru", Variant(kind="none")),
    ("rnn", Variant()),
    ("rnn", Variant(kind="rms", inputs="summed")),
    ("rnn", Variant(kind="none")),
]
every_function = pytest.mark.parametrize(
    ("cell", "variant"), [pytest.param(*f, id=f"{f[0]}-{i}") for i, f in enumerate(FUNCTIONS)]
)
# Each in float32 and in one other type.
every_function_and_type = pytest.mark.parametrize(
    ("cell", "variant", "dtype"),
    [
        pytest.param(*function, dtype, id=f"{function[0]}-{i}-{dtype}")
        for i, function in enumerate(FUNCTIONS)
        for dtype in (torch.float32, DTYPES[1 + i % 3])
    ],
)


class Layer:
    """Weights of one layer and direction, and a call that returns everything a caller can see."""

    def __init__(self, cell, variant, features, hidden, dtype=torch.float32, proj=0, **options):
        self.cell, self.variant, self.options = cell, variant, options
        self.sizes = (proj or hidden, hidden) if cell == "lstm" else (hidden,)
        shapes = parameter_shapes(cell, resolve(variant, cell), features, hidden, proj_size=proj)
        self.weights = {}
        for name, shape in shapes.items():
            drawn = torch.randn(shape) * (0.3 if len(shape) == 1 else hidden**-0.5)
            self.weights[name] = (drawn + name.startswith("gain")).to(dtype).requires_grad_()

    def state(self, rows, dtype=torch.float32):
        return [torch.randn(rows, size).to(dtype) for size in self.sizes]

    def forward(self, x, state, **options):
        hx = tuple(state) if self.cell == "lstm" else state[0]
        call = getattr(LF, self.cell)
        output, final = call(x, hx, self.weights, variant=self.variant, **self.options, **options)
        return [output, *(final if isinstance(final, tuple) else (final,))]

    def __call__(self, x, state, seeds, **options):
        """Outputs, gradients of input and state, gradients of the weights."""
        x, *state = (t.detach().requires_grad_() for t in (x, *state))
        found = self.forward(x, state, **options)
        leaves = [x, *state, *self.weights.values()]
        grads = torch.autograd.grad(found, leaves, seeds)
        return [t.detach() for t in found], grads[: 1 + len(state)], grads[1 + len(state) :]


def seeds_like(layer, steps, rows, dtype=torch.float32):
    return [
        torch.randn(steps, rows, layer.sizes[0]).to(dtype),
        *(torch.randn(rows, size).to(dtype) for size in layer.sizes),
    ]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def with_threads(count, call, *arguments, **options):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call(*arguments, **options)
    finally:
        torch.set_num_threads(before)


# ---- the same bits ----


@every_function_and_type
def test_for_any_number_of_threads_and_run_to_run(cell, variant, dtype):
    # 9·24·129·(65 + 129) products for each gate, over 2^21: threads have rows of their own.
    layer = Layer(cell, variant, 65, 129, dtype)
    x, state = torch.randn(9, 24, 65).to(dtype), layer.state(24, dtype)
    resets = torch.rand(9, 24) < 0.1
    seeds = seeds_like(layer, 9, 24, dtype)
    one, two, again, three = (with_threads(n, layer, x, state, seeds, resets=resets) for n in (1, 2, 2, 3))
    for other in (two, again, three):
        for a, b in zip(one, other, strict=True):
            assert same(a, b)


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
        x, state = torch.randn(17, rows, 130).to(dtype), layer.state(rows, dtype)
        resets = torch.rand(17, rows) < 0.1
        seeds = seeds_like(layer, 17, rows, dtype)
        results = [
            with_threads(n, layer, x, state, seeds, resets=resets, recompute=recompute) for n in (1, 2, 3)
        ]
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert same(a, b)


@every_function_and_type
def test_alone_and_in_any_batch(cell, variant, dtype):
    for features, hidden, rows in ((5, 7, 11), (33, 40, 6), (64, 65, 70)):
        layer = Layer(cell, variant, features, hidden, dtype)
        x, state = torch.randn(6, rows, features).to(dtype), layer.state(rows, dtype)
        seeds = seeds_like(layer, 6, rows, dtype)
        outputs, grads, _ = layer(x, state, seeds)
        some = [0, rows // 2, rows - 1]
        for row in some:
            alone = [row]
            rest = layer(x[:, alone], [s[alone] for s in state], [s[..., alone, :] for s in seeds])
            assert same(rest[0], [t[..., alone, :] for t in outputs])
            assert same(rest[1], [t[..., alone, :] for t in grads])
        rest = layer(x[:, some], [s[some] for s in state], [s[..., some, :] for s in seeds])
        assert same(rest[0], [t[..., some, :] for t in outputs])
        assert same(rest[1], [t[..., some, :] for t in grads])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_alone_and_in_any_batch_on_every_instruction_set(capability):
    before = ops.native.capability()
    assert ops.native.use_capability(capability)
    try:
        for dtype in DTYPES:
            for cell, variant in FUNCTIONS[::3]:
                layer = Layer(cell, variant, 33, 40, dtype)
                x, state = torch.randn(6, 11, 33).to(dtype), layer.state(11, dtype)
                seeds = seeds_like(layer, 6, 11, dtype)
                outputs, grads, _ = layer(x, state, seeds)
                rest = layer(x[:, 4:5], [s[4:5] for s in state], [s[..., 4:5, :] for s in seeds])
                assert same(rest[0], [t[..., 4:5, :] for t in outputs])
                assert same(rest[1], [t[..., 4:5, :] for t in grads])
    finally:
        ops.native.use_capability(before)


@pytest.mark.parametrize("proj", [0, 17])
def test_alone_and_in_any_batch_with_a_projection(proj):
    for dtype in DTYPES:
        layer = Layer("lstm", Variant(), 20, 41, dtype, proj)
        x, state, seeds = (
            torch.randn(6, 9, 20).to(dtype),
            layer.state(9, dtype),
            seeds_like(layer, 6, 9, dtype),
        )
        outputs, grads, _ = layer(x, state, seeds)
        rest = layer(x[:, 4:5], [s[4:5] for s in state], [s[..., 4:5, :] for s in seeds])
        assert same(rest[0], [t[..., 4:5, :] for t in outputs])
        assert same(rest[1], [t[..., 4:5, :] for t in grads])


@every_function_and_type
def test_for_any_split_of_the_sequence_at_its_state(cell, variant, dtype):
    layer = Layer(cell, variant, 5, 35, dtype)
    steps, rows = 60, 4  # more rows than are projected together
    x, state = torch.randn(steps, rows, 5).to(dtype), layer.state(rows, dtype)
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
    x, state = torch.randn(12, 4, 5).to(dtype), layer.state(4, dtype)
    seeds = seeds_like(layer, 12, 4, dtype)
    _, whole, _ = layer(x, state, seeds)
    leaves = [t.requires_grad_() for t in (x.clone(), *(s.clone() for s in state))]
    first, *between = layer.forward(leaves[0][:5], leaves[1:])
    second, *final = layer.forward(leaves[0][5:], between)
    assert same(torch.autograd.grad([torch.cat([first, second]), *final], leaves, seeds), whole)


@every_function
def test_in_reverse_as_flipped(cell, variant):
    layer = Layer(cell, variant, 5, 35)
    x, state = torch.randn(30, 6, 5), layer.state(6)
    resets = torch.rand(30, 6) < 0.2
    # A reset parts its step from the one before; flipped, that is the one after.
    turned = torch.cat([torch.zeros(1, 6, dtype=torch.bool), resets[1:].flip(0)])
    seeds = seeds_like(layer, 30, 6)
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
        x, state = torch.randn(20, rows, 19).to(dtype), layer.state(rows, dtype)
        seeds = seeds_like(layer, 20, rows, dtype)
        resets = torch.rand(20, rows) < 0.2
        kept, again = (layer(x, state, seeds, resets=resets, recompute=r) for r in (False, True))
        assert same(kept[0], again[0])
        if dtype in (torch.float32, torch.float64):
            assert same(kept[1], again[1])
            assert same(kept[2], again[2])
            continue
        # What is kept of a half precision is rounded to it, what is recomputed is not: a unit of each
        # normalized number, and as many units of a gradient as it passes steps.
        for a, b in zip((*kept[1], *kept[2]), (*again[1], *again[2]), strict=True):
            error = (a.float() - b.float()).abs().max()
            assert error <= 20 * torch.finfo(dtype).eps * (1 + b.float().abs().max())


@pytest.mark.parametrize("reverse", [False, True])
@every_function
def test_packed_as_each_row_alone(cell, variant, reverse):
    for dtype, recompute in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        layer = Layer(cell, variant, 6, 33, dtype)
        lengths = [40, 40, 31, 17, 17, 9, 2, 1, 1]
        rows = len(lengths)
        sizes = [sum(length > t for length in lengths) for t in range(40)]
        kept = torch.tensor([[t < length for length in lengths] for t in range(40)])
        x, state = torch.randn(40, rows, 6).to(dtype), layer.state(rows, dtype)
        resets = torch.rand(40, rows) < 0.15
        seeds = seeds_like(layer, 40, rows, dtype)
        options = {"reverse": reverse, "recompute": recompute}
        packed = [t[kept] for t in (x, resets, seeds[0])]
        outputs, grads, _ = layer(
            packed[0], state, [packed[2], *seeds[1:]], batch_sizes=sizes, resets=packed[1], **options
        )
        padded, grad_x = (torch.zeros(40, rows, t.size(-1), dtype=dtype) for t in (outputs[0], grads[0]))
        padded[kept], grad_x[kept] = outputs[0], grads[0]
        for row, length in enumerate(lengths):
            here = slice(row, row + 1)
            alone = layer(
                x[:length, here],
                [s[here] for s in state],
                [seeds[0][:length, here], *(s[here] for s in seeds[1:])],
                resets=resets[:length, here],
                **options,
            )
            assert same(alone[0], [padded[:length, here], *(t[here] for t in outputs[1:])])
            assert same(alone[1], [grad_x[:length, here], *(t[here] for t in grads[1:])])


# ---- bad rows, extreme numbers, lengths ----


@every_function_and_type
def test_a_bad_row_harms_no_other(cell, variant, dtype):
    layer = Layer(cell, variant, 6, 33, dtype)
    x, state = torch.randn(5, 9, 6).to(dtype), layer.state(9, dtype)
    seeds = seeds_like(layer, 5, 9, dtype)
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
        if recompute and dtype in (torch.bfloat16, torch.float16):
            grads = layer(x, state, seeds, recompute=True)[1]
        assert same([t[..., others, :] for t in found_grads], [t[..., others, :] for t in grads])


@every_function
def test_what_a_reset_row_had_before_is_forgotten_even_nan(cell, variant):
    layer = Layer(cell, variant, 6, 33)
    x, state, seeds = torch.randn(5, 3, 6), layer.state(3), seeds_like(layer, 5, 3)
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


@pytest.mark.parametrize("size", [1e20, 1e30, 1e-20, 1e-38])
@every_function
def test_numbers_whose_squares_float32_cannot_hold(cell, variant, size):
    if variant.kind == "none" and size > 1:
        size = 1e10  # not normalized: a sum of products is as large as it is
    layer = Layer(cell, variant, 6, 33)
    # Every other row is ordinary: its bits do not change.
    x, state, seeds = torch.randn(5, 6, 6), layer.state(6), seeds_like(layer, 5, 6)
    ordinary = layer(x, state, seeds)
    x[:, ::2] *= size
    outputs, grads, _ = layer(x, state, seeds)
    assert same([t[..., 1::2, :] for t in outputs], [t[..., 1::2, :] for t in ordinary[0]])
    assert same([t[..., 1::2, :] for t in grads], [t[..., 1::2, :] for t in ordinary[1]])
    exact = Layer(cell, variant, 6, 33, torch.float64)
    exact.weights = {n: w.detach().double().requires_grad_() for n, w in layer.weights.items()}
    with backends.use("reference"):
        expected, expected_grads, _ = exact(
            x.double(), [s.double() for s in state], [s.double() for s in seeds]
        )
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
        x, seeds = torch.randn(4, 3, 6), seeds_like(layer, 4, 3)
        state = layer.state(3)
        state[1][1] *= 1e25
        outputs, grads, _ = layer(x, state, seeds)
        exact = Layer("lstm", variant, 6, 33, torch.float64)
        exact.weights = {n: w.detach().double().requires_grad_() for n, w in layer.weights.items()}
        with backends.use("reference"):
            expected = exact(x.double(), [s.double() for s in state], [s.double() for s in seeds])
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
    x, state = torch.randn(steps, 2, 2).double(), layer.state(2, torch.float64)
    seeds = seeds_like(layer, steps, 2, torch.float64)
    outputs, grads, weights = layer(x, state, seeds)
    again = layer(x, state, seeds, recompute=True)
    assert same((*outputs, *grads, *weights), itertools.chain(*again))
    # In pieces of 100 steps: the same outputs; the gradient of the last piece's input likewise.
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
        output, (h, c) = with_threads(threads, lstm, x)
        loss = output.square().sum() + h.sum() + c.sum()
        found.append([output, *with_threads(threads, torch.autograd.grad, loss, leaves)])
    assert same(found[0], found[1])
    assert same(found[0], found[2])
