"""The Triton kernels of the recurrent layers' products: rows times the transpose of a matrix.

The order in which an element is summed follows from its tile alone, and tiles are chosen by the sizes of
the matrix, never by the number of rows: so a row's bits do not depend on its batch, which no library's
product promises.
"""

from __future__ import annotations

import triton
import triton.language as tl

from layernorm.gpu.recurrent.table_kernels import BASE, address, await_kernel, rows_of_step, step_of_loop


@triton.jit
def _tile(
    a,
    b,
    row,
    column,
    in_rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    A_STRIDE: tl.constexpr,
    B_COLUMN: tl.constexpr,
    B_DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ_k a[row, k]·b[k, column] in float32; b's element is at column·B_COLUMN + k·B_DEPTH."""
    k = tl.arange(0, BLOCK_K)
    in_columns = column[None, :] < COLUMNS
    a_at = a + row[:, None] * A_STRIDE + k[None, :]
    b_at = b + column[None, :] * B_COLUMN + k[:, None] * B_DEPTH
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        left = DEPTH - start
        x = tl.load(a_at, in_rows[:, None] & (k[None, :] < left), other=0.0)
        y = tl.load(b_at, in_columns & (k[:, None] < left), other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        a_at += BLOCK_K
        b_at += BLOCK_K * B_DEPTH
    return total


@triton.jit(do_not_specialize=["rows"])
def product(
    a,
    b,
    bias,
    out,
    rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    B_COLUMN: tl.constexpr,
    B_DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute out (rows, COLUMNS) = a (rows, DEPTH) times b, plus the bias unless that is None."""
    tiles: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = row < rows
    total = _tile(a, b, row, column, in_rows, COLUMNS, DEPTH, DEPTH, B_COLUMN, B_DEPTH, BLOCK_K, PRECISION)
    in_columns = column < COLUMNS
    if bias is not None:
        total += tl.load(bias + column, in_columns, other=0.0).to(tl.float32)[None, :]
    at = out + row[:, None] * COLUMNS + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), in_rows[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=["step", "batch"])
def step_product(
    table,
    step,
    batch,
    A: tl.constexpr,
    B: tl.constexpr,
    BIAS: tl.constexpr,
    OUT: tl.constexpr,
    OUT_TYPE: tl.constexpr,
    SEQUENCE: tl.constexpr,
    ADD: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    B_COLUMN: tl.constexpr,
    B_DEPTH: tl.constexpr,
    TYPE: tl.constexpr,
    FROM_LAST: tl.constexpr,
    PACKED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the product of one step, of the tensors in these slots of the table (BIAS -1: none).

    a is a state (batch, DEPTH), or with ``SEQUENCE`` the rows of this step in a buffer of a chunk; out
    (batch, COLUMNS) is a state, to which ``ADD`` adds.
    """
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = step_of_loop(table, step, FROM_LAST)
    first, count = rows_of_step(table, t, batch, PACKED)
    if tl.program_id(0) * BLOCK_M >= count:
        return
    in_rows = n < count
    row = n.to(tl.int64)
    if SEQUENCE:
        row += first - tl.load(table + BASE)
    a = address(table, A, TYPE)
    b = address(table, B, TYPE)
    await_kernel(DEPENDENT)
    total = _tile(a, b, row, column, in_rows, COLUMNS, DEPTH, DEPTH, B_COLUMN, B_DEPTH, BLOCK_K, PRECISION)
    in_columns = column < COLUMNS
    if BIAS >= 0:
        total += tl.load(address(table, BIAS, TYPE) + column, in_columns, other=0.0).to(tl.float32)[None, :]
    at = address(table, OUT, OUT_TYPE) + n.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    if ADD:
        total += tl.load(at, mask, other=0.0).to(tl.float32)
    tl.store(at, total.to(OUT_TYPE), mask)
