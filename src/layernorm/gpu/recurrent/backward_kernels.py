"""The Triton kernels of the recurrent layers' backward; ``row_kernels`` tells the whole."""

from __future__ import annotations

import triton
import triton.language as tl

from layernorm.gpu.recurrent.gate_kernels import (
    in_float32,
    nonlinear,
    normalized,
    read_gates,
    sigmoid,
    tanh,
    through_nonlinear,
    through_norm,
    through_norms,
    write_gates,
)
from layernorm.gpu.recurrent.row_kernels import (
    candidate_value,
    gate_value,
    kept_gates,
    next_cell,
    normalized_cell,
    passes_on,
    row_of_step,
    rows_of_program,
    started_from,
    vector,
)
from layernorm.gpu.recurrent.table_kernels import BASE, KEPT, address, await_kernel, slot

GAIN_IH = slot("gain_ih")
GAIN_HH = slot("gain_hh")
GAIN_CELL = slot("gain_cell")
HIDDEN = slot("hidden")
OUTPUT = slot("output")
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
    """Gather the h that each row started from, for a chunk of steps (program_id(1))."""
    n, t, row, there = row_of_step(table, step, batch, REVERSE == 0, PACKED)
    if not there:
        return
    column = tl.arange(0, BLOCK)[:, None]
    mask = column < P
    h = started_from(
        table, t, n, row, there, batch, column, mask, OUTPUT, H0, P, TYPE, REVERSE, PACKED, PRESENT
    )
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
    """Compute mean and rstd of an LSTM's cell before its norm, for a chunk of steps (program_id(1))."""
    n, t, row, there = row_of_step(table, step, batch, REVERSE == 0, PACKED)
    if not there:
        return
    column = tl.arange(0, BLOCK)[:, None]
    mask = column < H
    x0, x1, x2, x3, h0, h1, h2, h3 = kept_gates(table, row, column, mask, INPUTS, GATES, H, TYPE)
    x0, x1, x2, _ = in_float32(x0, x1, x2, x3)
    h0, h1, h2, _ = in_float32(h0, h1, h2, h3)
    i = sigmoid(gate_value(table, 0, x0, h0, column, INPUTS, H, TYPE, PRESENT))
    f = sigmoid(gate_value(table, 1, x1, h1, column, INPUTS, H, TYPE, PRESENT))
    g = tanh(gate_value(table, 2, x2, h2, column, INPUTS, H, TYPE, PRESENT))
    before = started_from(
        table, t, n, row, there, batch, column, mask, SAVED_C, C0, H, TYPE, REVERSE, PACKED, PRESENT
    )
    c = tl.where(mask, (f * before.to(tl.float32) + i * g).to(TYPE).to(tl.float32), 0.0)
    _, _, _, _, rstd = normalized(c, c, c, c, mask, eps, H, 1, KIND == "layer")
    to = address(table, CELL_STATS, tl.float32) + (row - tl.load(table + BASE)) * 2
    mean = tl.zeros(n.shape, tl.float32)
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
    DEPENDENT: tl.constexpr,
    PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the gradient of h before the product with W_hrᵀ, from the step after and from the output."""
    n, t, row, there = row_of_step(table, step, batch, REVERSE == 0, PACKED)
    if not there:
        return
    column = tl.arange(0, BLOCK)[:, None]
    mask = column < P
    passed = mask & passes_on(table, t, n, row, there, batch, REVERSE, PACKED, PRESENT)
    await_kernel(DEPENDENT)
    grad = tl.load(address(table, GRAD_H, tl.float32) + n.to(tl.int64) * P + column, passed, other=0.0)
    if PRESENT >> int(GRAD_OUTPUT) & 1:
        grad += tl.load(address(table, GRAD_OUTPUT, TYPE) + row * P + column, mask, other=0.0).to(tl.float32)
    to = address(table, GRAD_STATE, TYPE) + (row - tl.load(table + BASE)) * P + column
    tl.store(to, grad.to(TYPE), mask)


@triton.jit
def _through_lstm_cell(
    table,
    o,
    c,
    grad,
    of_c,
    at,
    column,
    mask,
    cell_eps,
    KIND: tl.constexpr,
    CELL_NORM: tl.constexpr,
    RELU: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    PROJECTED: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Return the gradients of an LSTM's c before its norm, and of its output gate before the sigmoid.

    ``grad`` is that of h, ``of_c`` that of c from the step after; ``at`` is where the chunk has this row.
    """
    seen, cell, rstd = c, c, grad
    if CELL_NORM != "none":
        cell, seen, rstd = normalized_cell(table, c, column, mask, cell_eps, KIND, H, TYPE, PRESENT)
        if CELL_NORM == "carried":
            seen = seen.to(TYPE).to(tl.float32)
    shown = nonlinear(seen, RELU)
    if PROJECTED:
        tl.store(address(table, HIDDEN, TYPE) + at, (o * shown).to(TYPE), mask)
    d = through_nonlinear(grad * o, shown, RELU)
    if CELL_NORM != "output":
        d += of_c
    if CELL_NORM != "none":
        tl.store(address(table, GRAD_CELL, TYPE) + at, d.to(TYPE), mask)
        tl.store(address(table, CELL_N, TYPE) + at, cell.to(TYPE), mask)
        d = tl.where(mask, d * vector(table, GAIN_CELL, 0, column, 1.0, H, TYPE, PRESENT), 0.0)
        d, _, _, _ = through_norm(d, d, d, d, cell, cell, cell, cell, rstd, mask, H, 1, KIND == "layer")
        if CELL_NORM == "output":
            d += of_c
    return d, grad * shown * o * (1.0 - o)


@triton.jit
def read_kept(
    table,
    t,
    n,
    row,
    there,
    batch,
    column,
    mask,
    CELL: tl.constexpr,
    INPUTS: tl.constexpr,
    GATES: tl.constexpr,
    H: tl.constexpr,
    TYPE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PROJECTED: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Load in their own type what entered the gates of rows, c or h before them, and grad_output."""
    x0, x1, x2, x3, h0, h1, h2, h3 = kept_gates(table, row, column, mask, INPUTS, GATES, H, TYPE)
    before, seed = x0, x0
    if CELL == "lstm":
        before = started_from(
            table, t, n, row, there, batch, column, mask, SAVED_C, C0, H, TYPE, REVERSE, PACKED, PRESENT
        )
    elif CELL == "gru":
        local = row - tl.load(table + BASE)
        before = tl.load(address(table, H_BEFORE, TYPE) + local * H + column, mask, other=0.0)
    if not PROJECTED and PRESENT >> int(GRAD_OUTPUT) & 1:
        seed = tl.load(address(table, GRAD_OUTPUT, TYPE) + row * H + column, mask, other=0.0)
    return x0, x1, x2, x3, h0, h1, h2, h3, before, seed


@triton.jit
def gate_gradients(
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
    grad,
    of_c,
    row,
    there,
    column,
    mask,
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
    PROJECTED: tl.constexpr,
    PRESENT: tl.constexpr,
):
    """Take rows from the gradient of h to those of their gates and of W_hh h, which are stored.

    ``grad`` and ``of_c`` are the gradients of h and of an LSTM's c from the step after; the rest is
    ``read_kept``'s. Returns the four of W_hh h, and what else passes to the step before: of a GRU's h, or of
    an LSTM's c.
    """
    kept = row - tl.load(table + KEPT)
    local = row - tl.load(table + BASE)
    x0, x1, x2, x3 = in_float32(x0, x1, x2, x3)
    h0, h1, h2, h3 = in_float32(h0, h1, h2, h3)
    before = before.to(tl.float32)
    if not PROJECTED and PRESENT >> int(GRAD_OUTPUT) & 1:
        grad += seed.to(tl.float32)
    first_gate = gate_value(table, 0, x0, h0, column, INPUTS, H, TYPE, PRESENT)
    d1, d2, d3, passed = grad, grad, grad, grad
    if CELL == "lstm":
        i = sigmoid(first_gate)
        f = sigmoid(gate_value(table, 1, x1, h1, column, INPUTS, H, TYPE, PRESENT))
        g = nonlinear(gate_value(table, 2, x2, h2, column, INPUTS, H, TYPE, PRESENT), RELU)
        o = sigmoid(gate_value(table, 3, x3, h3, column, INPUTS, H, TYPE, PRESENT))
        c, free = next_cell(f, before, i * g, CLIP)
        c = tl.where(mask, c.to(TYPE).to(tl.float32), 0.0)
        at = local * H + column
        d, d3 = _through_lstm_cell(
            table,
            o,
            c,
            grad,
            of_c,
            at,
            column,
            mask,
            cell_eps,
            KIND,
            CELL_NORM,
            RELU,
            H,
            TYPE,
            PROJECTED,
            PRESENT,
        )
        if CLIP > 0.0:
            d = tl.where((free > CLIP) | (free < -CLIP), 0.0, d)
        passed = d * f
        d0 = d * g * i * (1.0 - i)
        d1 = d * before * f * (1.0 - f)
        d2 = through_nonlinear(d * i, g, RELU)
    elif CELL == "gru":
        r = sigmoid(first_gate)
        z = sigmoid(gate_value(table, 1, x1, h1, column, INPUTS, H, TYPE, PRESENT))
        candidate, of_reset = candidate_value(table, r, x2, h2, column, INPUTS, RELU, H, TYPE, PRESENT)
        passed = grad * z
        d1 = grad * (before - candidate) * z * (1.0 - z)
        d2 = through_nonlinear(grad * (1.0 - z), candidate, RELU)
        d0 = d2 * of_reset * r * (1.0 - r)  # late: found below instead, inside of the candidate's norm
        if INPUTS == "summed":
            d2 *= r
    else:
        d0 = through_nonlinear(grad, nonlinear(first_gate, RELU), RELU)

    d0 = tl.where(mask, d0, 0.0)
    d1 = tl.where(mask, d1, 0.0)
    d2 = tl.where(mask, d2, 0.0)
    d3 = tl.where(mask, d3, 0.0)
    own = address(table, GRAD_OWN, TYPE) + local * H + column
    stats = address(table, SAVED_STATS, tl.float32) + kept * STATS
    of_x = d2  # late: of the candidate's x
    if INPUTS == "late":
        rstd = tl.load(stats + GROUPS - 1, there, other=0.0)
        of_x = d2 * vector(table, GAIN_IH, 2, column, 1.0, H, TYPE, PRESENT)
        of_x, _, _, _ = through_norm(of_x, d2, d2, d2, x2, x2, x2, x2, rstd, mask, H, 1, KIND == "layer")
        d0 = of_x * h2 * r * (1.0 - r)
        tl.store(own, of_x.to(TYPE), mask)
    to = address(table, GRAD_GATES, TYPE) + local * (GATES * H)
    write_gates(to, column, mask, d0, d1, d2, d3, GATES, H)

    if CELL == "gru" and INPUTS == "separate":
        d2 *= r  # the candidate's part of h has a gradient of its own
        tl.store(own, d2.to(TYPE), mask)
    if GROUPS > 0:
        GAIN: tl.constexpr = GAIN_HH if INPUTS == "separate" else GAIN_IH
        d0 *= vector(table, GAIN, 0, column, 1.0, H, TYPE, PRESENT)
        if GATES > 1:
            d1 *= vector(table, GAIN, 1, column, 1.0, H, TYPE, PRESENT)
        if GATES > 2:
            d2 *= vector(table, GAIN, 2, column, 1.0, H, TYPE, PRESENT)
        if GATES > 3:
            d3 *= vector(table, GAIN, 3, column, 1.0, H, TYPE, PRESENT)
        if INPUTS == "separate":
            d0, d1, d2, d3 = through_norms(
                d0, d1, d2, d3, h0, h1, h2, h3, stats + GROUPS, there, mask, CELL, KIND, SCOPE, GATES, H
            )
        elif INPUTS == "summed":
            d0, d1, d2, d3 = through_norms(
                d0, d1, d2, d3, x0, x1, x2, x3, stats, there, mask, CELL, KIND, SCOPE, GATES, H
            )
        else:
            d0, d1, _, _ = through_norms(
                d0, d1, d0, d1, x0, x1, x0, x1, stats, there, mask, CELL, KIND, SCOPE, 2, H
            )
            d2 = of_x * r
    write_gates(address(table, GRAD_WH, TYPE) + local * (GATES * H), column, mask, d0, d1, d2, d3, GATES, H)
    return d0, d1, d2, d3, passed


@triton.jit(do_not_specialize=["step", "batch"])
def cell_backward(
    table,
    step,
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
    PROJECTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take row program_id(0) of a step from the gradient of its state to those of its gates and W_hh h."""
    n, t, row, there = row_of_step(table, step, batch, REVERSE == 0, PACKED)
    if not there:
        return
    column = tl.arange(0, BLOCK)[:, None]
    mask = column < H
    x0, x1, x2, x3, h0, h1, h2, h3, before, seed = read_kept(
        table,
        t,
        n,
        row,
        there,
        batch,
        column,
        mask,
        CELL,
        INPUTS,
        GATES,
        H,
        TYPE,
        REVERSE,
        PACKED,
        PROJECTED,
        PRESENT,
    )
    at_state = n.to(tl.int64) * H + column
    at_h = address(table, GRAD_H, tl.float32) + at_state
    at_c = address(table, GRAD_C, tl.float32) + at_state
    passes = mask & passes_on(table, t, n, row, there, batch, REVERSE, PACKED, PRESENT)
    await_kernel(DEPENDENT)
    if PROJECTED:
        grad = tl.load(address(table, GRAD_HIDDEN, tl.float32) + at_state, mask, other=0.0)
    else:
        grad = tl.load(at_h, passes, other=0.0)
    of_c = grad
    if CELL == "lstm":
        of_c = tl.load(at_c, passes, other=0.0)
    _, _, _, _, passed = gate_gradients(
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
        grad,
        of_c,
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
        PROJECTED,
        PRESENT,
    )
    if CELL == "lstm":
        tl.store(at_c, passed, mask)
    elif CELL == "gru":
        tl.store(at_h, passed, mask)


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
    """Replace the gates' gradients by those of W_ih x, through the norm of ``normalize_rows``."""
    row = rows_of_program(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[:, None]
    mask = column < H
    at = grad + row * (GATES * H)
    a, b, c, d = read_gates(at, column, mask, GATES, H)
    a, b, c, d = in_float32(a, b, c, d)
    p, q, r, s = read_gates(x + row * (GATES * H), column, mask, GATES, H)
    p, q, r, s = in_float32(p, q, r, s)
    if gain is not None:
        u, v, w, y = read_gates(gain, column, mask, GATES, H)
        u, v, w, y = in_float32(u, v, w, y)
        a, b, c, d = a * u, b * v, c * w, d * y
    stats += row * STATS
    a, b, c, d = through_norms(a, b, c, d, p, q, r, s, stats, True, mask, CELL, KIND, SCOPE, GATES, H)
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
    """Sum grad, grad·first and grad·second of each column over a part of the rows (program_id(0)).

    grad, first and second are (rows, WIDTH), rows of the first FIRST_STRIDE apart; sums (parts, WIDTH) in
    float32, or None.
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_width = column < WIDTH
    part = tl.program_id(0)
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
