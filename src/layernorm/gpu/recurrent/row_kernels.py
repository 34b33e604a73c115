"""What the Triton kernels of the recurrent layers share: where a row of a step is, what enters its gates.

A program takes one row of one step, all its gates in registers. A row of a step goes through

- ``step_product`` (``product_kernels``): W_hh h of all rows of the step, in float32;
- ``cell_forward`` (``forward_kernels``): norms, gates, cell and state.

Backward ``cell_backward`` (``backward_kernels``) takes the gradients of the gates, and through the
norm of W_hh h, and a product takes them to the step before. What no step waits for comes after a chunk of
steps, for all its rows at once.

The words are those of ``layernorm.variants``, but INPUTS is ``LayerSpec.products``: "late" for a GRU whose
candidate is summed after the reset; and without a norm "summed" or, for a GRU, "separate".
PRESENT has a bit for each slot of the table that holds a tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from layernorm.gpu.recurrent.gate_kernels import (
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
WH = slot("wh")
GAIN_IH = slot("gain_ih")
GAIN_HH = slot("gain_hh")
BIAS = slot("bias")
BIAS_HN = slot("bias_hn")
GAIN_CELL = slot("gain_cell")
BIAS_CELL = slot("bias_cell")
SAVED_H = slot("saved_h")
SAVED_STATS = slot("saved_stats")


@triton.jit
def vector(table, SLOT: tl.constexpr, PRESENT: tl.constexpr, TYPE: tl.constexpr, at, mask, absent):
    """Load a part of a gain or a bias in float32; ``absent`` where there is none."""
    if PRESENT >> int(SLOT) & 1:
        found = tl.load(address(table, SLOT, TYPE) + at, mask, other=0.0).to(tl.float32)
    else:
        found = tl.zeros(at.shape, tl.float32) + absent
    return found


@triton.jit
def row_of_step(table, step, batch, FROM_LAST: tl.constexpr, PACKED: tl.constexpr):
    """Find row n = program_id(0) of a step of the loop, number ``step`` + program_id(1).

    Returns n, the step t of the sequence, the row among those of all steps, and how many the step has.
    """
    n = tl.program_id(0)
    t = step_of_loop(table, step + tl.program_id(1), FROM_LAST)
    first, count = rows_of_step(table, t, batch, PACKED)
    return n, t, first + n, count


@triton.jit
def _neighbour(table, t, batch, PACKED: tl.constexpr):
    """Return first row and rows of step t; no rows where there is no such step."""
    inside = (t >= 0) & (t < tl.load(table + STEPS))
    first, count = rows_of_step(table, tl.where(inside, t, 0), batch, PACKED)
    return first, tl.where(inside, count, 0)


@triton.jit
def _no_reset(table, row, where, PRESENT: tl.constexpr):
    """Return whether this row is not reset; true where ``where`` is not."""
    found = row == row  # true
    if PRESENT >> int(RESETS) & 1:
        found = tl.load(address(table, RESETS, tl.uint8) + row, where, other=0) == 0
    return found


@triton.jit
def passes_on(table, t, n, row, batch, REVERSE: tl.constexpr, PACKED: tl.constexpr, PRESENT: tl.constexpr):
    """Return whether row n of step t passes something on to the next step: no reset parts them."""
    if REVERSE:
        passes = _no_reset(table, row, t > 0, PRESENT)
    else:
        first, count = _neighbour(table, t + 1, batch, PACKED)
        passes = _no_reset(table, first + n, n < count, PRESENT)
    return passes


@triton.jit
def started_from(
    table,
    t,
    n,
    row,
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
    """Load the state that row n of step t started from; zeros after a reset."""
    first, count = _neighbour(table, t + 1 if REVERSE else t - 1, batch, PACKED)
    taken = n < count
    if REVERSE:
        passes = _no_reset(table, first + n, taken, PRESENT)
    else:
        passes = _no_reset(table, row, n >= 0, PRESENT)
    of_sequence = address(table, SEQUENCE, TYPE) + (first + n) * SIZE + column
    initial = address(table, INITIAL, TYPE) + n.to(tl.int64) * SIZE + column
    inside = mask & passes
    before = tl.load(of_sequence, inside & taken, other=0.0)
    return before + tl.load(initial, inside & (n >= count), other=0.0)


@triton.jit
def gate_inputs(
    table,
    n,
    row,
    wh_row,
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
    """Return what enters the gates: x and W_hh h, normalized; kept where there is room for them.

    Where inputs are summed the second four are not looked at; late, only the candidate of x and of h.
    """
    KEPT_ROWS: tl.constexpr = PRESENT >> int(SAVED_H) & 1
    KEPT_STATS: tl.constexpr = PRESENT >> int(SAVED_STATS) & 1
    kept = row - tl.load(table + KEPT)
    at_x = address(table, X, TYPE) + kept * (GATES * H)
    x0, x1, x2, x3 = read_gates(at_x, column, mask, GATES, H)
    at_h = address(table, WH, tl.float32) + wh_row * (GATES * H)
    h0, h1, h2, h3 = read_gates(at_h, column, mask, GATES, H)
    stats = None
    if KEPT_STATS:
        stats = address(table, SAVED_STATS, tl.float32) + kept * STATS
    if INPUTS == "separate":
        if GROUPS > 0:
            if KEPT_STATS:
                stats += GROUPS
            h0, h1, h2, h3 = normalized_gates(h0, h1, h2, h3, mask, eps, stats, CELL, KIND, SCOPE, GATES, H)
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
                    x0, x1, x2, x3, mask, eps, stats, CELL, KIND, SCOPE, GATES, H
                )
        else:
            x0, x1, _, _ = normalized_gates(
                x0 + h0, x1 + h1, x0, x1, mask, eps, stats, CELL, KIND, SCOPE, 2, H
            )
            gain = vector(table, GAIN_IH, PRESENT, TYPE, column, mask, 1.0)
            reset = sigmoid(x0 * gain + vector(table, BIAS, PRESENT, TYPE, column, mask, 0.0))
            x2, _, _, _, rstd = normalized(
                tl.where(mask, x2 + reset * h2, 0.0), x2, x2, x2, mask, eps, H, 1, KIND == "layer"
            )
            if KEPT_STATS:
                tl.store(stats + GROUPS - 1, rstd)
            if KEPT_ROWS:
                at_kept = address(table, SAVED_H, TYPE) + kept * H
                tl.store(at_kept + column, h2.to(TYPE), mask)
        write_gates(at_x, column, mask, x0, x1, x2, x3, GATES, H)
    return x0, x1, x2, x3, h0, h1, h2, h3


@triton.jit
def kept_gates(
    table,
    kept,
    column,
    mask,
    INPUTS: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Load what ``gate_inputs`` kept in this row, and return it as that does."""
    at_x = address(table, X, TYPE) + kept * (GATES * H)
    x0, x1, x2, x3 = read_gates(at_x, column, mask, GATES, H)
    h0, h1, h2, h3 = x0, x1, x2, x3
    if INPUTS == "separate":
        at_h = address(table, SAVED_H, TYPE) + kept * (GATES * H)
        h0, h1, h2, h3 = read_gates(at_h, column, mask, GATES, H)
    elif INPUTS == "late":
        h2 = tl.load(address(table, SAVED_H, TYPE) + kept * H + column, mask, other=0.0).to(tl.float32)
    return x0, x1, x2, x3, h0, h1, h2, h3


@triton.jit
def gate_value(
    table,
    which: tl.constexpr,
    x,
    h,
    column,
    mask,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Return a gate before its nonlinearity; for a GRU's candidate without what the reset gate multiplies."""
    at = which * H + column
    gate = x * vector(table, GAIN_IH, PRESENT, TYPE, at, mask, 1.0)
    if INPUTS == "separate":
        gate += h * vector(table, GAIN_HH, PRESENT, TYPE, at, mask, 1.0)
    return gate + vector(table, BIAS, PRESENT, TYPE, at, mask, 0.0)


@triton.jit
def candidate_value(
    table,
    reset,
    x,
    h,
    column,
    mask,
    INPUTS: tl.constexpr,
    RELU: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Return the candidate of a GRU, and what the reset gate multiplies in it."""
    at = 2 * H + column
    a = x * vector(table, GAIN_IH, PRESENT, TYPE, at, mask, 1.0)
    a += vector(table, BIAS, PRESENT, TYPE, at, mask, 0.0)
    of_reset = a
    if INPUTS == "separate":
        of_reset = h * vector(table, GAIN_HH, PRESENT, TYPE, at, mask, 1.0)
        of_reset += vector(table, BIAS_HN, PRESENT, TYPE, column, mask, 0.0)
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
    gain = vector(table, GAIN_CELL, PRESENT, TYPE, column, mask, 1.0)
    return n, n * gain + vector(table, BIAS_CELL, PRESENT, TYPE, column, mask, 0.0), rstd
