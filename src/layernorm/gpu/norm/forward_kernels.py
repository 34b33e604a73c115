"""The Triton kernel of the norms, forward; ``backward_kernels`` has those of the derivative.

What a kernel does is decided by which of its tensors are there and by its compile-time parameters:

- ``CENTRED``: layer norm; else RMS norm, which has no mean.
- ``WHOLE``: a tile holds whole rows, which are then read once. Else forward loops over a row, and backward
  finds its sums in ``sums``, where ``row_sums`` left them, and takes a part of the columns.
- ``NESTED``: rows that lie at two strides, else at one.
- ``STAGES``: of a loop. Triton loads ahead of itself only in loops that say how far.

Statistics and all sums are in float32 and in an order that the parameters decide, never the number of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A row whose variance or sum of squares lies beyond these is looked at again in float64.
LEAST_VARIANCE = tl.constexpr(2.0**-100)
MOST_SQUARES = tl.constexpr(2.0**127)


@triton.jit
def places(row, inner, outer, stride, NESTED: tl.constexpr):
    """Return where rows begin, in elements."""
    if NESTED:
        return row // inner * outer + row % inner * stride
    return row * stride


@triton.jit
def _read(input, residual, total, input_at, residual_at, column, mask):
    """Load what is normalized, in float32: the input, or its sum with the residual, rounded to its type."""
    x = tl.load(input + input_at[:, None] + column, mask, other=0.0).to(tl.float32)
    if residual is not None:
        x += tl.load(residual + residual_at[:, None] + column, mask, other=0.0).to(tl.float32)
        x = x.to(total.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def row_mean(a, width):
    """Return the mean of each row, correctly rounded but for the sum."""
    return tl.div_rn(tl.sum(a, 1), tl.full([1], width, tl.float32))


@triton.jit
def _whole_statistics(x, mask, width, CENTRED: tl.constexpr):
    """Return mean, what its rounding lost, and the sum of squares about both, of rows that are at hand."""
    mean = tl.zeros([x.shape[0]], tl.float32)
    rest = mean
    if CENTRED:
        mean = row_mean(x, width)
        x = tl.where(mask, x - mean[:, None], 0.0)
        rest = row_mean(x, width)
        x = tl.where(mask, x - rest[:, None], 0.0)
    return mean, rest, tl.sum(x * x, 1)


@triton.jit
def _looped_statistics(
    input,
    residual,
    total,
    input_at,
    residual_at,
    inside,
    width,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return what ``_whole_statistics`` does, for rows wider than a block.

    Each lane keeps the moments of its own elements (Welford 1962) about the mean of the row's first block,
    so that a large offset costs nothing; at the end lanes are put together (Chan, Golub, LeVeque 1979).
    """
    column = tl.arange(0, BLOCK)[None, :]
    shift = tl.zeros([ROWS], tl.float32)
    rest = shift
    if CENTRED:
        first = _read(input, residual, total, input_at, residual_at, column, inside & (column < width))
        shift = row_mean(first, BLOCK)
    mean = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        mask = inside & (start + column < width)
        x = _read(input, residual, total, input_at, residual_at, start + column, mask)
        if CENTRED:
            # A lane beyond the row sees its own mean once more, which changes nothing.
            x = tl.where(mask, x - shift[:, None], mean)
            away = x - mean
            inverse = tl.div_rn(tl.full([1], 1.0, tl.float32), tl.full([1], start // BLOCK + 1, tl.float32))
            mean += away * inverse[:, None]
            squares += away * (x - mean)
        else:
            squares += x * x
    if CENTRED:
        count = ((width - column + BLOCK - 1) // BLOCK).to(tl.float32)
        middle = row_mean(count * mean, width)
        mean -= middle[:, None]
        rest = row_mean(count * mean, width)
        mean -= rest[:, None]
        squares += count * mean * mean
        # The sum shift + middle, and exactly what its rounding loses (Knuth's two-sum).
        mean_of_row = shift + middle
        back = mean_of_row - shift
        rest += (shift - (mean_of_row - back)) + (middle - back)
        shift = mean_of_row
    return shift, rest, tl.sum(squares, 1)


@triton.jit
def _extreme_statistics(
    input,
    residual,
    total,
    input_at,
    residual_at,
    inside,
    width,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Return mean and mean square about it in float64, for rows whose squares float32 cannot hold."""
    column = tl.arange(0, CHUNK)[None, :]
    n = tl.full([1], width, tl.float64)
    sums = tl.zeros([ROWS, CHUNK], tl.float64)
    if CENTRED:
        for start in range(0, width, CHUNK):
            mask = inside & (start + column < width)
            x = _read(input, residual, total, input_at, residual_at, start + column, mask)
            sums += x.to(tl.float64)
    mean = tl.sum(sums, 1) / n
    squares = tl.zeros([ROWS, CHUNK], tl.float64)
    for start in range(0, width, CHUNK):
        mask = inside & (start + column < width)
        x = _read(input, residual, total, input_at, residual_at, start + column, mask)
        away = tl.where(mask, x.to(tl.float64) - mean[:, None], 0.0)
        squares += away * away
    return mean, tl.sum(squares, 1) / n


@triton.jit
def _write(
    x,
    gain,
    bias,
    output,
    total,
    at,
    column,
    mask,
    in_width,
    scale,
    mean,
    rest,
    rstd,
    CENTRED: tl.constexpr,
):
    """Store output = (x·scale - mean - rest)·rstd·gain + bias, and the sum unless ``total`` is None."""
    if total is not None:
        tl.store(total + at[:, None] + column, x.to(total.dtype.element_ty), mask)
    if CENTRED:
        y = (x * scale[:, None] - mean[:, None] - rest[:, None]) * rstd[:, None]
    else:
        y = x * scale[:, None] * rstd[:, None]
    if gain is not None:
        y *= tl.load(gain + column, in_width, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, in_width, other=0.0).to(tl.float32)
    tl.store(output + at[:, None] + column, y.to(output.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "input_inner", "residual_inner"])
def forward(
    input,
    residual,
    gain,
    bias,
    output,
    total,
    stats,
    rows,
    width,
    eps,
    input_inner,
    input_outer,
    input_stride,
    residual_inner,
    residual_outer,
    residual_stride,
    CENTRED: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute output, sum and statistics of ROWS rows.

    ``residual``, ``gain``, ``bias``, ``total`` and ``stats`` may be None. ``stats`` holds the means, where
    CENTRED, then the rstds. ``CHUNK`` is what rows that float32 cannot hold are read in.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    input_at = places(row, input_inner, input_outer, input_stride, NESTED)
    residual_at = places(row, residual_inner, residual_outer, residual_stride, NESTED)
    column = tl.arange(0, BLOCK)[None, :]
    mask = inside & (column < width)
    if WHOLE:
        x = _read(input, residual, total, input_at, residual_at, column, mask)
        mean, rest, squares = _whole_statistics(x, mask, width, CENTRED)
    else:
        mean, rest, squares = _looped_statistics(
            input, residual, total, input_at, residual_at, inside, width, CENTRED, ROWS, BLOCK, STAGES
        )
    variance = tl.div_rn(squares, tl.full([1], width, tl.float32)) + eps
    rstd = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), tl.sqrt_rn(variance))
    scale = tl.full([ROWS], 1.0, tl.float32)
    scaled_mean = mean
    scaled_rstd = rstd
    extreme = (row < rows) & ~((variance > LEAST_VARIANCE) & (squares < MOST_SQUARES))
    if tl.max(extreme.to(tl.int32), 0) > 0:
        exact_mean, square = _extreme_statistics(
            input, residual, total, input_at, residual_at, inside, width, CENTRED, ROWS, CHUNK
        )
        exact_rstd = 1.0 / tl.sqrt(square + eps)
        # A power of two, so that scaling is exact.
        exact_scale = tl.where(exact_rstd < 1.0, 2.0**-100, 2.0**100).to(tl.float64)
        scale = tl.where(extreme, exact_scale.to(tl.float32), scale)
        mean = tl.where(extreme, exact_mean.to(tl.float32), mean)
        scaled_mean = tl.where(extreme, (exact_mean * exact_scale).to(tl.float32), scaled_mean)
        lost = exact_mean * exact_scale - (exact_mean * exact_scale).to(tl.float32).to(tl.float64)
        rest = tl.where(extreme, lost.to(tl.float32), rest)
        rstd = tl.where(extreme, exact_rstd.to(tl.float32), rstd)
        scaled_rstd = tl.where(extreme, (exact_rstd / exact_scale).to(tl.float32), scaled_rstd)
    if stats is not None:
        if CENTRED:
            tl.store(stats + row, mean, row < rows)
            tl.store(stats + rows + row, rstd, row < rows)
        else:
            tl.store(stats + row, rstd, row < rows)
    at = row * width
    if WHOLE:
        _write(
            x,
            gain,
            bias,
            output,
            total,
            at,
            column,
            mask,
            column < width,
            scale,
            scaled_mean,
            rest,
            scaled_rstd,
            CENTRED,
        )
    else:
        for start in tl.range(0, width, BLOCK, num_stages=STAGES):
            in_width = start + column < width
            part = _read(input, residual, total, input_at, residual_at, start + column, inside & in_width)
            _write(
                part,
                gain,
                bias,
                output,
                total,
                at,
                start + column,
                inside & in_width,
                in_width,
                scale,
                scaled_mean,
                rest,
                scaled_rstd,
                CENTRED,
            )
