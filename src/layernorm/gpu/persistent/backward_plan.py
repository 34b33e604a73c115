"""How the persistent kernel's backward is laid out on a GPU, as data, and the cost model that chooses.

``plan`` does the same for forward; the kernel is ``backward.cu``. A block multiplies the gradients of its own
gates with its rows of W_hh, for all units, and the blocks add up their parts.

A row's bits follow from the cell, the hidden size and ``units``, which a plan has from no batch: ``rows``,
``row_split``, ``warps`` and ``register_steps`` change no order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from layernorm.gpu.persistent import plan as persistent_plan
from layernorm.gpu.persistent.plan import BLOCKS, ROWS, SHARED_BYTES, THREADS, Layout, Seconds
from layernorm.variants import Cell

_ROW_SPLITS: Final = (1, 2, 4)
#: Of a block: with 255 registers for each thread, and with half of them.
_WARPS: Final = (8, 16)


@dataclass(frozen=True)
class BackwardPlan(Layout):
    """What the backward kernel is compiled for.

    Attributes:
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"``.
        hidden: H, a multiple of 16.
        dtype: ``"bfloat16"`` or ``"float16"``, of states and weights.
        blocks: of a cluster.
        units: hidden units of a block, a multiple of 16; the last ones may have fewer, or none.
        row_split: warps that have the same units, of which each makes the gates of some eights of rows.
        warps: of a block, more than have units where that makes room for weights in registers.
        register_steps: of the ``steps`` of a product, those with weights in registers.
        rows: of the batch, of a cluster.
    """

    cell: Cell
    hidden: int
    dtype: str
    blocks: int
    units: int
    row_split: int
    warps: int
    register_steps: int
    rows: int

    @property
    def split(self) -> int:
        """Warps that have the same units."""
        return self.row_split

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def steps(self) -> int:
        """k-steps of 16 of the product's sums, over the block's gates."""
        return self.gates * self.units // 16

    @property
    def warp_sixteens(self) -> int:
        """Sixteens of all units, of which a warp makes the product."""
        return -(-self.blocks * (self.units // 16) // self.warps)

    @property
    def weight_bytes(self) -> int:
        """Shared memory for the weights that are not in registers."""
        return 16 * self.threads * self.warp_sixteens * (self.steps - self.register_steps)

    @property
    def part_bytes(self) -> int:
        """Shared memory for the parts of the product that blocks send each other."""
        return 4 * self.rows * self.units * -(-self.hidden // self.units)

    def shared_bytes(self, groups: int = 1) -> int:
        """Return the shared memory of a block with statistics of ``groups`` groups, as the kernel has it."""
        depth = 16 * self.steps
        parts = [
            *self.vector_parts,
            2 * self.rows * (depth + (80 - depth % 64) % 64),  # gradients of own gates
            self.weight_bytes,
            self.part_bytes,
            self.statistics_bytes if self.cell == "lstm" else 0,  # of the cell
            groups * self.statistics_bytes,
        ]
        return sum(-(-part // 16) * 16 for part in parts)

    def _own_macros(self) -> dict[str, int]:
        return {"backward": 1, "register_steps": self.register_steps}


def seconds_per_step(plan: BackwardPlan, *, cell_norm: bool = True, groups: int = 1) -> Seconds:
    """Estimate the time of one step of one cluster: the cost by which plans are chosen.

    Args:
        plan: the kernel's.
        cell_norm: whether an LSTM's cell is normalized, which is one exchange more.
        groups: of features that share statistics.

    Examples:
        >>> from layernorm.gpu.persistent.backward_plan import plan, seconds_per_step
        >>> 1e-6 < sum(seconds_per_step(plan("lstm", 256, "bfloat16", 90))) < 1e-5
        True
    """
    of = persistent_plan
    normed = plan.cell == "lstm" and cell_norm
    depth = 16 * plan.steps
    products = 16 * plan.warp_sixteens * plan.warps * depth * plan.rows / of.PRODUCTS_PER_CLOCK
    states = 2 * plan.warps * plan.rows * depth + 2 * plan.part_bytes
    remote = plan.blocks - 1
    sent = 4 * plan.rows * plan.hidden * remote / plan.blocks
    sent += 8 * plan.rows * plan.unit_warps * (groups + normed) * remote
    barrier = of.BARRIER_SECONDS if plan.blocks > 1 else of.BLOCK_BARRIER_SECONDS
    clock = 1 / of.CLOCKS_PER_SECOND
    return Seconds(
        product=max(products, plan.steps * of.PRODUCT_LATENCY_CLOCKS) * clock,
        weights=plan.weight_bytes / of.SHARED_BYTES_PER_CLOCK * clock,
        states=states / of.SHARED_BYTES_PER_CLOCK * clock,
        barriers=(2 + normed) * barrier + of.BLOCK_BARRIER_SECONDS,
        exchange=sent / of.REMOTE_BYTES_PER_CLOCK * clock,
        activations=plan.activations() * clock,
        statistics=of.STATISTICS_CLOCKS * (groups + normed) * clock,
    )


@functools.cache
def plan(
    cell: Cell, hidden: int, dtype: str, architecture: int, batch: int = 1, groups: int = 1
) -> BackwardPlan | str:
    """Return the plan for a cell, or in words why there is none.

    Args:
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"``.
        hidden: H.
        dtype: of states and weights.
        architecture: of the device, as in ``sm_90``.
        batch: N, which alone decides ``rows``, and with it how many weights are in registers.
        groups: of features that share statistics, for which there must be room.

    Examples:
        >>> from layernorm.gpu.persistent.backward_plan import plan
        >>> plan("lstm", 512, "bfloat16", 90).blocks
        16
    """
    why_not = persistent_plan.unsupported(hidden, dtype, architecture)
    if why_not is not None:
        return why_not
    return persistent_plan.best(
        (p for blocks in BLOCKS for p in _alike(_units(cell, hidden, dtype, blocks), groups, ROWS[:1])),
        lambda some: _alike(some, groups, ROWS),
        seconds_per_step,
        batch,
    ) or persistent_plan.too_large(hidden)


def _units(cell: Cell, hidden: int, dtype: str, blocks: int) -> BackwardPlan:
    """Return the plan for a number of blocks as far as a row's bits follow from it."""
    units = -(-hidden // (blocks * 16)) * 16
    return BackwardPlan(cell, hidden, dtype, blocks, units, 1, 1, 0, ROWS[0])


def _alike(plan: BackwardPlan, groups: int, rows: tuple[int, ...]) -> Iterator[BackwardPlan | None]:
    """Yield plans that make the same bits for these numbers of rows; None where one does not fit."""
    for r, split in itertools.product(rows, _ROW_SPLITS):
        least = split * plan.unit_warps
        for warps in sorted({least, *(w for w in _WARPS if w > least)}):
            yield _filled(replace(plan, rows=r, row_split=split, warps=warps), groups)


#: Registers that a thread needs besides weights and the product's sums, as the compiler has it: for one eight
#: of rows, and for each more. See test_plans.py.
_BESIDES: Final[Mapping[Cell, tuple[int, int]]] = {"lstm": (104, 60), "gru": (90, 46), "rnn": (84, 34)}


def _filled(plan: BackwardPlan, groups: int) -> BackwardPlan | None:
    """Return the plan with as many weights in registers as fit; None where the rest has no room."""
    if plan.threads > THREADS:
        return None
    first, more = _BESIDES[plan.cell]
    sums = 4 * (plan.rows // 8) * plan.warp_sixteens
    besides = first + more * (plan.warp_tiles - 1) + sums
    if besides > plan.registers:
        return None
    room = (plan.registers - besides) // (4 * plan.warp_sixteens)
    filled = replace(plan, register_steps=min(plan.steps, room))
    return filled if filled.shared_bytes(groups) <= SHARED_BYTES else None
