"""The gradients of a layer while backward adds them up, and the buffers of one chunk of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from layernorm.gpu import settings
from layernorm.gpu.launching import aligned, launch
from layernorm.gpu.recurrent import backward_kernels, forward_kernels
from layernorm.gpu.recurrent.layer import VECTORS, Layer, Saved
from layernorm.gpu.recurrent.products import product, sum_of_outer

_MATRICES: Final = ("weight_ih", "weight_hh", "weight_hr")
_FOUND: Final = (*_MATRICES, *VECTORS)
_SUM_ROWS: Final = 32
_SUM_COLUMNS: Final = 64
_PER_PART: Final = 256  # rows of a part of a sum


@dataclass(frozen=True)
class Chunk:
    """Buffers for the rows of a chunk of steps; None where the layer has no such thing.

    Attributes:
        grad_gates: (rows, G·H), of the gates before their nonlinearities, and then of W_ih x.
        grad_wh: (rows, G·H), of W_hh h.
        grad_own: (rows, H), GRU: of the part of the candidate that has a gradient of its own.
        grad_cell: (rows, H): of the normalized cell with gain and bias.
        cell: (rows, H): the normalized cell without.
        h_before: (rows, P): what the steps started from.
        grad_state: (rows, P): of h after the projection.
        hidden: (rows, H): h before it.
        grad_hidden: (N, H), float32: its gradient in the present step.
        cell_stats: (rows, 2), float32: mean and rstd of the cell, for the persistent kernel.
        recomputed: what forward did not keep and backward computes again, or None.
        wh: (rows, G·H), float32: W_hh h, where it is computed again.
    """

    grad_gates: Tensor
    grad_wh: Tensor
    h_before: Tensor
    grad_own: Tensor | None
    grad_cell: Tensor | None
    cell: Tensor | None
    grad_state: Tensor | None
    hidden: Tensor | None
    grad_hidden: Tensor | None
    cell_stats: Tensor | None
    recomputed: Saved | None
    wh: Tensor | None

    @classmethod
    def of(cls, layer: Layer, rows: int, *, recompute: bool, cell_stats: bool) -> Chunk:
        """Make room for this number of rows."""

        def new(width: int, *, where: bool = True) -> Tensor | None:
            return layer.input.new_empty((rows, width)) if where else None

        def floats(*shape: int) -> Tensor:
            return layer.input.new_empty(shape, dtype=torch.float32)

        width, hidden, size = layer.gate_width, layer.hidden_size, layer.output_size
        normed = layer.spec.normalizes_cell
        return cls(
            grad_gates=layer.input.new_empty((rows, width)),
            grad_wh=layer.input.new_empty((rows, width)),
            h_before=layer.input.new_empty((rows, size)),
            grad_own=new(hidden, where=layer.spec.cell == "gru" and layer.spec.products != "summed"),
            grad_cell=new(hidden, where=normed),
            cell=new(hidden, where=normed),
            grad_state=new(size, where=layer.is_projected),
            hidden=new(hidden, where=layer.is_projected),
            grad_hidden=floats(layer.batch, hidden) if layer.is_projected else None,
            cell_stats=floats(rows, 2) if cell_stats and normed else None,
            recomputed=layer.new_saved(rows, with_c=False) if recompute else None,
            wh=floats(rows, width) if recompute else None,
        )

    def tensors(self) -> dict[str, Tensor | None]:
        """Return what goes into the table."""
        names = ("grad_gates", "grad_wh", "grad_own", "grad_cell", "cell", "h_before", "grad_state", "hidden")
        return {name: getattr(self, name) for name in (*names, "grad_hidden", "cell_stats", "wh")}

    def rows(self, name: str, rows: int) -> Tensor:
        """Return the first rows of a buffer that the layer has."""
        tensor: Tensor = getattr(self, name)
        return tensor[:rows]


class Gradients:
    """The gradients of a layer while they are added up.

    Args:
        layer: what they are of.
        grad_output, grad_h, grad_c: of the results, or None for zeros.
        wanted: of input, h, c, reset_h, reset_c and the weights.

    Raises:
        RuntimeError: a gradient has another shape, dtype or device than its result.
    """

    def __init__(
        self,
        layer: Layer,
        grad_output: Tensor | None,
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        wanted: Sequence[bool],
    ) -> None:
        def checked(name: str, grad: Tensor | None, shape: Sequence[int]) -> Tensor | None:
            if grad is None:
                return None
            same = grad.dtype == layer.dtype and grad.device == layer.input.device
            if list(grad.shape) != list(shape) or not same:
                raise RuntimeError(
                    f"layernorm: {name} must be of shape {list(shape)} and dtype {layer.dtype}, got "
                    f"{list(grad.shape)} of {grad.dtype}"
                )
            return aligned(grad)

        def begun(grad: Tensor | None, like: Tensor) -> Tensor:
            return torch.zeros_like(like, dtype=torch.float32) if grad is None else grad.float().clone()

        self._layer, self._wanted = layer, list(wanted)
        size, hidden = layer.output_size, layer.hidden_size
        self.output = checked("grad_output", grad_output, (*layer.input.shape[:-1], size))
        #: Of the state between steps, in float32.
        self.h = begun(checked("grad_h", grad_h, (layer.batch, size)), layer.h0)
        self.c: Tensor | None = None
        if layer.c0 is not None:
            self.c = begun(checked("grad_c", grad_c, (layer.batch, hidden)), layer.c0)
        tensors = dict.fromkeys(_FOUND) | layer.vectors
        tensors |= {name: getattr(layer, name) for name in _MATRICES}
        self._found = {
            name: torch.zeros_like(tensor, dtype=torch.float32)
            for (name, tensor), want in zip(tensors.items(), wanted[5:], strict=True)
            if want and tensor is not None
        }
        self._input = torch.empty_like(layer.input) if wanted[0] else None

    def tensors(self) -> dict[str, Tensor | None]:
        """Return what goes into the table."""
        return {"grad_output": self.output, "grad_h": self.h, "grad_c": self.c}

    def close(self, chunk: Chunk, saved: Saved, begin: int, rows: int) -> None:
        """Add what follows from a chunk's rows; ``saved`` holds what forward kept of them."""
        layer, hidden = self._layer, self._layer.hidden_size
        grad, grad_wh = chunk.rows("grad_gates", rows), chunk.rows("grad_wh", rows)
        own = None if chunk.grad_own is None else chunk.rows("grad_own", rows)
        if layer.spec.groups and self._wants("bias", "gain_ih", "gain_hh", "bias_hn"):
            separate = layer.spec.products == "separate"
            total, of_x, of_h = _column_sums(grad, saved.x, saved.h if separate else None)
            if separate and own is not None:
                of_own, own_h, _ = _column_sums(own, saved.h[:, 2 * hidden :])
                of_h[2 * hidden :] = own_h
                self._add("bias_hn", of_own)
            self._add("bias", total)
            self._add("gain_ih", of_x)
            self._add("gain_hh", of_h)
        if chunk.cell is not None and self._wants("gain_cell", "bias_cell"):
            total, of_cell, _ = _column_sums(chunk.rows("grad_cell", rows), chunk.rows("cell", rows))
            self._add("bias_cell", total)
            self._add("gain_cell", of_cell)
        grad_x = self._through_input_norm(grad, grad_wh, own, saved)
        for name, of in (("bias_ih", grad_x), ("bias_hh", grad_wh)):
            if self._wants(name):
                self._add(name, _column_sums(of)[0])
        input = layer.input_rows[begin : begin + rows]
        pairs = [("weight_ih", grad_x, input), ("weight_hh", grad_wh, chunk.rows("h_before", rows))]
        if layer.is_projected:
            pairs.append(("weight_hr", chunk.rows("grad_state", rows), chunk.rows("hidden", rows)))
        for name, left, right in pairs:
            if self._wants(name):
                sum_of_outer(left, right, self._found[name])
        if self._input is not None:
            out = self._input.reshape(layer.rows, layer.input_size)[begin : begin + rows]
            product(grad_x, layer.weight_ih, out, transposed=False)

    def results(self) -> tuple[Tensor | list[Tensor], ...]:
        """Return those that are wanted, in the layer's dtype; the others have no element."""
        layer = self._layer

        def given(grad: Tensor | None) -> Tensor:
            return layer.input.new_empty(0) if grad is None else grad.to(layer.dtype)

        h, c = (
            given(None if grad is None or not want else layer.cleared(grad))
            for grad, want in zip((self.h, self.c), self._wanted[1:3], strict=True)
        )
        weights = [given(self._found.get(name)) for name in _FOUND]
        return given(self._input), h, c, given(None), given(None), weights

    def _wants(self, *names: str) -> bool:
        return any(name in self._found for name in names)

    def _add(self, name: str, sums: Tensor) -> None:
        if name in self._found:
            self._found[name] += sums

    def _through_input_norm(self, grad: Tensor, grad_wh: Tensor, own: Tensor | None, saved: Saved) -> Tensor:
        """Return the gradients of W_ih x, in place of the gates' unless they are those of W_hh h."""
        layer = self._layer
        if layer.spec.products == "summed":
            return grad_wh
        if layer.spec.products == "late":
            assert own is not None  # noqa: S101 - a GRU has it
            grad[:, : 2 * layer.hidden_size] = grad_wh[:, : 2 * layer.hidden_size]
            grad[:, 2 * layer.hidden_size :] = own
        elif layer.spec.groups:
            launch(
                backward_kernels.rows_backward,
                (grad.size(0),),
                grad,
                grad,
                saved.x,
                saved.stats,
                layer.vectors["gain_ih"],
                **row_options(layer),
            )
        return grad


def normalize_rows(layer: Layer, saved: Saved) -> None:
    """Normalize W_ih x in ``saved.x`` in place, where it is normalized by itself."""
    if layer.spec.products != "separate" or not layer.spec.groups:
        return
    launch(
        forward_kernels.normalize_rows,
        (saved.x.size(0),),
        saved.x,
        saved.x,
        saved.stats,
        layer.spec.eps,
        **row_options(layer),
    )


def row_options(layer: Layer) -> dict[str, Any]:
    """Return the parameters of kernels that take whole rows of gates."""
    block = settings.block_for(layer.hidden_size)
    return {
        **{name: layer.options[name] for name in ("CELL", "KIND", "SCOPE", "GATES", "H", "STATS")},
        "BLOCK": block,
        "num_warps": settings.row_warps(block),
    }


def _column_sums(
    grad: Tensor, first: Tensor | None = None, second: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ grad, Σ grad·first and Σ grad·second over the rows; first may be columns of wider rows."""
    rows, width = grad.shape
    parts = -(-rows // _PER_PART)
    sums = grad.new_empty((3, parts, width), dtype=torch.float32)
    launch(
        backward_kernels.column_sums,
        (parts, -(-width // _SUM_COLUMNS)),
        grad,
        grad,
        first,
        second,
        sums[0],
        None if first is None else sums[1],
        None if second is None else sums[2],
        rows,
        _PER_PART,
        WIDTH=width,
        FIRST_STRIDE=width if first is None else first.stride(0),
        ROWS=_SUM_ROWS,
        BLOCK=_SUM_COLUMNS,
        num_warps=4,
    )
    total, of_first, of_second = sums.sum(1)
    return total, of_first, of_second
