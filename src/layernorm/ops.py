"""The operators: schemas and fake kernels, and the compiled module that has their CPU kernels.

Importing this module defines the operators and loads the compiled module if there is one. The kernels, the
derivatives and the entries for plain calls are in ``csrc/torch``; this is what they are for:

- ``layer_norm``, ``rms_norm``, ``add_layer_norm``, ``add_rms_norm``: what users call. On CPU tensors that
  need a derivative they record a node and run
- ``norm_forward``, which also returns the statistics, and in backward
- ``norm_backward``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

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


def _one(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(input.shape)


def _two(input: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), input.new_empty(input.shape)


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
    rows = 1
    for size in input.shape[: input.dim() - len(normalized_shape)]:
        rows *= size
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    total = input.new_empty(0) if residual is None else input.new_empty(input.shape)
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
    def like(parameter: Tensor | None, is_wanted: bool) -> Tensor:
        if not is_wanted:
            return input.new_empty(0)
        return (input if parameter is None else parameter).new_empty(normalized_shape)

    grad_input = input.new_empty(input.shape if wanted[0] else 0)
    return grad_input, like(weight, wanted[1]), like(bias, wanted[2])


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
