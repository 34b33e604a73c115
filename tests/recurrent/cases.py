"""Builders for tests of recurrent layers: functions, parameters, states, modules, layers, operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import layernorm
from layernorm import Variant
from layernorm import functional as LF
from layernorm.spec import layer_spec
from layernorm.variants import GATES

SEQUENCES = {"lstm": layernorm.LayerNormLSTM, "gru": layernorm.LayerNormGRU, "rnn": layernorm.LayerNormRNN}
CELLS = {
    "lstm": layernorm.LayerNormLSTMCell,
    "gru": layernorm.LayerNormGRUCell,
    "rnn": layernorm.LayerNormRNNCell,
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
#: Small sizes: features of the input, features of the state.
F, H = 3, 4

# ---- functions: a cell and its variant ----

#: Every distinct function of gates. A field without a meaning for a cell has one value only.
GATES_FUNCTIONS = [
    *(
        (cell, Variant(kind=kind, inputs=inputs, scope=scope, cell=cell_norm, projection_bias=bias))
        for cell in GATES
        for kind in ("layer", "rms")
        for inputs in ("separate", "summed")
        for scope in ("matrix", "all", "gate")
        for cell_norm in ("output", "carried", "none")
        for bias in (False, True)
        if {
            "lstm": scope != "all",
            "gru": cell_norm == "output",
            "rnn": (scope, cell_norm) == ("all", "output"),
        }[cell]
    ),
    *((cell, Variant(kind="none")) for cell in GATES),
]
#: What an LSTM's cell has apart from its gates.
CELL_FUNCTIONS = [
    *(
        ("lstm", Variant(kind=kind, inputs="plain", cell=cell_norm, cell_clip=clip))
        for kind, cell_norm, clip in (
            ("layer", "output", None),
            ("layer", "carried", 0.4),
            ("rms", "carried", None),
        )
    ),
    ("lstm", Variant(kind="rms", inputs="plain", eps=0.1, cell_clip=0.3)),
    ("lstm", Variant(inputs="summed", scope="gate", cell="none", cell_clip=0.4)),
    ("lstm", Variant(cell_eps=0.3)),
    ("lstm", Variant(kind="rms", cell="carried", eps=0.1, cell_eps=0.0, cell_clip=0.5)),
    ("lstm", Variant(kind="none", cell_clip=0.4)),
]
#: GRUs that the reference alone computes.
RESET_BEFORE = [
    ("gru", Variant(kind=kind, inputs=inputs, scope=scope, projection_bias=bias, reset_after=False))
    for kind, inputs, scope, bias in (
        ("none", "separate", "matrix", True),
        ("layer", "separate", "matrix", False),
        ("rms", "separate", "gate", True),
        ("layer", "summed", "gate", False),
        ("rms", "summed", "matrix", True),
    )
]
ALL_FUNCTIONS = GATES_FUNCTIONS + CELL_FUNCTIONS
#: Some of all, in which every value of every field occurs.
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
    ("lstm", Variant(inputs="plain", cell="carried")),
]


def of_functions(functions: Iterable[tuple[Any, ...]], *more: str) -> pytest.MarkDecorator:
    """Parametrize a test by cell and variant, and by whatever follows them."""
    params = [
        pytest.param(*f, id="-".join([f[0], str(i), *map(str, f[2:])])) for i, f in enumerate(functions)
    ]
    return pytest.mark.parametrize(("cell", "variant", *more), params)


every_function = of_functions(FUNCTIONS)
# Each in float32 and in one other type.
every_function_and_type = of_functions(
    [(*f, dtype) for i, f in enumerate(FUNCTIONS) for dtype in (torch.float32, DTYPES[1 + i % 3])], "dtype"
)

# ---- tensors ----


def flat(result: Any) -> list[Tensor]:
    """Return the tensors of a result, a packed sequence's data among them."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """Return whether tensors are equal, pair by pair."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def largest(t: Tensor) -> float:
    """Return the largest magnitude, 0 where there is no element."""
    return float(t.detach().abs().max()) if t.numel() else 0.0


def as_hx(state: Sequence[Tensor] | None) -> Any:
    """Return a state as layers take it: one tensor, a tuple of two, or None."""
    return None if not state else tuple(state) if len(state) == 2 else state[0]


def state_sizes(cell: str, hidden: int, proj: int = 0) -> dict[str, int]:
    """Return the features of h, and of an LSTM's c."""
    return {"h": proj or hidden} | ({"c": hidden} if cell == "lstm" else {})


def state_of(cell: str, rows: int, proj: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return a random state of size H that needs a gradient."""
    sizes = state_sizes(cell, H, proj).values()
    return [torch.randn(rows, size).to(dtype).requires_grad_() for size in sizes]


def weights_of(
    cell: str,
    variant: str | Variant = "paper",
    features: int = F,
    hidden: int = H,
    proj: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    needs_grad: bool = True,
) -> dict[str, Tensor]:
    """Return random parameters by name, gains and biases away from 1 and 0."""
    shapes = layer_spec(cell, variant).parameter_shapes(features, hidden, proj_size=proj, bias=bias)
    weights = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape) * (0.3 if len(shape) == 1 else hidden**-0.5)
        weights[name] = (drawn + name.startswith("gain")).to(dtype).requires_grad_(needs_grad)
    return weights


def packing(lengths: Sequence[int]) -> tuple[list[int], Tensor]:
    """Return the batch sizes of rows of these lengths, and a mask (T, N) of their steps."""
    there = torch.tensor([[t < length for length in lengths] for t in range(max(lengths))])
    return there.sum(1).tolist(), there


# ---- modules ----


def randomized(module: nn.Module) -> nn.Module:
    """Move all parameters, gains and biases away from their initial 1 and 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def made(cell: str, sizes: tuple[int, int] = (F, H), **options: Any) -> nn.Module:
    """Return a network of these sizes with random parameters."""
    return randomized(SEQUENCES[cell](*sizes, **options))


def module_state(module: nn.Module, rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return a random initial state, each tensor (L·D, N, size), that needs a gradient."""
    sizes = state_sizes(module.spec.cell, module.hidden_size, module.proj_size).values()
    count = module.num_layers * (1 + module.bidirectional)
    return [torch.randn(count, rows, size).to(dtype).requires_grad_() for size in sizes]


# ---- one layer and direction ----


def called(cell: str, x: Tensor, state: Sequence[Tensor], weights: Mapping[str, Tensor], **options: Any):
    """Return the result of a sequence function as [output, *final]."""
    return flat(getattr(LF, cell)(x, as_hx(state), weights, **options))


def as_function(cell: str, names: Iterable[str], **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Return a sequence function of tensors alone: the input, the state, and the weights of these names."""
    count = len(state_sizes(cell, H))

    def function(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip(names, tensors[count:], strict=True))
        return tuple(called(cell, x, tensors[:count], weights, **options))

    return function


class Layer:
    """Weights of one layer and direction, and a call that returns everything a caller can see."""

    def __init__(self, cell, variant, features, hidden, dtype=torch.float32, proj=0, **options):
        self.cell, self.features, self.dtype = cell, features, dtype
        self.options = options | {"variant": variant}
        self.sizes = tuple(state_sizes(cell, hidden, proj).values())
        self.weights = weights_of(cell, variant, features, hidden, proj, dtype)

    def state(self, rows, dtype=None):
        return [torch.randn(rows, size).to(dtype or self.dtype) for size in self.sizes]

    def drawn(self, steps, rows):
        """Return a random input, state, and gradients of all results."""
        x = torch.randn(steps, rows, self.features).to(self.dtype)
        return x, self.state(rows), seeds_like(self, steps, rows, self.dtype)

    def in_float64(self):
        """Return the same layer in float64."""
        wide = Layer(self.cell, self.options["variant"], self.features, self.sizes[-1], torch.float64)
        wide.weights = {n: w.detach().double().requires_grad_() for n, w in self.weights.items()}
        return wide

    def forward(self, x, state, **options):
        return called(self.cell, x, state, self.weights, **self.options, **options)

    def __call__(self, x, state, seeds, **options):
        """Return outputs, gradients of input and state, gradients of the weights."""
        x, *state = (t.detach().requires_grad_() for t in (x, *state))
        found = self.forward(x, state, **options)
        leaves = [x, *state, *self.weights.values()]
        grads = torch.autograd.grad(found, leaves, seeds)
        return [t.detach() for t in found], grads[: 1 + len(state)], grads[1 + len(state) :]


def seeds_like(layer, steps, rows, dtype=torch.float32):
    """Return random gradients of all results of a layer."""
    shapes = [(steps, rows, layer.sizes[0]), *((rows, size) for size in layer.sizes)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


# ---- a step after its products ----

#: The cells that have such a function.
GATES_CELLS = ("lstm", "gru")
#: The state is an LSTM's c, or a GRU's h.
GATES_INPUTS = ("input_gates", "hidden_gates", "state")


def called_gates(cell: str, variant: str | Variant, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return h, and an LSTM's c, from inputs and parameters by name."""
    weights = {name: tensor for name, tensor in tensors.items() if name not in GATES_INPUTS}
    inputs = [tensors[name] for name in GATES_INPUTS]
    return flat(getattr(LF, f"{cell}_gates")(*inputs, weights, variant=variant))


def gates_results(
    cell: str, variant: str | Variant, tensors: Mapping[str, Tensor], seeds: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the new state and every gradient of Σ seeds·state, by name; seeds are for h and c."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = called_gates(cell, variant, leaves)
    seeds = seeds[: len(outputs)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), seeds, materialize_grads=True)
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)
    found = {f"output {name}": output.detach() for name, output in zip(("h", "c"), outputs, strict=False)}
    return found | dict(zip(leaves, grads, strict=True))


# ---- promises of a layer ----


def assert_same_results(a, b):
    """Check that outputs, gradients of input and state, and gradients of weights are equal."""
    for x, y in zip(a, b, strict=True):
        assert same(x, y)


def assert_rows_are_alone(layer, x, state, seeds, whole, rows):
    """Check that these rows by themselves have the outputs and gradients that they have in the batch."""
    found = layer(x[:, rows], [s[rows] for s in state], [s[..., rows, :] for s in seeds])
    for part, batch in zip(found[:2], whole[:2], strict=True):
        assert same(part, [t[..., rows, :] for t in batch])


def assert_packed_rows_are_alone(layer, lengths, **options):
    """Check that packed rows of these lengths have the outputs and gradients that each has by itself."""
    sizes, there = packing(lengths)
    x, state, seeds = layer.drawn(*there.shape)
    resets = torch.rand(there.shape) < 0.15
    packed = [t[there] for t in (x, resets, seeds[0])]
    outputs, grads, _ = layer(
        packed[0], state, [packed[2], *seeds[1:]], batch_sizes=sizes, resets=packed[1], **options
    )
    padded, grad_x = (torch.zeros(*there.shape, t.size(-1), dtype=t.dtype) for t in (outputs[0], grads[0]))
    padded[there], grad_x[there] = outputs[0], grads[0]
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


# ---- the operators ----


def operator_arguments(
    cell="lstm", variant=None, proj=0, dtype=torch.float32, packed=False, resets=True, features=F, **changes
) -> dict[str, Any]:
    """Return the arguments of ``torch.ops.layernorm.recurrent``, by name and in order."""
    spec = layer_spec(cell, variant or Variant())
    h, *c = state_of(cell, 2, proj, dtype)
    shape = (5,) if packed else (3, 2)
    return {
        "input": torch.randn(*shape, features).to(dtype).requires_grad_(),
        "h": h,
        "c": c[0] if c else None,
        "weights": spec.listed(weights_of(cell, spec.variant, features, H, proj, dtype)),
        "resets": torch.rand(shape) < 0.3 if resets else None,
        "reset_h": None,
        "reset_c": None,
        "batch_sizes": [2, 2, 1] if packed else None,
        "spec": list(spec.codes),
        "eps": spec.eps,
        "reverse": False,
        "recompute": False,
    } | changes


def detached(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments without a need of a gradient."""

    def strip(value):
        if isinstance(value, list):
            return [strip(v) for v in value]
        return value.detach() if isinstance(value, Tensor) else value

    return {name: strip(value) for name, value in given.items()}


def backward_arguments(given: Mapping[str, Any], kept: Sequence[Tensor]) -> dict[str, Any]:
    """Return those of recurrent_backward, from those of recurrent_forward and what it returned."""
    output, hn, cn, *saved = kept
    rest = {name: value for name, value in given.items() if name != "recompute"}
    grads = {
        "grad_output": torch.randn_like(output),
        "grad_h": torch.randn_like(hn),
        "grad_c": torch.randn_like(cn) if cn.numel() else None,
    }
    names = ("saved_x", "saved_h", "saved_c", "saved_stats")
    names_of_states = ("input", "h", "c", "reset_h", "reset_c")
    leaves = (*(given[name] for name in names_of_states), *given["weights"])
    wanted = [leaf is not None for leaf in leaves]
    return rest | grads | {"output": output} | dict(zip(names, saved, strict=True)) | {"wanted": wanted}
