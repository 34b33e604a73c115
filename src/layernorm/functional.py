"""The operators as functions, with the signatures of their twins in ``torch.nn.functional``.

Shapes: the normalized features are the last dimensions, ``normalized_shape``; every other dimension
holds rows. Each function checks its arguments and hands the call to the kernel that
``layernorm.backends.choose`` names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layernorm import autocast, backends, checks, ops, recurrent_checks, reference
from layernorm.pytorch_internals import is_any_autocast_enabled
from layernorm.spec import LayerSpec, layer_spec
from layernorm.variants import Variant


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize over the last dimensions: layer normalization (Ba, Kiros, Hinton 2016, eq. 3 and 4).

    output = (a - mean)·rstd·weight + bias with rstd = 1/√(var + eps) and the biased variance, over the
    last dimensions. Statistics are kept in float32 for float16 and bfloat16 inputs.

    Args:
        input: (*, *normalized_shape), of a floating-point dtype.
        normalized_shape: the sizes of the last dimensions.
        weight: the gain, of shape normalized_shape and the input's dtype, or float32 with a
            half-precision input; None for 1.
        bias: of the same shape and dtypes; None for 0.
        eps: added to the variance.

    Returns:
        Tensor of the input's shape and dtype.

    Raises:
        TypeError: an argument is of the wrong type.
        RuntimeError: shapes, dtypes or devices do not fit together.

    Examples:
        >>> import torch
        >>> from layernorm import functional as LF
        >>> output = LF.layer_norm(torch.tensor([[1.0, 2.0, 3.0]]), (3,))
        >>> output.mean().abs() < 1e-6, output.square().mean()
        (tensor(True), tensor(1.0000))
    """
    if (compiled := backends.compiled_module()) is not None:
        result: Tensor = compiled.layer_norm(input, normalized_shape, weight, bias, eps)
        if result is not NotImplemented:
            return result
    return _norm("layer_norm", input, None, normalized_shape, weight, bias, eps)  # type: ignore[no-any-return]


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Normalize by the root mean square (Zhang and Sennrich 2019): layer norm without the mean.

    output = a·rstd·weight with rstd = 1/√(Σa²/H + eps), over the last dimensions.

    Args:
        input: (*, *normalized_shape), of a floating-point dtype, or complex, where a² is not |a|²: PyTorch's
            operator is called then.
        normalized_shape: the sizes of the last dimensions; H is their product.
        weight: the gain, of shape normalized_shape; None for 1.
        eps: added to the mean square; None for the machine epsilon of the dtype computed in.

    Returns:
        Tensor of the input's shape and dtype.

    Raises:
        TypeError: an argument is of the wrong type.
        RuntimeError: shapes, dtypes or devices do not fit together.

    Examples:
        >>> import torch
        >>> from layernorm import functional as LF
        >>> LF.rms_norm(torch.tensor([[3.0, -3.0]]), (2,))
        tensor([[ 1., -1.]])
    """
    if (compiled := backends.compiled_module()) is not None:
        result: Tensor = compiled.rms_norm(input, normalized_shape, weight, eps)
        if result is not NotImplemented:
            return result
    return _norm("rms_norm", input, None, normalized_shape, weight, None, eps)  # type: ignore[no-any-return]


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add a residual and layer-normalize the sum, which is returned too: the step of a residual stream.

    Args:
        input: (*, *normalized_shape), of a floating-point dtype.
        residual: of the input's shape and dtype; or float32 with a half-precision input: a residual
            stream that is kept in float32.
        normalized_shape: the sizes of the last dimensions.
        weight: the gain, of shape normalized_shape; None for 1.
        bias: of shape normalized_shape; None for 0.
        eps: added to the variance.

    Returns:
        ``(output, sum)``: output = layer_norm(sum) of the input's dtype, and sum = input + residual
        rounded to the residual's dtype first; both of the input's shape.

    Raises:
        TypeError: an argument is of the wrong type.
        RuntimeError: shapes, dtypes or devices do not fit together.

    Examples:
        >>> import torch
        >>> from layernorm import functional as LF
        >>> x, residual = torch.randn(2, 8), torch.randn(2, 8)
        >>> output, residual = LF.add_layer_norm(x, residual, (8,))
    """
    if (compiled := backends.compiled_module()) is not None:
        result: tuple[Tensor, Tensor] = compiled.add_layer_norm(
            input, residual, normalized_shape, weight, bias, eps
        )
        if result is not NotImplemented:
            return result
    return _norm("add_layer_norm", input, residual, normalized_shape, weight, bias, eps)  # type: ignore[no-any-return]


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a residual and RMS-normalize the sum, which is returned too.

    Arguments, results and errors are those of ``add_layer_norm`` and ``rms_norm``.

    Examples:
        >>> import torch
        >>> from layernorm import functional as LF
        >>> x, residual = torch.randn(2, 8), torch.randn(2, 8)
        >>> output, residual = LF.add_rms_norm(x, residual, (8,))
    """
    if (compiled := backends.compiled_module()) is not None:
        result: tuple[Tensor, Tensor] = compiled.add_rms_norm(input, residual, normalized_shape, weight, eps)
        if result is not NotImplemented:
            return result
    return _norm("add_rms_norm", input, residual, normalized_shape, weight, None, eps)  # type: ignore[no-any-return]


def _norm(
    operator: str,
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> Any:
    """Check the arguments of a norm, then compute it by the kernel that is chosen for it."""
    shape = checks.sizes(operator, "normalized_shape", normalized_shape)
    if (distributed := backends.distributed_module(input)) is not None:
        return distributed.norm(operator, _norm, input, residual, shape, weight, bias, eps)
    adds = operator.startswith("add_")
    if backends.is_for_pytorch_alone(input):
        return _norm_by_pytorch(operator, input, residual, shape, weight, bias, eps)
    checks.norm_arguments(operator, input, shape, weight, bias, eps)
    if adds:
        checks.residual_argument(operator, residual, input)
    kernel = backends.kernel_for(operator, input, math.prod(shape))
    if residual is not None and residual.dtype != input.dtype and kernel != "triton":
        total = input + residual
        gain, offset = (None if t is None else t.to(total.dtype) for t in (weight, bias))
        if operator == "add_layer_norm":
            return layer_norm(total, shape, gain, offset, eps).to(input.dtype), total  # type: ignore[arg-type]
        return rms_norm(total, shape, gain, eps).to(input.dtype), total
    if kernel == "torch" and not _is_promoted_by_pytorch(operator, input, weight):
        return _norm_by_pytorch(operator, input, residual, shape, weight, bias, eps)
    rows = (input,) if residual is None else (input, residual)
    affine = (weight, bias) if operator.endswith("layer_norm") else (weight,)
    if kernel in backends.OPERATORS:
        return getattr(torch.ops.layernorm, operator)(*rows, shape, *affine, _eps(eps, input))
    return getattr(reference, operator)(*rows, shape, *affine, eps)


def _eps(eps: float | None, input: Tensor) -> float:
    """Return ``eps``, or the machine epsilon of the dtype computed in."""
    if eps is not None:
        return eps
    return torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps


def _norm_by_pytorch(
    operator: str,
    input: Tensor,
    residual: Tensor | None,
    shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> Any:
    total = input if residual is None else input + residual
    if operator.endswith("layer_norm"):
        output = F.layer_norm(total, shape, weight, bias, eps)  # type: ignore[arg-type]
    else:
        output = F.rms_norm(total, shape, weight, eps)
    return output if residual is None else (output, total)


def _is_promoted_by_pytorch(operator: str, input: Tensor, weight: Tensor | None) -> bool:
    """Return whether PyTorch's RMS norm would promote the input to the gain's dtype, and warn."""
    is_rms = operator.endswith("rms_norm")
    return is_rms and weight is not None and weight.dtype != input.dtype and not input.is_complex()


def lstm(
    input: Tensor,
    state: tuple[Tensor, Tensor],
    weights: Mapping[str, Tensor],
    *,
    variant: str | Variant = "paper",
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    resets: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    recompute: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run one layer and direction of a normalized LSTM over a whole sequence (paper eq. 20-22).

    Args:
        input: (T, N, F): time, batch, features; or the (ΣN_t, F) data of a packed sequence together
            with its ``batch_sizes``.
        state: h (N, proj_size or H) and c (N, H).
        weights: by the names and shapes of ``layernorm.variants.parameter_shapes``; any bias may
            be left out.
        variant: a preset's name or a ``layernorm.Variant``.
        nonlinearity: of the candidate and of the cell, ``"tanh"`` or ``"relu"``.
        reverse: run from the last step to the first; the outputs stay in the input's order.
        batch_sizes: the rows of each step, not increasing: ints, or a tensor as ``PackedSequence`` has it.
        resets: bool, or numbers that are 0 or 1, (T, N), or (ΣN_t,) with ``batch_sizes``, with or
            without a last dimension of 1. Where it is true nothing passes between
            this step and the one before, neither state nor gradient: forward the step starts from a
            state of zeros, whatever came, NaN included; in reverse the step before starts from it.
        reset_state: h and c from which it goes on there, in place of zeros: of the state's shapes, or of any
            that broadcast to them. It gets gradients.
        recompute: keep less for backward and compute it again (compiled kernels; the reference ignores it).

    Returns:
        ``(output, (h, c))``: output (T, N, proj_size or H) or (ΣN_t, ·), and the final state.

    Raises:
        ValueError: an unknown variant, weights that are not the variant's, bad ``batch_sizes``,
            ``resets`` of another dtype than bool.
        TypeError: an argument is of the wrong type.
        RuntimeError: a tensor of the wrong shape, of another device or, outside of autocast, dtype than the
            input, or not of a floating-point dtype. Gains and biases may be float32 beside half precision;
            variants without layer norm take complex numbers.

    Examples:
        >>> import torch
        >>> from layernorm import functional as LF
        >>> from layernorm.variants import parameter_shapes, resolve
        >>> shapes = parameter_shapes("lstm", resolve("paper", "lstm"), 3, 5)
        >>> weights = {name: torch.randn(shape) for name, shape in shapes.items()}
        >>> state = torch.zeros(2, 5), torch.zeros(2, 5)
        >>> output, (h, c) = LF.lstm(torch.randn(7, 2, 3), state, weights)
        >>> output.shape
        torch.Size([7, 2, 5])
    """
    spec = layer_spec("lstm", variant, checks.nonlinearity(nonlinearity))
    output, (h, c) = _sequence(
        spec,
        input,
        state,
        weights,
        reverse=reverse,
        batch_sizes=batch_sizes,
        resets=resets,
        reset_state=reset_state,
        recompute=recompute,
    )
    return output, (h, c)


def gru(
    input: Tensor,
    state: Tensor,
    weights: Mapping[str, Tensor],
    *,
    variant: str | Variant = "paper",
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one layer and direction of a normalized GRU over a whole sequence (paper eq. 26-28).

    h' = (1 - z)·n + z·h, which is PyTorch's convention; the paper's has z and 1 - z the other way round.
    ``nonlinearity`` is that of the candidate n, "tanh" or "relu".
    Arguments, results and errors are those of ``lstm``, with the state h (N, H) and the final h.

    Examples:
        >>> import torch
        >>> from layernorm import functional as LF
        >>> from layernorm.variants import parameter_shapes, resolve
        >>> shapes = parameter_shapes("gru", resolve("paper", "gru"), 3, 5)
        >>> weights = {name: torch.randn(shape) for name, shape in shapes.items()}
        >>> output, h = LF.gru(torch.randn(7, 2, 3), torch.zeros(2, 5), weights)
    """
    spec = layer_spec("gru", variant, checks.nonlinearity(nonlinearity))
    output, (h,) = _sequence(
        spec,
        input,
        state,
        weights,
        reverse=reverse,
        batch_sizes=batch_sizes,
        resets=resets,
        reset_state=reset_state,
        recompute=recompute,
    )
    return output, h


def rnn(
    input: Tensor,
    state: Tensor,
    weights: Mapping[str, Tensor],
    *,
    variant: str | Variant = "paper",
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one layer and direction of a normalized RNN over a whole sequence (paper eq. 4).

    ``nonlinearity`` is "tanh" or "relu". Other arguments, results and errors as those of ``lstm``,
    with the state h (N, H) and the final h.

    Examples:
        >>> import torch
        >>> from layernorm import functional as LF
        >>> from layernorm.variants import parameter_shapes, resolve
        >>> shapes = parameter_shapes("rnn", resolve("paper", "rnn"), 3, 5)
        >>> weights = {name: torch.randn(shape) for name, shape in shapes.items()}
        >>> output, h = LF.rnn(torch.randn(7, 2, 3), torch.zeros(2, 5), weights)
    """
    spec = layer_spec("rnn", variant, checks.nonlinearity(nonlinearity))
    output, (h,) = _sequence(
        spec,
        input,
        state,
        weights,
        reverse=reverse,
        batch_sizes=batch_sizes,
        resets=resets,
        reset_state=reset_state,
        recompute=recompute,
    )
    return output, h


def lstm_gates(
    input_gates: Tensor,
    hidden_gates: Tensor,
    c: Tensor,
    weights: Mapping[str, Tensor],
    *,
    variant: str | Variant = "paper",
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Compute the part of a normalized LSTM's step after its products (paper eq. 20-22).

    For networks whose next input depends on the state, such as those with attention: they go step by step,
    and can make the products W_ih x and W_hh h as suits them. All else of the step, the norms, the gates and
    the new state, is one operator, forward and backward, on the CPU; elsewhere it is PyTorch's operators.

    Args:
        input_gates: W_ih x (N, 4H), in the order i, f, g, o of ``torch.nn.LSTM``, without a bias.
        hidden_gates: W_hh h (N, 4H), likewise.
        c: the cell's state before (N, H).
        weights: gains and biases by the names and shapes of ``layernorm.variants.parameter_shapes``, without
            the matrices; any bias may be left out.
        variant: a preset's name or a ``layernorm.Variant``.
        nonlinearity: of the candidate and of the cell, ``"tanh"`` or ``"relu"``.

    Returns:
        ``(h, c)``, each (N, H).

    Raises:
        ValueError: an unknown variant, or weights that are not the variant's.
        TypeError: an argument is of the wrong type.
        RuntimeError: a tensor of the wrong shape, device or dtype.

    Examples:
        >>> import torch, layernorm
        >>> from layernorm import functional as LF
        >>> cell = layernorm.LayerNormLSTMCell(3, 5)
        >>> weights = {n: p for n, p in cell.named_parameters() if not n.startswith("weight")}
        >>> x, h, c = torch.randn(2, 3), torch.zeros(2, 5), torch.zeros(2, 5)
        >>> h, c = LF.lstm_gates(x @ cell.weight_ih.T, h @ cell.weight_hh.T, c, weights)
        >>> h.shape
        torch.Size([2, 5])
    """
    spec = layer_spec("lstm", variant, checks.nonlinearity(nonlinearity))
    h, c = _gates_step(spec, input_gates, hidden_gates, c, weights)
    return h, c


def gru_gates(
    input_gates: Tensor,
    hidden_gates: Tensor,
    h: Tensor,
    weights: Mapping[str, Tensor],
    *,
    variant: str | Variant = "paper",
    nonlinearity: str = "tanh",
) -> Tensor:
    """Compute the part of a normalized GRU's step after its products (paper eq. 26-28).

    h' = (1 - z)·n + z·h, as in ``gru``. For networks that make the products themselves, such as world models
    whose input depends on the state; kernels and errors are those of ``lstm_gates``.

    Args:
        input_gates: W_ih x (N, 3H), in the order r, z, n of ``torch.nn.GRU``, without a bias.
        hidden_gates: W_hh h (N, 3H), likewise.
        h: the state before (N, H), which also gets a gradient that does not pass ``hidden_gates``.
        weights: gains and biases by name, without the matrices; any bias may be left out.
        variant: a preset's name or a ``layernorm.Variant``.
        nonlinearity: of the candidate, ``"tanh"`` or ``"relu"``.

    Returns:
        The new h (N, H).

    Raises:
        ValueError: an unknown variant, or weights that are not the variant's.
        TypeError: an argument is of the wrong type.
        RuntimeError: a tensor of the wrong shape, device or dtype.

    Examples:
        >>> import torch, layernorm
        >>> from layernorm import functional as LF
        >>> cell = layernorm.LayerNormGRUCell(3, 5)
        >>> weights = {n: p for n, p in cell.named_parameters() if not n.startswith("weight")}
        >>> x, h = torch.randn(2, 3), torch.zeros(2, 5)
        >>> h = LF.gru_gates(x @ cell.weight_ih.T, h @ cell.weight_hh.T, h, weights)
        >>> h.shape
        torch.Size([2, 5])
    """
    spec = layer_spec("gru", variant, checks.nonlinearity(nonlinearity))
    if not spec.variant.reset_after:
        raise ValueError("gru_gates: with reset_after=False W_hn (r·h) comes after the reset gate")
    (h,) = _gates_step(spec, input_gates, hidden_gates, h, weights)
    return h


def _gates_step(
    spec: LayerSpec, input_gates: Tensor, hidden_gates: Tensor, state: Tensor, weights: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """Compute the part of a step after its products by the kernel that is chosen for it."""
    is_autocast_enabled = is_any_autocast_enabled()
    if (compiled := backends.compiled_module()) is not None and not is_autocast_enabled:
        found: tuple[Tensor, ...] = compiled.gates(
            input_gates, hidden_gates, state, weights, spec.gates_names, spec.codes, spec.eps
        )
        if found is not NotImplemented:
            return found
    recurrent_checks.gates_arguments(spec, input_gates, hidden_gates, state, weights)
    if is_autocast_enabled:
        given = (input_gates, hidden_gates, state, *weights.values())
        input_gates, hidden_gates, state, *rest = autocast.cast(given, state.device)
        weights = dict(zip(weights, rest, strict=True))
    operator = f"{spec.cell}_gates"
    kernel = backends.recurrent_kernel_for(operator, state, (input_gates, hidden_gates, *weights.values()))
    if kernel in backends.OPERATORS and spec.codes and state.size(-1):  # none has no kernel
        return ops.gates_step(spec, input_gates, hidden_gates, state, weights)
    named = {recurrent_checks.gates_state(spec): state}
    named |= {"input_gates": input_gates, "hidden_gates": hidden_gates, **weights}
    recurrent_checks.numbers_of_one_kind(operator, spec.variant, named, one_dtype=False)
    with autocast.disabled(state.device):
        return reference.gates_step(spec, input_gates, hidden_gates, state, weights)


def _sequence(
    spec: LayerSpec,
    input: Tensor,
    state: Any,
    weights: Mapping[str, Tensor],
    *,
    reverse: bool,
    batch_sizes: Sequence[int] | None,
    resets: Tensor | None,
    reset_state: Any,
    recompute: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Check the arguments of a sequence, then compute it."""
    checks.flag("reverse", reverse)
    checks.flag("recompute", recompute)
    given, sizes, mask = recurrent_checks.layer_arguments(spec, input, state, weights, batch_sizes, resets)
    shapes = [tuple(s.shape) for s in given]
    starts = recurrent_checks.reset_state(spec.cell, reset_state, mask, shapes, input)
    return recurrent_layer(spec, input, given, weights, reverse, sizes, mask, recompute, starts)


def recurrent_layer(
    spec: LayerSpec,
    input: Tensor,
    state: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
    reset_state: Sequence[Tensor] | None = None,
    masks: reference.Masks | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute one layer and direction by the kernel that is chosen for it: the one door to all of them.

    Shapes, names and types have been checked; whether the numbers are of one kind is checked here, where no
    kernel takes them. Arguments and results are those of ``layernorm.reference.recurrent_layer`` and of
    ``lstm``.

    Raises:
        RuntimeError: a tensor is on another device than the input, or of another dtype (but for gains and
            biases of float32 beside half precision), or not of a floating-point dtype.
    """
    if is_any_autocast_enabled():
        count = len(state)
        input, *rest = autocast.cast((input, *state, *(reset_state or ()), *weights.values()), input.device)
        state, rest = rest[:count], rest[count:]
        if reset_state is not None:
            reset_state, rest = rest[:count], rest[count:]
        weights = dict(zip(weights, rest, strict=True))
    # Where a call's own arguments decide, the compiled kernels look at them themselves.
    if state[0].size(-1) and masks is None and spec.codes and backends.compiled_module() is not None:
        found = ops.recurrent_layer_natively(
            spec, input, state, weights, reverse, batch_sizes, resets, recompute, reset_state
        )
        if found is not NotImplemented:
            return found  # type: ignore[no-any-return]
    others = (*state, *weights.values()) if reset_state is None else (*state, *reset_state, *weights.values())
    kernel = backends.recurrent_kernel_for(spec.cell, input, others)
    by_kernel = masks is None and spec.codes and (kernel == "native" or reset_state is None)
    if kernel in backends.OPERATORS and by_kernel and state[0].size(-1):  # none has no kernel
        return ops.recurrent_layer(
            spec, input, state, weights, reverse, batch_sizes, resets, recompute, reset_state
        )
    named = {"input": input, **dict(zip(("h", "c"), state, strict=False)), **weights}
    named |= dict(zip(("reset_state[0]", "reset_state[1]"), reset_state or (), strict=False))
    recurrent_checks.numbers_of_one_kind(spec.cell, spec.variant, named, one_dtype=True)
    with autocast.disabled(input.device):
        return reference.recurrent_layer(
            spec, input, state, weights, reverse, batch_sizes, resets, reset_state, masks
        )
