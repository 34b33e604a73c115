"""The operators of an LSTM's step after its products: schemas, fake kernels, derivatives of higher order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from layernorm import recurrent_checks, reference
from layernorm.ops.autocast import autocast
from layernorm.ops.composite import gradients_of, leaves_of, register_composite
from layernorm.ops.registration import register_vmap, require_tensors
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


def lstm_gates(
    spec: LayerSpec, input_gates: Tensor, hidden_gates: Tensor, c: Tensor, weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute ``layernorm.reference.lstm_gates`` by the operator."""
    tensors = autocast([input_gates, hidden_gates, c, *spec.listed_for_gates(weights)], c.device)
    state: tuple[Tensor, Tensor] = _LSTM_GATES(*tensors, spec.codes, spec.eps)
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
        grad_hidden.new_empty(tensor.shape if tensor is not None and want else 0)
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


register_composite("lstm_gates_composite_backward", _composite_backward)
for _name in ("lstm_gates", "lstm_gates_backward", "lstm_gates_composite_backward"):
    register_vmap(_name)
