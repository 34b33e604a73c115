"""The Triton kernels of the norms: one forward, one backward, and the sums over rows.

What a kernel does is decided by which of its tensors are there and by its compile-time parameters:

- ``CENTRED``: layer norm; else RMS norm, which has no mean.
- ``WHOLE``: a tile holds whole rows, which are then read once. Else forward loops over a row, and backward
  finds its sums in ``sums``, where ``row_sums`` left them, and takes a part of the columns.
- ``NESTED``: rows that lie at two strides, else at one.

Statistics and all sums are in float32 and in an order that the parameters decide, never the number of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A row whose variance or sum of squares lies beyond these is looked at again in float64.
LEAST_VARIANCE = tl.constexpr(2.0**-100)
MOST_SQUARES = tl.constexpr(2.0**127)


@triton.jit
def _places(row, inner, outer, stride, NESTED: tl.constexpr):
    """Where rows begin, in elements."""
    if NESTED:
        return row // inner * outer + row % inner * stride
    return row * stride


@triton.jit
def _read(input, residual, total, input_at, residual_at, column, mask):
    """What is normalized, in float32: the input, or its sum with the residual, rounded to the sum's type."""
    x = tl.load(input + input_at[:, None] + column, mask, other=0.0).to(tl.float32)
    if residual is not None:
        x += tl.load(residual + residual_at[:, None] + column, mask, other=0.0).to(tl.float32)
        x = x.to(total.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _mean(a, width):
    """The mean of each row, correctly rounded but for the sum."""
    return tl.div_rn(tl.sum(a, 1), tl.full([1], width, tl.float32))


@triton.jit
def _whole_statistics(x, mask, width, CENTRED: tl.constexpr):
    """Mean, what its rounding lost, and the sum of squares about both, of rows that are at hand."""
    mean = tl.zeros([x.shape[0]], tl.float32)
    rest = mean
    if CENTRED:
        mean = _mean(x, width)
        x = tl.where(mask, x - mean[:, None], 0.0)
        rest = _mean(x, width)
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
):
    """As ``_whole_statistics``, of rows wider than a block.

    Each lane keeps the moments of its own elements (Welford 1962) about the mean of the row's first block,
    so that a large offset costs nothing; at the end lanes are put together (Chan, Golub, LeVeque 1979).
    """
    column = tl.arange(0, BLOCK)[None, :]
    shift = tl.zeros([ROWS], tl.float32)
    rest = shift
    if CENTRED:
        first = _read(input, residual, total, input_at, residual_at, column, inside & (column < width))
        shift = _mean(first, BLOCK)
    mean = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        mask = inside & (start + column < width)
        x = _read(input, residual, total, input_at, residual_at, start + column, mask)
        if CENTRED:
            x -= shift[:, None]
            away = x - mean
            inverse = tl.div_rn(tl.full([1], 1.0, tl.float32), tl.full([1], start // BLOCK + 1, tl.float32))
            mean += tl.where(mask, away * inverse[:, None], 0.0)
            squares += tl.where(mask, away * (x - mean), 0.0)
        else:
            squares += x * x
    if CENTRED:
        count = ((width - column + BLOCK - 1) // BLOCK).to(tl.float32)
        middle = _mean(count * mean, width)
        mean -= middle[:, None]
        rest = _mean(count * mean, width)
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
    """Mean and mean square about it in float64, for rows whose squares float32 cannot hold."""
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
    """Output = (x·scale - mean - rest)·rstd·gain + bias, and the sum where there is one."""
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
    CHUNK: tl.constexpr,
):
    """Output, sum and statistics of ROWS rows.

    ``residual``, ``gain``, ``bias``, ``total`` and ``stats`` may be None. ``stats`` holds the means, where
    CENTRED, then the rstds. ``CHUNK`` is what rows that float32 cannot hold are read in.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    input_at = _places(row, input_inner, input_outer, input_stride, NESTED)
    residual_at = _places(row, residual_inner, residual_outer, residual_stride, NESTED)
    column = tl.arange(0, BLOCK)[None, :]
    mask = inside & (column < width)
    if WHOLE:
        x = _read(input, residual, total, input_at, residual_at, column, mask)
        mean, rest, squares = _whole_statistics(x, mask, width, CENTRED)
    else:
        mean, rest, squares = _looped_statistics(
            input, residual, total, input_at, residual_at, inside, width, CENTRED, ROWS, BLOCK
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
        for start in range(0, width, BLOCK):
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


@triton.jit
def _row_statistics(stats, row, rows, here, CENTRED: tl.constexpr):
    """Mean and rstd; and a power of two by which elements are scaled before anything is subtracted.

    Without it the difference from the mean could overflow, which is as far away as the largest numbers.
    """
    if CENTRED:
        mean = tl.load(stats + row, here, other=0.0)
        rstd = tl.load(stats + rows + row, here, other=0.0)
    else:
        rstd = tl.load(stats + row, here, other=0.0)
        mean = tl.zeros_like(rstd)
    scale = tl.where(rstd < 2.0**-60, 0.5, 1.0)
    return mean * scale, rstd, scale


@triton.jit
def _normalized(x, mean, rstd, scale, CENTRED: tl.constexpr):
    """N = (x - mean)·rstd, whose mean came scaled."""
    if CENTRED:
        x = x * scale[:, None] - mean[:, None]
    else:
        x = x * scale[:, None]
    return x * (rstd / scale)[:, None]


@triton.jit(do_not_specialize=["rows", "grad_inner", "input_inner"])
def row_sums(
    grad,
    input,
    stats,
    gain,
    sums,
    rows,
    width,
    grad_inner,
    grad_outer,
    grad_stride,
    input_inner,
    input_outer,
    input_stride,
    CENTRED: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For one row wider than a block the means of t = grad·gain, where CENTRED, and of t·n: (2, rows)."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    grad_at = _places(row, grad_inner, grad_outer, grad_stride, NESTED)
    input_at = _places(row, input_inner, input_outer, input_stride, NESTED)
    mean, rstd, scale = _row_statistics(stats, row, rows, row < rows, CENTRED)
    column = tl.arange(0, BLOCK)[None, :]
    sum_t = tl.zeros([1, BLOCK], tl.float32)
    sum_tn = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        mask = start + column < width
        t = tl.load(grad + grad_at[:, None] + start + column, mask, other=0.0).to(tl.float32)
        x = tl.load(input + input_at[:, None] + start + column, mask, other=0.0).to(tl.float32)
        if gain is not None:
            t *= tl.load(gain + start + column, mask, other=0.0).to(tl.float32)
        sum_t += t
        sum_tn += t * _normalized(x, mean, rstd, scale, CENTRED)
    if CENTRED:
        tl.store(sums + row, _mean(sum_t, width))
    tl.store(sums + rows + row, _mean(sum_tn, width))


@triton.jit(do_not_specialize=["rows", "rows_per_part", "grad_inner", "grad_sum_inner", "input_inner"])
def backward(
    grad,
    grad_sum,
    input,
    stats,
    sums,
    gain,
    grad_input,
    part_gain,
    part_bias,
    rows,
    width,
    rows_per_part,
    grad_inner,
    grad_outer,
    grad_stride,
    grad_sum_inner,
    grad_sum_outer,
    grad_sum_stride,
    input_inner,
    input_outer,
    input_stride,
    CENTRED: tl.constexpr,
    NESTED: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The input's gradient over one part of the rows and one block of columns, and that part's sums.

    With n = (x - mean)·rstd and t = grad·gain, grad_input = rstd·(t - mean(t) - n·mean(t·n)) + grad_sum,
    without mean(t) where not CENTRED; the sums over rows are of grad·n and of grad. ``grad_sum``, ``gain``,
    ``grad_input``, ``part_gain`` and ``part_bias`` may be None; ``sums`` is, where WHOLE.
    """
    part = tl.program_id(1).to(tl.int64)
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    in_width = column < width
    if gain is not None:
        factor = tl.load(gain + column, in_width, other=0.0).to(tl.float32)
    gains = tl.zeros([ROWS, BLOCK], tl.float32)
    biases = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, rows_per_part, ROWS):
        row = part * rows_per_part + begin + tl.arange(0, ROWS)
        here = row < rows
        mask = here[:, None] & in_width
        grad_at = _places(row, grad_inner, grad_outer, grad_stride, NESTED)
        input_at = _places(row, input_inner, input_outer, input_stride, NESTED)
        g = tl.load(grad + grad_at[:, None] + column, mask, other=0.0).to(tl.float32)
        x = tl.load(input + input_at[:, None] + column, mask, other=0.0).to(tl.float32)
        mean, rstd, scale = _row_statistics(stats, row, rows, here, CENTRED)
        n = tl.where(mask, _normalized(x, mean, rstd, scale, CENTRED), 0.0)
        if part_gain is not None:
            gains += g * n
        if part_bias is not None:
            biases += g
        if grad_input is not None:
            t = g
            if gain is not None:
                t = g * factor
            if WHOLE:
                along_n = _mean(t * n, width)
            else:
                along_n = tl.load(sums + rows + row, here, other=0.0)
            d = t - n * along_n[:, None]
            if CENTRED:
                if WHOLE:
                    along_one = _mean(t, width)
                else:
                    along_one = tl.load(sums + row, here, other=0.0)
                d -= along_one[:, None]
            d *= rstd[:, None]
            if grad_sum is not None:
                grad_sum_at = _places(row, grad_sum_inner, grad_sum_outer, grad_sum_stride, NESTED)
                d += tl.load(grad_sum + grad_sum_at[:, None] + column, mask, other=0.0).to(tl.float32)
            tl.store(grad_input + row[:, None] * width + column, d.to(grad_input.dtype.element_ty), mask)
    at = part * width + column
    if part_gain is not None:
        tl.store(part_gain + at, tl.sum(gains, 0)[None, :], in_width)
    if part_bias is not None:
        tl.store(part_bias + at, tl.sum(biases, 0)[None, :], in_width)


@triton.jit
def _sum_parts(parts_of, total, parts, width, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    sums = tl.zeros([PARTS, COLUMNS], tl.float32)
    for begin in range(0, parts, PARTS):
        part = (begin + tl.arange(0, PARTS))[:, None]
        mask = (part < parts) & (column < width)
        sums += tl.load(parts_of + part.to(tl.int64) * width + column, mask, other=0.0)
    tl.store(total + column, tl.sum(sums, 0)[None, :].to(total.dtype.element_ty), column < width)


@triton.jit(do_not_specialize=["parts"])
def sum_parts(
    part_gain,
    part_bias,
    grad_gain,
    grad_bias,
    parts,
    width,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients of gain and bias from their parts; either may be None."""
    if grad_gain is not None:
        _sum_parts(part_gain, grad_gain, parts, width, PARTS, COLUMNS)
    if grad_bias is not None:
        _sum_parts(part_bias, grad_bias, parts, width, PARTS, COLUMNS)
