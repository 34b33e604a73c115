"""The Triton kernels of the norms, backward: one for the gradients, and the sums over rows.

Their compile-time parameters are those of ``forward_kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from layernorm.gpu.norm.forward_kernels import places, row_mean


@triton.jit
def _row_statistics(stats, row, rows, here, CENTRED: tl.constexpr):
    """Load mean and rstd, and a power of two by which elements are scaled before anything is subtracted.

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
    """Return N = (x - mean)·rstd, whose mean came scaled."""
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
    STAGES: tl.constexpr,
):
    """Compute the means of t = grad·gain, where CENTRED, and of t·n for a row wider than a block."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    grad_at = places(row, grad_inner, grad_outer, grad_stride, NESTED)
    input_at = places(row, input_inner, input_outer, input_stride, NESTED)
    mean, rstd, scale = _row_statistics(stats, row, rows, row < rows, CENTRED)
    column = tl.arange(0, BLOCK)[None, :]
    sum_t = tl.zeros([1, BLOCK], tl.float32)
    sum_tn = tl.zeros([1, BLOCK], tl.float32)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        mask = start + column < width
        t = tl.load(grad + grad_at[:, None] + start + column, mask, other=0.0).to(tl.float32)
        x = tl.load(input + input_at[:, None] + start + column, mask, other=0.0).to(tl.float32)
        if gain is not None:
            t *= tl.load(gain + start + column, mask, other=0.0).to(tl.float32)
        sum_t += t
        sum_tn += t * _normalized(x, mean, rstd, scale, CENTRED)
    if CENTRED:
        tl.store(sums + row, row_mean(sum_t, width))
    tl.store(sums + rows + row, row_mean(sum_tn, width))


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
    STAGES: tl.constexpr,
):
    """Compute the input's gradient over one part of the rows and one block of columns, and that part's sums.

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
    for begin in tl.range(0, rows_per_part, ROWS, num_stages=STAGES):
        row = part * rows_per_part + begin + tl.arange(0, ROWS)
        here = row < rows
        mask = here[:, None] & in_width
        grad_at = places(row, grad_inner, grad_outer, grad_stride, NESTED)
        input_at = places(row, input_inner, input_outer, input_stride, NESTED)
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
                along_n = row_mean(t * n, width)
            else:
                along_n = tl.load(sums + rows + row, here, other=0.0)
            d = t - n * along_n[:, None]
            if CENTRED:
                if WHOLE:
                    along_one = row_mean(t, width)
                else:
                    along_one = tl.load(sums + row, here, other=0.0)
                d -= along_one[:, None]
            d *= rstd[:, None]
            if grad_sum is not None:
                grad_sum_at = places(row, grad_sum_inner, grad_sum_outer, grad_sum_stride, NESTED)
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
    """Sum the gradients of gain and bias over their parts, each in programs of its own; one may be None."""
    if grad_gain is not None:  # noqa: SIM102 - what is compiled, then what runs
        if tl.program_id(1) == 0:
            _sum_parts(part_gain, grad_gain, parts, width, PARTS, COLUMNS)
    if grad_bias is not None:  # noqa: SIM102
        if tl.program_id(1) == tl.num_programs(1) - 1:
            _sum_parts(part_bias, grad_bias, parts, width, PARTS, COLUMNS)
