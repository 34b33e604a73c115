"""The norm operators of this package and of others, each prepared for one point of the grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.core import jax_arrays, onnx_session
from benchmarks.core.subjects import NotSupportedError, Subject, module
from layernorm import functional as LF

EPS: Final = 1e-5
_Outputs = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """The tensors of a point.

    Attributes:
        operator: one of ``layernorm.backends.NORMS``.
        training: forward and backward, or forward alone.
        inputs: input, with a residual also residual, weight, and with layer norm bias.
        grads: the gradients of the outputs: of output, with a residual also of the sum.
    """

    operator: str
    training: bool
    inputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]

    @property
    def has_residual(self) -> bool:
        """Whether the operator adds a residual first."""
        return self.operator.startswith("add_")

    @property
    def is_layer_norm(self) -> bool:
        """Layer norm, not RMS norm."""
        return self.operator.endswith("layer_norm")

    def in_float32(self) -> Case:
        """Return the same numbers in float32."""
        inputs, grads = (tuple(t.float() for t in tensors) for tensors in (self.inputs, self.grads))
        return replace(self, inputs=inputs, grads=grads)


def make_case(
    operator: str, dtype: torch.dtype, rows: int, width: int, training: bool, device: str = "cpu"
) -> Case:
    """Return random tensors for an operator; the same ones each time."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device).to(dtype)

    count = 2 if operator.startswith("add_") else 1
    inputs = [normal(rows, width) for _ in range(count)]
    inputs.append(1 + 0.1 * normal(width))
    if operator.endswith("layer_norm"):
        inputs.append(0.1 * normal(width))
    return Case(operator, training, tuple(inputs), tuple(normal(rows, width) for _ in range(count)))


def eager(function: Callable[..., _Outputs], case: Case) -> Subject:
    """Return a function on tensors, with the signature of this package's."""
    # Every peer has leaves, and so gradients, of its own; the data is shared.
    leaves = [tensor.detach().requires_grad_(case.training) for tensor in case.inputs]
    rows = 2 if case.has_residual else 1
    shape = (case.inputs[0].size(-1),)
    forward = partial(function, *leaves[:rows], shape, *leaves[rows:], EPS)
    if not case.training:

        def outputs() -> list[Tensor]:
            found = forward()
            return [found] if isinstance(found, Tensor) else list(found)

        return Subject(forward, outputs)

    def step() -> _Outputs:
        for leaf in leaves:
            leaf.grad = None
        found = forward()
        if isinstance(found, Tensor):
            found.backward(case.grads[0])
        else:
            torch.autograd.backward(found, case.grads)
        return found

    def results() -> list[Tensor]:
        found = step()
        values = [found] if isinstance(found, Tensor) else list(found)
        return [value.detach() for value in values] + [leaf.grad for leaf in leaves if leaf.grad is not None]

    return Subject(step, results)


def _layer_norm(x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, shape, weight, eps)


def _add_layer_norm(
    x: Tensor, residual: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, shape, weight, bias, eps), total


def _add_rms_norm(
    x: Tensor, residual: Tensor, shape: list[int], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, shape, weight, eps), total


#: The operators in PyTorch's functions, with the signatures of this package's.
WRITTEN_OUT: Final[dict[str, Callable[..., _Outputs]]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "add_layer_norm": _add_layer_norm,
    "add_rms_norm": _add_rms_norm,
}


def _ours(case: Case) -> Subject:
    return eager(getattr(LF, case.operator), case)


def _torch(case: Case) -> Subject:
    # PyTorch's functions themselves where it has them, so that no wrapper is timed.
    return eager(getattr(F, case.operator, WRITTEN_OUT[case.operator]), case)


def _compiled(case: Case) -> Subject:
    torch._dynamo.reset()  # or the shapes of earlier points would count against its limit
    return eager(torch.compile(WRITTEN_OUT[case.operator], dynamic=False, fullgraph=True), case)


def _jax(case: Case) -> Subject:
    jax = module("jax")
    jnp = module("jax.numpy")

    def function(*tensors: Any) -> Any:
        if case.has_residual:
            total, affine = tensors[0] + tensors[1], tensors[2:]
        else:
            total, affine = tensors[0], tensors[1:]
        a = total.astype(jnp.float32)
        mean_square = jnp.square(a).mean(-1, keepdims=True)
        if case.is_layer_norm:
            mean = a.mean(-1, keepdims=True)
            var = jnp.maximum(0.0, mean_square - jnp.square(mean))  # as Flax's LayerNorm has it
            output = (a - mean) * (jax.lax.rsqrt(var + EPS) * affine[0]) + affine[1]
        else:
            output = a * (jax.lax.rsqrt(mean_square + EPS) * affine[0])
        output = output.astype(total.dtype)
        return (output, total) if case.has_residual else output

    def step(inputs: Any, grads: Any) -> Any:
        outputs, pullback = jax.vjp(function, *inputs)
        return outputs, pullback(grads)

    inputs = tuple(jax_arrays.array(tensor) for tensor in case.inputs)
    if not case.training:
        return jax_arrays.jitted(function, inputs)
    grads = tuple(jax_arrays.array(grad) for grad in case.grads)
    return jax_arrays.jitted(step, (inputs, grads if case.has_residual else grads[0]))


def _onnxruntime(case: Case) -> Subject:
    if case.training:
        raise NotSupportedError
    rows = ["input", "residual"] if case.has_residual else ["input"]
    outputs = {name: torch.empty_like(case.inputs[0]) for name in _onnx_outputs(case)}
    inputs = dict(zip(rows, case.inputs, strict=False))  # weight and bias are constants of the model

    def results(call: Callable[[], None]) -> list[Tensor]:
        call()
        return list(outputs.values())

    return onnx_session.subject(_onnx_model(case, rows), [(inputs, outputs)], results, fresh=True)


def _onnx_outputs(case: Case) -> list[str]:
    return ["output", "sum"] if case.has_residual else ["output"]


def _onnx_model(case: Case, rows: list[str]) -> bytes:
    """Return a model of one normalization, after an Add where there is a residual."""
    helper = module("onnx.helper")
    x = case.inputs[0]
    affine = dict(zip(("weight", "bias"), case.inputs[len(rows) :], strict=False))
    nodes = [helper.make_node("Add", rows, ["sum"])] if case.has_residual else []
    # RMSNormalization came with version 23 of the operators, which needs version 11 of the format.
    kind, opset, version = (
        ("LayerNormalization", 17, 8) if case.is_layer_norm else ("RMSNormalization", 23, 11)
    )
    normalized = ["sum" if case.has_residual else "input", *affine]
    nodes.append(helper.make_node(kind, normalized, ["output"], axis=-1, epsilon=EPS))
    graph = helper.make_graph(
        nodes,
        case.operator,
        [onnx_session.value(name, x.dtype, x.shape) for name in rows],
        [onnx_session.value(name, x.dtype, x.shape) for name in _onnx_outputs(case)],
        [onnx_session.constant(name, value) for name, value in affine.items()],
    )
    return onnx_session.model(graph, opset, version)


#: By name; the order is that of tables and pictures.
PEERS: Final[dict[str, Callable[[Case], Subject]]] = {
    "layernorm": _ours,
    "torch": _torch,
    "torch.compile": _compiled,
    "jax": _jax,
    "onnxruntime": _onnxruntime,
}
