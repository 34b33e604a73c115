"""The operators of a step after its products: schemas, fake kernels, CPU kernels, derivatives.

An LSTM's and a GRU's are alike: they take W_ih x, W_hh h, one tensor of the state (an LSTM's c, a GRU's h),
the gains and biases, and the spec. They return the new state: h, and an LSTM's c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.compiler import is_compiling

from layernorm import recurrent_checks, reference
from layernorm.ops.composite import gradients_of, leaves_of, register_composite
from layernorm.ops.loading import native
from layernorm.ops.registration import (
    empty_for_none,
    register_derivative,
    register_on_cpu,
    register_vmap,
    require_tensors,
    run_beneath,
    wants_composite,
)
from layernorm.pytorch_internals import below_autograd, is_in_forward_mode, recorder_of
from layernorm.spec import GATES_PARAMETERS, LayerSpec

#: By cell, the tensor of the state that its operator takes, and what it returns.
_STATES: Final = {"lstm": ("c", "(Tensor hidden, Tensor cn)"), "gru": ("h", "Tensor")}
_PARAMETERS: Final = ", ".join(f"Tensor? {name}" for name in GATES_PARAMETERS)


def _define(cell: str) -> None:
    """Define the operators of a cell.

    ``grads`` are those of the new state, and ``wanted`` is of the products, the state and the parameters; a
    gradient that is not wanted has no element.
    """
    state, returned = _STATES[cell]
    step = f"Tensor input_gates, Tensor hidden_gates, Tensor {state}, {_PARAMETERS}, int[] spec, float eps"
    found = ", ".join(
        f"Tensor grad_{name}" for name in ("input_gates", "hidden_gates", state, *GATES_PARAMETERS)
    )
    torch.library.define(f"layernorm::{cell}_gates", f"({step}) -> {returned}")
    wanted = f"bool[{3 + len(GATES_PARAMETERS)}] wanted"
    for name in (f"{cell}_gates_backward", f"{cell}_gates_composite_backward"):
        torch.library.define(f"layernorm::{name}", f"(Tensor?[] grads, {step}, {wanted}) -> ({found})")


for _cell in _STATES:
    _define(_cell)
_OPERATORS: Final = {cell: getattr(torch.ops.layernorm, f"{cell}_gates").default for cell in _STATES}
_BACKWARDS: Final = {cell: getattr(torch.ops.layernorm, f"{cell}_gates_backward").default for cell in _STATES}


def gates_step(
    spec: LayerSpec, input_gates: Tensor, hidden_gates: Tensor, state: Tensor, weights: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """Compute ``layernorm.reference.gates_step`` by the operator."""
    given = (input_gates, hidden_gates, state)
    if native is not None and not is_compiling():
        found = native.gates(*given, dict(weights), spec.gates_names, spec.codes, spec.eps)
        if found is not NotImplemented:
            return found  # type: ignore[no-any-return]
    return _as_state(_OPERATORS[spec.cell](*given, *spec.listed_for_gates(weights), spec.codes, spec.eps))


def _as_state(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _as_result(state: Sequence[Tensor]) -> Any:
    """Return the new state as an operator returns it."""
    return state[0] if len(state) == 1 else tuple(state)


def _spec_of(cell: str, codes: Sequence[int], eps: float) -> LayerSpec:
    spec = LayerSpec.decode(codes, eps)
    if spec.cell != cell:
        raise RuntimeError(f"layernorm: spec must be of the cell {cell}, got one of {spec.cell}")
    return spec


def _require_inputs(cell: str, given: Sequence[Any]) -> None:
    require_tensors(input_gates=given[0], hidden_gates=given[1], **{_STATES[cell][0]: given[2]})


def _fake(cell: str, *arguments: Any) -> Any:
    _, _, state, *_, codes, eps = arguments
    _require_inputs(cell, arguments)
    _spec_of(cell, codes, eps)
    return _as_result([state.new_empty(state.shape) for _ in range(2 if cell == "lstm" else 1)])


def _backward_fake(cell: str, grads: Sequence[Tensor | None], *rest: Any) -> tuple[Tensor, ...]:
    *given, codes, eps, wanted = rest
    _require_inputs(cell, given)
    _spec_of(cell, codes, eps)
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and want else given[2].new_empty(0)
        for tensor, want in zip(given, wanted, strict=False)
    )


def _by_reference(spec: LayerSpec, given: Sequence[Any]) -> tuple[Tensor, ...]:
    input_gates, hidden_gates, state, *listed = given
    parameters = spec.named(listed, GATES_PARAMETERS)
    recurrent_checks.gates_arguments(spec, input_gates, hidden_gates, state, parameters)
    return reference.gates_step(spec, input_gates, hidden_gates, state, parameters)


def _composite_backward(grads: Sequence[Tensor | None], *rest: Any) -> tuple[Tensor, ...]:
    """Return the gradients by differentiating the reference, themselves differentiable."""
    *given, codes, eps, wanted = rest
    leaves = leaves_of(given)
    with torch.enable_grad():
        outputs = _by_reference(LayerSpec.decode(codes, eps), leaves)
    if len(grads) != len(outputs):
        raise RuntimeError(f"layernorm: grads must be a list of {len(outputs)}, got {len(grads)}")
    seeds = [torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads, strict=True)]
    return tuple(gradients_of(outputs, leaves, seeds, wanted))


class LayerNormGates(torch.autograd.Function):
    """The part of a step whose derivative is recorded; it takes the operator's arguments and result."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Keep what backward needs; return the new state."""
        *tensors, codes, eps, state = arguments
        ctx.save_for_backward(*tensors)
        ctx.options = codes, eps
        ctx.set_materialize_grads(False)
        return state  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of the tensors among the arguments."""
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        wanted = ctx.needs_input_grad[:-3]
        given = (list(grads), *ctx.saved_tensors, *ctx.options, wanted)
        if wants_composite(*grads):
            found = _composite_backward(*given)
        else:
            operator = _BACKWARDS[LayerSpec.decode(*ctx.options).cell]
            found = run_beneath(operator, "gates_backward", *given)
        return (*(grad if want else None for grad, want in zip(found, wanted, strict=True)), None, None, None)


def _record(cell: str, *arguments: Any) -> Any:
    """Call the operator and record its derivative."""
    with below_autograd():
        state = _as_state(_OPERATORS[cell](*arguments))
    return _as_result(LayerNormGates.apply(*arguments, state))  # type: ignore[no-untyped-call]


def _definition(cell: str, *arguments: Any) -> Any:
    if is_in_forward_mode():
        raise NotImplementedError(
            "layernorm: the compiled recurrent kernels have no forward-mode derivative; use "
            'layernorm.backends.use("reference")'
        )
    *given, codes, eps = arguments
    return _as_result(_by_reference(_spec_of(cell, codes, eps), given))


def _on_cpu(cell: str, entry: Any, *arguments: Any) -> Any:
    _require_inputs(cell, arguments)
    _spec_of(cell, *arguments[-2:])
    return _as_result(entry(*arguments))


def _backward_on_cpu(cell: str, entry: Any, *arguments: Any) -> list[Tensor]:
    _, *given, codes, eps, _ = arguments
    _require_inputs(cell, given)
    _spec_of(cell, codes, eps)
    first, second, *rest = empty_for_none(given[2], entry(*arguments))
    # Where the products are summed, theirs is one and the same, but no two results may be one tensor.
    return [first, second.clone() if second is first and second.numel() else second, *rest]


def _register(cell: str) -> None:
    name = f"{cell}_gates"
    torch.library.register_fake(f"layernorm::{name}", partial(_fake, cell))
    torch.library.register_fake(f"layernorm::{name}_backward", partial(_backward_fake, cell))
    register_on_cpu(name, "gates_forward", partial(_on_cpu, cell))
    register_on_cpu(f"{name}_backward", "gates_backward", partial(_backward_on_cpu, cell))
    register_derivative(name, partial(_record, cell), partial(_definition, cell), lambda *given: given[:-2])
    register_composite(f"{name}_composite_backward", _composite_backward)
    for operator in (name, f"{name}_backward", f"{name}_composite_backward"):
        register_vmap(operator)


for _cell in _STATES:
    _register(_cell)
#: By name of an entry, the function that records its derivative.
RECORDERS: Final = {"gates": recorder_of(LayerNormGates)}
