"""One layer and direction as the GPU's kernels see it: the operators' arguments, checked."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor

from layernorm.gpu.launching import aligned
from layernorm.variants import CellNorm, Inputs, Kind, Scope

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
#: The vectors among the operators' weights in their order, as the kernels call them.
VECTORS: Final = ("bias_ih", "bias_hh", "gain_ih", "gain_hh", "bias", "bias_hn", "gain_cell", "bias_cell")
_GATES: Final = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


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
        """A part of the rows."""
        return Saved(*(None if t is None else t[begin : begin + count] for t in self))


@dataclass(frozen=True, eq=False)
class Spec:
    """What the kernels are compiled for; see ``recurrent_kernels``.

    Attributes:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        kind: "layer", "rms" or "none".
        inputs: "separate", "summed" or "late".
        scope: "matrix", "all" or "gate".
        cell_norm: "output", "carried" or "none".
        eps: added to the variance.
        reverse: whether the loop begins with the last step.
        packed: whether steps have different numbers of rows.
        projected: whether h is W_hr times the hidden vector.
        dtype: of all tensors.
        gates, hidden_size, output_size, input_size: G, H, P and F.
    """

    cell: str
    kind: Kind
    inputs: str
    scope: Scope
    cell_norm: CellNorm
    eps: float
    reverse: bool
    packed: bool
    projected: bool
    dtype: torch.dtype
    gates: int
    hidden_size: int
    output_size: int
    input_size: int

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal specs."""
        return tuple(getattr(self, field.name) for field in fields(Spec))

    @property
    def gate_width(self) -> int:
        """G·H."""
        return self.gates * self.hidden_size

    @property
    def groups(self) -> int:
        """Groups of a row's features that share statistics."""
        if self.kind == "none":
            return 0
        if self.scope == "gate":
            return self.gates
        return 2 if self.scope == "matrix" and self.cell == "gru" else 1

    @property
    def stats_width(self) -> int:
        """Numbers in a row of the statistics."""
        return self.groups * (2 if self.inputs == "separate" else 1)

    @property
    def saved_h_width(self) -> int:
        """Features of W_hh h that backward needs beside x."""
        return {"separate": self.gate_width, "summed": 0, "late": self.hidden_size}[self.inputs]


@dataclass(frozen=True, eq=False)
class Layer(Spec):
    """A spec with its tensors.

    Attributes:
        input: (T, N, F), or (rows, F) packed; contiguous, as all tensors here.
        h0, c0: (N, P), and (N, H) of an LSTM.
        weight_ih, weight_hh, weight_hr: (G·H, F), (G·H, P), and (P, H) or None.
        vectors: by the names of ``VECTORS``; None where there is none.
        resets: uint8 (rows), or None.
        batch_sizes, offsets: int64 (T) on the device, of a packed sequence: rows of each step, and its first.
        counts: the former on the CPU, or None.
        steps, batch, rows: T, N, and the rows of all steps.
    """

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
        batch_sizes: Sequence[int] | None,
        cell: str,
        kind: Kind,
        inputs: Inputs,
        scope: Scope,
        cell_norm: CellNorm,
        eps: float,
        reverse: bool,
    ) -> Self:
        """The arguments of the operators, checked.

        Raises:
            RuntimeError: a tensor has another shape, dtype or device than the layer's, or there is no step.
        """
        if cell not in _GATES:
            raise RuntimeError(f"layernorm: cell must be one of {', '.join(_GATES)}; got {cell}")
        packed = batch_sizes is not None
        if input.dtype not in DTYPES or input.dim() != (2 if packed else 3):
            raise RuntimeError(
                f"layernorm: input must be of {2 if packed else 3} dimensions, of float32, bfloat16 or "
                f"float16; got {list(input.shape)} of {input.dtype}"
            )
        gates = _GATES[cell]
        weight_ih, weight_hh, weight_hr = weights[:3]
        if weight_ih is None or weight_hh is None or weight_hh.dim() != 2 or weight_hh.size(0) % gates:
            raise RuntimeError(
                f"layernorm: weight_ih and weight_hh must be matrices of {gates} times hidden_size rows"
            )
        hidden, output = weight_hh.size(0) // gates, weight_hh.size(1)
        counts = _checked(batch_sizes, input.size(0)) if batch_sizes is not None else None
        steps, batch = (len(counts), counts[0]) if counts else (input.size(0), input.size(1))
        if steps == 0:
            raise RuntimeError("layernorm: Expected sequence length to be larger than 0 in RNN")
        rows = sum(counts) if counts else steps * batch
        width = gates * hidden

        def held(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
            return None if tensor is None else _held(name, tensor, shape, input.dtype, input)

        sizes = {"bias_hn": hidden, "gain_cell": hidden, "bias_cell": hidden}
        vectors = {
            name: held(name, vector, (sizes.get(name, width),))
            for name, vector in zip(VECTORS, weights[3:], strict=True)
        }
        held_h0 = _held("h", h, (batch, output), input.dtype, input)
        if cell == "lstm" and c is None:
            raise RuntimeError("layernorm: an LSTM needs the state c")
        mask = None
        if resets is not None:
            mask = _held("resets", resets, tuple(input.shape[:-1]), torch.bool, input).view(torch.uint8)
        offsets = [0, *accumulate(counts)][:-1] if counts else None
        device_sizes, device_offsets = (
            None if numbers is None else torch.tensor(numbers, device=input.device)
            for numbers in (counts, offsets)
        )
        return cls(
            cell=cell,
            kind=kind,
            inputs=_inputs(cell, kind, inputs, scope),
            scope=scope,
            cell_norm="none" if kind == "none" else cell_norm,
            eps=eps,
            reverse=reverse,
            packed=packed,
            projected=weight_hr is not None,
            dtype=input.dtype,
            gates=gates,
            hidden_size=hidden,
            output_size=output,
            input_size=input.size(-1),
            input=aligned(input),
            h0=held_h0,
            c0=held("c", c, (batch, hidden)) if cell == "lstm" else None,
            weight_ih=_held("weight_ih", weight_ih, (width, input.size(-1)), input.dtype, input),
            weight_hh=_held("weight_hh", weight_hh, (width, output), input.dtype, input),
            weight_hr=held("weight_hr", weight_hr, (output, hidden)),
            vectors=vectors,
            resets=mask,
            batch_sizes=device_sizes,
            offsets=device_offsets,
            counts=counts,
            steps=steps,
            batch=batch,
            rows=rows,
        )

    @property
    def input_rows(self) -> Tensor:
        """(rows, F)."""
        return self.input.reshape(self.rows, self.input_size)

    def first_row(self, step: int) -> int:
        """Of a step among those of all steps."""
        return step * self.batch if self.counts is None else sum(self.counts[:step])

    def chunk(self, done: int, count: int) -> tuple[int, int]:
        """First row and rows of the steps that backward takes after ``done`` steps, so many of them."""
        first = done if self.reverse else self.steps - done - count
        begin = self.first_row(first)
        return begin, self.first_row(first + count) - begin

    def first_state(self) -> tuple[Tensor, Tensor | None]:
        """Copies of the initial state, with zeros where the first step resets it."""
        c = None if self.c0 is None else self.cleared(self.c0.clone())
        return self.cleared(self.h0.clone()), c

    def cleared(self, state: Tensor) -> Tensor:
        """The state, or its gradient, with zeros in the rows that the first step resets."""
        if self.resets is None or self.reverse:
            return state
        reset = self.resets.reshape(self.rows)[: self.batch].bool()
        return state.masked_fill_(reset.unsqueeze(-1), 0)

    def new_saved(self, rows: int, *, with_c: bool, keep: bool = True) -> Saved:
        """Room for what forward keeps; without ``keep`` x, which it works in, and c alone."""
        new = self.input.new_empty
        h = new((rows, self.saved_h_width)) if keep and self.saved_h_width else None
        c = new((rows, self.hidden_size)) if with_c and self.cell == "lstm" else None
        stats = new((rows, self.stats_width), dtype=torch.float32) if keep else None
        return Saved(new((rows, self.gate_width)), h, c, stats)

    def tensors(self, saved: Saved) -> dict[str, Tensor | None]:
        """What goes into the table for the steps, by the slots' names."""
        stats = saved.stats if self.stats_width else None
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
        """Raises RuntimeError unless these are what forward returned."""
        again = saved.x.numel() == 0
        c_width = self.hidden_size if self.cell == "lstm" else 0
        widths = [
            self.output_size,
            c_width,
            *((0, 0, 0) if again else (self.gate_width, self.saved_h_width, self.stats_width)),
        ]
        tensors = (output, saved.c, saved.x, saved.h, saved.stats)
        for tensor, width in zip(tensors, widths, strict=True):
            dtype = torch.float32 if tensor is saved.stats else self.dtype
            if tensor.numel() != self.rows * width or tensor.dtype != dtype:
                raise RuntimeError(
                    "layernorm: output and the saved tensors must be those that recurrent_forward returned"
                )


def _inputs(cell: str, kind: str, inputs: str, scope: str) -> str:
    if kind == "none":  # nothing distinguishes the products but the candidate of a GRU
        return "separate" if cell == "gru" else "summed"
    return "late" if cell == "gru" and inputs == "summed" and scope != "all" else inputs


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
