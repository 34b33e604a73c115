"""The norm operators on GPUs: checks, memory, and the launches of the kernels.

The functions have the signatures of the operators ``layernorm::…`` that they compute. A row's bits depend on
its width and the architecture, not on its batch. The parts of the sums over rows are fixed too, so every
gradient has the same bits each time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, NamedTuple

import torch
from torch import Tensor

from layernorm.gpu import settings
from layernorm.gpu.launching import Wrap, aligned, capability, compiled_by, launch
from layernorm.gpu.norm import backward_kernels, forward_kernels
from layernorm.gpu.norm.rows import NO_ROWS, Rows, rows_of

#: Of input, residual and parameters, in any mixture.
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)

# Of the sums over rows what a program adds up at a time: 64 bytes of a row, and few columns, since a model's
# width is all that spreads them over the multiprocessors.
_PARTS: Final = 128
_COLUMNS: Final = 16
_CHUNK: Final = 512  # elements of a tile of rows that float32 cannot hold
_MOST_WIDTH: Final = 2**31 - 2**16  # columns are counted in 32 bits, rows and elements in 64


def norm_forward(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    *,
    with_stats: bool = True,
    wrap: Wrap = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, sum and statistics; what does not exist has no element.

    Args:
        input: (*, *normalized_shape), of one of ``DTYPES``.
        residual: of the input's shape and one of ``DTYPES``, or None; the sum has its dtype.
        normalized_shape: the sizes of the last dimensions.
        weight: the gain, of shape normalized_shape and one of ``DTYPES``, or None.
        bias: of the same shape and dtypes, or None.
        eps: added to the variance or mean square.
        centred: layer norm, not RMS norm.
        with_stats: whether the statistics are wanted: (2, rows) mean and rstd, (1, rows) rstd alone.
        wrap: see ``Wrap``.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device.
    """
    normalized_shape = tuple(normalized_shape)
    leading, rows, width = _sizes(input, normalized_shape)
    gain = _parameter("weight", weight, input, normalized_shape)
    offset = _parameter("bias", bias, input, normalized_shape)
    if offset is not None and not centred:
        raise RuntimeError("layernorm: RMS norm has no bias")
    if residual is not None:
        _check("residual", residual, input, input.shape)
    output = input.new_empty(input.shape)
    total = None if residual is None else residual.new_empty(input.shape)
    stats = input.new_empty((2 if centred else 1, rows), dtype=torch.float32) if with_stats else None
    if rows > 0 and width > 0:
        other = NO_ROWS if residual is None else rows_of(residual, leading, width)
        call = _Forward(input, rows_of(input, leading, width), other, rows, width, eps, centred, wrap)
        with _compiled("forward", call, (input, residual, gain, offset, stats), width, centred):
            call.run(gain, offset, output, total, stats)
    elif stats is not None:
        stats.zero_()
    return output, _or_nothing(total, input), _or_nothing(stats, input)


def norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    stats: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    wanted: Sequence[bool],
    *,
    wrap: Wrap = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of input (and residual), weight and bias; one that is not wanted has no element.

    Args:
        grad: of the output, (*, *normalized_shape).
        grad_sum: of the sum, or None.
        input: what was normalized: the sum, where there was a residual.
        stats: as ``norm_forward`` returned them.
        normalized_shape: the sizes of the last dimensions.
        weight: the gain, or None.
        bias: or None; its values do not matter.
        centred: layer norm, not RMS norm.
        wanted: of input, weight and bias.
        wrap: see ``Wrap``.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device.
    """
    normalized_shape = tuple(normalized_shape)
    leading, rows, width = _sizes(input, normalized_shape)
    _check("grad", grad, input, input.shape)
    if grad_sum is not None:
        _check("grad_sum", grad_sum, input, input.shape)
    if wanted[2] and not centred:
        raise RuntimeError("layernorm: RMS norm has no bias")
    if stats.shape != (2 if centred else 1, rows) or stats.dtype != torch.float32:
        raise RuntimeError("layernorm: stats must be those that norm_forward returned")
    gain = _parameter("weight", weight, input, normalized_shape)
    offset = _parameter("bias", bias, input, normalized_shape)

    def like(parameter: Tensor | None, is_wanted: bool) -> Tensor | None:
        return (input if parameter is None else parameter).new_empty(normalized_shape) if is_wanted else None

    grad_input = input.new_empty(input.shape) if wanted[0] else None
    found = (grad_input, like(gain, wanted[1]), like(offset, wanted[2]))
    if rows > 0 and width > 0:
        of_output, x = rows_of(grad, leading, width), rows_of(input, leading, width)
        of_sum = NO_ROWS if grad_sum is None else rows_of(grad_sum, leading, width)
        held = stats.contiguous()
        call = _Backward(input, of_output, x, of_sum, held, gain, rows, width, centred, wrap)
        with _compiled("backward", call, (grad, grad_sum, input, gain, *found), width, centred):
            call.run(*found)
    else:
        for parameter in found[1:]:
            if parameter is not None:
                parameter.zero_()
    of_input, of_gain, of_bias = (_or_nothing(tensor, input) for tensor in found)
    return of_input, of_gain, of_bias


class _Forward(NamedTuple):
    """A call of forward, whose tensors have been checked."""

    input: Tensor
    x: Rows
    residual: Rows
    rows: int
    width: int
    eps: float
    centred: bool
    wrap: Wrap

    @property
    def is_nested(self) -> bool:
        """Return whether rows lie at two strides."""
        return self.x.is_nested or self.residual.is_nested

    def run(
        self,
        gain: Tensor | None,
        bias: Tensor | None,
        output: Tensor,
        total: Tensor | None,
        stats: Tensor | None,
    ) -> None:
        """Launch the kernel, which writes output, and sum and statistics where they have a tensor."""
        tile = settings.forward_tile(_settings(self.input), self.width)
        launch(
            forward_kernels.forward,
            (-(-self.rows // tile.rows),),
            self.input,
            self.x.tensor,
            self.residual.tensor,
            gain,
            bias,
            output,
            total,
            stats,
            self.rows,
            self.width,
            self.eps,
            *self.x.places,
            *self.residual.places,
            CENTRED=self.centred,
            NESTED=self.is_nested,
            CHUNK=chunk(tile),
            **tile.options,
            wrap=self.wrap,
        )


class _Backward(NamedTuple):
    """A call of backward, whose tensors have been checked."""

    input: Tensor
    grad: Rows
    x: Rows
    grad_sum: Rows
    stats: Tensor
    gain: Tensor | None
    rows: int
    width: int
    centred: bool
    wrap: Wrap

    @property
    def is_nested(self) -> bool:
        """Return whether rows lie at two strides."""
        return self.grad.is_nested or self.x.is_nested or self.grad_sum.is_nested

    def run(self, grad_input: Tensor | None, grad_gain: Tensor | None, grad_bias: Tensor | None) -> None:
        """Launch what computes the gradients that have a tensor."""
        chosen = _settings(self.input)
        tile = settings.backward_tile(chosen, self.width)
        options = {"CENTRED": self.centred, "NESTED": self.is_nested}
        sums = None if tile.whole or grad_input is None else self._row_sums(chosen, options)
        per_part = settings.rows_per_part(chosen, tile, self.rows, self.width)
        parts = -(-self.rows // per_part)
        part_gain, part_bias = (
            None if grad is None else self.input.new_empty((parts, self.width), dtype=torch.float32)
            for grad in (grad_gain, grad_bias)
        )
        launch(
            backward_kernels.backward,
            (-(-self.width // tile.block), parts),
            self.input,
            self.grad.tensor,
            self.grad_sum.tensor,
            self.x.tensor,
            self.stats,
            sums,
            self.gain,
            grad_input,
            part_gain,
            part_bias,
            self.rows,
            self.width,
            per_part,
            *self.grad.places,
            *self.grad_sum.places,
            *self.x.places,
            **options,
            **tile.options,
            wrap=self.wrap,
        )
        found = (grad_gain is not None) + (grad_bias is not None)
        if found:
            launch(
                backward_kernels.sum_parts,
                (-(-self.width // _COLUMNS), found),
                self.input,
                part_gain,
                part_bias,
                grad_gain,
                grad_bias,
                parts,
                self.width,
                PARTS=_PARTS,
                COLUMNS=_COLUMNS,
                num_warps=4,
                wrap=self.wrap,
            )

    def _row_sums(self, chosen: settings.Settings, options: dict[str, bool]) -> Tensor:
        """Launch the sums over rows that no tile holds whole."""
        sums = self.input.new_empty((2, self.rows), dtype=torch.float32)
        tile = settings.sums_tile(chosen, self.width)
        launch(
            backward_kernels.row_sums,
            (self.rows,),
            self.input,
            self.grad.tensor,
            self.x.tensor,
            self.stats,
            self.gain,
            sums,
            self.rows,
            self.width,
            *self.grad.places,
            *self.x.places,
            **options,
            BLOCK=tile.block,
            STAGES=tile.stages,
            num_warps=tile.warps,
            wrap=self.wrap,
        )
        return sums


def _compiled(
    name: str, call: _Forward | _Backward, tensors: Sequence[Tensor | None], width: int, centred: bool
) -> AbstractContextManager[None]:
    """Return a context for launches, in which ``compiled_by`` refuses a first time within a capture."""
    if call.wrap is not None:
        return nullcontext()
    dtypes = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
    return compiled_by((name, dtypes, width, centred, call.is_nested), call.input)


def _or_nothing(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Return the tensor, or one without elements: operators return no None."""
    return like.new_empty(0) if tensor is None else tensor


@functools.cache
def chunk(tile: settings.Tile) -> int:
    """Return how many columns are taken at a time of rows that float32 cannot hold."""
    return max(1, min(tile.block, _CHUNK // tile.rows))


def _settings(input: Tensor) -> settings.Settings:
    return settings.for_architecture(capability(input.device))


def _sizes(input: Tensor, normalized_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the number of dimensions of rows, the number of rows, and the width of a row."""
    leading = input.dim() - len(normalized_shape)
    if not normalized_shape or leading < 0 or input.shape[leading:] != normalized_shape:
        raise RuntimeError(
            f"layernorm: normalized_shape={list(normalized_shape)} must be the tail of the input's shape "
            f"{list(input.shape)}"
        )
    if input.dtype not in DTYPES:
        raise RuntimeError(
            f"layernorm: the Triton kernels are for float32, bfloat16 and float16, got {input.dtype}"
        )
    # The width chooses the kernels: a program that is traced for any width is then for this one.
    rows, width = math.prod(input.shape[:leading]), int(math.prod(normalized_shape))
    if width > _MOST_WIDTH:
        raise RuntimeError(f"layernorm: a row may have at most {_MOST_WIDTH} elements, got {width}")
    return leading, rows, width


def _check(name: str, tensor: Tensor, input: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in DTYPES or tensor.device != input.device:
        raise RuntimeError(
            f"layernorm: {name} must be of shape {list(shape)}, of float32, bfloat16 or float16, and on "
            f"{input.device}; got shape {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )


def _parameter(
    name: str, tensor: Tensor | None, input: Tensor, normalized_shape: tuple[int, ...]
) -> Tensor | None:
    if tensor is None:
        return None
    _check(name, tensor, input, normalized_shape)
    return aligned(tensor)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    wrap: Wrap = None,
) -> Tensor:
    """Compute the operator ``layernorm::layer_norm`` without a derivative."""
    return _outputs(input, None, normalized_shape, weight, bias, eps, True, wrap)[0]


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float, *, wrap: Wrap = None
) -> Tensor:
    """Compute the operator ``layernorm::rms_norm`` without a derivative."""
    return _outputs(input, None, normalized_shape, weight, None, eps, False, wrap)[0]


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    wrap: Wrap = None,
) -> tuple[Tensor, Tensor]:
    """Compute the operator ``layernorm::add_layer_norm`` without a derivative."""
    return _outputs(input, residual, normalized_shape, weight, bias, eps, True, wrap)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    *,
    wrap: Wrap = None,
) -> tuple[Tensor, Tensor]:
    """Compute the operator ``layernorm::add_rms_norm`` without a derivative."""
    return _outputs(input, residual, normalized_shape, weight, None, eps, False, wrap)


def _outputs(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    wrap: Wrap,
) -> tuple[Tensor, Tensor]:
    found = norm_forward(
        input, residual, normalized_shape, weight, bias, eps, centred, with_stats=False, wrap=wrap
    )
    return found[0], found[1]
