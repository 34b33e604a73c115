"""How the persistent recurrent kernel is laid out on a GPU, as data, and the cost model that chooses.

The kernel (``forward.cu``) gives a cluster of thread blocks some rows of the batch for all steps. The
weights W_hh stay on the chip for the whole sequence; each step the blocks exchange statistics and states
through each other's shared memory. A ``Plan`` says which block has which units and where their weights are;
it is found here, and it alone makes the kernel's macros.

A row's bits follow from the cell, the hidden size and ``k_split``: what a sum is made of, and in which order,
is the same for any ``blocks``, ``units``, ``register_pairs`` and ``rows``. ``plan`` takes nothing of the
batch but ``rows``.

No device has run this kernel yet. The costs are estimates from the constants below, which say what they
assume.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, TypeVar

from layernorm.variants import GATES, Cell

#: The dtypes that the kernels take, by their names in ``torch``.
DTYPES: Final = ("bfloat16", "float16")
#: The architectures that have what is below: of H100 and H200, B200 and B300.
ARCHITECTURES: Final = (90, 100, 103)
#: Of a block: bytes of shared memory that it may have, registers, threads; and of a thread.
SHARED_BYTES: Final = 227 * 1024
REGISTERS: Final = 64 * 1024
REGISTERS_PER_THREAD: Final = 255
THREADS: Final = 512
#: Blocks of a cluster; more than 8 are not portable and must be asked for.
BLOCKS: Final = (1, 2, 4, 8, 16)
#: Rows of the batch that a cluster may take.
ROWS: Final = (8, 16, 32)
_K_SPLITS: Final = (1, 2, 4, 8)

# Assumptions of the cost model, for an H100; measured ones will replace them.
CLOCKS_PER_SECOND: Final = 1.7e9
MULTIPROCESSORS: Final = 132
#: Multiply-adds that mma.sync does in a clock on a multiprocessor, half of what wgmma can.
PRODUCTS_PER_CLOCK: Final = 1024
#: From an mma to the next that adds to its sums.
PRODUCT_LATENCY_CLOCKS: Final = 33
#: Bytes that a multiprocessor's shared memory gives in a clock.
SHARED_BYTES_PER_CLOCK: Final = 128
#: Bytes that a multiprocessor sends to others of its cluster in a clock.
REMOTE_BYTES_PER_CLOCK: Final = 16
#: From the last arrival at one of the cluster's barriers to all blocks going on; within one block.
BARRIER_SECONDS: Final = 0.5e-6
BLOCK_BARRIER_SECONDS: Final = 0.05e-6
#: A sigmoid or tanh on a multiprocessor: two special functions at 16 a clock, and about 16 other
#: instructions at 128 a clock.
ACTIVATION_CLOCKS: Final = 0.25
#: What an activation adds to the time of a thread, which has a few side by side.
ACTIVATION_LATENCY_CLOCKS: Final = 30
#: What a warp waits for shuffles, one after the other, that make and combine statistics: two sums over
#: three shuffles and two over two, at about 25 clocks, for each exchange of statistics.
STATISTICS_CLOCKS: Final = 250


class Layout:
    """The layout of a block, for either direction; ``Plan`` describes the attributes."""

    cell: Cell
    hidden: int
    dtype: str
    blocks: int
    units: int
    rows: int

    @property
    def split(self) -> int:
        """Warps that have the same units."""
        raise NotImplementedError

    @property
    def gates(self) -> int:
        """G, the gates of the cell."""
        return GATES[self.cell]

    @property
    def warp_units(self) -> int:
        """Hidden units of a warp: of an RNN two eights, where others have two or more gates."""
        return 16 if self.cell == "rnn" else 8

    @property
    def slots(self) -> int:
        """Eights of gates of a warp: of an RNN its two eights of units, else one for each gate."""
        return 2 if self.cell == "rnn" else self.gates

    @property
    def unit_warps(self) -> int:
        """Warps that have different units."""
        return self.units // self.warp_units

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.split * self.unit_warps

    @property
    def warp_tiles(self) -> int:
        """Eights of rows whose gates a warp makes; the warps that have the same units share these."""
        return -(-(self.rows // 8) // self.split)

    @property
    def statistics_bytes(self) -> int:
        """Shared memory for the statistics of one group: a pair of float32 for each row and warp's units."""
        parts = self.hidden // self.warp_units
        return 8 * self.rows * (-(-parts // 4) * 4)

    @property
    def registers(self) -> int:
        """Registers that a thread may have: four schedulers have a quarter each, for whole warps."""
        warps = -(-self.threads // 128) * 4
        return min(REGISTERS_PER_THREAD, REGISTERS // (32 * warps) // 8 * 8)

    @property
    def vector_parts(self) -> list[int]:
        """Shared memory for the barrier, gains and biases, part by part."""
        lstm, gru = self.cell == "lstm", self.cell == "gru"
        return [16, 16 * self.gates * self.units, 4 * self.units * gru, 8 * self.units * lstm]

    def activations(self) -> float:
        """Return the clocks that a step's activations take."""
        # A warp's tiles have all of its units' activations.
        activations = self.gates + (self.cell == "lstm")
        in_thread = 2 * self.warp_tiles * (self.slots if self.cell == "rnn" else activations)
        return max(
            self.rows * self.units * activations * ACTIVATION_CLOCKS, in_thread * ACTIVATION_LATENCY_CLOCKS
        )

    def shared_bytes(self, groups: int = 1) -> int:
        """Return the shared memory of a block with statistics of ``groups`` groups, as the kernel has it."""
        raise NotImplementedError

    def macros(self) -> dict[str, int]:
        """Return the macros that the kernel is compiled with."""
        values = {
            "cell": ("lstm", "gru", "rnn").index(self.cell),
            "hidden": self.hidden,
            "float16": int(self.dtype == "float16"),
            "blocks": self.blocks,
            "units": self.units,
            "split": self.split,
            "warps": self.threads // 32,
            "rows": self.rows,
            "shared_bytes": self.shared_bytes(),
            **self._own_macros(),
        }
        return {f"LAYERNORM_{name.upper()}": value for name, value in values.items()}

    def _own_macros(self) -> dict[str, int]:
        raise NotImplementedError


P = TypeVar("P", bound=Layout)


@dataclass(frozen=True)
class Plan(Layout):
    """What the forward kernel is compiled for.

    Attributes:
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"``.
        hidden: H, a multiple of 16.
        dtype: ``"bfloat16"`` or ``"float16"``, of states and weights.
        blocks: of a cluster.
        units: hidden units of a block; the last ones may have fewer, or none.
        k_split: warps that share the sums over h of the same units.
        register_pairs: of the ``pairs`` of k-steps of 16 that a warp has, those with weights in registers.
        rows: of the batch, of a cluster.
    """

    cell: Cell
    hidden: int
    dtype: str
    blocks: int
    units: int
    k_split: int
    register_pairs: int
    rows: int

    @property
    def split(self) -> int:
        """Warps that have the same units."""
        return self.k_split

    @property
    def products(self) -> int:
        """The mma of a k-step and eight rows: two slots are the 16 rows of an mma."""
        return -(-self.slots // 2)

    @property
    def pairs(self) -> int:
        """Pairs of k-steps of a warp: 32 features of h each."""
        return _pairs(self.hidden, self.k_split)

    @property
    def width(self) -> int:
        """Features of h in the kernel, with zeros after H."""
        return 32 * self.k_split * self.pairs

    @property
    def weight_bytes(self) -> int:
        """Shared memory for the weights that are not in registers."""
        return 16 * self.threads * self.slots * (self.pairs - self.register_pairs)

    def shared_bytes(self, groups: int = 1) -> int:
        """Return the shared memory of a block with statistics of ``groups`` groups, as the kernel has it."""
        stride = self.width + (32 if self.width // 32 % 2 == 0 else 0)
        own = self.rows * self.units
        sums = 0 if self.k_split == 1 else 16 * (self.rows // 8) * self.threads * self.products
        parts = [
            *self.vector_parts,
            2 * self.rows * stride,  # h
            self.weight_bytes,
            sums,
            2 * own,  # h of own units
        ]
        if self.cell == "lstm":
            parts += [2 * own, self.statistics_bytes]  # c of own units, and the statistics of c
        parts += [4 * self.rows, groups * self.statistics_bytes]
        return sum(-(-part // 16) * 16 for part in parts)

    def _own_macros(self) -> dict[str, int]:
        return {"register_pairs": self.register_pairs}


class Seconds(NamedTuple):
    """The cost of a step, part by part; their sum is the estimate, as if none overlapped.

    Attributes:
        product: W_hh h by mma.
        weights: reading weights from shared memory.
        states: reading h from shared memory, and the partial sums of K.
        barriers: two of the cluster or, where a cell is normalized, three; and one within a block.
        exchange: sending statistics and states.
        activations: sigmoid and tanh.
        statistics: making and combining them.
    """

    product: float
    weights: float
    states: float
    barriers: float
    exchange: float
    activations: float
    statistics: float


def seconds_per_step(plan: Plan, *, cell_norm: bool = True, groups: int = 1) -> Seconds:
    """Estimate the time of one step of one cluster: the cost by which plans are chosen.

    Args:
        plan: the kernel's.
        cell_norm: whether an LSTM's cell is normalized, which is one exchange more.
        groups: of features that share statistics.

    Examples:
        >>> from layernorm.gpu.persistent.plan import plan, seconds_per_step
        >>> 1e-6 < sum(seconds_per_step(plan("lstm", 256, "bfloat16", 90))) < 1e-5
        True
    """
    normed = plan.cell == "lstm" and cell_norm
    unit_warps = plan.units // plan.warp_units
    products = 16 * plan.products * unit_warps * plan.width * plan.rows / PRODUCTS_PER_CLOCK
    sums = 0 if plan.k_split == 1 else 2 * 16 * (plan.rows // 8) * plan.threads * plan.products
    states = 2 * unit_warps * plan.rows * plan.width + sums
    sent = plan.rows * (2 * plan.units + 8 * unit_warps * (groups + normed))
    barrier = BARRIER_SECONDS if plan.blocks > 1 else BLOCK_BARRIER_SECONDS
    exchanges = 2 + normed
    clock = 1 / CLOCKS_PER_SECOND
    return Seconds(
        product=max(products, 2 * plan.pairs * PRODUCT_LATENCY_CLOCKS) * clock,
        weights=plan.weight_bytes / SHARED_BYTES_PER_CLOCK * clock,
        states=states / SHARED_BYTES_PER_CLOCK * clock,
        barriers=exchanges * barrier + (plan.k_split > 1) * BLOCK_BARRIER_SECONDS,
        exchange=sent * (plan.blocks - 1) / REMOTE_BYTES_PER_CLOCK * clock,
        activations=plan.activations() * clock,
        statistics=STATISTICS_CLOCKS * (groups + normed) * clock,
    )


def waves(plan: Layout, batch: int) -> int:
    """Return how often all multiprocessors are filled with clusters, if any of them may form one."""
    clusters = -(-batch // plan.rows)
    return -(-clusters // (MULTIPROCESSORS // plan.blocks))


@functools.cache
def plan(
    cell: Cell, hidden: int, dtype: str, architecture: int, batch: int = 1, groups: int = 1
) -> Plan | str:
    """Return the plan for a cell, or in words why there is none.

    Args:
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"``.
        hidden: H.
        dtype: of states and weights.
        architecture: of the device, as in ``sm_90``.
        batch: N, which alone decides ``rows``, and with it how many weights are in registers.
        groups: of features that share statistics, for which there must be room.

    Examples:
        >>> from layernorm.gpu.persistent.plan import plan
        >>> plan("lstm", 512, "bfloat16", 90).blocks
        16
        >>> plan("lstm", 512, "bfloat16", 80)
        'compute capability 8.0 has no thread block clusters'
    """
    why_not = unsupported(hidden, dtype, architecture)
    if why_not is not None:
        return why_not
    return best(
        _candidates(cell, hidden, dtype, groups),
        lambda some: (_filled(replace(some, rows=rows), groups) for rows in ROWS),
        seconds_per_step,
        batch,
    ) or too_large(hidden)


def unsupported(hidden: int, dtype: str, architecture: int) -> str | None:
    """Return why no plan of any direction can take these, or None."""
    if architecture not in ARCHITECTURES:
        capability = f"{architecture // 10}.{architecture % 10}"
        lacking = "no thread block clusters" if architecture < 90 else "too little shared memory"
        return f"compute capability {capability} has {lacking}"
    if dtype not in DTYPES:
        return f"dtype {dtype} is not served; {' and '.join(DTYPES)} are"
    if hidden <= 0 or hidden % 16 != 0:
        return f"hidden size {hidden} is not a multiple of 16"
    return None


def too_large(hidden: int) -> str:
    """Return why there is no plan where nothing else is in the way."""
    return f"the weights of hidden size {hidden} do not fit into {BLOCKS[-1]} multiprocessors"


def best(
    candidates: Iterable[P | None],
    alike: Callable[[P], Iterable[P | None]],
    seconds: Callable[[P], Seconds],
    batch: int,
) -> P | None:
    """Return the cheapest plan for a batch of those that make the bits of the cheapest candidate, or None.

    Args:
        candidates: for eight rows; None are those that do not fit, here and below.
        alike: to a plan those that make the same bits.
        seconds: of a step.
        batch: N.
    """
    fitting = [p for p in candidates if p is not None]
    if not fitting:
        return None
    fastest = min(fitting, key=lambda p: sum(seconds(p)))
    others = (p for p in alike(fastest) if p is not None)
    return min(others, key=lambda p: waves(p, batch) * sum(seconds(p)))


def _candidates(cell: Cell, hidden: int, dtype: str, groups: int) -> Iterator[Plan | None]:
    """Yield all plans for eight rows; None where one does not fit."""
    for blocks in BLOCKS:
        for k_split in _K_SPLITS:
            warp_units = 16 if cell == "rnn" else 8
            units = -(-hidden // (blocks * warp_units)) * warp_units
            yield _filled(Plan(cell, hidden, dtype, blocks, units, k_split, 0, ROWS[0]), groups)


def _filled(plan: Plan, groups: int) -> Plan | None:
    """Return the plan with as many weights in registers as fit; None where the rest has no room."""
    if plan.threads > THREADS:
        return None
    # Registers that a thread needs for all else, as the compiler reports them: see test_plans.py. An mma's
    # fragment is four registers in a row, so that a GRU's candidate takes as many as two gates.
    tiles = plan.rows // 8
    besides = (
        (104 if plan.cell == "gru" else 84)
        + 4 * tiles * plan.products
        + 4 * plan.slots * (plan.warp_tiles - 1)
    )
    if besides > plan.registers:
        return None
    room = (plan.registers - besides) // (8 * plan.products)
    filled = replace(plan, register_pairs=min(plan.pairs, room))
    return filled if filled.shared_bytes(groups) <= SHARED_BYTES else None


def _pairs(hidden: int, k_split: int) -> int:
    return -(-hidden // (32 * k_split))
