"""The recurrent operators themselves: schemas, derivatives, compilation, bad arguments, and what is kept."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import layernorm
from layernorm import Variant, backends, ops, recurrent_operator
from layernorm import functional as LF
from layernorm.variants import GATES, parameter_shapes

pytestmark = pytest.mark.usefixtures("native", "one_thread")

FUNCTIONS = [
    ("lstm", Variant(), 0),
    ("lstm", Variant(inputs="summed", scope="gate", cell="carried", projection_bias=True), 0),
    ("lstm", Variant(kind="rms", cell="none"), 2),
    ("lstm", Variant(kind="none"), 2),
    ("gru", Variant(), 0),
    ("gru", Variant(inputs="summed", scope="gate", projection_bias=True), 0),
    ("gru", Variant(kind="rms", inputs="summed", scope="all"), 0),
    ("gru", Variant(kind="none"), 0),
    ("rnn", Variant(), 0),
    ("rnn", Variant(inputs="summed"), 0),
    ("rnn", Variant(kind="none"), 0),
]
every_function = pytest.mark.parametrize(
    ("cell", "variant", "proj"), [pytest.param(*f, id=f"{f[0]}-{i}") for i, f in enumerate(FUNCTIONS)]
)
F, H = 3, 4


def weights_of(cell, variant, proj=0, dtype=torch.float64, features=F, hidden=H):
    shapes = parameter_shapes(cell, variant, features, hidden, proj_size=proj)
    return {
        n: (torch.randn(s) * 0.5 + n.startswith("gain")).to(dtype).requires_grad_() for n, s in shapes.items()
    }


def state_of(cell, rows, proj=0, dtype=torch.float64):
    sizes = (proj or H, H) if cell == "lstm" else (H,)
    return [torch.randn(rows, size).to(dtype).requires_grad_() for size in sizes]


def arguments(cell="lstm", variant=None, proj=0, dtype=torch.float32, packed=False, resets=True, **changes):
    """Those of torch.ops.layernorm.recurrent, by name."""
    variant = variant or Variant()
    weights = weights_of(cell, variant, proj, dtype)
    state = state_of(cell, 2, proj, dtype)
    shape = (5,) if packed else (3, 2)
    kind, inputs, scope, cell_norm, eps = recurrent_operator.spec(variant)
    return {
        "input": torch.randn(*shape, F).to(dtype).requires_grad_(),
        "h": state[0],
        "c": state[1] if cell == "lstm" else None,
        "weights": recurrent_operator.listed(weights, variant),
        "resets": torch.rand(shape) < 0.3 if resets else None,
        "batch_sizes": [2, 2, 1] if packed else None,
        "cell": "rnn_tanh" if cell == "rnn" else cell,
        "kind": kind,
        "inputs": inputs,
        "scope": scope,
        "cell_norm": cell_norm,
        "eps": eps,
        "reverse": False,
        "recompute": False,
    } | changes


def detached(given):
    def strip(value):
        if isinstance(value, list):
            return [strip(v) for v in value]
        return value.detach() if isinstance(value, torch.Tensor) else value

    return {name: strip(value) for name, value in given.items()}


def backward_arguments(given, kept):
    """Those of recurrent_backward, from those of recurrent_forward and what it returned."""
    output, hn, cn, *saved = kept
    rest = {name: value for name, value in given.items() if name != "recompute"}
    grads = {
        "grad_output": torch.randn_like(output),
        "grad_h": torch.randn_like(hn),
        "grad_c": torch.randn_like(cn) if cn.numel() else None,
    }
    names = ("saved_x", "saved_h", "saved_c", "saved_stats")
    leaves = (given["input"], given["h"], given["c"], *given["weights"])
    wanted = [leaf is not None for leaf in leaves]
    return rest | grads | {"output": output} | dict(zip(names, saved, strict=True)) | {"wanted": wanted}


# ---- PyTorch's own judges ----


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@every_function
def test_opcheck(cell, variant, proj, packed):
    for recompute in (False, True):
        given = arguments(cell, variant, proj, packed=packed, recompute=recompute)
        opcheck(torch.ops.layernorm.recurrent.default, (), given)
        given = detached(given)
        opcheck(torch.ops.layernorm.recurrent_forward.default, (), given)
        kept = torch.ops.layernorm.recurrent_forward(**given)
        opcheck(torch.ops.layernorm.recurrent_backward.default, (), backward_arguments(given, kept))


def test_compiled_as_a_whole_it_is_the_same():
    lstm = layernorm.LayerNormLSTM(5, 7, 2, bidirectional=True)
    x = torch.randn(6, 3, 5, requires_grad=True)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    leaves = [x, *lstm.parameters()]
    results = []
    for module in (lstm, compiled):
        output, (h, c) = module(x)
        loss = output.square().sum() + h.sum() + c.sum()
        results.append((output, h, c, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@every_function
def test_derivatives_of_both_orders(cell, variant, proj, reverse):
    # A large eps keeps curvature within what finite differences of two orders can resolve.
    spec = variant if variant.kind == "none" else Variant(**{**vars(variant), "eps": 0.5})
    weights, state = weights_of(cell, spec, proj), state_of(cell, 2, proj)
    x = torch.randn(5, F, dtype=torch.float64, requires_grad=True)
    resets = torch.tensor([False, True, False, False, True])
    with backends.use("native"):
        for recompute in (False, True):

            def function(x, *tensors, recompute=recompute):
                hx, rest = tensors[: len(state)], tensors[len(state) :]
                output, final = getattr(LF, cell)(
                    x,
                    hx if cell == "lstm" else hx[0],
                    dict(zip(weights, rest, strict=True)),
                    variant=spec,
                    reverse=reverse,
                    batch_sizes=[2, 2, 1],
                    resets=resets,
                    recompute=recompute,
                )
                return output, *(final if cell == "lstm" else (final,))

            assert gradcheck(function, (x, *state, *weights.values()), fast_mode=True)
        assert gradgradcheck(function, (x, *state, *weights.values()), fast_mode=True)


def called(cell, variant, x, state, weights, kernel):
    with backends.use(kernel):
        output, final = getattr(LF, cell)(
            x, tuple(state) if cell == "lstm" else state[0], weights, variant=variant
        )
    return [output, *(final if cell == "lstm" else (final,))]


@every_function
def test_second_derivatives_are_the_references(cell, variant, proj):
    weights, state = weights_of(cell, variant, proj), state_of(cell, 3, proj)
    x = torch.randn(4, 3, F, dtype=torch.float64, requires_grad=True)
    leaves = [x, *state, *weights.values()]
    results = []
    for kernel in ("native", "reference"):
        found = called(cell, variant, x, state, weights, kernel)
        loss = sum((t.square() * (1 + i)).sum() for i, t in enumerate(found))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([*first, *second])
    for a, e in zip(*results, strict=True):
        # As the kernel's tests have it, and once more through all sums.
        assert (a - e).abs().max() <= 1e-10 * (1 + e.abs().max())


@every_function
def test_parts_of_the_result_and_backward_twice(cell, variant, proj):
    weights, state = weights_of(cell, variant, proj), state_of(cell, 3, proj)
    x = torch.randn(4, 3, F, dtype=torch.float64, requires_grad=True)
    leaves = [x, *state, *weights.values()]
    ours, theirs = (called(cell, variant, x, state, weights, k) for k in ("native", "reference"))
    for i in range(len(ours)):
        seed = torch.randn_like(ours[i])
        found, again, expected = (
            torch.autograd.grad(t[i], leaves, seed, retain_graph=True, materialize_grads=True)
            for t in (ours, ours, theirs)
        )
        for a, b, e in zip(found, again, expected, strict=True):
            assert torch.equal(a, b)
            assert (a - e).abs().max() <= 1e-11 * (1 + e.abs().max())
    ours[0].sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        ours[0].sum().backward()


def test_what_backward_reads_must_not_change():
    weights, state = weights_of("gru", Variant()), state_of("gru", 2)
    x = torch.randn(3, 2, F, dtype=torch.float64, requires_grad=True)
    output = called("gru", Variant(), x, state, weights, "native")[0]
    x.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# ---- an empty batch, no features, threads within threads ----


@pytest.mark.parametrize("cell", list(GATES))
def test_an_empty_batch_is_torchs(cell):
    ours = getattr(layernorm, f"LayerNorm{cell.upper()}")(3, 4, 2, bidirectional=True)
    theirs = getattr(torch.nn, cell.upper())(3, 4, 2, bidirectional=True)
    for module in (ours, theirs):
        x = torch.randn(5, 0, 3, requires_grad=True)
        output, final = module(x)
        output.sum().backward()
        assert output.shape == (5, 0, 8)
        assert (final[0] if cell == "lstm" else final).shape == (4, 0, 4)
        assert x.grad.shape == x.shape
        assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
            module(torch.randn(0, 2, 3))
    given = arguments(cell, input=torch.zeros(0, 2, F), resets=None)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        torch.ops.layernorm.recurrent(**given)


def test_without_input_features():
    weights = weights_of("lstm", Variant(kind="none"), features=0)
    state = state_of("lstm", 2)
    found = [
        called("lstm", Variant(kind="none"), torch.zeros(3, 2, 0).double(), state, weights, k)
        for k in ("native", "reference")
    ]
    for a, e in zip(*found, strict=True):
        assert (a - e).abs().max() <= 1e-14
    grads = [torch.autograd.grad(f[0].sum(), weights["weight_hh"])[0] for f in found]
    assert (grads[0] - grads[1]).abs().max() <= 1e-13


# ---- bad arguments ----


def changed_weight(index, shape, dtype=torch.float32):
    def change(given):
        given["weights"][index] = torch.zeros(shape, dtype=dtype)

    return change


BAD = {
    "input of one dimension": ({"input": torch.zeros(3)}, "input must be a strided tensor of 3 dimensions"),
    "an integer input": ({"input": torch.zeros(3, 2, F, dtype=torch.int64)}, "of float32, float64, bfloat16"),
    "an input of another width": ({"input": torch.zeros(3, 2, F + 1)}, "weight_ih must be of shape"),
    "a state of another batch": ({"h": torch.zeros(3, H)}, r"h must be of shape \[2, 4\], got \[3, 4\]"),
    "a state of another dtype": (
        {"h": torch.zeros(2, H).double()},
        "h must be a strided tensor of the input",
    ),
    "a cell of another width": ({"c": torch.zeros(2, H + 1)}, r"c must be of shape \[2, 4\], got \[2, 5\]"),
    "no cell": ({"c": None}, "an LSTM's state has a cell"),
    "too few weights": ({"weights": [torch.zeros(16, F)]}, "weights must be a list of 11, got 1"),
    "no weights": ({"weights": []}, "weights must be a list of 11, got 0"),
    "too many weights": ({"weights": [torch.zeros(16, F)] * 12}, "weights must be a list of 11, got 12"),
    "no matrices": ({"weights": [None] * 11}, "weight_ih and weight_hh must be matrices"),
    "a weight of another height": (changed_weight(0, (15, F)), "weight_ih must be of shape"),
    "a recurrent weight of another height": (changed_weight(1, (15, H)), "must be matrices of 4 times"),
    "an empty recurrent weight": (changed_weight(1, (0, 0)), "must be matrices of 4 times"),
    "a recurrent weight of another width": (changed_weight(1, (16, H + 1)), "hidden_size=4 columns.*got 5"),
    "a projection of another height": (changed_weight(2, (3, H)), "weight_hr must be of shape"),
    "a weight that is a vector": (changed_weight(0, (16,)), "must be matrices of 4 times"),
    "a weight of another dtype": (changed_weight(0, (16, F), torch.float64), "weight_ih must be a strided"),
    "a gain of another width": (changed_weight(5, (15,)), "gain_ih must be of shape"),
    "a bias that it does not have": (changed_weight(8, (4,)), "gain or bias that this variant does not have"),
    "resets of numbers": ({"resets": torch.zeros(3, 2)}, "resets must be bool"),
    "resets of another shape": ({"resets": torch.zeros(2, 3, dtype=torch.bool)}, "resets must be bool, of"),
    "an unknown cell": ({"cell": "rnn"}, "cell must be one of .*lstm, gru.*got rnn"),
    "an unknown kind": ({"kind": "batch"}, "kind must be one of .*layer.*got batch"),
    "unknown inputs": ({"inputs": ""}, "inputs must be one of .*separate"),
    "an unknown scope": ({"scope": "row"}, "scope must be one of .*matrix.*got row"),
    "an unknown cell norm": ({"cell_norm": "input"}, "cell_norm must be one of .*output.*got input"),
    "batch_sizes beside a padded input": ({"batch_sizes": [2, 2, 2]}, "a strided tensor of 2 dimensions"),
    "a gated cell's weights for another": ({"cell": "gru", "c": None}, "layernorm: "),
}
BAD_PACKED = {
    "batch_sizes that grow": ([1, 2, 2], "must be positive and not increasing"),
    "batch_sizes with a zero": ([3, 2, 0], "must be positive and not increasing"),
    "negative batch_sizes": ([3, 3, -1], "must be positive and not increasing"),
    "batch_sizes of more rows": ([2, 2, 2], "must sum to the input's rows 5"),
    "batch_sizes of fewer rows": ([2, 2], "must sum to the input's rows 5"),
    "no batch_sizes": ([], "layernorm: "),
}


def refused(given, message):
    for operator in (torch.ops.layernorm.recurrent, torch.ops.layernorm.recurrent_forward):
        with pytest.raises(RuntimeError, match=message):
            operator(**detached(given))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.layernorm.recurrent(**given)


@pytest.mark.parametrize(("change", "message"), [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_bad_arguments_are_refused(change, message):
    given = arguments()
    if callable(change):
        change(given)
    else:
        given |= change
    refused(given, message)


@pytest.mark.parametrize(("sizes", "message"), [pytest.param(*v, id=k) for k, v in BAD_PACKED.items()])
def test_bad_batch_sizes_are_refused(sizes, message):
    refused(arguments(packed=True, batch_sizes=sizes), message)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "name", ["output", "saved_x", "saved_h", "saved_c", "saved_stats", "grad_output", "grad_h", "grad_c"]
)
def test_tensors_that_forward_did_not_return_are_refused(name, recompute):
    given = detached(arguments(recompute=recompute))
    right = backward_arguments(given, torch.ops.layernorm.recurrent_forward(**given))
    torch.ops.layernorm.recurrent_backward(**right)
    there = right[name]
    for wrong in (there.double(), torch.zeros(7), torch.zeros(1, 1)):
        if there.numel() == 0 and wrong.numel() == 0:
            continue
        with pytest.raises(RuntimeError, match="layernorm: "):
            torch.ops.layernorm.recurrent_backward(**right | {name: wrong})
    # As hooks on saved tensors may give it back.
    strided = there.new_zeros(*there.shape, 2)[..., 0].copy_(there)
    wanted = torch.ops.layernorm.recurrent_backward(**right)
    assert_equal(torch.ops.layernorm.recurrent_backward(**right | {name: strided}), wanted)


def assert_equal(found, wanted):
    """Compare the results of two operator calls to the bit."""
    for a, b in zip(
        torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted), strict=True
    ):
        assert torch.equal(a, b)


def test_what_another_call_kept_is_refused():
    given = detached(arguments())
    kept = {}
    for name, options in {
        "longer": {"input": torch.randn(4, 2, F), "resets": None},
        "recomputing": {"recompute": True},
        "another norm": {"scope": "gate"},
    }.items():
        kept[name] = torch.ops.layernorm.recurrent_forward(**given | options)
    right = backward_arguments(given, torch.ops.layernorm.recurrent_forward(**given))
    for name, (output, _, _, x, h, c, stats) in kept.items():
        wrong = {"output": output, "saved_x": x, "saved_h": h, "saved_c": c, "saved_stats": stats}
        if name == "recomputing":  # needs nothing else: the same gradients
            found = torch.ops.layernorm.recurrent_backward(**right | wrong)
            assert torch.equal(found[0], torch.ops.layernorm.recurrent_backward(**right)[0])
            wrong["saved_stats"] = right["saved_stats"]
        with pytest.raises(RuntimeError, match=r"layernorm: \w+ must be of shape"):
            torch.ops.layernorm.recurrent_backward(**right | wrong)


def test_forward_mode_derivatives_are_refused_or_the_references():
    x, weights, state = torch.randn(3, 2, F).double(), weights_of("gru", Variant()), state_of("gru", 2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn_like(x))
        output, _ = LF.gru(dual, state[0], weights)
        assert torch.autograd.forward_ad.unpack_dual(output).tangent.isfinite().all()
        given = arguments("gru", dtype=torch.float64)
        given["input"] = torch.autograd.forward_ad.make_dual(
            given["input"].detach(), torch.ones(3, 2, F).double()
        )
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.ops.layernorm.recurrent(**given)


# ---- what is kept for backward ----


def test_no_more_is_kept_than_by_torch():
    steps, rows, size = 20, 8, 128
    floats = steps * rows * size * 4
    variant = Variant()
    kept = {}
    for recompute in (False, True):
        weights = weights_of("lstm", variant, 0, torch.float32, size, size)
        kind, inputs, scope, cell_norm, eps = recurrent_operator.spec(variant)
        output, _, _, *saved = torch.ops.layernorm.recurrent_forward(
            torch.randn(steps, rows, size),
            torch.zeros(rows, size),
            torch.zeros(rows, size),
            [w if w is None else w.detach() for w in recurrent_operator.listed(weights, variant)],
            None,
            None,
            "lstm",
            kind,
            inputs,
            scope,
            cell_norm,
            eps,
            False,
            recompute,
        )
        kept[recompute] = sum(t.nbytes for t in (output, *saved))
    # torch.nn.LSTM keeps 15.3 times the output of such a layer.
    assert kept[False] <= 15.3 * floats
    assert kept[True] <= kept[False] / 2
    assert len(ops.WEIGHTS) == 11
