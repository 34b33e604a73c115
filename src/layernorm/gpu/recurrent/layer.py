"""One layer and direction as the GPU's kernels see it: the operators' arguments, checked."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor

from layernorm.gpu.launching import aligned, triton_type
from layernorm.spec import PARAMETERS, LayerSpec

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
#: The vectors among the operators' weights in their order, as the kernels call them.
VECTORS: Final = PARAMETERS[3:]
# Those of H elements; the others have G·H.
_OF_UNITS: Final = ("bias_hn", "gain_cell", "bias_cell")


class Saved(NamedTuple):
    """What forward keeps: x and h as they meet at the gates, the LSTM's c, and rstd of each group.

    Shapes: x (rows, G·H); h (rows, G·H), or (rows, H) of a GRU's candidate where it is summed after the
    reset, or None; c (rows, H) or None; stats (rows, groups), or twice as many where inputs are separate.
    """

    x: Any
    h: Any
    c: Any
    stats: Any

    def rows(self, begin: int, count: int) -> Saved:
        """Return a part of the rows."""
        return Saved(*(None if t is None else t[begin : begin + count] for t in self))


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer and direction with its tensors, all contiguous and on one device.

    Attributes:
        spec: what it computes.
        reverse: whether the loop begins with the last step.
        input_size, hidden_size, output_size: F, H and P.
        input: (T, N, F), or (rows, F) packed.
        h0, c0: (N, P), and (N, H) of an LSTM.
        weight_ih, weight_hh, weight_hr: (G·H, F), (G·H, P), and (P, H) or None.
        vectors: by the names of ``VECTORS``; None where there is none.
        resets: uint8 (rows), or None.
        batch_sizes, offsets: int64 (T) on the device, of a packed sequence: rows of each step, and its first.
        counts: the former on the CPU, or None.
        steps, batch, rows: T, N, and the rows of all steps.
    """

    spec: LayerSpec
    reverse: bool
    input_size: int
    hidden_size: int
    output_size: int
    input: Tensor
    h0: Tensor
    c0: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor
    weight_hr: Tensor | None
    vectors: dict[str, Tensor | None]
    resets: Tensor | None
    batch_sizes: Tensor | None
    offsets: Tensor | None
    counts: tuple[int, ...] | None
    steps: int
    batch: int
    rows: int

    @classmethod
    def of(
        cls,
        input: Tensor,
        h: Tensor,
        c: Tensor | None,
        weights: Sequence[Tensor | None],
        resets: Tensor | None,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
        batch_sizes: Sequence[int] | None,
        codes: Sequence[int],
        eps: float,
        reverse: bool,
    ) -> Self:
        """Check the arguments of the operators.

        Raises:
            RuntimeError: a tensor has another shape, dtype or device than the layer's, there is no step, or a
                state to reset to.
        """
        if reset_h is not None or reset_c is not None:
            raise RuntimeError(
                "layernorm: the kernels for GPUs reset to zeros; for another state use "
                'layernorm.backends.use("reference")'
            )
        spec = LayerSpec.decode(codes, eps)
        weight_ih, weight_hh, weight_hr = _matrices(spec, weights)
        hidden, output, features = weight_hh.size(0) // spec.gates, weight_hh.size(1), input.size(-1)
        counts, steps, batch, rows = _steps(input, batch_sizes)
        width = spec.gates * hidden

        def held(name: str, tensor: Tensor | None, *shape: int) -> Tensor | None:
            return None if tensor is None else _held(name, tensor, shape, input.dtype, input)

        vectors = {
            name: held(name, vector, hidden if name in _OF_UNITS else width)
            for name, vector in zip(VECTORS, weights[3:], strict=True)
        }
        held_h0 = _held("h", h, (batch, output), input.dtype, input)
        if spec.cell == "lstm" and c is None:
            raise RuntimeError("layernorm: an LSTM needs the state c")
        if resets is not None:
            resets = _held("resets", resets, tuple(input.shape[:-1]), torch.bool, input).view(torch.uint8)
        on_device = (None, None) if counts is None else _on_device(counts, input)
        return cls(
            spec=spec,
            reverse=reverse,
            input_size=features,
            hidden_size=hidden,
            output_size=output,
            input=aligned(input),
            h0=held_h0,
            c0=held("c", c, batch, hidden) if spec.cell == "lstm" else None,
            weight_ih=_held("weight_ih", weight_ih, (width, features), input.dtype, input),
            weight_hh=_held("weight_hh", weight_hh, (width, output), input.dtype, input),
            weight_hr=held("weight_hr", weight_hr, output, hidden),
            vectors=vectors,
            resets=resets,
            batch_sizes=on_device[0],
            offsets=on_device[1],
            counts=counts,
            steps=steps,
            batch=batch,
            rows=rows,
        )

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """What the kernels are compiled for, and their launches depend on; equal for equal layers."""
        sizes = (self.input_size, self.hidden_size, self.output_size)
        flags = (self.reverse, self.is_packed, self.is_projected, self.dtype)
        return (self.spec.codes, self.spec.eps, *sizes, *flags)

    @property
    def dtype(self) -> torch.dtype:
        """The type of all tensors but sums and statistics."""
        return self.input.dtype

    @property
    def is_packed(self) -> bool:
        """Whether steps have different numbers of rows."""
        return self.counts is not None

    @property
    def is_projected(self) -> bool:
        """Whether h is W_hr times the hidden vector."""
        return self.weight_hr is not None

    @property
    def gate_width(self) -> int:
        """G·H."""
        return self.spec.gates * self.hidden_size

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """What every kernel that takes a row of gates is compiled with, by the kernels' names."""
        variant = self.spec.variant
        return {
            "CELL": self.spec.cell,
            "RELU": self.spec.nonlinearity == "relu",
            "CLIP": variant.cell_clip or 0.0,
            "eps": self.spec.eps,
            "cell_eps": self.spec.cell_eps,
            "KIND": variant.kind,
            "INPUTS": self.spec.products,
            "SCOPE": variant.scope,
            "CELL_NORM": variant.cell,
            "GATES": self.spec.gates,
            "H": self.hidden_size,
            "P": self.output_size,
            "GROUPS": len(self.spec.groups),
            "STATS": self.spec.statistics,
            "REVERSE": self.reverse,
            "PACKED": self.is_packed,
            "PROJECTED": self.is_projected,
            "TYPE": triton_type(self.dtype),
        }

    @property
    def input_rows(self) -> Tensor:
        """(rows, F)."""
        return self.input.reshape(self.rows, self.input_size)

    def first_row(self, step: int) -> int:
        """Return the first row of a step among those of all steps."""
        return step * self.batch if self.counts is None else sum(self.counts[:step])

    def chunk(self, done: int, count: int) -> tuple[int, int]:
        """Return first row and rows of the ``count`` steps that backward takes after ``done`` steps."""
        first = done if self.reverse else self.steps - done - count
        begin = self.first_row(first)
        return begin, self.first_row(first + count) - begin

    def first_state(self) -> tuple[Tensor, Tensor | None]:
        """Return copies of the initial state, with zeros where the first step resets it."""
        c = None if self.c0 is None else self.cleared(self.c0.clone())
        return self.cleared(self.h0.clone()), c

    def cleared(self, state: Tensor) -> Tensor:
        """Put zeros in the rows of the state, or of its gradient, that the first step resets."""
        if self.resets is None or self.reverse:
            return state
        reset = self.resets.reshape(self.rows)[: self.batch].bool()
        return state.masked_fill_(reset.unsqueeze(-1), 0)

    def new_saved(self, rows: int, *, with_c: bool, keep: bool = True) -> Saved:
        """Make room for what forward keeps; without ``keep`` x, which it works in, and c alone."""
        new = self.input.new_empty
        h_width = self.spec.saved_h_gates * self.hidden_size
        h = new((rows, h_width)) if keep and h_width else None
        c = new((rows, self.hidden_size)) if with_c and self.spec.cell == "lstm" else None
        stats = new((rows, self.spec.statistics), dtype=torch.float32) if keep else None
        return Saved(new((rows, self.gate_width)), h, c, stats)

    def tensors(self, saved: Saved) -> dict[str, Tensor | None]:
        """Return what goes into the table for the steps, by the slots' names."""
        stats = saved.stats if self.spec.statistics else None
        return {
            **{name: vector for name, vector in self.vectors.items() if name != "bias_ih"},
            "weight_hh": self.weight_hh,
            "weight_hr": self.weight_hr,
            "resets": self.resets,
            "batch_sizes": self.batch_sizes,
            "offsets": self.offsets,
            "x": saved.x,
            "saved_h": saved.h,
            "saved_c": saved.c,
            "saved_stats": stats,
        }

    def check_saved(self, output: Tensor, saved: Saved) -> None:
        """Check that these are what forward returned."""
        recomputes = saved.x.numel() == 0
        h_width = self.spec.saved_h_gates * self.hidden_size
        kept = (0, 0, 0) if recomputes else (self.gate_width, h_width, self.spec.statistics)
        widths = [self.output_size, self.hidden_size if self.spec.cell == "lstm" else 0, *kept]
        tensors = (output, saved.c, saved.x, saved.h, saved.stats)
        for tensor, width in zip(tensors, widths, strict=True):
            dtype = torch.float32 if tensor is saved.stats else self.dtype
            if tensor.numel() != self.rows * width or tensor.dtype != dtype:
                raise RuntimeError(
                    "layernorm: output and the saved tensors must be those that recurrent_forward returned"
                )


def _matrices(spec: LayerSpec, weights: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
    weight_ih, weight_hh, weight_hr = weights[:3]
    if weight_ih is None or weight_hh is None or weight_hh.dim() != 2 or weight_hh.size(0) % spec.gates:
        raise RuntimeError(
            f"layernorm: weight_ih and weight_hh must be matrices of {spec.gates} times hidden_size rows"
        )
    return weight_ih, weight_hh, weight_hr


def _steps(input: Tensor, batch_sizes: Sequence[int] | None) -> tuple[tuple[int, ...] | None, int, int, int]:
    """Return the rows of each step where they differ, and T, N and the rows of all steps."""
    dims = 3 if batch_sizes is None else 2
    if input.dtype not in DTYPES or input.dim() != dims:
        raise RuntimeError(
            f"layernorm: input must be of {dims} dimensions, of float32, bfloat16 or float16; got "
            f"{list(input.shape)} of {input.dtype}"
        )
    counts = _checked(batch_sizes, input.size(0)) if batch_sizes is not None else None
    steps, batch = (len(counts), counts[0]) if counts else (input.size(0), input.size(1))
    if steps == 0:
        raise RuntimeError("layernorm: Expected sequence length to be larger than 0 in RNN")
    return counts, steps, batch, sum(counts) if counts else steps * batch


def _on_device(counts: Sequence[int], input: Tensor) -> tuple[Tensor, Tensor]:
    """Copy the rows of each step and its first row to the input's device, without waiting for it."""
    if input.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "layernorm: the lengths of a packed sequence come from the CPU, from where nothing can be copied "
            "while a CUDA graph is captured; give it a padded sequence"
        )
    padding = (0,) * (len(counts) % 2)  # both begin where vectors can be read
    numbers = torch.tensor(
        [(*counts, *padding), (*accumulate(counts[:-1], initial=0), *padding)], pin_memory=input.is_cuda
    )
    batch_sizes, offsets = numbers.to(input.device, non_blocking=True)[:, : len(counts)].unbind(0)
    return batch_sizes, offsets


def _held(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, input: Tensor) -> Tensor:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != input.device:
        raise RuntimeError(
            f"layernorm: {name} must be of shape {list(shape)}, of {dtype} and on {input.device}; got "
            f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )
    return aligned(tensor)


def _checked(batch_sizes: Sequence[int], rows: int) -> tuple[int, ...]:
    sizes = tuple(batch_sizes)
    if any(b <= 0 or b > a for a, b in zip((sizes[:1] or (0,)) + sizes, sizes, strict=False)):
        raise RuntimeError(f"layernorm: batch_sizes must be positive and not increasing, got {list(sizes)}")
    if sum(sizes) != rows:
        raise RuntimeError(f"layernorm: batch_sizes must sum to the input's rows {rows}, got {list(sizes)}")
    return sizes
