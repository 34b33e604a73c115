"""The Triton kernels of the recurrent layers' forward; ``row_kernels`` tells the whole."""

from __future__ import annotations

import triton
import triton.language as tl

from layernorm.gpu.recurrent.gate_kernels import (
    in_float32,
    nonlinear,
    normalized_gates,
    read_gates,
    sigmoid,
    write_gates,
)
from layernorm.gpu.recurrent.row_kernels import (
    candidate_value,
    gate_inputs,
    gate_value,
    next_cell,
    normalized_cell,
    passes_on,
    read_x,
    row_of_step,
    rows_of_program,
)
from layernorm.gpu.recurrent.table_kernels import BASE, address, await_kernel, slot

WH = slot("wh")
STATE_H = slot("h")
STATE_C = slot("c")
HIDDEN = slot("hidden")
OUTPUT = slot("output")
SAVED_C = slot("saved_c")


@triton.jit
def cell_of_gates(
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
    CELL: tl.constexpr,
    KIND: tl.constexpr,
    INPUTS: tl.constexpr,
    CELL_NORM: tl.constexpr,
    RELU: tl.constexpr,
    CLIP: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Return h and an LSTM's c of rows, from what entered the gates and the c, or a GRU's h, ``before``.

    Stores c; c is rounded to the type, h is not.
    """
    first_gate = gate_value(table, 0, x0, h0, column, INPUTS, H, TYPE, PRESENT)
    c = before
    if CELL == "lstm":
        forget = sigmoid(gate_value(table, 1, x1, h1, column, INPUTS, H, TYPE, PRESENT))
        candidate = nonlinear(gate_value(table, 2, x2, h2, column, INPUTS, H, TYPE, PRESENT), RELU)
        output_gate = sigmoid(gate_value(table, 3, x3, h3, column, INPUTS, H, TYPE, PRESENT))
        c, _ = next_cell(forget, before, sigmoid(first_gate) * candidate, CLIP)
        c = tl.where(mask, c.to(TYPE).to(tl.float32), 0.0)
        seen = c
        if CELL_NORM != "none":
            _, seen, _ = normalized_cell(table, c, column, mask, cell_eps, KIND, H, TYPE, PRESENT)
            if CELL_NORM == "carried":
                seen = seen.to(TYPE).to(tl.float32)
                c = seen
        tl.store(address(table, SAVED_C, TYPE) + row * H + column, c.to(TYPE), mask)
        h = output_gate * nonlinear(seen, RELU)
    elif CELL == "gru":
        reset = sigmoid(first_gate)
        update = sigmoid(gate_value(table, 1, x1, h1, column, INPUTS, H, TYPE, PRESENT))
        candidate, _ = candidate_value(table, reset, x2, h2, column, INPUTS, RELU, H, TYPE, PRESENT)
        h = (1.0 - update) * candidate + update * before
    else:
        h = nonlinear(first_gate, RELU)
    return h, c


@triton.jit(do_not_specialize=["step", "batch"])
def cell_forward(
    table,
    step,
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
    PROJECTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take row program_id(0) of a step from W_hh h to the new state."""
    n, t, row, there = row_of_step(table, step, batch, REVERSE, PACKED)
    if not there:
        return
    column = tl.arange(0, BLOCK)[:, None]
    mask = column < H
    x0, x1, x2, x3 = read_x(table, row, column, mask, GATES, H, TYPE)
    passes = passes_on(table, t, n, row, there, batch, REVERSE, PACKED, PRESENT)
    await_kernel(DEPENDENT)
    at_h = address(table, WH, tl.float32) + n.to(tl.int64) * (GATES * H)
    h0, h1, h2, h3 = read_gates(at_h, column, mask, GATES, H)
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
    at_state = n.to(tl.int64) * H + column
    STATE: tl.constexpr = STATE_C if CELL == "lstm" else STATE_H
    before = x0
    if CELL != "rnn":
        before = tl.load(address(table, STATE, TYPE) + at_state, mask, other=0.0).to(tl.float32)
    h, c = cell_of_gates(
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
    if CELL == "lstm":
        tl.store(address(table, STATE, TYPE) + at_state, tl.where(passes, c, 0.0).to(TYPE), mask)
    if PROJECTED:
        tl.store(address(table, HIDDEN, TYPE) + at_state, h.to(TYPE), mask)
    else:
        tl.store(address(table, OUTPUT, TYPE) + row * H + column, h.to(TYPE), mask)
        tl.store(address(table, STATE_H, TYPE) + at_state, tl.where(passes, h, 0.0).to(TYPE), mask)


@triton.jit(do_not_specialize=["step", "batch"])
def projected_forward(
    table,
    step,
    batch,
    P: tl.constexpr,
    TYPE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the new h to the output after the product with W_hr, and put zeros in its place after a reset."""
    n, t, row, there = row_of_step(table, step, batch, REVERSE, PACKED)
    if not there:
        return
    column = tl.arange(0, BLOCK)[:, None]
    mask = column < P
    state = address(table, STATE_H, TYPE) + n.to(tl.int64) * P + column
    passes = passes_on(table, t, n, row, there, batch, REVERSE, PACKED, PRESENT)
    await_kernel(DEPENDENT)
    h = tl.load(state, mask, other=0.0)
    tl.store(address(table, OUTPUT, TYPE) + row * P + column, h, mask)
    tl.store(state, tl.where(passes, h, tl.zeros(h.shape, TYPE)), mask)


@triton.jit(do_not_specialize=["step", "batch"])
def recompute_gates(
    table,
    step,
    batch,
    eps,
    CELL: tl.constexpr,
    KIND: tl.constexpr,
    INPUTS: tl.constexpr,
    SCOPE: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    STATS: tl.constexpr,
    TYPE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute again what entered the gates, for a chunk of steps (program_id(1)), where it was not kept."""
    _, _, row, there = row_of_step(table, step, batch, REVERSE == 0, PACKED)
    if not there:
        return
    column = tl.arange(0, BLOCK)[:, None]
    mask = column < H
    x0, x1, x2, x3 = read_x(table, row, column, mask, GATES, H, TYPE)
    at_h = address(table, WH, tl.float32) + (row - tl.load(table + BASE)) * (GATES * H)
    h0, h1, h2, h3 = read_gates(at_h, column, mask, GATES, H)
    gate_inputs(
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


@triton.jit
def normalize_rows(
    x,
    stats,
    eps,
    CELL: tl.constexpr,
    KIND: tl.constexpr,
    SCOPE: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalize W_ih x of one row in place; store rstd of its groups in ``stats``, unless that is None."""
    row = rows_of_program(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[:, None]
    mask = column < H
    at = x + row * (GATES * H)
    a, b, c, d = read_gates(at, column, mask, GATES, H)
    a, b, c, d = in_float32(a, b, c, d)
    if stats is not None:
        stats += row * STATS
    a, b, c, d = normalized_gates(a, b, c, d, mask, eps, stats, True, CELL, KIND, SCOPE, GATES, H)
    write_gates(at, column, mask, a, b, c, d, GATES, H)
