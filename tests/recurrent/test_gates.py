"""The part of a step after its products: the compiled operators against the reference."""

from __future__ import annotations

import dataclasses
import itertools
from types import MappingProxyType

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from layernorm import Variant, backends
from layernorm import functional as LF
from layernorm.spec import layer_spec
from layernorm.variants import GATES, PRESETS
from tests.recurrent.cases import (
    ALL_FUNCTIONS,
    CELLS,
    FUNCTIONS,
    GATES_CELLS,
    GATES_INPUTS,
    as_hx,
    called,
    called_gates,
    flat,
    gates_results,
    largest,
    of_functions,
    same,
    weights_of,
)
from tests.settings import needs_torch, thread_count

pytestmark = pytest.mark.usefixtures("native", "one_thread")

every_function = of_functions(f for f in ALL_FUNCTIONS if f[0] in GATES_CELLS)
some_functions = of_functions(f for f in FUNCTIONS if f[0] in GATES_CELLS)
each_cell = pytest.mark.parametrize("cell", GATES_CELLS)
# Rows in parts of blocks of parts; features in parts of vectors.
SIZES = [(1, 33), (3, 7), (4, 33), (5, 1), (19, 7)]


def drawn(
    cell: str, variant: Variant, rows: int, hidden: int, dtype=torch.float64, biases=True
) -> dict[str, torch.Tensor]:
    """Return the tensors of a call by name, with gains and biases away from 1 and 0."""
    sizes = dict(zip(GATES_INPUTS, (GATES[cell], GATES[cell], 1), strict=True))
    tensors = {n: torch.randn(rows, size * hidden).to(dtype).requires_grad_() for n, size in sizes.items()}
    weights = weights_of(cell, variant, 1, hidden, dtype=dtype, bias=biases)
    return tensors | {name: w for name, w in weights.items() if not name.startswith("weight")}


def results(
    cell: str, variant: Variant, tensors: dict[str, torch.Tensor], kernel: str
) -> dict[str, torch.Tensor]:
    """Return the new state and the gradients of a random sum of it."""
    generator, state = torch.Generator().manual_seed(5), tensors["state"]
    seeds = [torch.randn(state.shape, generator=generator).to(state.dtype) for _ in range(2)]
    with backends.use(kernel):
        return gates_results(cell, variant, tensors, seeds)


@pytest.mark.usefixtures("poisoned")
@every_function
def test_float64(cell, variant):
    for (rows, hidden), biases in itertools.product(SIZES, (True, False)):
        tensors = drawn(cell, variant, rows, hidden, biases=biases)
        found, expected = (results(cell, variant, tensors, kernel) for kernel in ("native", "reference"))
        # Sums of at most 132 features or 19 rows, √132 = 11 units of 1.1e-16; a norm amplifies by at most
        # 1/√eps = 316, a gradient passes the norms of gates and cell: 11·316²·1.1e-16 = 1.2e-10 at worst.
        for name, e in expected.items():
            assert largest(found[name] - e) <= 1e-10 * (1 + largest(e)), (rows, hidden, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
@every_function
def test_lower_precisions(cell, variant, dtype):
    unit = torch.finfo(dtype).eps / 2
    for rows, hidden in ((1, 7), (5, 33), (4, 64)):
        tensors = drawn(cell, variant, rows, hidden, dtype)
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        exact = results(cell, variant, wide, "reference")
        found = results(cell, variant, tensors, "native")
        others = [results(cell, variant, tensors, "reference")]
        for _ in range(2):
            moved = {name: t * (1 + unit * torch.randn(t.shape)) for name, t in wide.items()}
            others.append(results(cell, variant, moved, "reference"))
        # Eight times what the results move by when the arguments do by random units of roundoff, and what
        # the reference is off by.
        for name, e in exact.items():
            allowed = unit * (1 + largest(e)) + sum(largest(other[name].double() - e) for other in others)
            assert largest(found[name].double() - e) <= 8 * allowed, (rows, hidden, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_function
def test_the_same_bits_as_in_a_sequence_and_a_cell(cell, variant, dtype):
    # Matrices that select: the products are exact there.
    hidden, gates = 24, GATES[cell]
    tensors = {name: t.detach() for name, t in drawn(cell, variant, 7, hidden, dtype).items()}
    state = [torch.randn(7, hidden).to(dtype), tensors["state"]][-1 if cell == "gru" else 0 :]
    weights = {name: t for name, t in tensors.items() if name not in GATES_INPUTS}
    weights |= {
        "weight_ih": torch.eye(gates * hidden, dtype=dtype),
        "weight_hh": torch.eye(hidden, dtype=dtype).repeat(gates, 1),
    }
    single = CELLS[cell](gates * hidden, hidden, variant=variant, dtype=dtype)
    single.load_state_dict(single.state_dict() | weights)
    with backends.use("native"):
        _, *expected = called(cell, tensors["input_gates"][None], state, weights, variant=variant)
        found = called_gates(cell, variant, tensors | {"hidden_gates": state[0].repeat(1, gates)})
        assert same(found, expected)
        assert same(found, flat(single(tensors["input_gates"], as_hx(state))))


@every_function
def test_a_row_has_its_bits_in_any_batch_and_for_any_number_of_threads(cell, variant):
    tensors = drawn(cell, variant, 300, 33, torch.float32)
    whole = results(cell, variant, tensors, "native")
    with thread_count(3):
        assert same(results(cell, variant, tensors, "native").values(), whole.values())
    with torch.no_grad():
        some = called_gates(cell, variant, tensors | {name: tensors[name][11:14] for name in GATES_INPUTS})
    assert same(some, [t[11:14] for name, t in whole.items() if name.startswith("output")])


@each_cell
def test_layouts_and_an_empty_batch(cell):
    variant = Variant()
    tensors = drawn(cell, variant, 6, 9, torch.float32)
    expected = results(cell, variant, tensors, "native")
    strided = {
        name: torch.stack([t.detach(), t.detach().flip(-1)], -1)[..., 0] for name, t in tensors.items()
    }
    assert not strided["state"].is_contiguous()
    with torch.no_grad(), backends.use("native"):
        assert torch.equal(called_gates(cell, variant, strided)[0], expected["output h"])
    empty = {name: t[:0] if t.dim() == 2 else t for name, t in tensors.items()}
    found = results(cell, variant, empty, "native")
    assert found["output h"].shape == (0, 9)
    assert found["gain_ih"].shape == (9 * GATES[cell],)
    assert not found["gain_ih"].any()


@each_cell
def test_no_features_are_the_references(cell):
    tensors = {name: t[..., :0].detach() for name, t in drawn(cell, Variant(), 2, 3).items()}
    assert all(output.shape == (2, 0) for output in called_gates(cell, Variant(), tensors))


@each_cell
def test_rows_that_float32_cannot_square(cell):
    tensors = drawn(cell, Variant(), 5, 40, torch.float32)
    with torch.no_grad():
        tensors["input_gates"] *= 1e25
        tensors["hidden_gates"] *= 1e-30
    wide = {name: t.detach().double() for name, t in tensors.items()}
    exact, found = (results(cell, Variant(), *given) for given in ((wide, "reference"), (tensors, "native")))
    for name in (*(n for n in found if n.startswith("output")), "state", "gain_ih", "bias"):
        assert largest(found[name].double() - exact[name]) <= 1e-5 * (1 + largest(exact[name])), name


@some_functions
def test_derivatives_of_both_orders(cell, variant):
    # A large eps keeps curvature within what finite differences of two orders can resolve.
    variant = dataclasses.replace(variant, eps=0.5)
    tensors = drawn(cell, variant, 3, 4)

    def function(*values):
        return tuple(called_gates(cell, variant, dict(zip(tensors, values, strict=True))))

    with backends.use("native"):
        gradcheck(function, tuple(tensors.values()))
        gradgradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize(("cell", "part"), [("lstm", 0), ("lstm", 1), ("gru", 0)])
def test_the_gradient_of_one_result_and_of_some_arguments(cell, part):
    tensors = drawn(cell, Variant(), 3, 5)
    for name in ("hidden_gates", "gain_cell" if cell == "lstm" else "bias_hn"):
        tensors[name].requires_grad_(False)
    needed = [t for t in tensors.values() if t.requires_grad]
    grads = []
    for kernel in ("native", "reference"):
        with backends.use(kernel):
            output = called_gates(cell, Variant(), tensors)[part]
        grads.append(torch.autograd.grad(output.sum(), needed, allow_unused=True, materialize_grads=True))
    assert all(torch.allclose(a, e, rtol=1e-9, atol=1e-10) for a, e in zip(*grads, strict=True))


@some_functions
def test_a_gradient_has_its_bits_whatever_else_is_wanted(cell, variant):
    for dtype, name in itertools.product((torch.float32, torch.bfloat16), GATES_INPUTS):
        tensors = drawn(cell, variant, 5, 9, dtype)
        expected = results(cell, variant, tensors, "native")
        tensors[name] = tensors[name].detach()
        leaves = [t for t in tensors.values() if t.requires_grad]
        for wanted in (leaves, leaves[:1]):
            outputs = called_gates(cell, variant, tensors)
            generator = torch.Generator().manual_seed(5)
            seeds = [torch.randn(o.shape, generator=generator).to(dtype) for o in outputs]
            names = [n for n, t in tensors.items() if any(t is leaf for leaf in wanted)]
            found = torch.autograd.grad(outputs, wanted, seeds, materialize_grads=True, allow_unused=True)
            assert same(found, [expected[n] for n in names]), (dtype, name)


@each_cell
def test_weights_in_any_mapping(cell):
    tensors = {name: t.detach() for name, t in drawn(cell, Variant(), 3, 5).items()}
    inputs = [tensors.pop(name) for name in GATES_INPUTS]
    expected, *found = (
        flat(getattr(LF, f"{cell}_gates")(*inputs, weights))
        for weights in (tensors, MappingProxyType(tensors), torch.nn.ParameterDict(tensors))
    )
    assert all(same(outputs, expected) for outputs in found)


def operator(cell: str, suffix: str = ""):
    """Return an operator of a cell."""
    return getattr(torch.ops.layernorm, f"{cell}_gates{suffix}")


def arguments(cell: str, variant: Variant, dtype=torch.float32):
    """Return the operator's arguments by position."""
    spec, tensors = layer_spec(cell, variant), drawn(cell, variant, 3, 4, dtype)
    return (*(tensors[name] for name in GATES_INPUTS), *spec.listed_for_gates(tensors), spec.codes, spec.eps)


@some_functions
def test_opcheck(cell, variant):
    given = arguments(cell, variant)
    opcheck(operator(cell).default, given)
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in given)
    grads = [torch.randn(3, 4) for _ in range(2 if cell == "lstm" else 1)]
    wanted = [a is not None for a in given[:-2]]
    opcheck(operator(cell, "_backward").default, (grads, *detached, wanted))


@needs_torch(2, 7, "cannot trace it in one graph")
@each_cell
def test_compiled_it_is_the_same(cell):
    tensors = drawn(cell, Variant(), 3, 5, torch.float32)
    compiled = torch.compile(called_gates, fullgraph=True, backend="aot_eager")
    found = []
    for function in (called_gates, compiled):
        outputs = function(cell, Variant(), tensors)
        total = sum(output.pow(i + 1).sum() for i, output in enumerate(outputs))
        found.append((*outputs, *torch.autograd.grad(total, list(tensors.values()))))
    assert same(*found)


@each_cell
def test_autocast_computes_in_the_lower_precision(cell):
    tensors = drawn(cell, Variant(), 3, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        h, *_ = called_gates(cell, Variant(), tensors)
    expected, *_ = called_gates(cell, Variant(), {name: t.bfloat16() for name, t in tensors.items()})
    assert h.dtype == torch.bfloat16
    assert torch.equal(h, expected)


@each_cell
def test_forward_mode_is_the_references(cell):
    tensors = {name: t.detach() for name, t in drawn(cell, Variant(), 3, 4).items()}
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors["state"], torch.randn(3, 4).double())
        h, *_ = called_gates(cell, Variant(), tensors | {"state": dual})
        assert torch.autograd.forward_ad.unpack_dual(h).tangent.isfinite().all()
        given = list(arguments(cell, Variant(), torch.float64))
        given[2] = dual
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            operator(cell)(*given)


@pytest.mark.parametrize(
    ("cell", "preset"),
    [(cell, name) for name, cells in PRESETS.items() for cell in GATES_CELLS if cell in cells],
)
def test_a_cell_is_made_of_it(cell, preset):
    single = CELLS[cell](3, 5, variant=preset).double()
    x, h, c = (torch.randn(4, size, dtype=torch.float64) for size in (3, 5, 5))
    products = {"input_gates": x @ single.weight_ih.T, "hidden_gates": h @ single.weight_hh.T}
    weights = {n: p for n, p in single.named_parameters() if not n.startswith("weight")}
    found = called_gates(cell, preset, {**products, "state": c if cell == "lstm" else h, **weights})
    for a, e in zip(found, flat(single(x, as_hx([h, c][: len(found)]))), strict=True):
        assert torch.allclose(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_gates": torch.zeros(3, 15)}, RuntimeError, r"Expected input_gates of shape \[3, {width}\]"),
        (
            {"hidden_gates": torch.zeros(2, 16)},
            RuntimeError,
            r"Expected hidden_gates of shape \[3, {width}\]",
        ),
        ({"state": torch.zeros(4)}, RuntimeError, "{state} must have 2 dimensions, got 1"),
        ({"gain_ih": torch.ones(4)}, RuntimeError, r"Expected gain_ih of shape \[{width}\]"),
        ({"weight_ih": torch.ones(16, 2)}, ValueError, "unknown: weight_ih"),
        ({"gain_ih": None}, ValueError, "missing: gain_ih"),
    ],
)
@each_cell
def test_bad_arguments_are_refused(cell, change, error, message):
    tensors = drawn(cell, Variant(), 3, 4, torch.float32) | change
    message = message.format(width=4 * GATES[cell], state="c" if cell == "lstm" else "h")
    with pytest.raises(error, match=f"{cell}_gates: .*{message}"):
        called_gates(
            cell, Variant(), {name: tensor for name, tensor in tensors.items() if tensor is not None}
        )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, 15), "input_gates must be"),
        (1, torch.zeros(3, 16).double(), "hidden_gates must be"),
        (2, torch.zeros(3), "must have two dimensions"),
        (2, torch.zeros(3, 4, dtype=torch.int64), "must have two dimensions"),
        (5, torch.zeros(3), "gain_ih must be"),
        (-2, layer_spec("rnn", "paper").codes, "spec must be of the cell"),
    ],
)
@each_cell
def test_the_operator_refuses_bad_arguments(cell, place, value, message):
    given = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments(cell, Variant())]
    given[place] = value
    with pytest.raises(RuntimeError, match=message):
        operator(cell)(*given)


@each_cell
def test_the_operator_refuses_parameters_of_another_variant(cell):
    given = list(arguments(cell, Variant()))
    given[-2] = layer_spec(cell, "none").codes
    with pytest.raises(RuntimeError, match="a gain or bias that this variant does not have"):
        operator(cell)(*given)
