"""The norm operators on GPUs: checks, allocates, and launches the kernels of ``norm_kernels``.

The functions have the signatures of the operators ``layernorm::…`` that they serve. A row's bits depend on
its width and the architecture, not on its batch. The parts of the sums over rows are fixed too, so every
gradient has the same bits each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from layernorm.gpu import settings
from layernorm.gpu.launching import ALIGNED, Wrap, aligned, capability, is_aligned, launch
from layernorm.gpu.norm import kernels as norm_kernels

#: Of input, residual and parameters, in any mixture.
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)

_PARTS: Final = 32
_COLUMNS: Final = 64
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
    """Output, sum and statistics; those that there are not have no element.

    Args:
        input: (*, *normalized_shape), of one of ``DTYPES``.
        residual: of the input's shape and one of ``DTYPES``, or None; the sum has its dtype.
        normalized_shape: the sizes of the last dimensions.
        weight: the gain, of shape normalized_shape and one of ``DTYPES``, or None.
        bias: likewise.
        eps: added to the variance or mean square.
        centred: layer norm, not RMS norm.
        with_stats: whether the statistics are wanted: (2, rows) mean and rstd, (1, rows) rstd alone.
        wrap: see ``Wrap``.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device.
    """
    leading, rows, width = _sizes(input, normalized_shape)
    gain = _parameter("weight", weight, input, normalized_shape)
    offset = _parameter("bias", bias, input, normalized_shape)
    if offset is not None and not centred:
        raise RuntimeError("layernorm: RMS norm has no bias")
    if residual is not None:
        _check("residual", residual, input, input.shape)
    output = input.new_empty(input.shape)
    total = None if residual is None else residual.new_empty(input.shape)
    kinds = 2 if centred else 1
    stats = input.new_empty((kinds, rows), dtype=torch.float32) if with_stats else None
    if rows > 0 and width > 0:
        x = _rows(input, leading, width)
        other = _NO_ROWS if residual is None else _rows(residual, leading, width)
        tile = settings.forward_tile(_settings(input), width)
        launch(
            norm_kernels.forward,
            (-(-rows // tile.rows),),
            input,
            x.tensor,
            other.tensor,
            gain,
            offset,
            output,
            total,
            stats,
            rows,
            width,
            eps,
            *x.places,
            *other.places,
            CENTRED=centred,
            NESTED=x.is_nested or other.is_nested,
            WHOLE=tile.whole,
            ROWS=tile.rows,
            BLOCK=tile.block,
            CHUNK=chunk(tile),
            num_warps=tile.warps,
            wrap=wrap,
        )
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
    """Gradients of input (which is the residual's too), weight and bias; those not wanted have no element.

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
    leading, rows, width = _sizes(input, normalized_shape)
    _check("grad", grad, input, input.shape)
    if grad_sum is not None:
        _check("grad_sum", grad_sum, input, input.shape)
    if wanted[2] and not centred:
        raise RuntimeError("layernorm: RMS norm has no bias")
    kinds = 2 if centred else 1
    if tuple(stats.shape) != (kinds, rows) or stats.dtype != torch.float32:
        raise RuntimeError("layernorm: stats must be those that norm_forward returned")
    stats = stats.contiguous()
    gain = _parameter("weight", weight, input, normalized_shape)
    offset = _parameter("bias", bias, input, normalized_shape)

    def like(parameter: Tensor | None, is_wanted: bool) -> Tensor | None:
        return (input if parameter is None else parameter).new_empty(normalized_shape) if is_wanted else None

    grad_input = input.new_empty(input.shape) if wanted[0] else None
    grad_gain, grad_bias = like(gain, wanted[1]), like(offset, wanted[2])
    if rows > 0 and width > 0:
        g, x = _rows(grad, leading, width), _rows(input, leading, width)
        other = _NO_ROWS if grad_sum is None else _rows(grad_sum, leading, width)
        chosen = _settings(input)
        tile = settings.backward_tile(chosen, width)
        nested = g.is_nested or x.is_nested or other.is_nested
        sums = None
        if not tile.whole and wanted[0]:
            sums = input.new_empty((2, rows), dtype=torch.float32)
            block, warps = chosen.looped_sums
            launch(
                norm_kernels.row_sums,
                (rows,),
                input,
                g.tensor,
                x.tensor,
                stats,
                gain,
                sums,
                rows,
                width,
                *g.places,
                *x.places,
                CENTRED=centred,
                NESTED=nested,
                BLOCK=block,
                num_warps=warps,
                wrap=wrap,
            )
        per_part = settings.rows_per_part(chosen, tile, rows, width)
        parts = -(-rows // per_part)
        part_gain, part_bias = (
            input.new_empty((parts, width), dtype=torch.float32) if is_wanted else None
            for is_wanted in wanted[1:]
        )
        launch(
            norm_kernels.backward,
            (-(-width // tile.block), parts),
            input,
            g.tensor,
            other.tensor,
            x.tensor,
            stats,
            sums,
            gain,
            grad_input,
            part_gain,
            part_bias,
            rows,
            width,
            per_part,
            *g.places,
            *other.places,
            *x.places,
            CENTRED=centred,
            NESTED=nested,
            WHOLE=tile.whole,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
            wrap=wrap,
        )
        if wanted[1] or wanted[2]:
            launch(
                norm_kernels.sum_parts,
                (-(-width // _COLUMNS),),
                input,
                part_gain,
                part_bias,
                grad_gain,
                grad_bias,
                parts,
                width,
                PARTS=_PARTS,
                COLUMNS=_COLUMNS,
                num_warps=4,
                wrap=wrap,
            )
    else:
        for found in (grad_gain, grad_bias):
            if found is not None:
                found.zero_()
    return (
        _or_nothing(grad_input, input),
        _or_nothing(grad_gain, input),
        _or_nothing(grad_bias, input),
    )


def _or_nothing(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or one without elements: operators return no None."""
    return like.new_empty(0) if tensor is None else tensor


def chunk(tile: settings.Tile) -> int:
    """Columns at a time of rows that float32 cannot hold."""
    return max(1, min(tile.block, _CHUNK // tile.rows))


def _settings(input: Tensor) -> settings.Settings:
    return settings.for_architecture(capability(input.device))


def _sizes(input: Tensor, normalized_shape: Sequence[int]) -> tuple[int, int, int]:
    """The number of dimensions of rows, the number of rows, and the width of a row."""
    leading = input.dim() - len(normalized_shape)
    if not len(normalized_shape) or leading < 0 or list(input.shape[leading:]) != list(normalized_shape):
        raise RuntimeError(
            f"layernorm: normalized_shape={list(normalized_shape)} must be the tail of the input's shape "
            f"{list(input.shape)}"
        )
    if input.dtype not in DTYPES:
        raise RuntimeError(
            f"layernorm: the Triton kernels are for float32, bfloat16 and float16, got {input.dtype}"
        )
    rows, width = math.prod(input.shape[:leading]), math.prod(normalized_shape)
    if width > _MOST_WIDTH:
        raise RuntimeError(f"layernorm: a row may have at most {_MOST_WIDTH} elements, got {width}")
    return leading, rows, width


def _check(name: str, tensor: Tensor, input: Tensor, shape: Sequence[int]) -> None:
    if list(tensor.shape) != list(shape) or tensor.dtype not in DTYPES or tensor.device != input.device:
        raise RuntimeError(
            f"layernorm: {name} must be of shape {list(shape)}, of float32, bfloat16 or float16, and on "
            f"{input.device}; got shape {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )


def _parameter(
    name: str, tensor: Tensor | None, input: Tensor, normalized_shape: Sequence[int]
) -> Tensor | None:
    if tensor is None:
        return None
    _check(name, tensor, input, normalized_shape)
    return aligned(tensor)


class _Rows(NamedTuple):
    """A tensor whose rows can be read in place, and where they lie: see ``_places``."""

    tensor: Tensor | None
    inner: int
    outer: int
    stride: int

    @property
    def is_nested(self) -> bool:
        """Whether its rows lie at two strides."""
        return self.inner != 1

    @property
    def places(self) -> tuple[int, int, int]:
        """The kernels' arguments."""
        return self.inner, self.outer, self.stride


_NO_ROWS: Final = _Rows(None, 1, 0, 0)


def _rows(tensor: Tensor, leading: int, width: int) -> _Rows:
    """The tensor itself where its rows lie at one or two strides, else a copy."""
    found = (1, width, width) if tensor.is_contiguous() else _strides(tensor, leading, width)
    if found is not None:
        inner, outer, stride = found
        # Vectors are read wherever the width allows them, so that a row has the same bits in any layout.
        in_place = outer % ALIGNED == 0 and stride % ALIGNED == 0 and is_aligned(tensor)
        if width % ALIGNED != 0 or in_place:
            return _Rows(tensor, inner, outer, stride)
    return _Rows(tensor.clone(memory_format=torch.contiguous_format), 1, width, width)


def _strides(tensor: Tensor, leading: int, width: int) -> tuple[int, int, int] | None:
    """Size of the inner dimension of rows, stride of the outer, stride of the inner; None for more."""
    expected = 1
    for dim in range(tensor.dim() - 1, leading - 1, -1):
        if tensor.size(dim) != 1:
            if tensor.stride(dim) != expected:
                return None
            expected *= tensor.size(dim)
    dims: list[tuple[int, int]] = []  # size and stride from the innermost out, those that go on as one
    for dim in range(leading - 1, -1, -1):
        size, stride = tensor.size(dim), tensor.stride(dim)
        if size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, stride))
    if not dims:
        return 1, width, width
    inner, stride = dims[0]
    if len(dims) == 1:
        return 1, stride, stride
    return (inner, dims[1][1], stride) if len(dims) == 2 else None


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    wrap: Wrap = None,
) -> Tensor:
    """The operator ``layernorm::layer_norm`` without a derivative."""
    return _outputs(input, None, normalized_shape, weight, bias, eps, True, wrap)[0]


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float, *, wrap: Wrap = None
) -> Tensor:
    """The operator ``layernorm::rms_norm`` without a derivative."""
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
    """The operator ``layernorm::add_layer_norm`` without a derivative."""
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
    """The operator ``layernorm::add_rms_norm`` without a derivative."""
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
