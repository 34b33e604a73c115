"""The norm operators: schemas, fake kernels, kernels on the CPU, and derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from layernorm.ops.registration import (
    empty_for_none,
    register_autocast_on_gpus,
    register_derivative,
    register_on_cpu,
    register_on_gpus,
    register_vmap,
    require_tensors,
    run_beneath,
    wants_composite,
)
from layernorm.pytorch_internals import below_autograd, is_cast_by_autocast, recorder_of

#: The norms that users call.
NORMS: Final = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
# What PyTorch does to the arguments of its norms under autocast on a GPU.
_AUTOCAST_DTYPE: Final = torch.float32

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
_NORM_FORWARD: Final = torch.ops.layernorm.norm_forward.default
_NORM_BACKWARD: Final = torch.ops.layernorm.norm_backward.default


def _one_output(input: Tensor, *_: object) -> Tensor:
    require_tensors(input=input)
    return input.new_empty(input.shape)


def _two_outputs(input: Tensor, residual: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    require_tensors(input=input, residual=residual)
    return input.new_empty(input.shape), residual.new_empty(input.shape)


for _name, _fake in (
    ("layer_norm", _one_output),
    ("rms_norm", _one_output),
    ("add_layer_norm", _two_outputs),
    ("add_rms_norm", _two_outputs),
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
    require_tensors(input=input)
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
    require_tensors(grad=grad, input=input, stats=stats)
    if len(wanted) != 3:
        raise RuntimeError(f"layernorm: wanted must be a list of 3, got {len(wanted)}")

    def like(parameter: Tensor | None, is_wanted: bool) -> Tensor:
        if not is_wanted:
            return input.new_empty(0)
        return (input if parameter is None else parameter).new_empty(normalized_shape)

    grad_input = input.new_empty(input.shape if wanted[0] else 0)
    return grad_input, like(weight, wanted[1]), like(bias, wanted[2])


class _Norm(torch.autograd.Function):
    """A norm whose derivative is recorded: what was normalized, the statistics and the parameters are kept.

    ``found`` is what the operator ``norm_forward`` returns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        found: Sequence[Tensor],
    ) -> Any:
        output, total, stats = found
        ctx.save_for_backward(input if residual is None else total, stats, weight, bias)
        ctx.options = shape, eps, centred
        ctx.set_materialize_grads(False)
        return output if residual is None else (output, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None = None) -> Any:
        of_input, of_residual, _, of_weight, of_bias, _, _, _ = ctx.needs_input_grad
        grad_input, grad_weight, grad_bias = grad_sum, None, None
        if grad is not None:
            rows, stats, weight, bias = ctx.saved_tensors
            shape, eps, centred = ctx.options
            if wants_composite(grad, grad_sum):
                found = _composite_backward(grad, grad_sum, rows, shape, weight, bias, eps, centred)
            else:
                wanted = (of_input or of_residual, of_weight, of_bias)
                arguments = (grad, grad_sum, rows, stats, shape, weight, bias, centred, wanted)
                found = run_beneath(_NORM_BACKWARD, "norm_backward", *arguments)
            grad_input, grad_weight, grad_bias = found
        return (
            grad_input if of_input else None,
            grad_input if of_residual else None,
            None,
            grad_weight if of_weight else None,
            grad_bias if of_bias else None,
            None,
            None,
            None,
        )


def _composite_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients as PyTorch's operators, which can be differentiated again, to any order.

    Mean and rstd are functions of the input here.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    last = list(range(input.dim() - len(shape), input.dim()))
    leading = last[0] if last else 0
    rows, g = input.to(dtype), grad.to(dtype)
    if centred and math.prod(shape) == 1:
        # The one element of a row is its mean: there is nothing to scale, and no gradient.
        one = rows.new_ones(())
        a, rest, root_eps = rows - rows, one, one * float(eps != 0)
        factor = one / math.sqrt(abs(eps)) if eps != 0 else one * math.inf
    else:
        a, factor, rest, root_eps = _scaled(rows, last, eps, centred)
    added = root_eps.square() if eps >= 0 else -root_eps.square()
    rstd = ((a * a).mean(last, True) + added).rsqrt()
    normalized = a * rstd
    t = g if weight is None else g * weight.to(dtype)
    along = normalized * (t * normalized).mean(last, True)
    if centred:
        along = along + t.mean(last, True)
    grad_input = (rstd * (t - along) * factor * rest).to(input.dtype)
    over_rows = list(range(leading))

    def total(terms: Tensor, parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        return (terms.sum(over_rows) if over_rows else terms).to(parameter.dtype)

    if grad_sum is not None:
        grad_input = grad_input + grad_sum
    return grad_input, total(g * normalized, weight), total(g, bias)


def _scaled(
    rows: Tensor, dims: list[int], eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows times a power of two each, so that their squares, with eps, stay in the dtype's range.

    Where they are centred the mean is taken first.

    Returns:
        The rows; the power as two factors, since it may be beyond what the dtype holds; and the √eps that
        belongs to such rows.
    """
    most = 1022 if rows.dtype == torch.float64 else 126
    of_zero = -4096  # an exponent below all others

    def exponents(a: Tensor) -> Tensor:
        if a.numel() == 0:
            return a.new_zeros((), dtype=torch.int64)
        size = a.detach().abs().amax(dims, True)
        exponent = torch.frexp(size).exponent.to(torch.int64)
        return torch.where(size == 0, of_zero, torch.where(size.isfinite(), exponent, 0))

    def power(exponent: Tensor) -> Tensor:
        return torch.ldexp(torch.ones_like(exponent, dtype=rows.dtype), exponent)

    mantissa, of_eps = math.frexp(math.sqrt(abs(eps))) if eps != 0 else (0.0, of_zero)
    # First the greater of a row and √eps near 1, then of the centred row, which may be much smaller.
    once = -exponents(rows).clamp(min=of_eps).clamp(-most, most)
    a = rows * power(once)
    if centred:
        a = a - a.mean(dims, True)
    again = -torch.maximum(exponents(a), once + of_eps).clamp(-most, most)
    total = once + again
    factor = total.clamp(-most, most)
    root_eps = mantissa * power((total + of_eps).clamp(-2 * most, most))
    return a * power(again), power(factor), power(total - factor), root_eps


def _register(name: str, function_name: str) -> None:
    """Register a norm that users call: on the CPU, and with its derivative."""
    adds, centred = name.startswith("add_"), name.endswith("layer_norm")
    function: Any = type(function_name, (_Norm,), {})  # whose name the graph's nodes have

    def arranged(input: Tensor, *rest: Any) -> tuple[Any, ...]:
        """Return the arguments of every norm, of which this one lacks some."""
        residual, *rest_of = rest if adds else (None, *rest)
        shape, weight, *bias, eps = rest_of
        require_tensors(input=input, **({"residual": residual} if adds else {}))
        return input, residual, shape, weight, bias[0] if bias else None, eps, centred

    def compute(entry: Any, *arguments: Any) -> Any:
        output, total, _ = entry(*arranged(*arguments), False)
        return (output, total) if adds else output

    def definition(*arguments: Any) -> Any:
        input, residual, shape, weight, bias, eps, _ = arranged(*arguments)
        total = input if residual is None else input + residual
        if centred:
            output = F.layer_norm(total, shape, weight, bias, eps)
        else:
            output = F.rms_norm(total, shape, weight, eps)
        return output if residual is None else (output, total)

    def tensors_of(*arguments: Any) -> tuple[Any, ...]:
        input, residual, _, weight, bias, _, _ = arranged(*arguments)
        return input, residual, weight, bias

    def record(*arguments: Any) -> Any:
        every = arranged(*arguments)
        with below_autograd():
            found = _NORM_FORWARD(*every)
        return function.apply(*every, found)

    register_on_cpu(name, "norm_forward", compute)
    register_derivative(name, record, definition, tensors_of)
    RECORDERS[name] = recorder_of(function)


def _forward_on_cpu(entry: Any, *arguments: Any) -> list[Tensor]:
    require_tensors(input=arguments[0])
    return empty_for_none(arguments[0], entry(*arguments, True))


def _backward_on_cpu(entry: Any, *arguments: Any) -> list[Tensor]:
    require_tensors(grad=arguments[0], input=arguments[2], stats=arguments[3])
    return empty_for_none(arguments[2], entry(*arguments))


#: By name of a norm, the function that records its derivative.
RECORDERS: Final[dict[str, Any]] = {}
for _name, _function_name in zip(NORMS, ("LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm"), strict=True):
    _register(_name, _function_name)
register_on_cpu("norm_forward", "norm_forward", _forward_on_cpu)
register_on_cpu("norm_backward", "norm_backward", _backward_on_cpu)
for _name in (*NORMS, "norm_forward", "norm_backward"):
    register_on_gpus("norm", _name, traced=True)
    register_vmap(_name)
for _name in NORMS:
    # RMS norm has been on that list since PyTorch 2.13.
    if is_cast_by_autocast(_name.removeprefix("add_")):
        register_autocast_on_gpus(_name, _AUTOCAST_DTYPE)
