"""The Triton kernels that loop over the steps of small layers themselves, in one launch.

A program takes ``ROWS`` rows of the batch through all steps. It holds their state, and keeps W_hh on the chip
between steps: as tiles of one gate, whose product with the state is a tile of the gate. What a step reads
of memory is loaded a step ahead, since nothing else of it can be computed before the state is there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from layernorm.gpu.recurrent.backward_kernels import (
    GRAD_C,
    GRAD_H,
    gate_gradients,
    read_kept,
)
from layernorm.gpu.recurrent.forward_kernels import OUTPUT, STATE_C, STATE_H, cell_of_gates
from layernorm.gpu.recurrent.row_kernels import (
    gate_inputs,
    passes_on,
    read_x,
    rows_of_neighbour,
    rows_of_program,
    vector,
)
from layernorm.gpu.recurrent.table_kernels import address, slot, step_of_loop

WEIGHT_HH = slot("weight_hh")
BIAS_HH = slot("bias_hh")


@triton.jit
def _rows(table, step, n, batch, FROM_LAST: tl.constexpr, PACKED: tl.constexpr):
    """Return step t of the sequence, rows n of it among those of all steps, and which of them there are."""
    t = step_of_loop(table, step, FROM_LAST)
    first, count = rows_of_neighbour(table, t, batch, PACKED)
    return t, first + n, n < count


@triton.jit
def _matrices(
    table,
    BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Load W_hh of each gate, or its transpose; the others are the first."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    at = address(table, WEIGHT_HH, TYPE) + (j * H + i if TRANSPOSED else i * H + j)
    mask = (i < H) & (j < H)
    a = tl.load(at, mask, other=0.0)
    b, c, d = a, a, a
    if GATES > 1:
        b = tl.load(at + H * H, mask, other=0.0)
    if GATES > 2:
        c = tl.load(at + 2 * H * H, mask, other=0.0)
    if GATES > 3:
        d = tl.load(at + 3 * H * H, mask, other=0.0)
    return a, b, c, d


@triton.jit
def _product_with_bias(
    table,
    w,
    h,
    WHICH: tl.constexpr,
    column,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    PRESENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    found = tl.dot(w, h, input_precision=PRECISION)
    if PRESENT >> int(BIAS_HH) & 1:
        found += vector(table, BIAS_HH, WHICH, column, 0.0, H, TYPE, PRESENT)
    return found


@triton.jit(do_not_specialize=["steps", "batch"])
def looped_forward(
    table,
    steps,
    batch,
    eps,
    cell_eps,
    CELL: tl.constexpr,
    KIND: tl.constexpr,
    INPUTS: tl.constexpr,
    SCOPE: tl.constexpr,
    CELL_NORM: tl.constexpr,
    RELU: tl.constexpr,
    CLIP: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    STATS: tl.constexpr,
    TYPE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRESENT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take a program's rows through ``steps`` steps, from the state in the table to that after them."""
    n = rows_of_program(ROWS)
    column = tl.arange(0, BLOCK)[:, None]
    at_state = n.to(tl.int64) * H + column
    in_batch = (column < H) & (n < batch)
    w0, w1, w2, w3 = _matrices(table, BLOCK, False, GATES, H, TYPE)
    h = tl.load(address(table, STATE_H, TYPE) + at_state, in_batch, other=0.0)
    c = h.to(tl.float32)
    if CELL == "lstm":
        c = tl.load(address(table, STATE_C, TYPE) + at_state, in_batch, other=0.0).to(tl.float32)
    t, row, there = _rows(table, 0, n, batch, REVERSE, PACKED)
    x0, x1, x2, x3 = read_x(table, row, column, (column < H) & there, GATES, H, TYPE)
    for step in range(steps):
        next_t, next_row, next_there = _rows(table, step + 1, n, batch, REVERSE, PACKED)
        y0, y1, y2, y3 = read_x(table, next_row, column, (column < H) & next_there, GATES, H, TYPE)
        mask = (column < H) & there
        h0 = _product_with_bias(table, w0, h, 0, column, H, TYPE, PRESENT, PRECISION)
        h1, h2, h3 = h0, h0, h0
        if GATES > 1:
            h1 = _product_with_bias(table, w1, h, 1, column, H, TYPE, PRESENT, PRECISION)
        if GATES > 2:
            h2 = _product_with_bias(table, w2, h, 2, column, H, TYPE, PRESENT, PRECISION)
        if GATES > 3:
            h3 = _product_with_bias(table, w3, h, 3, column, H, TYPE, PRESENT, PRECISION)
        x0, x1, x2, x3, h0, h1, h2, h3 = gate_inputs(
            table,
            x0,
            x1,
            x2,
            x3,
            h0,
            h1,
            h2,
            h3,
            row,
            there,
            column,
            mask,
            eps,
            CELL,
            KIND,
            INPUTS,
            SCOPE,
            GATES,
            H,
            GROUPS,
            STATS,
            TYPE,
            PRESENT,
        )
        before = c if CELL == "lstm" else h.to(tl.float32)
        new_h, new_c = cell_of_gates(
            table,
            x0,
            x1,
            x2,
            x3,
            h0,
            h1,
            h2,
            h3,
            before,
            row,
            column,
            mask,
            cell_eps,
            CELL,
            KIND,
            INPUTS,
            CELL_NORM,
            RELU,
            CLIP,
            H,
            TYPE,
            PRESENT,
        )
        tl.store(address(table, OUTPUT, TYPE) + row * H + column, new_h.to(TYPE), mask)
        passes = passes_on(table, t, n, row, there, batch, REVERSE, PACKED, PRESENT)
        h = tl.where(mask, tl.where(passes, new_h, 0.0).to(TYPE), h)
        if CELL == "lstm":
            c = tl.where(mask, tl.where(passes, new_c, 0.0), c)
        t, row, there = next_t, next_row, next_there
        x0, x1, x2, x3 = y0, y1, y2, y3
    tl.store(address(table, STATE_H, TYPE) + at_state, h, in_batch)
    if CELL == "lstm":
        tl.store(address(table, STATE_C, TYPE) + at_state, c.to(TYPE), in_batch)


@triton.jit(do_not_specialize=["steps", "batch"])
def looped_backward(
    table,
    steps,
    batch,
    cell_eps,
    CELL: tl.constexpr,
    KIND: tl.constexpr,
    INPUTS: tl.constexpr,
    SCOPE: tl.constexpr,
    CELL_NORM: tl.constexpr,
    RELU: tl.constexpr,
    CLIP: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    STATS: tl.constexpr,
    TYPE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRESENT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take a program's rows, and their state's gradients, back through the ``steps`` steps of a chunk."""
    n = rows_of_program(ROWS)
    column = tl.arange(0, BLOCK)[:, None]
    at_state = n.to(tl.int64) * H + column
    in_batch = (column < H) & (n < batch)
    w0, w1, w2, w3 = _matrices(table, BLOCK, True, GATES, H, TYPE)
    of_h = tl.load(address(table, GRAD_H, tl.float32) + at_state, in_batch, other=0.0)
    of_c = of_h
    if CELL == "lstm":
        of_c = tl.load(address(table, GRAD_C, tl.float32) + at_state, in_batch, other=0.0)
    t, row, there = _rows(table, 0, n, batch, REVERSE == 0, PACKED)
    x0, x1, x2, x3, h0, h1, h2, h3, before, seed = read_kept(
        table,
        t,
        n,
        row,
        there,
        batch,
        column,
        (column < H) & there,
        CELL,
        INPUTS,
        GATES,
        H,
        TYPE,
        REVERSE,
        PACKED,
        False,
        PRESENT,
    )
    for step in range(steps):
        mask = (column < H) & there
        passes = passes_on(table, t, n, row, there, batch, REVERSE, PACKED, PRESENT)
        next_t, next_row, next_there = _rows(table, step + 1, n, batch, REVERSE == 0, PACKED)
        next_there = next_there & (step + 1 < steps)
        y0, y1, y2, y3, k0, k1, k2, k3, next_before, next_seed = read_kept(
            table,
            next_t,
            n,
            next_row,
            next_there,
            batch,
            column,
            (column < H) & next_there,
            CELL,
            INPUTS,
            GATES,
            H,
            TYPE,
            REVERSE,
            PACKED,
            False,
            PRESENT,
        )
        d0, d1, d2, d3, passed = gate_gradients(
            table,
            x0,
            x1,
            x2,
            x3,
            h0,
            h1,
            h2,
            h3,
            before,
            seed,
            tl.where(passes, of_h, 0.0),
            tl.where(passes, of_c, 0.0),
            row,
            there,
            column,
            mask,
            cell_eps,
            CELL,
            KIND,
            INPUTS,
            SCOPE,
            CELL_NORM,
            RELU,
            CLIP,
            GATES,
            H,
            GROUPS,
            STATS,
            TYPE,
            False,
            PRESENT,
        )
        total = tl.dot(w0, d0.to(TYPE), input_precision=PRECISION)
        if GATES > 1:
            total = tl.dot(w1, d1.to(TYPE), total, input_precision=PRECISION)
        if GATES > 2:
            total = tl.dot(w2, d2.to(TYPE), total, input_precision=PRECISION)
        if GATES > 3:
            total = tl.dot(w3, d3.to(TYPE), total, input_precision=PRECISION)
        if CELL == "lstm":
            of_c = tl.where(mask, passed, of_c)
        elif CELL == "gru":
            total += passed
        of_h = tl.where(mask, total, of_h)
        t, row, there = next_t, next_row, next_there
        x0, x1, x2, x3, h0, h1, h2, h3 = y0, y1, y2, y3, k0, k1, k2, k3
        before, seed = next_before, next_seed
    tl.store(address(table, GRAD_H, tl.float32) + at_state, of_h, in_batch)
    if CELL == "lstm":
        tl.store(address(table, GRAD_C, tl.float32) + at_state, of_c, in_batch)
