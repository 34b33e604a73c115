"""The norm operators: schemas and fake kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from layernorm.ops.registration import register_on_gpus, register_vmap, require_tensors

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


for _name in (*NORMS, "norm_forward", "norm_backward"):
    register_on_gpus("norm", _name, traced=True)
    register_vmap(_name)
for _name in NORMS:
    torch.library.register_autocast(f"layernorm::{_name}", "cuda", _AUTOCAST_DTYPE)
