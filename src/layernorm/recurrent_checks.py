"""Errors in the arguments of the recurrent functions, modules and cells; see ``layernorm.checks``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import ParameterDict
from torch.nn.utils.rnn import PackedSequence

from layernorm import checks
from layernorm.checks import as_list
from layernorm.pytorch_internals import are_transforms_active, is_jit_tracing
from layernorm.spec import LayerSpec
from layernorm.variants import Variant


def sequence_tensors(operator: str, input: object, state: object, weights: object) -> tuple[Tensor, ...]:
    """Return the state as a tuple, if it, the input and the weights are made of tensors."""
    checks.tensor(operator, "input", input)
    _weights(operator, weights)
    if operator != "lstm":
        return (checks.tensor(operator, "state", state),)
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        got = type(state).__name__ + (f" of {len(state)}" if isinstance(state, (tuple, list)) else "")
        raise TypeError(f"{operator}: state must be a tuple (h, c) of two Tensors, got {got}")
    h, c = state
    return checks.tensor(operator, "state[0]", h), checks.tensor(operator, "state[1]", c)


def _weights(operator: str, weights: object) -> None:
    if type(weights) is not dict and not isinstance(weights, (Mapping, ParameterDict)):
        raise TypeError(
            f"{operator}: weights must be a mapping from names to Tensors, got {type(weights).__name__}; "
            "layernorm.variants.parameter_shapes has the names"
        )
    for name, given in weights.items():
        if isinstance(given, Tensor):
            continue
        if given is None:
            raise TypeError(
                f"{operator}: weights[{name!r}] must be a Tensor, got NoneType; to leave a bias "
                "out, leave its name out"
            )
        checks.tensor(operator, f"weights[{name!r}]", given)


def sizes_of_steps(operator: str, batch_sizes: object) -> list[int] | None:
    """Return ``batch_sizes`` as a list, if it is a sequence of ints, a tensor of them, or None."""
    if batch_sizes is None:
        return None
    if isinstance(batch_sizes, Tensor) and batch_sizes.dim() == 1:
        batch_sizes = batch_sizes.tolist()  # as PackedSequence has it
    return checks.sizes(operator, "batch_sizes", batch_sizes)


def numbers_of_one_kind(
    operator: str, variant: Variant, tensors: Mapping[str, Tensor], *, one_dtype: bool
) -> None:
    """Check that tensors are of floating-point numbers, on one device and, where asked, of one dtype.

    The first is what the others are compared to. Without layer norm they may be complex, as ``torch.nn``'s
    layers and its RMS norm take such numbers; beside half precision gains and biases may be float32.
    """
    first, like = next(iter(tensors.items()))
    for name, given in tensors.items():
        if not given.is_complex() or variant.kind == "layer":
            checks.floating_point(operator, name, given)
        checks.same_device(operator, first, like, name, given)
        if one_dtype and given.dtype != like.dtype and not checks.is_wide_vector(given, like.dtype):
            raise RuntimeError(
                f"{operator}: expected {name} of the {first}'s dtype {like.dtype}, got {given.dtype}; "
                f"convert one, for example with {name}.to({like.dtype}), or run under torch.autocast"
            )


def layer_arguments(
    spec: LayerSpec,
    input: Tensor,
    state: Any,
    weights: Mapping[str, Tensor],
    batch_sizes: Sequence[int] | None,
    resets: Tensor | None,
) -> tuple[tuple[Tensor, ...], list[int] | None, Tensor | None]:
    """Check the call of one layer and direction; return the state as a tuple, batch sizes, and the mask."""
    given = sequence_tensors(spec.cell, input, state, weights)
    sizes = sizes_of_steps(spec.cell, batch_sizes)
    shapes = _shapes(spec, weights)
    parameters(spec.cell, weights, shapes)
    _sequence_arguments(spec.cell, input, given, shapes, sizes)
    mask = None if resets is None else reset_mask(spec.cell, resets, input.shape[:-1], input)
    return given, sizes, mask


def _shapes(spec: LayerSpec, weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that this variant's parameters must have, given the two weight matrices."""
    for name in ("weight_ih", "weight_hh"):
        if name not in weights or weights[name].dim() != 2:
            raise ValueError(f"{spec.cell}: weights must hold the matrix {name}")
    rows, input_size = weights["weight_ih"].shape
    proj_size = weights["weight_hr"].size(0) if spec.cell == "lstm" and "weight_hr" in weights else 0
    if rows % spec.gates:
        raise RuntimeError(f"{spec.cell}: weight_ih must have {spec.gates}·H rows, got {rows}")
    return spec.parameter_shapes(input_size, rows // spec.gates, proj_size=proj_size)


def _sequence_arguments(
    operator: str,
    input: Tensor,
    state: Sequence[Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Sequence[int] | None,
) -> None:
    """Check one layer's input, state and steps; ``shapes`` are those of its parameters."""
    dims = 3 if sizes is None else 2
    if input.dim() != dims:
        raise RuntimeError(f"{operator}: input must have {dims} dimensions, got {input.dim()}")
    if sizes is not None and (
        sizes != sorted(sizes, reverse=True) or sum(sizes) != input.size(0) or min(sizes, default=1) < 1
    ):
        raise ValueError(
            f"{operator}: batch_sizes must be positive, not increasing, and sum to the rows of "
            f"input, {input.size(0)}; got {sizes}"
        )
    steps = input.size(0) if sizes is None else len(sizes)
    if steps == 0:
        raise RuntimeError(f"{operator}: Expected sequence length to be larger than 0 in RNN")
    features = shapes["weight_ih"][1]
    if input.size(-1) != features:
        raise RuntimeError(
            f"{operator}: input.size(-1) must be equal to input_size. Expected {features}, got "
            f"{input.size(-1)}"
        )
    rows = input.size(1) if sizes is None else sizes[0]
    sizes_of_state = [shapes["weight_hh"][1], shapes["weight_hh"][0] // 4][: len(state)]
    for name, given, size in zip(("h", "c"), state, sizes_of_state, strict=False):
        if given.shape != (rows, size):
            raise RuntimeError(
                f"{operator}: Expected {name} of the state to have size [{rows}, {size}], got "
                f"{as_list(given.shape)}"
            )


def parameters(operator: str, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that weights have the names and shapes of a variant's; any bias may be missing, and all gains."""
    if weights.keys() != shapes.keys():
        _names(operator, weights, shapes)
    for name, given in weights.items():
        if given.shape != shapes[name]:
            raise RuntimeError(
                f"{operator}: Expected {name} of shape {as_list(shapes[name])}, but got "
                f"{as_list(given.shape)}"
            )


def module_weights(operator: str, weights: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check the attributes of a module that are its weights: they have its names, and may be anything."""
    for name, given in weights.items():
        if not isinstance(given, Tensor):
            _weights(operator, weights)
        if given.shape != shapes[name]:
            parameters(operator, weights, shapes)


def _names(operator: str, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the names are the variant's, from which any bias may be missing, and all gains together."""
    has_gains = any(name.startswith("gain") for name in weights)
    optional = ("bias",) if has_gains else ("bias", "gain")
    missing = [name for name in shapes if name not in weights and not name.startswith(optional)]
    unknown = [n for n in weights if n not in shapes]
    if missing or unknown:
        raise ValueError(
            f"{operator}: weights of this variant are {', '.join(shapes)}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(map(str, unknown))}" if unknown else "")
        )


def gates_state(spec: LayerSpec) -> str:
    """Return the name of the state that the part of a step after its products takes."""
    return "c" if spec.cell == "lstm" else "h"


def gates_arguments(
    spec: LayerSpec, input_gates: Tensor, hidden_gates: Tensor, state: Tensor, weights: Mapping[str, Tensor]
) -> None:
    """Check the call of ``lstm_gates`` or ``gru_gates``; ``weights`` are the gains and biases alone."""
    operator, state_name = f"{spec.cell}_gates", gates_state(spec)
    for name, given in (("input_gates", input_gates), ("hidden_gates", hidden_gates)):
        checks.tensor(operator, name, given)
    dims = checks.tensor(operator, state_name, state).dim()
    _weights(operator, weights)
    if dims != 2:
        raise RuntimeError(f"{operator}: {state_name} must have 2 dimensions, got {dims}")
    shapes = spec.parameter_shapes(1, state.size(-1))
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("weight")}
    expected = (state.size(0), spec.gates * state.size(1))
    for name, given in (("input_gates", input_gates), ("hidden_gates", hidden_gates)):
        if given.shape != expected:
            raise RuntimeError(
                f"{operator}: Expected {name} of shape {as_list(expected)} beside {state_name} of "
                f"{as_list(state.shape)}, but got {as_list(given.shape)}"
            )
    parameters(operator, weights, shapes)


def reset_mask(
    operator: str,
    resets: object,
    rows: torch.Size,
    like: Tensor,
    of: str = "the input's without its features",
) -> Tensor:
    """Return ``resets`` as a bool mask over ``rows``, on the device of ``like``.

    Rows are in whichever layout the input has. People have the mask as bool, as 0 and 1 in whatever dtype,
    and with a last dimension of 1.
    """
    if not isinstance(resets, Tensor):
        raise TypeError(
            f"{operator}: resets must be a Tensor or None, got {type(resets).__name__}; make it one, for "
            "example with torch.as_tensor(resets)"
        )
    has_last = resets.dim() == len(rows) + 1 and resets.size(-1) == 1
    if (resets.shape[:-1] if has_last else resets.shape) != rows:
        raise RuntimeError(
            f"{operator}: Expected resets of shape {as_list(rows)}, {of}, with or without a last 1, but got "
            f"{as_list(resets.shape)}; give each row of each step its entry, in the input's order of batch "
            "and time"
        )
    checks.same_device(operator, "input", like, "resets", resets)
    if resets.dtype != torch.bool:
        resets = _as_bool(operator, resets)
    return resets.squeeze(-1) if has_last else resets


def _as_bool(operator: str, resets: Tensor) -> Tensor:
    mask = resets.bool()
    # A GPU would have to be waited for, and a traced program has no numbers.
    if (
        type(resets) is Tensor
        and resets.device.type == "cpu"
        and not (is_compiling() or is_jit_tracing() or are_transforms_active())
        and not torch.equal(mask.to(resets.dtype), resets)
    ):
        wrong = resets[mask.to(resets.dtype) != resets][0].item()
        raise ValueError(
            f"{operator}: resets must be 0 or 1, or False or True, got {wrong} in {resets.dtype}; compare "
            "first, for example with resets > 0.5"
        )
    return mask


def reset_state(
    operator: str, given: object, resets: object, shapes: Sequence[tuple[int, ...]], input: Tensor
) -> tuple[Tensor, ...] | None:
    """Return the state that ``resets`` begin from, broadcast to the shapes of h (and c); None for zeros."""
    if given is None:
        return None
    if resets is None:
        raise ValueError(
            f"{operator}: reset_state says what resets begin from, but resets is None; give both"
        )
    parts = (given,) if len(shapes) == 1 else given
    if not isinstance(parts, (tuple, list)) or len(parts) != len(shapes):
        raise TypeError(
            f"{operator}: reset_state must be a tuple of two Tensors like the state, got "
            f"{type(given).__name__}"
        )
    found = []
    for index, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        name = "reset_state" if len(shapes) == 1 else f"reset_state[{index}]"
        checks.tensor(operator, name, part)
        checks.same_device(operator, "input", input, name, part)
        try:
            found.append(part.expand(shape))
        except RuntimeError as error:
            raise RuntimeError(
                f"{operator}: Expected {name} to broadcast to the state's shape {as_list(shape)}, but got "
                f"{as_list(tuple(part.shape))}"
            ) from error
    return tuple(found)


def packed_reset_mask(operator: str, resets: object, input: PackedSequence) -> Tensor:
    """Return the data of ``resets`` if it is a mask packed like ``input``."""
    if not isinstance(resets, PackedSequence):
        raise TypeError(
            f"{operator}: resets must be a PackedSequence like the input, or None, got "
            f"{type(resets).__name__}; pack it, for example with pack_padded_sequence and the input's lengths"
        )
    mask = reset_mask(operator, resets.data, input.data.shape[:-1], input.data)
    for field in ("batch_sizes", "sorted_indices"):
        got, expected = getattr(resets, field), getattr(input, field)
        if (got is None) != (expected is None) or (got is not None and not torch.equal(got, expected)):
            raise RuntimeError(
                f"{operator}: Expected resets packed like the input, with {field} {_listed(expected)}, but "
                f"got {_listed(got)}; pack both with the same lengths and enforce_sorted"
            )
    return mask


def _listed(indices: Tensor | None) -> object:
    return None if indices is None else indices.tolist()
