"""The operators that the compiled kernels serve: schema, fake kernel and derivative of each.

Importing this module defines the operators and loads the compiled library if there is one; the kernels
themselves are registered by ``csrc/torch_library.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import layernorm
from layernorm import reference

_LIBRARY = "_native.so"

torch.library.define(
    "layernorm::layer_norm",
    "(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor output, Tensor mean, Tensor rstd)",
)


@torch.library.register_fake("layernorm::layer_norm")
def _layer_norm_fake(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    leading = input.dim() - len(normalized_shape)
    stats = [*input.shape[:leading], *(1 for _ in normalized_shape)]
    return input.new_empty(input.shape), input.new_empty(stats), input.new_empty(stats)


def _layer_norm_setup(
    ctx: Any,
    inputs: tuple[Tensor, Sequence[int], Tensor | None, Tensor | None, float],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    input, ctx.normalized_shape, weight, bias, ctx.eps = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(input, weight, bias, mean, rstd)


def _layer_norm_backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    input, weight, bias, mean, rstd = ctx.saved_tensors
    shape = list(ctx.normalized_shape)
    wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3])
    if torch.is_grad_enabled():
        # The gradient is to be differentiated again: then mean and rstd are functions of the input,
        # which only the composite knows.
        primals = (input, weight, bias)
        output = reference.layer_norm(input, shape, weight, bias, ctx.eps)
        differentiable = [p for p, needed in zip(primals, wanted, strict=True) if needed]
        found = iter(torch.autograd.grad(output, differentiable, grad, create_graph=True))
        grads = tuple(next(found) if needed else None for needed in wanted)
    else:
        grads = torch.ops.aten.native_layer_norm_backward(
            grad, input, shape, mean, rstd, weight, bias, list(wanted)
        )
    return grads[0], None, grads[1], grads[2], None


torch.library.register_autograd(
    "layernorm::layer_norm", _layer_norm_backward, setup_context=_layer_norm_setup
)


def _load() -> str | None:
    """Loads the compiled kernels; None, or why they are not there."""
    found = [Path(folder) / _LIBRARY for folder in layernorm.__path__]
    library = next((path for path in found if path.is_file()), None)
    if library is None:
        return "this installation was made without them"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} cannot be loaded: {error}"
    return None


#: None when the compiled kernels are loaded, else why they are not, in one line.
NATIVE_PROBLEM: Final = _load()
