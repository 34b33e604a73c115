"""The recurrent operators themselves: schemas, derivatives, compilation, and what is kept for backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import layernorm
from layernorm import Variant, backends
from layernorm import functional as LF
from layernorm.spec import layer_spec
from tests.recurrent.cases import (
    F,
    as_function,
    backward_arguments,
    called,
    detached,
    of_functions,
    same,
    state_of,
    weights_of,
)
from tests.recurrent.cases import operator_arguments as arguments

pytestmark = pytest.mark.usefixtures("native", "one_thread")

every_function = of_functions(
    [
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
    ],
    "proj",
)


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


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_it_is_the_same(whole):
    torch.compiler.reset()
    lstm = layernorm.LayerNormLSTM(5, 7, 2, bidirectional=True)
    x = torch.randn(6, 3, 5, requires_grad=True)
    compiled = torch.compile(lstm, fullgraph=whole, backend="aot_eager")
    leaves = [x, *lstm.parameters()]
    results = []
    # As torch.nn's layers, which Dynamo leaves out of its graphs unless it is told otherwise.
    with torch._dynamo.config.patch(allow_rnn=whole):
        for module in (lstm, compiled):
            output, (h, c) = module(x)
            loss = output.square().sum() + h.sum() + c.sum()
            results.append((output, h, c, *torch.autograd.grad(loss, leaves)))
    assert same(*results)


@pytest.mark.parametrize("reverse", [False, True])
@every_function
def test_derivatives_of_both_orders(cell, variant, proj, reverse):
    # A large eps keeps curvature within what finite differences of two orders can resolve.
    variant = dataclasses.replace(variant, eps=0.5)
    weights, state = weights_of(cell, variant, proj=proj), state_of(cell, 2, proj)
    leaves = (torch.randn(5, F, dtype=torch.float64, requires_grad=True), *state, *weights.values())
    options = {"variant": variant, "reverse": reverse, "batch_sizes": [2, 2, 1]}
    options["resets"] = torch.tensor([False, True, False, False, True])
    with backends.use("native"):
        for recompute in (False, True):
            function = as_function(cell, weights, recompute=recompute, **options)
            assert gradcheck(function, leaves, fast_mode=True)
        assert gradgradcheck(function, leaves, fast_mode=True)


def by_kernels(cell, variant, x, state, weights):
    """Return the results of the compiled kernel and of the reference."""
    found = []
    for kernel in ("native", "reference"):
        with backends.use(kernel):
            found.append(called(cell, x, state, weights, variant=variant))
    return found


def leaves_of(cell, variant, proj):
    """Return a random input, state and weights."""
    x = torch.randn(4, 3, F, dtype=torch.float64, requires_grad=True)
    return x, state_of(cell, 3, proj), weights_of(cell, variant, proj=proj)


@every_function
def test_second_derivatives_are_the_references(cell, variant, proj):
    x, state, weights = leaves_of(cell, variant, proj)
    leaves = [x, *state, *weights.values()]
    results = []
    for found in by_kernels(cell, variant, x, state, weights):
        loss = sum((t.square() * (1 + i)).sum() for i, t in enumerate(found))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([*first, *second])
    for a, e in zip(*results, strict=True):
        # As the kernel's tests have it, and once more through all sums.
        assert (a - e).abs().max() <= 1e-10 * (1 + e.abs().max())


@every_function
def test_parts_of_the_result_and_backward_twice(cell, variant, proj):
    x, state, weights = leaves_of(cell, variant, proj)
    leaves = [x, *state, *weights.values()]
    ours, theirs = by_kernels(cell, variant, x, state, weights)
    for i in range(len(ours)):
        seed = torch.randn_like(ours[i])
        found, repeated, expected = (
            torch.autograd.grad(t[i], leaves, seed, retain_graph=True, materialize_grads=True)
            for t in (ours, ours, theirs)
        )
        assert same(found, repeated)
        for a, e in zip(found, expected, strict=True):
            assert (a - e).abs().max() <= 1e-11 * (1 + e.abs().max())
    ours[0].sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        ours[0].sum().backward()


def test_tensors_that_backward_reads_must_not_change():
    x, state, weights = leaves_of("gru", "paper", 0)
    output = called("gru", x, state, weights)[0]
    x.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_without_input_features():
    variant, x = Variant(kind="none"), torch.zeros(3, 2, 0).double()
    weights = weights_of("lstm", variant, features=0)
    found = by_kernels("lstm", variant, x, state_of("lstm", 2), weights)
    for a, e in zip(*found, strict=True):
        assert (a - e).abs().max() <= 1e-14
    grads = [torch.autograd.grad(f[0].sum(), weights["weight_hh"])[0] for f in found]
    assert (grads[0] - grads[1]).abs().max() <= 1e-13


def test_forward_mode_derivatives_are_refused_or_the_references():
    x, weights, state = torch.randn(3, 2, F).double(), weights_of("gru"), state_of("gru", 2)
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
    spec = layer_spec("lstm", "paper")
    weights = weights_of("lstm", "paper", size, size, dtype=torch.float32, needs_grad=False)
    given = detached(arguments(resets=False)) | {
        "input": torch.randn(steps, rows, size),
        "h": torch.zeros(rows, size),
        "c": torch.zeros(rows, size),
        "weights": spec.listed(weights),
    }
    kept = {}
    for recompute in (False, True):
        output, _, _, *saved = torch.ops.layernorm.recurrent_forward(**given | {"recompute": recompute})
        kept[recompute] = sum(t.nbytes for t in (output, *saved))
    # torch.nn.LSTM keeps 15.3 times the output of such a layer.
    assert kept[False] <= 15.3 * floats
    assert kept[True] <= kept[False] / 2
