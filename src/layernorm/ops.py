"""The operators: schemas and fake kernels, the Triton kernels of the norms, and the compiled module.

Importing this module defines the operators and loads the compiled module if there is one; Triton waits for
the first call that needs it. The CPU kernels, the derivatives of all devices and the entries for plain calls
are in ``csrc/torch``; this is what they are for:

- ``layer_norm``, ``rms_norm``, ``add_layer_norm``, ``add_rms_norm``: what users call. On tensors that need
  a derivative they record a node and run
- ``norm_forward``, which also returns the statistics, and in backward
- ``norm_backward``;
- ``recurrent``: one layer and direction of a recurrent network, with ``recurrent_forward``, which also
  returns what is kept, and ``recurrent_backward``. ``recurrent_composite_backward`` is the latter by the
  reference's own derivative, for derivatives of higher order;
- ``lstm_gates``: the part of an LSTM's step after its products, on the CPU alone, with
  ``lstm_gates_backward`` and ``lstm_gates_composite_backward`` likewise.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from layernorm import flops, recurrent_checks, reference
from layernorm.variants import Cell, CellNorm, Inputs, Kind, Scope, Variant

#: The variable that chooses the instruction set of the compiled kernels.
CAPABILITY_VARIABLE: Final = "LAYERNORM_CPU_CAPABILITY"

torch.library.define(
    "layernorm::layer_norm",
    "(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps) -> Tensor",
)
torch.library.define(
    "layernorm::rms_norm",
    "(Tensor input, SymInt[] normalized_shape, Tensor? weight, float eps) -> Tensor",
)
torch.library.define(
    "layernorm::add_layer_norm",
    "(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor output, Tensor sum)",
)
torch.library.define(
    "layernorm::add_rms_norm",
    "(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, float eps)"
    " -> (Tensor output, Tensor sum)",
)
# sum has no element where there is no residual; stats holds mean (where centred) and rstd of each row.
torch.library.define(
    "layernorm::norm_forward",
    "(Tensor input, Tensor? residual, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps,"
    " bool centred) -> (Tensor output, Tensor sum, Tensor stats)",
)
# input is what was normalized. A gradient that is not wanted has no element.
torch.library.define(
    "layernorm::norm_backward",
    "(Tensor grad, Tensor? grad_sum, Tensor input, Tensor stats, SymInt[] normalized_shape, Tensor? weight,"
    " Tensor? bias, bool centred, bool[3] wanted)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
)


def _given(**tensors: Tensor | None) -> None:
    """Raise for a tensor that an operator needs: PyTorch hands None on for it."""
    for name, tensor in tensors.items():
        if tensor is None:
            raise TypeError(f"layernorm: {name} must be a Tensor, got None")


def _one(input: Tensor, *_: object) -> Tensor:
    _given(input=input)
    return input.new_empty(input.shape)


def _two(input: Tensor, residual: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    _given(input=input, residual=residual)
    return input.new_empty(input.shape), residual.new_empty(input.shape)


for _name, _fake in (
    ("layer_norm", _one),
    ("rms_norm", _one),
    ("add_layer_norm", _two),
    ("add_rms_norm", _two),
):
    torch.library.register_fake(f"layernorm::{_name}", _fake)


@torch.library.register_fake("layernorm::norm_forward")
def _norm_forward_fake(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _given(input=input)
    rows = math.prod(input.shape[: input.dim() - len(normalized_shape)])
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    total = input.new_empty(0) if residual is None else residual.new_empty(input.shape)
    return input.new_empty(input.shape), total, input.new_empty((2 if centred else 1, rows), dtype=dtype)


@torch.library.register_fake("layernorm::norm_backward")
def _norm_backward_fake(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    stats: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _given(grad=grad, input=input, stats=stats)
    if len(wanted) != 3:
        raise RuntimeError(f"layernorm: wanted must be a list of 3, got {len(wanted)}")

    def like(parameter: Tensor | None, is_wanted: bool) -> Tensor:
        if not is_wanted:
            return input.new_empty(0)
        return (input if parameter is None else parameter).new_empty(normalized_shape)

    grad_input = input.new_empty(input.shape if wanted[0] else 0)
    return grad_input, like(weight, wanted[1]), like(bias, wanted[2])


#: The norms that users call.
NORMS: Final = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
_NORM: Final = (*NORMS, "norm_forward", "norm_backward")
_RECURRENT_NAMES: Final = ("recurrent", "recurrent_forward", "recurrent_backward")
#: The operators that Triton serves on GPUs.
TRITON: Final = (*_NORM, *_RECURRENT_NAMES)
#: What PyTorch does to the arguments of its norms under autocast on a GPU.
_AUTOCAST_DTYPE: Final = torch.float32


def triton_kernel(name: str, **options: Any) -> Callable[..., Any]:
    """The function of that name in ``layernorm.gpu``, which is imported when it is called first."""
    module = f"layernorm.gpu.{'norm' if name in _NORM else 'recurrent'}.operators"

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **options)

    return call


def _register_on_gpus(name: str) -> None:
    torch.library.impl(f"layernorm::{name}", "cuda", triton_kernel(name))
    if name in NORMS:
        torch.library.register_autocast(f"layernorm::{name}", "cuda", _AUTOCAST_DTYPE)
    inside = triton_kernel(name, wrap=torch.library.wrap_triton)

    # As torch.library.triton_op has it: a traced program holds the kernels' launches, not the operator.
    @torch.library.register_torch_dispatch(f"layernorm::{name}", FunctionalTensorMode)
    def _traced(mode: Any, operator: Any, types: Any, arguments: Any, keywords: Any) -> Any:
        if arguments[0].device.type != "cuda":
            return mode.__torch_dispatch__(operator, types, arguments, keywords)
        with mode:
            return inside(*arguments)


for _name in _NORM:
    _register_on_gpus(_name)

#: The parameters of a recurrent layer in the order in which operators list them. Where inputs are summed
#: ``gain`` stands in ``gain_ih``'s place.
WEIGHTS: Final = (
    "weight_ih",
    "weight_hh",
    "weight_hr",
    "bias_ih",
    "bias_hh",
    "gain_ih",
    "gain_hh",
    "bias",
    "bias_hn",
    "gain_cell",
    "bias_cell",
)

# cell is "lstm", "gru", "rnn_tanh" or "rnn_relu"; kind to eps are a Variant's fields. c, and cn among the
# results, are an LSTM's; cn has no element elsewhere. batch_sizes are a packed sequence's.
_RECURRENT = (
    "Tensor input, Tensor h, Tensor? c, Tensor?[] weights, Tensor? resets, int[]? batch_sizes, str cell,"
    " str kind, str inputs, str scope, str cell_norm, float eps, bool reverse"
)
_GRADS = "Tensor? grad_output, Tensor? grad_h, Tensor? grad_c"
torch.library.define(
    "layernorm::recurrent", f"({_RECURRENT}, bool recompute) -> (Tensor output, Tensor hn, Tensor cn)"
)
torch.library.define(
    "layernorm::recurrent_forward",
    f"({_RECURRENT}, bool recompute) -> (Tensor output, Tensor hn, Tensor cn, Tensor saved_x,"
    " Tensor saved_h, Tensor saved_c, Tensor saved_stats)",
)
# wanted: of input, h, c and the weights. A gradient that is not wanted has no element.
torch.library.define(
    "layernorm::recurrent_backward",
    f"({_RECURRENT}, {_GRADS}, Tensor output, Tensor saved_x, Tensor saved_h, Tensor saved_c,"
    " Tensor saved_stats, bool[14] wanted)"
    " -> (Tensor grad_input, Tensor grad_h, Tensor grad_c, Tensor[] grad_weights)",
)
torch.library.define(
    "layernorm::recurrent_composite_backward",
    f"({_RECURRENT}, {_GRADS}, bool[14] wanted)"
    " -> (Tensor grad_input, Tensor grad_h, Tensor grad_c, Tensor[] grad_weights)",
)
for _name in _RECURRENT_NAMES:
    torch.library.impl(f"layernorm::{_name}", "cuda", triton_kernel(_name))


_CELLS: Final = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _gates(cell: str) -> int:
    return {"lstm": 4, "gru": 3}.get(cell, 1)


def _recurrent_outputs(input: Tensor, h: Tensor, c: Tensor | None, cell: str) -> tuple[Tensor, ...]:
    _given(input=input, h=h)
    if h.dim() != 2 or input.dim() not in (2, 3):
        raise RuntimeError(
            "layernorm: h must have 2 dimensions, and input 3, or 2 if it is packed; got "
            f"{h.dim()} and {input.dim()}"
        )
    output = input.new_empty((*input.shape[:-1], h.size(-1)))
    cn = input.new_empty(c.shape) if c is not None and cell == "lstm" else input.new_empty(0)
    return output, input.new_empty(h.shape), cn


@torch.library.register_fake("layernorm::recurrent")
def _recurrent_fake(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    resets: Tensor | None,
    batch_sizes: Sequence[int] | None,
    cell: str,
    *_: object,
) -> tuple[Tensor, ...]:
    return _recurrent_outputs(input, h, c, cell)


@torch.library.register_fake("layernorm::recurrent_forward")
def _recurrent_forward_fake(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    resets: Tensor | None,
    batch_sizes: Sequence[int] | None,
    cell: str,
    kind: str,
    inputs: str,
    scope: str,
    cell_norm: str,
    eps: float,
    reverse: bool,
    recompute: bool,
) -> tuple[Tensor, ...]:
    gates = _gates(cell)
    weight = weights[1] if len(weights) == len(WEIGHTS) else None
    if weight is None or weight.dim() != 2:
        raise RuntimeError(f"layernorm: weights must be a list of {len(WEIGHTS)}, with the matrix weight_hh")
    hidden = weight.size(0) // gates
    rows = math.prod(input.shape[:-1])
    two = cell == "gru" if kind == "none" else inputs == "separate"
    late = cell == "gru" and not two and scope != "all"
    groups = 0 if kind == "none" else gates if scope == "gate" else 1 + (cell == "gru" and scope == "matrix")
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    wide = gates * hidden if two else hidden if late else 0
    saved = (
        input.new_empty(0 if recompute else (rows, gates * hidden)),
        input.new_empty(0 if recompute or not wide else (rows, wide)),
        input.new_empty((rows, hidden) if cell == "lstm" else 0),
        input.new_empty(0 if recompute else (rows, groups * (2 if two else 1)), dtype=dtype),
    )
    return *_recurrent_outputs(input, h, c, cell), *saved


@torch.library.register_fake("layernorm::recurrent_backward")
def _recurrent_backward_fake(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    wanted = rest[-1]
    assert isinstance(wanted, Sequence)  # noqa: S101 - the schema's own type
    _given(input=input, h=h)

    def like(tensor: Tensor | None, is_wanted: bool) -> Tensor:
        return input.new_empty(tensor.shape if tensor is not None and is_wanted else 0)

    first = (like(tensor, want) for tensor, want in zip((input, h, c), wanted[:3], strict=True))
    grads = [like(tensor, want) for tensor, want in zip(weights, wanted[3:], strict=True)]
    return *first, grads  # type: ignore[return-value]


def _recurrent_composite_backward(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    resets: Tensor | None,
    batch_sizes: Sequence[int] | None,
    cell: str,
    kind: Kind,
    inputs: Inputs,
    scope: Scope,
    cell_norm: CellNorm,
    eps: float,
    reverse: bool,
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients by differentiating the reference, themselves differentiable."""
    given = [input, h, c, *weights]
    leaves = _leaves(given)
    named = zip(WEIGHTS, leaves[3:], strict=True)
    names = {"gain_ih": "gain"} if kind != "none" and inputs == "summed" else {}
    parameters = {names.get(name, name): weight for name, weight in named if weight is not None}
    if cell not in _CELLS:
        raise ValueError(f"layernorm: cell must be one of {', '.join(_CELLS)}; got {cell!r}")
    kernel, _, nonlinearity = cast(tuple[Cell, str, str], cell.partition("_"))
    variant = Variant(
        kind=kind,
        inputs=inputs,
        scope=scope,
        cell=cell_norm,
        projection_bias="bias_ih" in parameters or "bias_hh" in parameters,
        eps=eps,
    )
    given_options: dict[str, Any] = {"reverse": reverse, "batch_sizes": batch_sizes, "resets": resets}
    if nonlinearity:
        given_options["nonlinearity"] = nonlinearity
    state = (leaves[1], leaves[2]) if cell == "lstm" else leaves[1]
    recurrent_checks.layer_arguments(kernel, leaves[0], state, parameters, variant, batch_sizes, resets)
    with torch.enable_grad():
        output, final = getattr(reference, kernel)(leaves[0], state, parameters, variant, **given_options)
        finals = final if isinstance(final, tuple) else (final,)
    pairs = [
        (out, grad)
        for out, grad in zip((output, *finals), (grad_output, grad_h, grad_c), strict=False)
        if grad is not None
    ]
    outputs, grads = zip(*pairs, strict=True)
    result = _gradients(outputs, leaves, grads, wanted)
    return result[0], result[1], result[2], result[3:]


@torch.enable_grad()
def _leaves(given: Sequence[Tensor | None]) -> list[Any]:
    """Return each tensor under another name, and as one that needs a gradient.

    Under its own, the gradient of one would count again that of another which was computed from it.
    """
    return [
        t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in given
    ]


def _gradients(
    outputs: Sequence[Tensor], leaves: Sequence[Any], grads: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the leaves, themselves differentiable; one that is not wanted has no element."""
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want and leaf is not None]
    found = iter(
        torch.autograd.grad(
            outputs, asked, grads, create_graph=True, materialize_grads=True, allow_unused=True
        )
    )
    return [
        next(found) if want and leaf is not None else leaves[0].new_empty(0)
        for leaf, want in zip(leaves, wanted, strict=True)
    ]


# The second key is that of batched gradients: is_grads_batched, jacobian(vectorize=True).
_COMPOSITE: Final = ("CompositeImplicitAutograd", "Batched")
for _key in _COMPOSITE:
    torch.library.impl("layernorm::recurrent_composite_backward", _key)(_recurrent_composite_backward)


#: The parameters of ``lstm_gates`` in their order among its arguments; ``gain`` as in ``WEIGHTS``.
GATES_PARAMETERS: Final = ("bias_ih", "bias_hh", "gain_ih", "gain_hh", "bias", "gain_cell", "bias_cell")
_GATES: Final = (
    "Tensor input_gates, Tensor hidden_gates, Tensor c, "
    + ", ".join(f"Tensor? {name}" for name in GATES_PARAMETERS)
    + ", str kind, str inputs, str scope, str cell_norm, float eps"
)
_GATES_GRADS: Final = ", ".join(
    f"Tensor grad_{name}" for name in ("input_gates", "hidden_gates", "c", *GATES_PARAMETERS)
)
torch.library.define("layernorm::lstm_gates", f"({_GATES}) -> (Tensor hidden, Tensor cn)")
# wanted: of the gates, c and the parameters. A gradient that is not wanted has no element.
for _name in ("lstm_gates_backward", "lstm_gates_composite_backward"):
    torch.library.define(
        f"layernorm::{_name}",
        f"(Tensor grad_hidden, Tensor? grad_cn, {_GATES}, bool[10] wanted) -> ({_GATES_GRADS})",
    )


@torch.library.register_fake("layernorm::lstm_gates")
def _lstm_gates_fake(
    input_gates: Tensor, hidden_gates: Tensor, c: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    _given(input_gates=input_gates, hidden_gates=hidden_gates, c=c)
    return c.new_empty(c.shape), c.new_empty(c.shape)


@torch.library.register_fake("layernorm::lstm_gates_backward")
def _lstm_gates_backward_fake(grad_hidden: Tensor, grad_cn: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *_, wanted = rest
    _given(grad_hidden=grad_hidden)
    return tuple(
        grad_hidden.new_empty(tensor.shape if tensor is not None and want else 0)
        for tensor, want in zip(rest, wanted, strict=False)
    )


def _lstm_gates_composite_backward(
    grad_hidden: Tensor, grad_cn: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """The gradients by differentiating the reference, themselves differentiable."""
    *given, kind, inputs, scope, cell_norm, eps, wanted = rest
    leaves = _leaves(given)
    named = {name: leaf for name, leaf in zip(GATES_PARAMETERS, leaves[3:], strict=True) if leaf is not None}
    variant = Variant(
        kind=kind,
        inputs=inputs,
        scope=scope,
        cell=cell_norm,
        projection_bias="bias_ih" in named or "bias_hh" in named,
        eps=eps,
    )
    if kind != "none" and inputs == "summed" and "gain_ih" in named:
        named["gain"] = named.pop("gain_ih")
    recurrent_checks.gates_arguments("lstm_gates", leaves[0], leaves[1], leaves[2], named, variant)
    with torch.enable_grad():
        outputs = reference.lstm_gates(leaves[0], leaves[1], leaves[2], named, variant)
    grads = (grad_hidden, torch.zeros_like(grad_hidden) if grad_cn is None else grad_cn)
    return tuple(_gradients(outputs, leaves, grads, wanted))


for _key in _COMPOSITE:
    torch.library.impl("layernorm::lstm_gates_composite_backward", _key)(_lstm_gates_composite_backward)


def _register_vmap(name: str) -> None:
    """Let ``torch.vmap`` run an operator case by case."""
    operator = getattr(torch.ops.layernorm, name)

    @torch.library.register_vmap(f"layernorm::{name}")
    def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, int]:
        def case(argument: Any, dim: Any, index: int) -> Any:
            if isinstance(dim, list | tuple):
                return [case(one, at, index) for one, at in zip(argument, dim, strict=True)]
            return argument if dim is None else argument.select(dim, index)

        def together(results: Sequence[Any]) -> Any:
            if isinstance(results[0], Tensor):
                return torch.stack(list(results))
            return type(results[0])(together(parts) for parts in zip(*results, strict=True))

        cases = [
            operator(*(case(argument, dim, i) for argument, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return together(cases), 0


for _name in (*_NORM, *_RECURRENT_NAMES, "recurrent_composite_backward"):
    _register_vmap(_name)
for _name in ("lstm_gates", "lstm_gates_backward", "lstm_gates_composite_backward"):
    _register_vmap(_name)
flops.register()


def _load() -> ModuleType | str:
    """The compiled module, or why there is none."""
    try:
        built_for = importlib.import_module("layernorm._built_for").TORCH
    except ModuleNotFoundError:
        return "this installation was made without them"
    if torch.__version__.split("+")[0] != built_for:
        return (
            f"they were built for PyTorch {built_for} and this is {torch.__version__}; install layernorm "
            "again with pip's --force-reinstall --no-cache-dir --no-deps"
        )
    try:
        native = importlib.import_module("layernorm._native")
    except ImportError as error:
        return f"they cannot be loaded: {error}"
    capability = os.environ.get(CAPABILITY_VARIABLE)
    if capability and not native.use_capability(capability):
        return (
            f"{CAPABILITY_VARIABLE} must be one of {', '.join(native.capabilities())} on this machine; got "
            f"{capability!r}"
        )
    return native


_loaded = _load()
#: The compiled module, or None.
native: Final = _loaded if isinstance(_loaded, ModuleType) else None
#: None when the compiled kernels are loaded, else why they are not, in one line.
NATIVE_PROBLEM: Final = _loaded if isinstance(_loaded, str) else None
