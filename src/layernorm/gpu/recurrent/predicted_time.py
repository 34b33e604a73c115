"""How long a recurrent layer should take by the Triton kernels: a prediction, written before any measurement.

The numbers are assumptions for an H100, each of which says what it assumes; measured ones will replace them.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from layernorm.gpu import settings
from layernorm.variants import GATES, Cell

#: From the end of one kernel of a CUDA graph to the start of the next, which waits for it.
LAUNCH_SECONDS: Final = 1.2e-6
#: An access to memory that the next instruction waits for; a kernel has two in a row, the first to its table.
ACCESS_SECONDS: Final = 0.5e-6
#: A sum over a program's row.
SUM_SECONDS: Final = 0.15e-6
#: A tile's depth of a product, the loads of those after it under way.
DEPTH_SECONDS: Final = 0.06e-6
#: Bytes a second from the second-level cache to all multiprocessors, and from memory.
CACHE_BANDWIDTH: Final = 5.5e12
MEMORY_BANDWIDTH: Final = 3.35e12
#: Half of the operations a second that the maker states for dense products, float32 as TF32.
OPERATIONS: Final = {torch.bfloat16: 0.5 * 989e12, torch.float16: 0.5 * 989e12, torch.float32: 0.5 * 494e12}
# Sums over a row, one after the other: forward a mean, what it lost and the squares of each norm; backward
# two of each norm that is passed, and the cell's norm once more.
_SUMS: Final = {"lstm": (6, 7), "gru": (6, 4), "rnn": (3, 2)}


class Seconds(NamedTuple):
    """What a step is predicted to take, part by part; their sum is the prediction, as if none overlapped.

    Attributes:
        launches: between the kernels.
        accesses: to the tables, and to what they point to.
        product: W_hh h, or its gradient's product: of its depth, its weights from the cache, and its
            operations, the longest.
        rows: what the rows of a step read and write.
        sums: over rows.
    """

    launches: float
    accesses: float
    product: float
    rows: float
    sums: float


def seconds_per_step(
    cell: Cell, hidden_size: int, batch: int, dtype: torch.dtype, *, backward: bool = False
) -> Seconds:
    """The predicted time of one step of the paper's layer.

    Args:
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"``.
        hidden_size: H.
        batch: N.
        dtype: of input and parameters.
        backward: instead of forward with what backward needs.

    Examples:
        >>> import torch
        >>> from layernorm.gpu.recurrent.predicted_time import seconds_per_step
        >>> 1e-6 < sum(seconds_per_step("lstm", 256, 16, torch.bfloat16)) < 2e-5
        True
    """
    width, size = GATES[cell] * hidden_size, dtype.itemsize
    columns, depth = (hidden_size, width) if backward else (width, hidden_size)
    tile = settings.product_tile(columns, dtype)
    tiles = -(-batch // tile.rows)
    product = max(
        -(-depth // tile.depth) * DEPTH_SECONDS,
        tiles * width * hidden_size * size / CACHE_BANDWIDTH,
        2 * tiles * tile.rows * width * hidden_size / OPERATIONS[dtype],
    )
    # Forward x, W_hh h and what is kept of it, c and h; backward those, and gradients of gates and W_hh h.
    features = (2 * size + 4) * width + 4 * size * hidden_size
    if backward:
        features = (4 * size) * width + (4 * size + 8) * hidden_size
    return Seconds(
        launches=2 * LAUNCH_SECONDS,
        accesses=4 * ACCESS_SECONDS,
        product=product,
        rows=batch * features / MEMORY_BANDWIDTH,
        sums=_SUMS[cell][backward] * SUM_SECONDS,
    )


def seconds(
    cell: Cell, hidden_size: int, batch: int, steps: int, dtype: torch.dtype, *, training: bool
) -> float:
    """The predicted time of a layer over a sequence, the input as wide as the state.

    Args:
        cell: see ``seconds_per_step``, as for what is not here.
        hidden_size: H, and F.
        batch: N.
        steps: T.
        dtype: of input and parameters.
        training: forward and backward.
    """
    loop = sum(seconds_per_step(cell, hidden_size, batch, dtype))
    if training:
        loop += sum(seconds_per_step(cell, hidden_size, batch, dtype, backward=True))
    # Training has the gradients of the input and of both matrices too.
    products = (4 if training else 1) * product_seconds(cell, hidden_size, batch, dtype)
    return steps * (loop + products)


def product_seconds(cell: Cell, hidden_size: int, batch: int, dtype: torch.dtype) -> float:
    """The predicted time of a step's part of a product over all steps, as that with the input is."""
    return 2 * batch * GATES[cell] * hidden_size**2 / OPERATIONS[dtype]


__all__ = ["Seconds", "product_seconds", "seconds", "seconds_per_step"]
