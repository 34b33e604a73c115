"""Argument errors: each names the argument, what was expected, what came, and the likely fix.

The exception types are PyTorch's, and so is the wording where code in the wild may match it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_HALF = (torch.float16, torch.bfloat16)


def norm_arguments(
    operator: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Raises what PyTorch would for arguments that do not fit together."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{operator}: input must be a Tensor, got {type(input).__name__}")
    if not isinstance(normalized_shape, Sequence):
        raise TypeError(
            f"{operator}: normalized_shape must be a sequence of ints such as ({normalized_shape},), "
            f"got {type(normalized_shape).__name__}"
        )
    shape = list(normalized_shape)
    if not shape:
        raise RuntimeError(
            f"{operator}: Expected normalized_shape to be at least 1-dimensional, i.e., containing at "
            "least one element, but got normalized_shape = []"
        )
    if list(input.shape[-len(shape) :]) != shape:
        expected = ", ".join(map(str, ["*", *shape]))
        raise RuntimeError(
            f"{operator}: Given normalized_shape={shape}, expected input with shape [{expected}], but "
            f"got input of size{list(input.shape)}"
        )
    if not input.is_floating_point():
        raise RuntimeError(
            f"{operator}: input must be of a floating-point dtype, got {input.dtype}; convert it, for "
            "example with input.float()"
        )
    if weight is not None:
        _affine(operator, "weight", weight, input, shape)
    if bias is not None:
        _affine(operator, "bias", bias, input, shape)


def _affine(operator: str, name: str, tensor: Tensor, input: Tensor, shape: list[int]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: {name} must be a Tensor or None, got {type(tensor).__name__}")
    if list(tensor.shape) != shape:
        raise RuntimeError(
            f"{operator}: Expected {name} to be of same shape as normalized_shape, but got {name} of "
            f"shape {list(tensor.shape)} and normalized_shape = {shape}"
        )
    if tensor.device != input.device:
        raise RuntimeError(
            f"{operator}: Expected all tensors to be on the same device, but input is on "
            f"{input.device} and {name} on {tensor.device}"
        )
    if tensor.dtype != input.dtype and not (tensor.dtype == torch.float32 and input.dtype in _HALF):
        raise RuntimeError(
            f"{operator}: expected {name} of the input's dtype {input.dtype}, or float32 beside a half "
            f"input, but got {tensor.dtype}; convert one, for example with {name}.to(input.dtype)"
        )


def residual_argument(operator: str, residual: Tensor | None, input: Tensor) -> None:
    """Raises unless ``residual`` is like ``input``, or float32 beside a half one."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"{operator}: residual must be a Tensor, got {type(residual).__name__}")
    for what in ("shape", "dtype", "device"):
        got, expected = getattr(residual, what), getattr(input, what)
        if got == expected or (what == "dtype" and got == torch.float32 and expected in _HALF):
            continue
        beside = ", or float32 beside a half input," if what == "dtype" else ","
        raise RuntimeError(
            f"{operator}: Expected residual to be of the input's {what} {_plain(expected)}{beside} but "
            f"got {_plain(got)}"
        )


def sequence_arguments(
    operator: str,
    input: Tensor,
    state: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    batch_sizes: Sequence[int] | None,
    resets: Tensor | None = None,
) -> None:
    """Checks one layer's call; ``shapes`` are the parameters' as the variant wants them."""
    _parameters(operator, weights, shapes)
    dims = 3 if batch_sizes is None else 2
    if input.dim() != dims:
        raise RuntimeError(f"{operator}: input must have {dims} dimensions, got {input.dim()}")
    if batch_sizes is not None:
        sizes = list(batch_sizes)
        if sizes != sorted(sizes, reverse=True) or sum(sizes) != input.size(0) or not all(sizes):
            raise ValueError(
                f"{operator}: batch_sizes must be positive, not increasing, and sum to the rows of "
                f"input, {input.size(0)}; got {sizes}"
            )
    steps = input.size(0) if batch_sizes is None else len(batch_sizes)
    if steps == 0:
        raise RuntimeError(f"{operator}: Expected sequence length to be larger than 0 in RNN")
    features = shapes["weight_ih"][1]
    if input.size(-1) != features:
        raise RuntimeError(
            f"{operator}: input.size(-1) must be equal to input_size. Expected {features}, got "
            f"{input.size(-1)}"
        )
    rows = input.size(1) if batch_sizes is None else batch_sizes[0]
    sizes_of_state = [shapes["weight_hh"][1], shapes["weight_hh"][0] // 4][: len(state)]
    for name, tensor, size in zip(("h", "c"), state, sizes_of_state, strict=False):
        if tuple(tensor.shape) != (rows, size):
            raise RuntimeError(
                f"{operator}: Expected {name} of the state to have size [{rows}, {size}], got "
                f"{_plain(tensor.shape)}"
            )
    if resets is not None:
        reset_mask(operator, resets, input)


def _parameters(operator: str, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = [n for n in shapes if n not in weights and not n.startswith("bias")]
    unknown = [n for n in weights if n not in shapes]
    if missing or unknown:
        raise ValueError(
            f"{operator}: weights of this variant are {', '.join(shapes)}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )
    for name, tensor in weights.items():
        if tuple(tensor.shape) != shapes[name]:
            raise RuntimeError(
                f"{operator}: Expected {name} of shape {_plain(shapes[name])}, but got {_plain(tensor.shape)}"
            )


def gates_arguments(
    operator: str,
    input_gates: Tensor,
    hidden_gates: Tensor,
    c: Tensor,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Checks one step's call; ``shapes`` are those of gains and biases as the variant wants them."""
    if c.dim() != 2:
        raise RuntimeError(f"{operator}: c must have 2 dimensions, got {c.dim()}")
    expected = (c.size(0), 4 * c.size(1))
    for name, tensor in (("input_gates", input_gates), ("hidden_gates", hidden_gates)):
        if tuple(tensor.shape) != expected:
            raise RuntimeError(
                f"{operator}: Expected {name} of shape {_plain(expected)} beside c of {_plain(c.shape)}, but "
                f"got {_plain(tensor.shape)}"
            )
    _parameters(operator, weights, shapes)


def reset_mask(operator: str, resets: object, input: Tensor) -> Tensor:
    """Returns ``resets`` if it is a mask over the rows of ``input``, in whichever layout that is."""
    if not isinstance(resets, Tensor):
        raise TypeError(
            f"{operator}: resets must be a bool Tensor or None, got {type(resets).__name__}; make it one, "
            "for example with torch.as_tensor(resets)"
        )
    if resets.dtype != torch.bool:
        raise ValueError(
            f"{operator}: resets must be of dtype torch.bool, got {resets.dtype}; convert it, for example "
            "with resets.bool()"
        )
    if resets.shape != input.shape[:-1]:
        raise RuntimeError(
            f"{operator}: Expected resets of shape {_plain(input.shape[:-1])}, the input's without its "
            f"features, but got {_plain(resets.shape)}; give each row of each step its entry, in the input's "
            "order of batch and time"
        )
    if resets.device != input.device:
        raise RuntimeError(
            f"{operator}: Expected all tensors to be on the same device, but input is on {input.device} "
            f"and resets on {resets.device}; move it, for example with resets.to(input.device)"
        )
    return resets


def packed_reset_mask(operator: str, resets: object, input: PackedSequence) -> Tensor:
    """Returns the data of ``resets`` if it is a mask packed like ``input``."""
    if not isinstance(resets, PackedSequence):
        raise TypeError(
            f"{operator}: resets must be a PackedSequence like the input, or None, got "
            f"{type(resets).__name__}; pack it, for example with pack_padded_sequence and the input's lengths"
        )
    mask = reset_mask(operator, resets.data, input.data)
    for field in ("batch_sizes", "sorted_indices"):
        got, expected = getattr(resets, field), getattr(input, field)
        if (got is None) != (expected is None) or (got is not None and not torch.equal(got, expected)):
            raise RuntimeError(
                f"{operator}: Expected resets packed like the input, with {field} {_listed(expected)}, but "
                f"got {_listed(got)}; pack both with the same lengths and enforce_sorted"
            )
    return mask


def step_argument(
    operator: str, name: str, tensor: object, batch_size: int, size: int, like: Tensor
) -> Tensor:
    """Returns what a step reads or writes, if it is (batch_size, size), or (size) of a single row."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operator}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{operator}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")
    shapes = [(batch_size, size), *([(size,)] if batch_size == 1 else [])]
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(_plain(shape)) for shape in shapes)
        raise RuntimeError(
            f"{operator}: Expected {name} of shape {expected}, one row for each of the "
            f"batch_size={batch_size} sequences, but got {_plain(tuple(tensor.shape))}"
        )
    _dtype_and_device(operator, name, tensor, like)
    return tensor


def out_argument(operator: str, out: Tensor, input: Tensor) -> None:
    """Raises unless a step of ``input`` can be written to ``out``, whose size is right."""
    if out.dim() != input.dim():
        raise RuntimeError(f"{operator}: out must have {input.dim()} dimensions like x_t, got {out.dim()}")
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise RuntimeError(
            f"{operator}: out must not have elements that share memory, got strides {out.stride()}; give a "
            "tensor that is not expanded"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{operator}: out must not require grad: no derivative is recorded; give out.detach(), or call "
            "it under torch.no_grad()"
        )


def stream_state(operator: str, name: str, tensor: Tensor, held: Tensor) -> Tensor:
    """Returns a part of the state if it can take the place of that held."""
    if tensor.shape != held.shape:
        raise RuntimeError(
            f"{operator}: Expected {name} of the state to have size {_plain(tuple(held.shape))}, "
            f"(num_layers, batch_size, features), got {_plain(tuple(tensor.shape))}"
        )
    _dtype_and_device(operator, f"{name} of the state", tensor, held)
    return tensor


def stream_mask(operator: str, mask: object, state: Tensor) -> Tensor:
    """Returns ``mask`` if it says of each sequence of a batch whether it begins anew."""
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"{operator}: mask must be a bool Tensor or None, got {type(mask).__name__}; make it one, for "
            "example with torch.as_tensor(mask)"
        )
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{operator}: mask must be of dtype torch.bool, got {mask.dtype}; convert it, for example with "
            "mask.bool()"
        )
    if mask.shape != state.shape[1:2]:
        raise RuntimeError(
            f"{operator}: Expected mask of shape {_plain(tuple(state.shape[1:2]))}, (batch_size), but got "
            f"{_plain(tuple(mask.shape))}"
        )
    if mask.device != state.device:
        raise RuntimeError(
            f"{operator}: Expected all tensors to be on the same device, but the state is on {state.device} "
            f"and mask on {mask.device}; move it, for example with mask.to(state.device)"
        )
    return mask


def _dtype_and_device(operator: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise ValueError(
            f"{operator}: {name} must be of the parameters' dtype {like.dtype}, got {tensor.dtype}; convert "
            f"it, for example with {name.split()[0]}.to({like.dtype})"
        )
    if tensor.device != like.device:
        raise RuntimeError(
            f"{operator}: Expected all tensors to be on the same device, but the parameters are on "
            f"{like.device} and {name} on {tensor.device}"
        )


def _listed(indices: Tensor | None) -> object:
    return None if indices is None else indices.tolist()


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def recurrent_sizes(
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    proj_size: int = 0,
) -> None:
    """Raises what ``torch.nn.RNNBase`` would for its constructor's arguments."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element "
            f"being zeroed, got {dropout!r}"
        )
    flag("bias", bias)
    flag("batch_first", batch_first)
    for name, size in (
        ("input_size", input_size),
        ("hidden_size", hidden_size),
        ("num_layers", num_layers),
        ("proj_size", proj_size),
    ):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if size <= 0 and name != "proj_size":
            raise ValueError(f"{name} must be greater than zero, got {size}")
    if proj_size < 0:
        raise ValueError(
            f"proj_size should be a positive integer or zero to disable projections, got {proj_size}"
        )
    if proj_size >= hidden_size:
        raise ValueError(f"proj_size has to be smaller than hidden_size, got {proj_size} and {hidden_size}")


def flag(name: str, value: bool) -> bool:
    """Returns the value if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    return value


def nonlinearity(name: str) -> str:
    """Returns the name if it is one an RNN knows."""
    if name not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{name}'. Select from 'tanh' or 'relu'.")
    return name


def module_argument(operator: str, model: object) -> None:
    """Raises unless ``model`` is a module."""
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        raise TypeError(
            f"{operator}: model must be a torch.nn.Module, got the class {model.__name__}; make an instance "
            "of it first"
        )
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"{operator}: model must be a torch.nn.Module, got {type(model).__name__}; give the module that "
            "holds the norms"
        )
