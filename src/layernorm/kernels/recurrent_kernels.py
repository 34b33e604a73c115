"""The Triton kernels of the recurrent layers: a step's rows forward and backward, and what surrounds it.

A program takes one row of one step, all its gates in registers. A row of a step goes through

- ``step_product`` (``product_kernels``): W_hh h of all rows of the step, in float32;
- ``cell_forward``: norms, gates, cell and state.

Backward ``cell_backward`` takes the gradients of the gates, and through the norm of W_hh h, and a product
takes them to the step before. What no step waits for comes after a chunk of steps, for all its rows at once.

The words are those of ``layernorm.variants``; INPUTS has a third value beside them, "late", for a GRU whose
candidate is summed after the reset, and says "summed" or, for a GRU, "separate" where there is no norm.
PRESENT has a bit for each slot of the table that holds a tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from layernorm.kernels.gate_kernels import (
    normalized,
    normalized_gates,
    read_gates,
    sigmoid,
    tanh,
    through_norm,
    through_norms,
    write_gates,
)
from layernorm.kernels.table_kernels import BASE, DONE, KEPT, STEPS, address, has, rows_of_step, slot

RESETS = slot("resets")
X = slot("x")
WH = slot("wh")
STATE_H = slot("h")
STATE_C = slot("c")
GAIN_IH = slot("gain_ih")
GAIN_HH = slot("gain_hh")
BIAS = slot("bias")
BIAS_HN = slot("bias_hn")
GAIN_CELL = slot("gain_cell")
BIAS_CELL = slot("bias_cell")
HIDDEN = slot("hidden")
OUTPUT = slot("output")
SAVED_H = slot("saved_h")
SAVED_C = slot("saved_c")
SAVED_STATS = slot("saved_stats")
H0 = slot("h0")
C0 = slot("c0")
GRAD_OUTPUT = slot("grad_output")
GRAD_H = slot("grad_h")
GRAD_C = slot("grad_c")
GRAD_HIDDEN = slot("grad_hidden")
GRAD_STATE = slot("grad_state")
GRAD_GATES = slot("grad_gates")
GRAD_WH = slot("grad_wh")
GRAD_OWN = slot("grad_own")
GRAD_CELL = slot("grad_cell")
CELL_N = slot("cell")
H_BEFORE = slot("h_before")
CELL_STATS = slot("cell_stats")


@triton.jit
def _vector(table, SLOT: tl.constexpr, PRESENT: tl.constexpr, TYPE: tl.constexpr, at, mask, absent):
    """A part of a gain or a bias in float32; ``absent`` where there is none."""
    if has(PRESENT, SLOT):
        found = tl.load(address(table, SLOT, TYPE) + at, mask, other=0.0).to(tl.float32)
    else:
        found = tl.zeros(at.shape, tl.float32) + absent
    return found


@triton.jit
def _step(table, step, FROM_LAST: tl.constexpr):
    """The step of the sequence that number ``step`` of the loop is."""
    done = tl.load(table + DONE) + step
    return tl.load(table + STEPS) - 1 - done if FROM_LAST else done


@triton.jit
def _neighbour(table, t, batch, PACKED: tl.constexpr):
    """First row and rows of step t; no rows where there is no such step."""
    inside = (t >= 0) & (t < tl.load(table + STEPS))
    first, count = rows_of_step(table, tl.where(inside, t, 0), batch, PACKED)
    return first, tl.where(inside, count, 0)


@triton.jit
def _no_reset(table, row, where, PRESENT: tl.constexpr):
    """Whether this row is not reset; true where ``where`` is not."""
    found = row == row  # true
    if has(PRESENT, RESETS):
        found = tl.load(address(table, RESETS, tl.uint8) + row, where, other=0) == 0
    return found


@triton.jit
def _passes(table, t, n, row, batch, REVERSE: tl.constexpr, PACKED: tl.constexpr, PRESENT: tl.constexpr):
    """Whether row n of step t passes something on to the step after it in the loop: no reset parts them."""
    if REVERSE:
        passes = _no_reset(table, row, t > 0, PRESENT)
    else:
        first, count = _neighbour(table, t + 1, batch, PACKED)
        passes = _no_reset(table, first + n, n < count, PRESENT)
    return passes


@triton.jit
def _before(
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
    """What row n of step t started from: of the step before in the loop, or initial; zeros after a reset."""
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
def _met(
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
    """What meets at the gates: x and W_hh h, normalized; kept where there is room for them.

    Where inputs are summed the second four are not looked at; late, only the candidate of x and of h.
    """
    KEPT_ROWS: tl.constexpr = has(PRESENT, SAVED_H)
    KEPT_STATS: tl.constexpr = has(PRESENT, SAVED_STATS)
    kept = row - tl.load(table + KEPT)
    at_x = address(table, X, TYPE) + kept * (GATES * H)
    x0, x1, x2, x3 = read_gates(at_x, column, mask, GATES, H)
    at_h = address(table, WH, tl.float32) + wh_row * (GATES * H)
    h0, h1, h2, h3 = read_gates(at_h, column, mask, GATES, H)
    stats = None
    if KEPT_STATS:
        stats = address(table, SAVED_STATS, tl.float32) + kept * STATS
    if INPUTS == "separate":
        if KIND != "none":
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
            if KIND != "none":
                x0, x1, x2, x3 = normalized_gates(
                    x0, x1, x2, x3, mask, eps, stats, CELL, KIND, SCOPE, GATES, H
                )
        else:
            x0, x1, _, _ = normalized_gates(
                x0 + h0, x1 + h1, x0, x1, mask, eps, stats, CELL, KIND, SCOPE, 2, H
            )
            gain = _vector(table, GAIN_IH, PRESENT, TYPE, column, mask, 1.0)
            reset = sigmoid(x0 * gain + _vector(table, BIAS, PRESENT, TYPE, column, mask, 0.0))
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
def _gate(
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
    """A gate before its nonlinearity; the candidate of a GRU without what the reset gate multiplies."""
    at = which * H + column
    gate = x * _vector(table, GAIN_IH, PRESENT, TYPE, at, mask, 1.0)
    if INPUTS == "separate":
        gate += h * _vector(table, GAIN_HH, PRESENT, TYPE, at, mask, 1.0)
    return gate + _vector(table, BIAS, PRESENT, TYPE, at, mask, 0.0)


@triton.jit
def _candidate(
    table,
    reset,
    x,
    h,
    column,
    mask,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """The candidate of a GRU, and what the reset gate multiplies in it."""
    at = 2 * H + column
    a = x * _vector(table, GAIN_IH, PRESENT, TYPE, at, mask, 1.0)
    a += _vector(table, BIAS, PRESENT, TYPE, at, mask, 0.0)
    of_reset = a
    if INPUTS == "separate":
        of_reset = h * _vector(table, GAIN_HH, PRESENT, TYPE, at, mask, 1.0)
        of_reset += _vector(table, BIAS_HN, PRESENT, TYPE, column, mask, 0.0)
        a += reset * of_reset
    elif INPUTS == "summed":
        a *= reset
    return tanh(a), of_reset


@triton.jit
def _cell_norm(
    table,
    c,
    column,
    mask,
    eps,
    KIND: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """N(c), with gain and bias, and rstd."""
    n, _, _, _, rstd = normalized(c, c, c, c, mask, eps, H, 1, KIND == "layer")
    gain = _vector(table, GAIN_CELL, PRESENT, TYPE, column, mask, 1.0)
    return n, n * gain + _vector(table, BIAS_CELL, PRESENT, TYPE, column, mask, 0.0), rstd


@triton.jit(do_not_specialize=["step", "batch"])
def cell_forward(
    table,
    step,
    batch,
    eps,
    CELL: tl.constexpr,
    KIND: tl.constexpr,
    INPUTS: tl.constexpr,
    SCOPE: tl.constexpr,
    CELL_NORM: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    STATS: tl.constexpr,
    TYPE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PROJECTED: tl.constexpr,
    PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row program_id(0) of a step: from W_hh h to the new state."""
    n = tl.program_id(0)
    t = _step(table, step, REVERSE)
    first, count = rows_of_step(table, t, batch, PACKED)
    if n >= count:
        return
    row = first + n
    column = tl.arange(0, BLOCK)
    mask = column < H
    x0, x1, x2, x3, h0, h1, h2, h3 = _met(
        table, n, row, n, column, mask, eps, CELL, KIND, INPUTS, SCOPE, GATES, H, GROUPS, STATS, TYPE, PRESENT
    )
    passes = _passes(table, t, n, row, batch, REVERSE, PACKED, PRESENT)
    first_gate = _gate(table, 0, x0, h0, column, mask, INPUTS, H, TYPE, PRESENT)
    at_state = n.to(tl.int64) * H + column
    if CELL == "lstm":
        forget = sigmoid(_gate(table, 1, x1, h1, column, mask, INPUTS, H, TYPE, PRESENT))
        candidate = tanh(_gate(table, 2, x2, h2, column, mask, INPUTS, H, TYPE, PRESENT))
        output_gate = sigmoid(_gate(table, 3, x3, h3, column, mask, INPUTS, H, TYPE, PRESENT))
        state = address(table, STATE_C, TYPE) + at_state
        c = forget * tl.load(state, mask, other=0.0).to(tl.float32) + sigmoid(first_gate) * candidate
        c = tl.where(mask, c.to(TYPE).to(tl.float32), 0.0)
        seen = c
        if CELL_NORM != "none":
            _, seen, _ = _cell_norm(table, c, column, mask, eps, KIND, H, TYPE, PRESENT)
            if CELL_NORM == "carried":
                seen = seen.to(TYPE).to(tl.float32)
                c = seen
        tl.store(address(table, SAVED_C, TYPE) + row * H + column, c.to(TYPE), mask)
        tl.store(state, tl.where(passes, c, 0.0).to(TYPE), mask)
        h = output_gate * tanh(seen)
    elif CELL == "gru":
        reset = sigmoid(first_gate)
        update = sigmoid(_gate(table, 1, x1, h1, column, mask, INPUTS, H, TYPE, PRESENT))
        candidate, _ = _candidate(table, reset, x2, h2, column, mask, INPUTS, H, TYPE, PRESENT)
        before = tl.load(address(table, STATE_H, TYPE) + at_state, mask, other=0.0).to(tl.float32)
        h = (1.0 - update) * candidate + update * before
    elif CELL == "rnn_tanh":
        h = tanh(first_gate)
    else:
        # maximum() would turn NaN into zero.
        h = tl.where(first_gate < 0.0, 0.0, first_gate)
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
    PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """After the product with W_hr: the new h to the output, and zeros in its place after a reset."""
    n = tl.program_id(0)
    t = _step(table, step, REVERSE)
    first, count = rows_of_step(table, t, batch, PACKED)
    if n >= count:
        return
    row = first + n
    column = tl.arange(0, BLOCK)
    mask = column < P
    state = address(table, STATE_H, TYPE) + n.to(tl.int64) * P + column
    h = tl.load(state, mask, other=0.0)
    tl.store(address(table, OUTPUT, TYPE) + row * P + column, h, mask)
    passes = _passes(table, t, n, row, batch, REVERSE, PACKED, PRESENT)
    tl.store(state, tl.where(passes, h, tl.zeros(h.shape, TYPE)), mask)


@triton.jit(do_not_specialize=["step", "batch"])
def meet_again(
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
    """For a chunk of steps (program_id(1)) what forward had at the gates, where it kept nothing."""
    n = tl.program_id(0)
    t = _step(table, step + tl.program_id(1), REVERSE == 0)
    first, count = rows_of_step(table, t, batch, PACKED)
    if n >= count:
        return
    row = first + n
    column = tl.arange(0, BLOCK)
    wh_row = row - tl.load(table + BASE)
    _met(
        table,
        n,
        row,
        wh_row,
        column,
        column < H,
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


@triton.jit(do_not_specialize=["step", "batch"])
def gather_before(
    table,
    step,
    batch,
    P: tl.constexpr,
    TYPE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For a chunk of steps (program_id(1)) the h that each row started from."""
    n = tl.program_id(0)
    t = _step(table, step + tl.program_id(1), REVERSE == 0)
    first, count = rows_of_step(table, t, batch, PACKED)
    if n >= count:
        return
    row = first + n
    column = tl.arange(0, BLOCK)
    mask = column < P
    h = _before(table, t, n, row, batch, column, mask, OUTPUT, H0, P, TYPE, REVERSE, PACKED, PRESENT)
    to = address(table, H_BEFORE, TYPE) + (row - tl.load(table + BASE)) * P + column
    tl.store(to, h, mask)


@triton.jit(do_not_specialize=["step", "batch"])
def cell_statistics(
    table,
    step,
    batch,
    eps,
    CELL: tl.constexpr,
    KIND: tl.constexpr,
    INPUTS: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For a chunk of steps (program_id(1)) mean and rstd of an LSTM's cell, before its norm."""
    n = tl.program_id(0)
    t = _step(table, step + tl.program_id(1), REVERSE == 0)
    first, count = rows_of_step(table, t, batch, PACKED)
    if n >= count:
        return
    row = first + n
    column = tl.arange(0, BLOCK)
    mask = column < H
    kept = row - tl.load(table + KEPT)
    x0, x1, x2, _ = read_gates(address(table, X, TYPE) + kept * (GATES * H), column, mask, GATES, H)
    h0, h1, h2 = x0, x1, x2
    if INPUTS == "separate":
        h0, h1, h2, _ = read_gates(address(table, SAVED_H, TYPE) + kept * (GATES * H), column, mask, GATES, H)
    i = sigmoid(_gate(table, 0, x0, h0, column, mask, INPUTS, H, TYPE, PRESENT))
    f = sigmoid(_gate(table, 1, x1, h1, column, mask, INPUTS, H, TYPE, PRESENT))
    g = tanh(_gate(table, 2, x2, h2, column, mask, INPUTS, H, TYPE, PRESENT))
    before = _before(table, t, n, row, batch, column, mask, SAVED_C, C0, H, TYPE, REVERSE, PACKED, PRESENT)
    c = tl.where(mask, (f * before.to(tl.float32) + i * g).to(TYPE).to(tl.float32), 0.0)
    _, _, _, _, rstd = normalized(c, c, c, c, mask, eps, H, 1, KIND == "layer")
    to = address(table, CELL_STATS, tl.float32) + (row - tl.load(table + BASE)) * 2
    mean = tl.zeros([], tl.float32)
    if KIND == "layer":
        mean = tl.sum(c, 0) / H
    tl.store(to, mean)
    tl.store(to + 1, rstd)


@triton.jit(do_not_specialize=["step", "batch"])
def projected_backward(
    table,
    step,
    batch,
    P: tl.constexpr,
    TYPE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Before the product with W_hrᵀ: the gradient of h, from the step after and from the output."""
    n = tl.program_id(0)
    t = _step(table, step, REVERSE == 0)
    first, count = rows_of_step(table, t, batch, PACKED)
    if n >= count:
        return
    row = first + n
    column = tl.arange(0, BLOCK)
    mask = column < P
    passed = mask & _passes(table, t, n, row, batch, REVERSE, PACKED, PRESENT)
    grad = tl.load(address(table, GRAD_H, tl.float32) + n.to(tl.int64) * P + column, passed, other=0.0)
    if has(PRESENT, GRAD_OUTPUT):
        grad += tl.load(address(table, GRAD_OUTPUT, TYPE) + row * P + column, mask, other=0.0).to(tl.float32)
    to = address(table, GRAD_STATE, TYPE) + (row - tl.load(table + BASE)) * P + column
    tl.store(to, grad.to(TYPE), mask)


@triton.jit(do_not_specialize=["step", "batch"])
def cell_backward(
    table,
    step,
    batch,
    eps,
    CELL: tl.constexpr,
    KIND: tl.constexpr,
    INPUTS: tl.constexpr,
    SCOPE: tl.constexpr,
    CELL_NORM: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    STATS: tl.constexpr,
    TYPE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PROJECTED: tl.constexpr,
    PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row program_id(0) of a step: from the gradient of its state to those of its gates and of W_hh h."""
    n = tl.program_id(0)
    t = _step(table, step, REVERSE == 0)
    first, count = rows_of_step(table, t, batch, PACKED)
    if n >= count:
        return
    row = first + n
    column = tl.arange(0, BLOCK)
    mask = column < H
    kept = row - tl.load(table + KEPT)
    local = row - tl.load(table + BASE)
    at_state = n.to(tl.int64) * H + column
    passed = mask & _passes(table, t, n, row, batch, REVERSE, PACKED, PRESENT)

    x0, x1, x2, x3 = read_gates(address(table, X, TYPE) + kept * (GATES * H), column, mask, GATES, H)
    h0, h1, h2, h3 = x0, x1, x2, x3
    if INPUTS == "separate":
        h0, h1, h2, h3 = read_gates(
            address(table, SAVED_H, TYPE) + kept * (GATES * H), column, mask, GATES, H
        )
    elif INPUTS == "late":
        h2 = tl.load(address(table, SAVED_H, TYPE) + kept * H + column, mask, other=0.0).to(tl.float32)
    if PROJECTED:
        grad = tl.load(address(table, GRAD_HIDDEN, tl.float32) + at_state, mask, other=0.0)
    else:
        grad = tl.load(address(table, GRAD_H, tl.float32) + at_state, passed, other=0.0)
        if has(PRESENT, GRAD_OUTPUT):
            of_output = address(table, GRAD_OUTPUT, TYPE) + row * H + column
            grad += tl.load(of_output, mask, other=0.0).to(tl.float32)

    first_gate = _gate(table, 0, x0, h0, column, mask, INPUTS, H, TYPE, PRESENT)
    d1, d2, d3 = grad, grad, grad
    if CELL == "lstm":
        i = sigmoid(first_gate)
        f = sigmoid(_gate(table, 1, x1, h1, column, mask, INPUTS, H, TYPE, PRESENT))
        g = tanh(_gate(table, 2, x2, h2, column, mask, INPUTS, H, TYPE, PRESENT))
        o = sigmoid(_gate(table, 3, x3, h3, column, mask, INPUTS, H, TYPE, PRESENT))
        before = _before(
            table, t, n, row, batch, column, mask, SAVED_C, C0, H, TYPE, REVERSE, PACKED, PRESENT
        ).to(tl.float32)
        c = tl.where(mask, (f * before + i * g).to(TYPE).to(tl.float32), 0.0)
        state = address(table, GRAD_C, tl.float32) + at_state
        of_c = tl.load(state, passed, other=0.0)
        seen, cell, rstd = c, c, grad
        if CELL_NORM != "none":
            cell, seen, rstd = _cell_norm(table, c, column, mask, eps, KIND, H, TYPE, PRESENT)
            if CELL_NORM == "carried":
                seen = seen.to(TYPE).to(tl.float32)
        shown = tanh(seen)
        if PROJECTED:
            tl.store(address(table, HIDDEN, TYPE) + local * H + column, (o * shown).to(TYPE), mask)
        d3 = grad * shown * o * (1.0 - o)
        d = grad * o * (1.0 - shown * shown)
        if CELL_NORM == "output":
            pass
        else:
            d += of_c
        if CELL_NORM != "none":
            tl.store(address(table, GRAD_CELL, TYPE) + local * H + column, d.to(TYPE), mask)
            tl.store(address(table, CELL_N, TYPE) + local * H + column, cell.to(TYPE), mask)
            d = tl.where(mask, d * _vector(table, GAIN_CELL, PRESENT, TYPE, column, mask, 1.0), 0.0)
            d, _, _, _ = through_norm(d, d, d, d, cell, cell, cell, cell, rstd, mask, H, 1, KIND == "layer")
            if CELL_NORM == "output":
                d += of_c
        tl.store(state, d * f, mask)
        d0 = d * g * i * (1.0 - i)
        d1 = d * before * f * (1.0 - f)
        d2 = d * i * (1.0 - g * g)
    elif CELL == "gru":
        r = sigmoid(first_gate)
        z = sigmoid(_gate(table, 1, x1, h1, column, mask, INPUTS, H, TYPE, PRESENT))
        candidate, of_reset = _candidate(table, r, x2, h2, column, mask, INPUTS, H, TYPE, PRESENT)
        before = tl.load(address(table, H_BEFORE, TYPE) + local * H + column, mask, other=0.0).to(tl.float32)
        tl.store(address(table, GRAD_H, tl.float32) + at_state, grad * z, mask)
        d1 = grad * (before - candidate) * z * (1.0 - z)
        d2 = grad * (1.0 - z) * (1.0 - candidate * candidate)
        if INPUTS == "late":
            d0 = d2  # found below, inside of the candidate's norm
        else:
            d0 = d2 * of_reset * r * (1.0 - r)
            if INPUTS == "summed":
                d2 *= r
    elif CELL == "rnn_tanh":
        a = tanh(first_gate)
        d0 = grad * (1.0 - a * a)
    else:
        d0 = tl.where(first_gate <= 0.0, 0.0, grad)

    d0 = tl.where(mask, d0, 0.0)
    d1 = tl.where(mask, d1, 0.0)
    d2 = tl.where(mask, d2, 0.0)
    d3 = tl.where(mask, d3, 0.0)
    own = address(table, GRAD_OWN, TYPE) + local * H + column
    stats = address(table, SAVED_STATS, tl.float32) + kept * STATS
    of_x = d2  # late: of the candidate's x
    if INPUTS == "late":
        gain = _vector(table, GAIN_IH, PRESENT, TYPE, 2 * H + column, mask, 1.0)
        rstd = tl.load(stats + GROUPS - 1)
        of_x, _, _, _ = through_norm(d2 * gain, d2, d2, d2, x2, x2, x2, x2, rstd, mask, H, 1, KIND == "layer")
        d0 = of_x * h2 * r * (1.0 - r)
        tl.store(own, of_x.to(TYPE), mask)
    to = address(table, GRAD_GATES, TYPE) + local * (GATES * H)
    write_gates(to, column, mask, d0, d1, d2, d3, GATES, H)

    if CELL == "gru" and INPUTS == "separate":
        d2 *= r  # the candidate's part of h has a gradient of its own
        tl.store(own, d2.to(TYPE), mask)
    if KIND != "none":
        GAIN: tl.constexpr = GAIN_HH if INPUTS == "separate" else GAIN_IH
        d0 *= _vector(table, GAIN, PRESENT, TYPE, column, mask, 1.0)
        if GATES > 1:
            d1 *= _vector(table, GAIN, PRESENT, TYPE, H + column, mask, 1.0)
        if GATES > 2:
            d2 *= _vector(table, GAIN, PRESENT, TYPE, 2 * H + column, mask, 1.0)
        if GATES > 3:
            d3 *= _vector(table, GAIN, PRESENT, TYPE, 3 * H + column, mask, 1.0)
        if INPUTS == "separate":
            d0, d1, d2, d3 = through_norms(
                d0, d1, d2, d3, h0, h1, h2, h3, stats + GROUPS, mask, CELL, KIND, SCOPE, GATES, H
            )
        elif INPUTS == "summed":
            d0, d1, d2, d3 = through_norms(
                d0, d1, d2, d3, x0, x1, x2, x3, stats, mask, CELL, KIND, SCOPE, GATES, H
            )
        else:
            d0, d1, _, _ = through_norms(d0, d1, d0, d1, x0, x1, x0, x1, stats, mask, CELL, KIND, SCOPE, 2, H)
            d2 = of_x * r
    write_gates(address(table, GRAD_WH, TYPE) + local * (GATES * H), column, mask, d0, d1, d2, d3, GATES, H)


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
    """W_ih x of one row, normalized in place; rstd of its groups to ``stats``, unless that is None."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < H
    at = x + row * (GATES * H)
    a, b, c, d = read_gates(at, column, mask, GATES, H)
    if stats is not None:
        stats += row * STATS
    a, b, c, d = normalized_gates(a, b, c, d, mask, eps, stats, CELL, KIND, SCOPE, GATES, H)
    write_gates(at, column, mask, a, b, c, d, GATES, H)


@triton.jit
def rows_backward(
    grad,
    x,
    stats,
    gain,
    CELL: tl.constexpr,
    KIND: tl.constexpr,
    SCOPE: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place of the gates' gradients those of W_ih x, through the norm of ``normalize_rows``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < H
    at = grad + row * (GATES * H)
    a, b, c, d = read_gates(at, column, mask, GATES, H)
    p, q, r, s = read_gates(x + row * (GATES * H), column, mask, GATES, H)
    if gain is not None:
        u, v, w, y = read_gates(gain, column, mask, GATES, H)
        a, b, c, d = a * u, b * v, c * w, d * y
    a, b, c, d = through_norms(a, b, c, d, p, q, r, s, stats + row * STATS, mask, CELL, KIND, SCOPE, GATES, H)
    write_gates(at, column, mask, a, b, c, d, GATES, H)


@triton.jit(do_not_specialize=["rows", "rows_per_part"])
def column_sums(
    grad,
    first,
    second,
    sums,
    first_sums,
    second_sums,
    rows,
    rows_per_part,
    WIDTH: tl.constexpr,
    FIRST_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a part of the rows (program_id(1)): Σ grad, Σ grad·first and Σ grad·second of each column.

    grad, first and second are (rows, WIDTH), rows of the first FIRST_STRIDE apart; sums (parts, WIDTH) in
    float32, or None.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_width = column < WIDTH
    part = tl.program_id(1)
    begin = part.to(tl.int64) * rows_per_part
    end = tl.minimum(begin + rows_per_part, rows)
    total = tl.zeros([BLOCK], tl.float32)
    of_first = tl.zeros([BLOCK], tl.float32)
    of_second = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & in_width[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        g = tl.load(grad + at, mask, other=0.0).to(tl.float32)
        if sums is not None:
            total += tl.sum(g, 0)
        if first_sums is not None:
            at_first = first + row[:, None] * FIRST_STRIDE + column[None, :]
            of_first += tl.sum(g * tl.load(at_first, mask, other=0.0).to(tl.float32), 0)
        if second_sums is not None:
            of_second += tl.sum(g * tl.load(second + at, mask, other=0.0).to(tl.float32), 0)
    to = part * WIDTH + column
    if sums is not None:
        tl.store(sums + to, total, in_width)
    if first_sums is not None:
        tl.store(first_sums + to, of_first, in_width)
    if second_sums is not None:
        tl.store(second_sums + to, of_second, in_width)
