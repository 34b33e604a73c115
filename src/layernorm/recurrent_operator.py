"""The recurrent operator, which the CPU's and the GPU's kernels serve, as ``layernorm.reference`` has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layernorm import flops, ops
from layernorm.variants import Variant

Weights = Mapping[str, Tensor]


def lstm(
    input: Tensor,
    state: tuple[Tensor, Tensor],
    weights: Weights,
    variant: Variant,
    *,
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``layernorm.reference.lstm`` by the operator."""
    output, h, c = _recurrent("lstm", input, state, weights, variant, reverse, batch_sizes, resets, recompute)
    return output, (h, c)


def gru(
    input: Tensor,
    state: Tensor,
    weights: Weights,
    variant: Variant,
    *,
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """``layernorm.reference.gru`` by the operator."""
    output, h, _ = _recurrent(
        "gru", input, (state,), weights, variant, reverse, batch_sizes, resets, recompute
    )
    return output, h


def rnn(
    input: Tensor,
    state: Tensor,
    weights: Weights,
    variant: Variant,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """``layernorm.reference.rnn`` by the operator."""
    output, h, _ = _recurrent(
        f"rnn_{nonlinearity}", input, (state,), weights, variant, reverse, batch_sizes, resets, recompute
    )
    return output, h


def lstm_gates(
    input_gates: Tensor, hidden_gates: Tensor, c: Tensor, weights: Weights, variant: Variant
) -> tuple[Tensor, Tensor]:
    """``layernorm.reference.lstm_gates`` by the operator."""
    tensors = [input_gates, hidden_gates, c, *listed(weights, variant, ops.GATES_PARAMETERS)]
    tensors = _autocast(tensors, c.device)
    state: tuple[Tensor, Tensor] = torch.ops.layernorm.lstm_gates.default(*tensors, *spec(variant))
    return state


def listed(weights: Weights, variant: Variant, names: Sequence[str] = ops.WEIGHTS) -> list[Tensor | None]:
    """The parameters in the order in which the operators list them."""
    summed = variant.kind != "none" and variant.inputs == "summed"
    return [weights.get("gain" if summed and name == "gain_ih" else name) for name in names]


def spec(variant: Variant) -> tuple[str, str, str, str, float]:
    """The variant as the operators take it: kind, inputs, scope, cell norm and eps."""
    return variant.kind, variant.inputs, variant.scope, variant.cell, variant.eps


def _recurrent(
    cell: str,
    input: Tensor,
    state: Sequence[Tensor],
    weights: Weights,
    variant: Variant,
    reverse: bool,
    batch_sizes: Sequence[int] | None,
    resets: Tensor | None,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0:
        flops.register()
    tensors: list[Tensor | None] = [input, state[0], state[1] if len(state) > 1 else None]
    tensors += listed(weights, variant)
    tensors = _autocast(tensors, input.device)
    x, h, c, *parameters = tensors
    sizes = None if batch_sizes is None else list(batch_sizes)
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.layernorm.recurrent(
        x, h, c, parameters, resets, sizes, cell, *spec(variant), reverse, recompute
    )
    return outputs


def _autocast(tensors: list[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """As ``torch.nn``'s layers do under autocast: everything in the lower precision."""
    if not torch.is_autocast_enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
