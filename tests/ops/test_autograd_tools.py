"""The compiled operators under PyTorch's own tools: vmap over gradients, compiled autograd, hooks on
saved tensors, changes in place, counting of FLOPs, tracing."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import functional as AF
from torch.utils.flop_counter import FlopCounterMode

import layernorm
from layernorm import functional as LF
from layernorm.variants import GATES
from tests.recurrent.cases import CELLS, GATES_CELLS, SEQUENCES, F, H, flat
from tests.settings import needs_torch

pytestmark = pytest.mark.usefixtures("native", "one_thread")

every_cell = pytest.mark.parametrize("cell", SEQUENCES)


def subjects(dtype=torch.float64):
    """Yield a function of a (T, N, F) tensor for each kind of node, with its name and its parameters."""
    for kind, variant in itertools.product(SEQUENCES, ("paper", "none")):
        module = SEQUENCES[kind](F, H, variant=variant).to(dtype)
        yield f"{kind}-{variant}", (lambda x, m=module: m(x)[0]), list(module.parameters())
    recompute = layernorm.LayerNormLSTM(F, H, recompute=True, proj_size=2).to(dtype)
    yield "recompute", (lambda x: recompute(x)[0]), list(recompute.parameters())
    cell = layernorm.LayerNormLSTMCell(F, H).to(dtype)
    yield "cell", (lambda x: cell(x[0])[1]), list(cell.parameters())
    for kind in GATES_CELLS:
        single = CELLS[kind](F, H).to(dtype)

        def gates(x: Tensor, kind: str = kind, single: torch.nn.Module = single) -> Tensor:
            products = x[0] @ single.weight_ih.T
            vectors = {n: p for n, p in single.named_parameters() if not n.startswith("weight")}
            step = getattr(LF, f"{kind}_gates")
            return torch.cat(flat(step(products, products.sin(), x.new_ones(x.size(1), H), vectors)), -1)

        yield f"{kind}_gates", gates, list(single.parameters())
    norm = layernorm.LayerNorm(F).to(dtype)
    yield "layer_norm", norm, list(norm.parameters())
    gain = torch.randn(F, dtype=dtype, requires_grad=True)
    yield "rms_norm", (lambda x: LF.rms_norm(x, (F,), gain)), [gain]
    yield "add_layer_norm", (lambda x: torch.cat(LF.add_layer_norm(x, x.sin(), (F,), gain), -1)), [gain]


NAMES = [name for name, *_ in subjects()]


@pytest.fixture(params=NAMES)
def subject(request):
    return next((function, leaves) for name, function, leaves in subjects() if name == request.param)


def assert_close(found, wanted):
    """Compare in float64, where two orders of summation differ by some roundings."""
    for f, w in zip(found, wanted, strict=True):
        assert (f is None) == (w is None)
        assert f is None or torch.allclose(f, w, rtol=1e-10, atol=1e-10)


# ---- vmap ----


@needs_torch(2, 5, "has no torch.vmap of operators from elsewhere")
def test_a_batch_of_gradients(subject):
    function, parameters = subject
    x = torch.randn(3, 2, F, dtype=torch.float64, requires_grad=True)
    output, leaves = function(x), [x, *parameters]
    grads = torch.randn(5, *output.shape, dtype=torch.float64)
    options = {"retain_graph": True, "allow_unused": True}
    each = [torch.autograd.grad(output, leaves, grad, **options) for grad in grads]
    wanted = [None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)]
    assert_close(torch.autograd.grad(output, leaves, grads, is_grads_batched=True, **options), wanted)
    of_x = torch.vmap(lambda grad: torch.autograd.grad(output, x, grad, retain_graph=True)[0])(grads)
    assert_close([of_x], wanted[:1])
    # Two levels at once.
    pairs = torch.stack([grads, grads * 2])
    of_x = torch.vmap(torch.vmap(lambda grad: torch.autograd.grad(output, x, grad, retain_graph=True)[0]))(
        pairs
    )
    assert_close([of_x], [torch.stack([wanted[0], wanted[0] * 2])])


def test_vectorized_jacobian_and_hessian(subject):
    function, _ = subject
    x = torch.randn(2, 2, F, dtype=torch.float64)
    assert_close([AF.jacobian(function, x, vectorize=True)], [AF.jacobian(function, x)])

    def scalar(x):
        return function(x).square().sum()

    assert_close([AF.hessian(scalar, x, vectorize=True)], [AF.hessian(scalar, x)])


def test_vmap_over_the_operators():
    x, gain = torch.randn(4, 3, F), torch.randn(4, F)
    found = torch.vmap(lambda a, w: torch.ops.layernorm.rms_norm(a, [F], w, 1e-5))(x, gain)
    assert torch.equal(
        found, torch.stack([LF.rms_norm(a, (F,), w, 1e-5) for a, w in zip(x, gain, strict=True)])
    )


# ---- derivatives of higher order ----


@every_cell
def test_arguments_that_depend_on_one_another_count_once(cell):
    # An initial state made from the input, and one tensor as two weights.
    module = SEQUENCES[cell](H, H).double()
    module.weight_hh_l0 = module.weight_ih_l0
    x = torch.randn(3, 2, H, dtype=torch.float64, requires_grad=True)
    h = x.mean(0, keepdim=True).sin()
    output = module(x, (h, h.cos()) if cell == "lstm" else h)[0]
    grad, leaves = torch.randn_like(output), [x, *module.parameters()]
    plain = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    assert_close(torch.autograd.grad(output, leaves, grad, create_graph=True), plain)


# ---- compiled autograd ----


@needs_torch(2, 6, "has another interface of compiled autograd")
@pytest.mark.parametrize("changed", [False, True], ids=["kept", "changed in place"])
@pytest.mark.parametrize("name", ["lstm-paper", "gru-paper", "lstm_gates", "gru_gates", "add_layer_norm"])
def test_compiled_autograd_takes_nodes_that_ran_eagerly(name, changed):
    function, parameters = next((f, p) for n, f, p in subjects() if n == name)
    torch._dynamo.reset()
    for steps in (3, 3, 4):
        x = torch.randn(steps, 2, F, dtype=torch.float64, requires_grad=True)
        output = function(x)
        loss = (output.mul_(2) if changed else output).square().sum()
        leaves = [x, *parameters]
        wanted = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        for leaf in leaves:
            leaf.grad = None
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
            loss.backward()
        assert_close([leaf.grad for leaf in leaves], wanted)


# ---- hooks on saved tensors ----


def test_hooks_may_change_the_layout_of_what_is_saved(subject):
    function, parameters = subject
    x = torch.randn(3, 2, F, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(function(x).sum(), [x, *parameters], allow_unused=True)

    def strided(saved):
        return torch.stack([saved, saved], -1)[..., 0]

    for pack, unpack in ((strided, lambda t: t), (lambda t: t.clone(), strided)):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            output = function(x)
        found = torch.autograd.grad(output.sum(), [x, *parameters], allow_unused=True)
        assert_close(found, wanted)


# ---- changes in place ----


@every_cell
@pytest.mark.parametrize(
    "change",
    [torch.nn.ReLU(inplace=True), lambda y: y.add_(1), lambda y: y[1:].mul_(2), lambda y: y.zero_()],
    ids=["ReLU", "add_", "of a part", "zero_"],
)
def test_an_output_may_be_changed_in_place(cell, change):
    for options in ({}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"recompute": True}):
        module = SEQUENCES[cell](F, H, **options).double()
        x = torch.randn(3, 2, F, dtype=torch.float64, requires_grad=True)
        leaves = [x, *module.parameters()]

        def loss(in_place, module=module, x=x):
            y, _ = module(x)
            y = y if in_place else y.clone()
            change(y)
            return y.square().sum()

        wanted = torch.autograd.grad(loss(False), leaves)
        found = loss(True)
        for _ in range(2):  # backward more than once
            for f, w in zip(torch.autograd.grad(found, leaves, retain_graph=True), wanted, strict=True):
                assert torch.equal(f, w)


@needs_torch(2, 6, "does not tell which hooks saved tensors have")
def test_an_output_may_be_changed_in_place_under_checkpoint_and_hooks():
    module = layernorm.LayerNormGRU(F, H).double()
    x = torch.randn(3, 2, F, dtype=torch.float64, requires_grad=True)

    def run(x):
        y, _ = module(x)
        return y.relu_()

    wanted = torch.autograd.grad(run(x).sum(), x)
    found = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], wanted[0])
    with torch.autograd.graph.save_on_cpu():
        found = run(x)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], wanted[0])


# ---- FLOPs ----


def counted(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


@pytest.mark.parametrize(("cell", "gates"), GATES.items())
def test_the_products_are_counted(cell, gates):
    steps, rows, features, hidden = 5, 2, 7, 6
    forward = 2 * steps * rows * gates * hidden * (features + hidden)
    module = SEQUENCES[cell](features, hidden)
    for needs_grad in (False, True):
        x = torch.randn(steps, rows, features, requires_grad=needs_grad)
        with torch.no_grad():
            assert counted(lambda x=x: module(x))[0] == forward
        found, (output, _) = counted(lambda x=x: module(x))
        assert found == forward
        of_input = 2 * steps * rows * gates * hidden * features
        assert counted(output.sum().backward)[0] == 2 * forward - (0 if needs_grad else of_input)
    with layernorm.backends.use("reference"):
        assert counted(lambda: module(x))[0] == forward


def test_projection_and_recompute_are_counted():
    module = layernorm.LayerNormLSTM(7, 6, proj_size=2, recompute=True)
    forward = 2 * 5 * 3 * (24 * (7 + 2) + 6 * 2)
    found, (output, _) = counted(lambda: module(torch.randn(5, 3, 7, requires_grad=True)))
    assert found == forward
    assert counted(output.sum().backward)[0] == 3 * forward


def test_a_counter_imported_late_counts():
    # In a process of its own: here the counter has been imported.
    code = """
import torch, layernorm
module = layernorm.LayerNormRNN(3, 4)
import sys
import warnings
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    module(torch.randn(2, 1, 3))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * 2 * 4 * (3 + 4)


# ---- tracing ----


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # from the checks of shapes, as torch.nn's
@every_cell
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
def test_recurrent_layers_can_be_traced(cell, options):
    module = SEQUENCES[cell](F, H, **options).double()
    x = torch.randn(4, 5, F, dtype=torch.float64)
    traced = torch.jit.trace(module, (x,), check_trace=False)
    assert "layernorm::" not in str(traced.inlined_graph)  # so that it runs without this package
    same_steps = (7, 5) if options else (4, 7)
    for shape in ((4, 5), same_steps):
        x = torch.randn(*shape, F, dtype=torch.float64)
        assert_close(flat(traced(x)), flat(module(x)))
    with pytest.raises(RuntimeError, match=r"Expected . elements in a list but found 9"):
        traced(torch.randn(9, 9, F, dtype=torch.float64))  # steps are unrolled


@every_cell
def test_cells_can_be_traced(cell):
    single = CELLS[cell](F, H).double()
    x = torch.randn(2, F, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(single, (x,), check_trace=False)
    x = torch.randn(6, F, dtype=torch.float64)
    assert_close(flat(traced(x)), flat(single(x)))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_norms_can_be_traced_with_a_shape_of_the_input(name):
    def function(x):
        found = getattr(LF, name)(*([x, x] if name.startswith("add") else [x]), x.shape[-1:], eps=1e-5)
        return found if isinstance(found, Tensor) else found[0] * found[1]

    traced = torch.jit.trace(function, (torch.randn(2, 3, dtype=torch.float64),))
    for shape in ((2, 3), (4, 9)):  # another width than it was traced with
        x = torch.randn(*shape, dtype=torch.float64)
        assert_close([traced(x)], [function(x)])


def test_a_traced_norm_runs_without_this_package():
    traced = torch.jit.trace(layernorm.LayerNorm(F), (torch.randn(2, F),))
    assert "layernorm::" not in str(traced.inlined_graph)
