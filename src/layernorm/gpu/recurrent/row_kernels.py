"""What the Triton kernels of the recurrent layers share: where a row of a step is, what enters its gates.

A program takes some rows of one step, all their gates in registers, as tiles of features × rows: ``column``
is (BLOCK, 1), and n, row and what else a row has are (ROWS). A row of a step goes through

- ``step_product`` (``product_kernels``): W_hh h of all rows of the step, in float32;
- ``cell_forward`` (``forward_kernels``): norms, gates, cell and state, for one row.

Backward ``cell_backward`` (``backward_kernels``) takes the gradients of the gates, and through the
norm of W_hh h, and a product takes them to the step before. What no step waits for comes after a chunk of
steps, for all its rows at once. ``looped_kernels`` do all of that in one launch, with the same functions.

The words are those of ``layernorm.variants``, but INPUTS is ``LayerSpec.products``: "late" for a GRU whose
candidate is summed after the reset; and without a norm "summed" or, for a GRU, "separate".
PRESENT has a bit for each slot of the table that holds a tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from layernorm.gpu.recurrent.gate_kernels import (
    in_float32,
    nonlinear,
    normalized,
    normalized_gates,
    read_gates,
    sigmoid,
    write_gates,
)
from layernorm.gpu.recurrent.table_kernels import KEPT, STEPS, address, rows_of_step, slot, step_of_loop

RESETS = slot("resets")
X = slot("x")
GAIN_IH = slot("gain_ih")
GAIN_HH = slot("gain_hh")
BIAS = slot("bias")
BIAS_HN = slot("bias_hn")
GAIN_CELL = slot("gain_cell")
BIAS_CELL = slot("bias_cell")
SAVED_H = slot("saved_h")
SAVED_STATS = slot("saved_stats")


@triton.jit
def vector(
    table,
    SLOT: tl.constexpr,
    WHICH: tl.constexpr,
    column,
    absent,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Load a gain or a bias of gate number WHICH in float32; ``absent`` where there is none."""
    if PRESENT >> int(SLOT) & 1:
        at = address(table, SLOT, TYPE) + WHICH * H + column
        found = tl.load(at, column < H, other=0.0).to(tl.float32)
    else:
        found = tl.zeros(column.shape, tl.float32) + absent
    return found


@triton.jit
def rows_of_program(ROWS: tl.constexpr):
    """Return the numbers n of a program's rows within a step."""
    return tl.program_id(0) * ROWS + tl.arange(0, ROWS)


@triton.jit
def row_of_step(table, step, batch, FROM_LAST: tl.constexpr, PACKED: tl.constexpr):
    """Find row n = program_id(0) of a step of the loop, number ``step`` + program_id(1).

    Returns n, the step t of the sequence, the row among those of all steps, and whether there is such a row.
    """
    n = rows_of_program(1)
    t = step_of_loop(table, step + tl.program_id(1), FROM_LAST)
    first, count = rows_of_step(table, t, batch, PACKED)
    return n, t, first + n, tl.program_id(0) < count


@triton.jit
def rows_of_neighbour(table, t, batch, PACKED: tl.constexpr):
    """Return first row and rows of step t; no rows where there is no such step."""
    inside = (t >= 0) & (t < tl.load(table + STEPS))
    first, count = rows_of_step(table, tl.where(inside, t, 0), batch, PACKED)
    return first, tl.where(inside, count, 0)


@triton.jit
def _no_reset(table, row, where, PRESENT: tl.constexpr):
    """Return whether these rows are not reset; true where ``where`` is not."""
    found = row == row  # true
    if PRESENT >> int(RESETS) & 1:
        found = tl.load(address(table, RESETS, tl.uint8) + row, where, other=0) == 0
    return found


@triton.jit
def passes_on(
    table,
    t,
    n,
    row,
    there,
    batch,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Return whether rows n of step t pass something on to the next step: no reset parts them."""
    if REVERSE:
        passes = _no_reset(table, row, there & (t > 0), PRESENT)
    else:
        first, count = rows_of_neighbour(table, t + 1, batch, PACKED)
        passes = _no_reset(table, first + n, n < count, PRESENT)
    return passes


@triton.jit
def started_from(
    table,
    t,
    n,
    row,
    there,
    batch,
    column,
    mask,
    SEQUENCE: tl.constexpr,
    INITIAL: tl.constexpr,
    SIZE: tl.constexpr,
    TYPE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Load the state that rows n of step t started from; zeros after a reset."""
    first, count = rows_of_neighbour(table, t + 1 if REVERSE else t - 1, batch, PACKED)
    taken = n < count
    if REVERSE:
        passes = _no_reset(table, first + n, taken, PRESENT)
    else:
        passes = _no_reset(table, row, there, PRESENT)
    of_sequence = address(table, SEQUENCE, TYPE) + (first + n) * SIZE + column
    initial = address(table, INITIAL, TYPE) + n.to(tl.int64) * SIZE + column
    inside = mask & passes
    before = tl.load(of_sequence, inside & taken, other=0.0)
    return before + tl.load(initial, inside & (n >= count), other=0.0)


@triton.jit
def read_x(
    table,
    row,
    column,
    mask,
    GATES: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Load W_ih x of rows."""
    kept = row - tl.load(table + KEPT)
    return read_gates(address(table, X, TYPE) + kept * (GATES * H), column, mask, GATES, H)


@triton.jit
def gate_inputs(
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
    CELL: tl.constexpr,
    KIND: tl.constexpr,
    INPUTS: tl.constexpr,
    SCOPE: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    STATS: tl.constexpr,
    TYPE: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Return what enters the gates: W_ih x and W_hh h, normalized; kept where there is room for them.

    Where inputs are summed the second four are not looked at; late, only the candidate of x and of h.
    """
    KEPT_ROWS: tl.constexpr = PRESENT >> int(SAVED_H) & 1
    KEPT_STATS: tl.constexpr = PRESENT >> int(SAVED_STATS) & 1
    kept = row - tl.load(table + KEPT)
    x0, x1, x2, x3 = in_float32(x0, x1, x2, x3)
    stats = None
    if KEPT_STATS:
        stats = address(table, SAVED_STATS, tl.float32) + kept * STATS
    if INPUTS == "separate":
        if GROUPS > 0:
            if KEPT_STATS:
                stats += GROUPS
            h0, h1, h2, h3 = normalized_gates(
                h0, h1, h2, h3, mask, eps, stats, there, CELL, KIND, SCOPE, GATES, H
            )
        if KEPT_ROWS:
            at_kept = address(table, SAVED_H, TYPE) + kept * (GATES * H)
            write_gates(at_kept, column, mask, h0, h1, h2, h3, GATES, H)
    else:
        if INPUTS == "summed":
            x0 += h0
            x1 += h1
            x2 += h2
            x3 += h3
            if GROUPS > 0:
                x0, x1, x2, x3 = normalized_gates(
                    x0, x1, x2, x3, mask, eps, stats, there, CELL, KIND, SCOPE, GATES, H
                )
        else:
            x0, x1, _, _ = normalized_gates(
                x0 + h0, x1 + h1, x0, x1, mask, eps, stats, there, CELL, KIND, SCOPE, 2, H
            )
            reset = sigmoid(gate_value(table, 0, x0, h0, column, INPUTS, H, TYPE, PRESENT))
            x2, _, _, _, rstd = normalized(
                tl.where(mask, x2 + reset * h2, 0.0), x2, x2, x2, mask, eps, H, 1, KIND == "layer"
            )
            if KEPT_STATS:
                tl.store(stats + GROUPS - 1, rstd, there)
            if KEPT_ROWS:
                at_kept = address(table, SAVED_H, TYPE) + kept * H
                tl.store(at_kept + column, h2.to(TYPE), mask)
        at_x = address(table, X, TYPE) + kept * (GATES * H)
        write_gates(at_x, column, mask, x0, x1, x2, x3, GATES, H)
    return x0, x1, x2, x3, h0, h1, h2, h3


@triton.jit
def kept_gates(
    table,
    row,
    column,
    mask,
    INPUTS: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Load what ``gate_inputs`` kept of these rows, and return it as that does, but in its own type."""
    x0, x1, x2, x3 = read_x(table, row, column, mask, GATES, H, TYPE)
    h0, h1, h2, h3 = x0, x1, x2, x3
    kept = row - tl.load(table + KEPT)
    if INPUTS == "separate":
        at_h = address(table, SAVED_H, TYPE) + kept * (GATES * H)
        h0, h1, h2, h3 = read_gates(at_h, column, mask, GATES, H)
    elif INPUTS == "late":
        h2 = tl.load(address(table, SAVED_H, TYPE) + kept * H + column, mask, other=0.0)
    return x0, x1, x2, x3, h0, h1, h2, h3


@triton.jit
def gate_value(
    table,
    WHICH: tl.constexpr,
    x,
    h,
    column,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Return a gate before its nonlinearity; for a GRU's candidate without what the reset gate multiplies."""
    gate = x * vector(table, GAIN_IH, WHICH, column, 1.0, H, TYPE, PRESENT)
    if INPUTS == "separate":
        gate += h * vector(table, GAIN_HH, WHICH, column, 1.0, H, TYPE, PRESENT)
    return gate + vector(table, BIAS, WHICH, column, 0.0, H, TYPE, PRESENT)


@triton.jit
def candidate_value(
    table,
    reset,
    x,
    h,
    column,
    INPUTS: tl.constexpr,
    RELU: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Return the candidate of a GRU, and what the reset gate multiplies in it."""
    a = x * vector(table, GAIN_IH, 2, column, 1.0, H, TYPE, PRESENT)
    a += vector(table, BIAS, 2, column, 0.0, H, TYPE, PRESENT)
    of_reset = a
    if INPUTS == "separate":
        of_reset = h * vector(table, GAIN_HH, 2, column, 1.0, H, TYPE, PRESENT)
        of_reset += vector(table, BIAS_HN, 0, column, 0.0, H, TYPE, PRESENT)
        a += reset * of_reset
    elif INPUTS == "summed":
        a *= reset
    return nonlinear(a, RELU), of_reset


@triton.jit
def next_cell(forget, before, entering, CLIP: tl.constexpr):
    """Return an LSTM's c, and what it is before it is held in [-CLIP, CLIP], unless that is 0."""
    free = forget * before + entering
    c = free
    if CLIP > 0.0:
        c = tl.where(c > CLIP, CLIP, tl.where(c < -CLIP, -CLIP, c))
    return c, free


@triton.jit
def normalized_cell(
    table,
    c,
    column,
    mask,
    cell_eps,
    KIND: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Return N(c), N(c) with gain and bias, and rstd."""
    n, _, _, _, rstd = normalized(c, c, c, c, mask, cell_eps, H, 1, KIND == "layer")
    gain = vector(table, GAIN_CELL, 0, column, 1.0, H, TYPE, PRESENT)
    return n, n * gain + vector(table, BIAS_CELL, 0, column, 0.0, H, TYPE, PRESENT), rstd
