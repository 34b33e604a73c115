"""The table that the kernels of a time loop read their tensors' addresses from.

A captured sequence of launches holds the arguments it was captured with. These kernels are given a table
in the device's memory instead, so that one capture serves any tensors of the same shapes: they are written
into the table before it is replayed.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

#: What the table holds: four numbers, then addresses. ``operators.py`` says what each is.
SLOTS: Final = (
    "done",
    "steps",
    "base",
    "kept",
    "batch_sizes",
    "offsets",
    "resets",
    "x",
    "wh",
    "h",
    "c",
    "weight_hh",
    "weight_hr",
    "bias_hh",
    "gain_ih",
    "gain_hh",
    "bias",
    "bias_hn",
    "gain_cell",
    "bias_cell",
    "hidden",
    "output",
    "saved_h",
    "saved_c",
    "saved_stats",
    "h0",
    "c0",
    "grad_output",
    "grad_h",
    "grad_c",
    "grad_hidden",
    "grad_state",
    "grad_gates",
    "grad_wh",
    "grad_own",
    "grad_cell",
    "cell",
    "h_before",
    "cell_stats",
)
#: The values that one launch of ``write`` takes.
WRITTEN: Final = 13


def slot(name: str) -> tl.constexpr:
    """Return a slot's number, for kernels."""
    return tl.constexpr(SLOTS.index(name))


DONE = slot("done")  # steps of the loop before the kernels' first one
STEPS = slot("steps")
BASE = slot("base")  # the row of all steps with which buffers of a chunk begin
KEPT = slot("kept")  # the row of all steps with which x, saved_h and saved_stats begin
BATCH_SIZES = slot("batch_sizes")
OFFSETS = slot("offsets")


@triton.jit
def address(table, SLOT: tl.constexpr, TYPE: tl.constexpr):
    """Return the tensor in this slot."""
    return tl.multiple_of(tl.load(table + SLOT).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def step_of_loop(table, step, FROM_LAST: tl.constexpr):
    """Return the step of the sequence that number ``step`` of the loop is, after those that are done."""
    done = tl.load(table + DONE) + step
    return tl.load(table + STEPS) - 1 - done if FROM_LAST else done


@triton.jit
def rows_of_step(table, t, batch, PACKED: tl.constexpr):
    """Return the first row of step t among those of all steps, and how many it has."""
    if PACKED:
        first = tl.load(address(table, OFFSETS, tl.int64) + t)
        count = tl.load(address(table, BATCH_SIZES, tl.int64) + t)
    else:
        first = t * batch
        count = batch + t * 0
    return first, count


@triton.jit
def await_kernel(DEPENDENT: tl.constexpr):
    """Wait until the kernel before has ended, where this one may begin earlier, and let the next one begin.

    What a kernel reads before it waits is what no step writes: the table, matrices, what forward kept. The
    next kernel is let in after that, so that this holds for it too.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


# Of the table only: else every value's own properties would make a kernel of its own.
_ANY: Final = list(range(1, 2 + WRITTEN))


@triton.jit(do_not_specialize=_ANY)
def write(
    table,
    start,
    a: tl.int64,
    b: tl.int64,
    c: tl.int64,
    d: tl.int64,
    e: tl.int64,
    f: tl.int64,
    g: tl.int64,
    h: tl.int64,
    i: tl.int64,
    j: tl.int64,
    k: tl.int64,
    l: tl.int64,  # noqa: E741
    m: tl.int64,
    SIZE: tl.constexpr,
):
    """Write values to the table from ``start`` on: a kernel, which a caller's graph may capture."""
    values = (a, b, c, d, e, f, g, h, i, j, k, l, m)
    for place in tl.static_range(13):
        if start + place < SIZE:
            tl.store(table + start + place, values[place])


@triton.jit(do_not_specialize=["count"])
def advance(table, count: tl.int64):
    """Count more steps as done."""
    tl.store(table + DONE, tl.load(table + DONE) + count)
