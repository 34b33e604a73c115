"""The operators of an LSTM's step after its products: schemas, fake kernels, CPU kernels, derivatives."""

from __future__ import annotations

from collections.abc import Mapping
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

_STEP: Final = (
    "Tensor input_gates, Tensor hidden_gates, Tensor c, "
    + ", ".join(f"Tensor? {name}" for name in GATES_PARAMETERS)
    + ", int[] spec, float eps"
)
_GRADS: Final = ", ".join(
    f"Tensor grad_{name}" for name in ("input_gates", "hidden_gates", "c", *GATES_PARAMETERS)
)
torch.library.define("layernorm::lstm_gates", f"({_STEP}) -> (Tensor hidden, Tensor cn)")
_LSTM_GATES: Final = torch.ops.layernorm.lstm_gates.default
# wanted: of the gates, c and the parameters. A gradient that is not wanted has no element.
for _name in ("lstm_gates_backward", "lstm_gates_composite_backward"):
    torch.library.define(
        f"layernorm::{_name}",
        f"(Tensor grad_hidden, Tensor? grad_cn, {_STEP}, bool[{3 + len(GATES_PARAMETERS)}] wanted)"
        f" -> ({_GRADS})",
    )


_LSTM_GATES_BACKWARD: Final = torch.ops.layernorm.lstm_gates_backward.default


def lstm_gates(
    spec: LayerSpec, input_gates: Tensor, hidden_gates: Tensor, c: Tensor, weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute ``layernorm.reference.lstm_gates`` by the operator."""
    arguments = (input_gates, hidden_gates, c, *spec.listed_for_gates(weights), spec.codes, spec.eps)
    found = NotImplemented if native is None or is_compiling() else native.lstm_gates(*arguments)
    state: tuple[Tensor, Tensor] = _LSTM_GATES(*arguments) if found is NotImplemented else found
    return state


@torch.library.register_fake("layernorm::lstm_gates")
def _lstm_gates_fake(
    input_gates: Tensor, hidden_gates: Tensor, c: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    require_tensors(input_gates=input_gates, hidden_gates=hidden_gates, c=c)
    *_, codes, eps = rest
    LayerSpec.decode(codes, eps)
    return c.new_empty(c.shape), c.new_empty(c.shape)


@torch.library.register_fake("layernorm::lstm_gates_backward")
def _lstm_gates_backward_fake(grad_hidden: Tensor, grad_cn: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *_, codes, eps, wanted = rest
    require_tensors(grad_hidden=grad_hidden)
    LayerSpec.decode(codes, eps)
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and want else grad_hidden.new_empty(0)
        for tensor, want in zip(rest, wanted, strict=False)
    )


def _composite_backward(grad_hidden: Tensor, grad_cn: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """Return the gradients by differentiating the reference, themselves differentiable."""
    *given, codes, eps, wanted = rest
    spec = LayerSpec.decode(codes, eps)
    leaves = leaves_of(given)
    input_gates, hidden_gates, c, *listed = leaves
    parameters = spec.named(listed, GATES_PARAMETERS)
    recurrent_checks.gates_arguments(spec, input_gates, hidden_gates, c, parameters)
    with torch.enable_grad():
        outputs = reference.lstm_gates(spec, input_gates, hidden_gates, c, parameters)
    grads = (grad_hidden, torch.zeros_like(grad_hidden) if grad_cn is None else grad_cn)
    return tuple(gradients_of(outputs, leaves, grads, wanted))


class LayerNormLSTMGates(torch.autograd.Function):
    """The part of a step whose derivative is recorded; its arguments are the operator's, and its result."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Keep what backward needs; return h and c."""
        *tensors, codes, eps, found = arguments
        ctx.save_for_backward(*tensors)
        ctx.options = codes, eps
        ctx.set_materialize_grads(False)
        return found  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of the tensors among the arguments."""
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[:-3]
        grad_hidden, grad_cn = grads
        if grad_hidden is None:
            grad_hidden = torch.zeros_like(tensors[2])
        given = (grad_hidden, grad_cn, *tensors, *ctx.options, wanted)
        if wants_composite(*grads):
            found = _composite_backward(*given)
        else:
            found = run_beneath(_LSTM_GATES_BACKWARD, "lstm_gates_backward", *given)
        return (*(grad if want else None for grad, want in zip(found, wanted, strict=True)), None, None, None)


def _record(*arguments: Any) -> Any:
    """Call the operator ``lstm_gates`` and record its derivative."""
    with below_autograd():
        found = _LSTM_GATES(*arguments)
    return LayerNormLSTMGates.apply(*arguments, found)  # type: ignore[no-untyped-call]


def _definition(*arguments: Any) -> tuple[Tensor, Tensor]:
    if is_in_forward_mode():
        raise NotImplementedError(
            "layernorm: the compiled recurrent kernels have no forward-mode derivative; use "
            'layernorm.backends.use("reference")'
        )
    input_gates, hidden_gates, c, *listed, codes, eps = arguments
    spec = LayerSpec.decode(codes, eps)
    return reference.lstm_gates(spec, input_gates, hidden_gates, c, spec.named(listed, GATES_PARAMETERS))


def _on_cpu(entry: Any, *arguments: Any) -> Any:
    input_gates, hidden_gates, c, *_ = arguments
    require_tensors(input_gates=input_gates, hidden_gates=hidden_gates, c=c)
    return entry(*arguments)


def _backward_on_cpu(entry: Any, *arguments: Any) -> list[Tensor]:
    grad_hidden, _, input_gates, hidden_gates, c, *_ = arguments
    require_tensors(grad_hidden=grad_hidden, input_gates=input_gates, hidden_gates=hidden_gates, c=c)
    first, second, *rest = empty_for_none(c, entry(*arguments))
    # Where the products are summed, theirs is one and the same, but no two results may be one tensor.
    return [first, second.clone() if second is first and second.numel() else second, *rest]


register_on_cpu("lstm_gates", "lstm_gates_forward", _on_cpu)
register_on_cpu("lstm_gates_backward", "lstm_gates_backward", _backward_on_cpu)
register_derivative("lstm_gates", _record, _definition, lambda *arguments: arguments[:-2])
#: By name of an operator, the function that records its derivative.
RECORDERS: Final = {"lstm_gates": recorder_of(LayerNormLSTMGates)}
register_composite("lstm_gates_composite_backward", _composite_backward)
for _name in ("lstm_gates", "lstm_gates_backward", "lstm_gates_composite_backward"):
    register_vmap(_name)
