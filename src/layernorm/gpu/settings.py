"""How the Triton kernels are launched, as data: nothing is tuned when a program runs.

The tile, and with it the order of every sum, follows from the width and the architecture alone, so a row's
bits do not depend on its batch. ``docs/gpu.md`` says what the numbers were chosen by: so far registers and
spills of the compiled kernels and the bytes in flight, since no device has been measured yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from layernorm.gpu.launching import ALIGNED


@dataclass(frozen=True)
class Tile:
    """What one program takes at a time.

    Attributes:
        rows: side by side.
        block: columns, a power of two.
        warps: of the program.
        whole: whether the block holds the whole row, which is then read once.
        stages: of its loop: while a turn is computed, the loads of the next ``stages - 1`` are under way.
    """

    rows: int
    block: int
    warps: int
    whole: bool = True
    stages: int = 1

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Return what the kernels take."""
        return {
            "WHOLE": self.whole,
            "ROWS": self.rows,
            "BLOCK": self.block,
            "STAGES": self.stages,
            "num_warps": self.warps,
        }


@dataclass(frozen=True, eq=False)
class Settings:
    """The numbers of one architecture.

    Attributes:
        forward: by the block's size; a wider row is looped over.
        backward: by the block's size; of a wider row the sums are formed first and the columns split.
        looped_forward: for a row that no block holds.
        looped_sums: for the sums of backward over such a row.
        columns: for the columns of such a row.
        multiprocessors: of the device, to which the parts of the sums over rows are fitted.
        least_rows: of such a part.
    """

    forward: dict[int, Tile]
    backward: dict[int, Tile]
    looped_forward: Tile
    looped_sums: Tile
    columns: Tile
    multiprocessors: int
    least_rows: int


def _whole(up_to: int, stages: int) -> dict[int, Tile]:
    """Return tiles of whole rows for blocks from 1 to ``up_to``, of 16 elements a thread."""
    sizes = (1 << power for power in range(up_to.bit_length()))
    return {
        size: Tile(max(1, min(64, 2048 // size)), size, max(4, size // 512), stages=stages) for size in sizes
    }


# Forward a row of 8,192 has 32 elements a thread: so a multiprocessor has room for two programs, of which one
# computes while the other waits. Of wider rows more is on its way in blocks of 2,048, three stages deep, than
# in a whole row whose program has a multiprocessor to itself; what is read again comes from the cache.
DEFAULT: Final = Settings(
    forward=_whole(4096, 1) | {8192: Tile(1, 8192, 8)},
    backward=_whole(8192, 2),
    looped_forward=Tile(1, 2048, 4, whole=False, stages=3),
    looped_sums=Tile(1, 2048, 4, whole=False, stages=3),
    columns=Tile(1, 1024, 4, whole=False, stages=2),
    multiprocessors=132,
    least_rows=4,
)

#: By compute capability; DEFAULT is for any other. A100 has 108 multiprocessors, H100 and H200 132, B200 148.
BY_ARCHITECTURE: Final[dict[tuple[int, int], Settings]] = {
    (8, 0): replace(DEFAULT, multiprocessors=108),
    (9, 0): DEFAULT,
    (10, 0): replace(DEFAULT, multiprocessors=148),
}


@dataclass(frozen=True)
class ProductTile:
    """What one program of a recurrent layer's product takes.

    Attributes:
        rows, columns: of the result.
        depth: that is loaded at a time.
        warps: of the program.
        stages: of loads ahead.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """Return them as the kernels take them."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_K": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# Warps that a multiprocessor holds of the backward kernel: with 128 registers to a thread where it forms a
# row's sums, with 64 where it finds them.
_WARPS_WHOLE: Final = 16
_WARPS_OF_COLUMNS: Final = 32

#: By compute capability, for each operator and dtype of the input the least bytes of a row from which
#: ``python -m benchmarks gpu`` found these kernels at least as fast as PyTorch's at every size it measured.
#: Narrower rows, and whatever has no number here, are left to PyTorch's. Small inputs are bound by the
#: launch, which PyTorch has cheaper; but the bytes of a whole input must not decide: a row's kernel, and so
#: its bits, would depend on how many rows come with it.
FASTER: Final[dict[tuple[int, int], dict[tuple[str, str], int]]] = {}

#: The compute capabilities on which the recurrent layers' Triton kernels have passed their tests and been
#: measured by ``python -m benchmarks gpu``. Elsewhere their first call says so.
VERIFIED: Final[frozenset[tuple[int, int]]] = frozenset()

#: By compute capability, for each cell the hidden sizes up to which ``python -m benchmarks gpu`` found the
#: looped kernel no slower than the steps' own launches, forward and backward. Elsewhere it takes whatever it
#: can hold.
LOOPED: Final[dict[tuple[int, int], dict[str, tuple[int, int]]]] = {}

#: The compute capabilities on which ``python -m benchmarks first_contact`` found the kernels of a step faster
#: where each begins before the one before it ends (programmatic dependent launch), and their bits the same.
DEPENDENT: Final[frozenset[tuple[int, int]]] = frozenset()

#: The same as LOOPED for the persistent kernel, where it was faster than others. Elsewhere it is not used.
PERSISTENT: Final[dict[tuple[int, int], dict[str, tuple[int, int]]]] = {}


def for_architecture(capability: tuple[int, int] | None) -> Settings:
    """Return the settings for a device's compute capability; None for no device."""
    return DEFAULT if capability is None else BY_ARCHITECTURE.get(capability, DEFAULT)


def block_for(width: int) -> int:
    """Return the least power of two that holds the width.

    Examples:
        >>> from layernorm.gpu.settings import block_for
        >>> block_for(1), block_for(768), block_for(1024)
        (1, 1024, 1024)
    """
    return 1 << max(0, width - 1).bit_length()


@functools.cache
def forward_tile(settings: Settings, width: int) -> Tile:
    """Return the tile of the forward kernel for rows of this width."""
    return _for_width(settings.forward.get(block_for(width), settings.looped_forward), width)


@functools.cache
def backward_tile(settings: Settings, width: int) -> Tile:
    """Return the tile of the backward kernel for rows of this width."""
    return _for_width(settings.backward.get(block_for(width), settings.columns), width)


@functools.cache
def sums_tile(settings: Settings, width: int) -> Tile:
    """Return the tile of backward's sums over rows of this width, which no block holds."""
    return _for_width(settings.looped_sums, width)


def _for_width(tile: Tile, width: int) -> Tile:
    # Rows that no vectors are read of would be loaded ahead by single numbers, if at all.
    return tile if width % ALIGNED == 0 else replace(tile, stages=1)


def sequence_tile(columns: int, dtype: torch.dtype) -> ProductTile:
    """Return the tile of a product over the rows of all steps, by its columns, whatever the number of rows.

    Of 128 rows and columns each number that is loaded serves 128 times, where a step's tile has 32 or 64:
    many rows are bound by what comes from the cache. Three stages of it are 96 KiB.
    """
    wide = min(128, max(32, block_for(columns)))
    return ProductTile(128, wide, 32 if dtype == torch.float32 else 64, 8, 3)


def product_tile(columns: int, dtype: torch.dtype) -> ProductTile:
    """Return the tile of a step's product with a matrix, by its columns, whatever the number of rows.

    64 rows are what a warp group's instruction takes. A step's product has few rows, so its columns are what
    keeps multiprocessors busy: 4·512 of them in 64 programs.
    """
    narrow = 32 if columns <= 2048 else 64
    if dtype == torch.float32:
        return ProductTile(64, narrow, 32, 4, 3)
    return ProductTile(64, narrow, 64, 4, 4)


#: Rows of the batch, and warps, of a program that takes them through all steps of a small layer. Eight rows
#: are the fewest that tensor cores take, and leave its registers room for the next step's input.
LOOP_ROWS: Final = 8
LOOP_WARPS: Final = 8
#: The largest hidden size of such a layer, and the bytes of W_hh that stay on the chip between steps.
LOOP_SIZE: Final = 128
_LOOP_BYTES: Final = 2**17
# Beside W_hh: the state, and sums of warps.
_LOOP_ROOM: Final = 2**14


def loop_block(hidden: int) -> int:
    """Return the features of a tile of a small layer: 16 are the fewest that tensor cores sum over."""
    return max(16, block_for(hidden))


def loop_bytes(gates: int, hidden: int, dtype: torch.dtype) -> int | None:
    """Return the shared memory of a program that loops over a layer's steps, None where W_hh is too large."""
    weights = gates * loop_block(hidden) ** 2 * dtype.itemsize
    return weights + _LOOP_ROOM if hidden <= LOOP_SIZE and weights <= _LOOP_BYTES else None


def row_warps(block: int) -> int:
    """Return the warps of a program that takes one row of gates: four features of its block a thread."""
    return max(1, min(16, block // 128))


def rows_per_part(settings: Settings, tile: Tile, rows: int, width: int) -> int:
    """Return how many rows each part of the sums over rows takes: as many parts as run at a time.

    More of them would add traffic, fewer leave multiprocessors idle.
    """
    warps = _WARPS_WHOLE if tile.whole else _WARPS_OF_COLUMNS
    programs = settings.multiprocessors * (warps // tile.warps)
    parts = -(-programs // -(-width // tile.block))
    per_part = max(settings.least_rows, -(-rows // parts))
    return -(-per_part // tile.rows) * tile.rows
