"""The part of an LSTM's step after its products: the compiled operator against the reference."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import layernorm
from layernorm import Variant, backends
from layernorm import functional as LF
from layernorm.spec import layer_spec
from layernorm.variants import PRESETS
from tests.recurrent.cases import (
    ALL_FUNCTIONS,
    GATES_INPUTS,
    called_gates,
    gates_results,
    largest,
    same,
    weights_of,
)
from tests.settings import needs_torch, thread_count

pytestmark = pytest.mark.usefixtures("native", "one_thread")

VARIANTS = [variant for cell, variant in ALL_FUNCTIONS if cell == "lstm"]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=map(str, range(len(VARIANTS))))
some_variants = pytest.mark.parametrize("variant", [VARIANTS[i] for i in (0, 9, 16, -1)], ids=str)
# Rows in parts of blocks of parts; features in parts of vectors.
SIZES = [(1, 33), (3, 7), (4, 33), (5, 1), (19, 7)]


def drawn(
    variant: Variant, rows: int, hidden: int, dtype=torch.float64, biases=True
) -> dict[str, torch.Tensor]:
    """Return the tensors of a call by name, with gains and biases away from 1 and 0."""
    shapes = {"input_gates": (rows, 4 * hidden), "hidden_gates": (rows, 4 * hidden), "c": (rows, hidden)}
    tensors = {name: torch.randn(shape).to(dtype).requires_grad_() for name, shape in shapes.items()}
    weights = weights_of("lstm", variant, 1, hidden, dtype=dtype, bias=biases)
    return tensors | {name: w for name, w in weights.items() if not name.startswith("weight")}


def results(variant: Variant, tensors: dict[str, torch.Tensor], kernel: str) -> dict[str, torch.Tensor]:
    """Return h, c and the gradients of a random sum of them."""
    generator, c = torch.Generator().manual_seed(5), tensors["c"]
    seeds = [torch.randn(c.shape, generator=generator).to(c.dtype) for _ in range(2)]
    with backends.use(kernel):
        return gates_results(variant, tensors, seeds)


@pytest.mark.usefixtures("poisoned")
@every_variant
def test_float64(variant):
    for (rows, hidden), biases in itertools.product(SIZES, (True, False)):
        tensors = drawn(variant, rows, hidden, biases=biases)
        found, expected = (results(variant, tensors, kernel) for kernel in ("native", "reference"))
        # Sums of at most 132 features or 19 rows, √132 = 11 units of 1.1e-16; a norm amplifies by at most
        # 1/√eps = 316, a gradient passes the norms of gates and cell: 11·316²·1.1e-16 = 1.2e-10 at worst.
        for name, e in expected.items():
            assert largest(found[name] - e) <= 1e-10 * (1 + largest(e)), (rows, hidden, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
@every_variant
def test_lower_precisions(variant, dtype):
    unit = torch.finfo(dtype).eps / 2
    for rows, hidden in ((1, 7), (5, 33), (4, 64)):
        tensors = drawn(variant, rows, hidden, dtype)
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        exact = results(variant, wide, "reference")
        found = results(variant, tensors, "native")
        others = [results(variant, tensors, "reference")]
        for _ in range(2):
            moved = {name: t * (1 + unit * torch.randn(t.shape)) for name, t in wide.items()}
            others.append(results(variant, moved, "reference"))
        # Eight times what the results move by when the arguments do by random units of roundoff, and what
        # the reference is off by.
        for name, e in exact.items():
            allowed = unit * (1 + largest(e)) + sum(largest(other[name].double() - e) for other in others)
            assert largest(found[name].double() - e) <= 8 * allowed, (rows, hidden, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_variant
def test_the_same_bits_as_in_a_sequence(variant, dtype):
    # Matrices that select: the products are exact there.
    hidden = 24
    tensors = {name: t.detach() for name, t in drawn(variant, 7, hidden, dtype).items()}
    h0 = torch.randn(7, hidden).to(dtype)
    weights = {name: t for name, t in tensors.items() if name not in GATES_INPUTS}
    matrices = {
        "weight_ih": torch.eye(4 * hidden, dtype=dtype),
        "weight_hh": torch.eye(hidden, dtype=dtype).repeat(4, 1),
    }
    with backends.use("native"):
        _, expected = LF.lstm(
            tensors["input_gates"][None], (h0, tensors["c"]), matrices | weights, variant=variant
        )
        found = called_gates(variant, tensors | {"hidden_gates": h0.repeat(1, 4)})
    assert same(found, expected)


@every_variant
def test_a_row_has_its_bits_in_any_batch_and_for_any_number_of_threads(variant):
    tensors = drawn(variant, 300, 33, torch.float32)
    whole = results(variant, tensors, "native")
    with thread_count(3):
        assert same(results(variant, tensors, "native").values(), whole.values())
    with torch.no_grad():
        some = called_gates(variant, tensors | {name: tensors[name][11:14] for name in GATES_INPUTS})
    assert same(some, [whole["output h"][11:14], whole["output c"][11:14]])


def test_layouts_and_an_empty_batch():
    variant = Variant()
    tensors = drawn(variant, 6, 9, torch.float32)
    expected = results(variant, tensors, "native")
    strided = {
        name: torch.stack([t.detach(), t.detach().flip(-1)], -1)[..., 0] for name, t in tensors.items()
    }
    assert not strided["c"].is_contiguous()
    with torch.no_grad(), backends.use("native"):
        assert torch.equal(called_gates(variant, strided)[0], expected["output h"])
    empty = {name: t[:0] if t.dim() == 2 else t for name, t in tensors.items()}
    found = results(variant, empty, "native")
    assert found["output h"].shape == (0, 9)
    assert found["gain_ih"].shape == (36,)
    assert not found["gain_ih"].any()


def test_rows_that_float32_cannot_square():
    tensors = drawn(Variant(), 5, 40, torch.float32)
    with torch.no_grad():
        tensors["input_gates"] *= 1e25
        tensors["hidden_gates"] *= 1e-30
    wide = {name: t.detach().double() for name, t in tensors.items()}
    exact, found = results(Variant(), wide, "reference"), results(Variant(), tensors, "native")
    for name in ("output h", "output c", "c", "gain_ih", "bias"):
        assert largest(found[name].double() - exact[name]) <= 1e-5 * (1 + largest(exact[name])), name


@some_variants
def test_derivatives_of_both_orders(variant):
    # A large eps keeps curvature within what finite differences of two orders can resolve.
    variant = dataclasses.replace(variant, eps=0.5)
    tensors = drawn(variant, 3, 4)

    def function(*values):
        return called_gates(variant, dict(zip(tensors, values, strict=True)))

    with backends.use("native"):
        gradcheck(function, tuple(tensors.values()))
        gradgradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("part", [0, 1])
def test_the_gradient_of_one_result_and_of_some_arguments(part):
    tensors = drawn(Variant(), 3, 5)
    for name in ("hidden_gates", "gain_cell"):
        tensors[name].requires_grad_(False)
    needed = [t for t in tensors.values() if t.requires_grad]
    grads = []
    for kernel in ("native", "reference"):
        with backends.use(kernel):
            output = called_gates(Variant(), tensors)[part]
        grads.append(torch.autograd.grad(output.sum(), needed, allow_unused=True, materialize_grads=True))
    assert all(torch.allclose(a, e, rtol=1e-9, atol=1e-10) for a, e in zip(*grads, strict=True))


def arguments(variant: Variant, dtype=torch.float32):
    """Return the operator's arguments by position."""
    spec, tensors = layer_spec("lstm", variant), drawn(variant, 3, 4, dtype)
    return (*(tensors[name] for name in GATES_INPUTS), *spec.listed_for_gates(tensors), spec.codes, spec.eps)


@some_variants
def test_opcheck(variant):
    given = arguments(variant)
    opcheck(torch.ops.layernorm.lstm_gates.default, given)
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in given)
    grads = torch.randn(3, 4), torch.randn(3, 4)
    wanted = [a is not None for a in given[:10]]
    opcheck(torch.ops.layernorm.lstm_gates_backward.default, (*grads, *detached, wanted))


@needs_torch(2, 7, "cannot trace it in one graph")
def test_compiled_it_is_the_same():
    tensors = drawn(Variant(), 3, 5, torch.float32)
    compiled = torch.compile(called_gates, fullgraph=True, backend="aot_eager")
    found = []
    for function in (called_gates, compiled):
        h, c = function(Variant(), tensors)
        found.append((h, c, *torch.autograd.grad(h.sum() + c.square().sum(), list(tensors.values()))))
    assert same(*found)


def test_autocast_computes_in_the_lower_precision():
    tensors = drawn(Variant(), 3, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        h, _ = called_gates(Variant(), tensors)
    expected, _ = called_gates(Variant(), {name: t.bfloat16() for name, t in tensors.items()})
    assert h.dtype == torch.bfloat16
    assert torch.equal(h, expected)


def test_forward_mode_is_the_references():
    tensors = {name: t.detach() for name, t in drawn(Variant(), 3, 4).items()}
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors["c"], torch.randn(3, 4).double())
        h, _ = called_gates(Variant(), tensors | {"c": dual})
        assert torch.autograd.forward_ad.unpack_dual(h).tangent.isfinite().all()
        given = list(arguments(Variant(), torch.float64))
        given[2] = dual
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.ops.layernorm.lstm_gates(*given)


@pytest.mark.parametrize("preset", [name for name, cells in PRESETS.items() if "lstm" in cells])
def test_a_cell_is_made_of_it(preset):
    cell = layernorm.LayerNormLSTMCell(3, 5, variant=preset).double()
    x, h, c = (torch.randn(4, size, dtype=torch.float64) for size in (3, 5, 5))
    weights = {n: p for n, p in cell.named_parameters() if not n.startswith("weight")}
    found = LF.lstm_gates(x @ cell.weight_ih.T, h @ cell.weight_hh.T, c, weights, variant=preset)
    for a, e in zip(found, cell(x, (h, c)), strict=True):
        assert torch.allclose(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_gates": torch.zeros(3, 15)}, RuntimeError, r"Expected input_gates of shape \[3, 16\]"),
        ({"hidden_gates": torch.zeros(2, 16)}, RuntimeError, r"Expected hidden_gates of shape \[3, 16\]"),
        ({"c": torch.zeros(4)}, RuntimeError, "c must have 2 dimensions, got 1"),
        ({"gain_ih": torch.ones(4)}, RuntimeError, r"Expected gain_ih of shape \[16\]"),
        ({"weight_ih": torch.ones(16, 2)}, ValueError, "unknown: weight_ih"),
        ({"gain_ih": None}, ValueError, "missing: gain_ih"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    tensors = drawn(Variant(), 3, 4, torch.float32) | change
    with pytest.raises(error, match="lstm_gates: .*" + message):
        called_gates(Variant(), {name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, 15), "input_gates must be"),
        (1, torch.zeros(3, 16).double(), "hidden_gates must be"),
        (2, torch.zeros(3), "c must have two dimensions"),
        (2, torch.zeros(3, 4, dtype=torch.int64), "c must have two dimensions"),
        (5, torch.zeros(3), "gain_ih must be"),
    ],
)
def test_the_operator_refuses_bad_arguments(place, value, message):
    given = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments(Variant())]
    given[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.layernorm.lstm_gates(*given)


def test_the_operator_refuses_parameters_of_another_variant():
    given = list(arguments(Variant()))
    given[10] = layer_spec("lstm", "none").codes
    with pytest.raises(RuntimeError, match="a gain or bias that this variant does not have"):
        torch.ops.layernorm.lstm_gates(*given)
