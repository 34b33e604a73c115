"""Products of rows with a layer's matrices."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from layernorm.gpu import settings
from layernorm.gpu.launching import launch, precision
from layernorm.gpu.recurrent import product_kernels

# Before PyTorch 2.8 a product of half precision has no float32 result.
_HAS_WIDE_SUMS: Final = "dtype" in torch.ops.aten.mm.overloads()


def product(
    a: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    transposed: bool = True,
    of_steps: bool = False,
) -> Tensor:
    """Write a (rows, depth) times the weight's transpose, or the weight, plus a bias to out (rows, columns).

    All are contiguous. A row's bits depend on the sizes of the weight alone. With ``of_steps`` they are those
    of the steps' own products, which it computes again.
    """
    columns, depth = weight.shape if transposed else weight.shape[::-1]
    rows = a.size(0)
    tile = (settings.product_tile if of_steps else settings.sequence_tile)(columns, a.dtype)
    launch(
        product_kernels.product,
        (-(-rows // tile.rows) * -(-columns // tile.columns),),
        a,
        a,
        weight,
        bias,
        out,
        rows,
        COLUMNS=columns,
        DEPTH=depth,
        B_COLUMN=depth if transposed else 1,
        B_DEPTH=1 if transposed else columns,
        PRECISION=precision(),
        **tile.options(),
    )
    return out


def sum_of_outer(a: Tensor, b: Tensor, total: Tensor) -> None:
    """Add aᵀ b over all rows of a (rows, m) and b (rows, n) to total (m, n), in float32, its type."""
    if a.dtype == torch.float32:
        total.addmm_(a.t(), b)
    elif a.is_cuda and _HAS_WIDE_SUMS:
        total += torch.mm(a.t(), b, out_dtype=torch.float32)
    else:
        total.addmm_(a.t().float(), b.float())
