"""Tensors whose rows are read where they lie, at one stride or two."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from layernorm.gpu.launching import ALIGNED, is_aligned


class Rows(NamedTuple):
    """A tensor whose rows can be read in place, and where they lie.

    Attributes:
        tensor: None stands for no tensor.
        inner: rows of the inner dimension.
        outer, stride: elements between rows of the outer dimension, and of the inner.
    """

    tensor: Tensor | None
    inner: int
    outer: int
    stride: int

    @property
    def is_nested(self) -> bool:
        """Whether its rows lie at two strides."""
        return self.inner != 1

    @property
    def places(self) -> tuple[int, int, int]:
        """The kernels' arguments."""
        return self.inner, self.outer, self.stride


NO_ROWS: Final = Rows(None, 1, 0, 0)


def rows_of(tensor: Tensor, leading: int, width: int) -> Rows:
    """Return the tensor itself where its rows lie at one or two strides, else a copy."""
    found = (1, width, width) if tensor.is_contiguous() else _strides(tensor, leading, width)
    if found is not None:
        inner, outer, stride = found
        # Vectors are read wherever the width allows them, so that a row has the same bits in any layout.
        in_place = outer % ALIGNED == 0 and stride % ALIGNED == 0 and is_aligned(tensor)
        if width % ALIGNED != 0 or in_place:
            return Rows(tensor, inner, outer, stride)
    return Rows(tensor.clone(memory_format=torch.contiguous_format), 1, width, width)


def _strides(tensor: Tensor, leading: int, width: int) -> tuple[int, int, int] | None:
    """Return the size of the inner dimension of rows, outer and inner stride; None for more dimensions."""
    expected = 1
    for dim in range(tensor.dim() - 1, leading - 1, -1):
        if tensor.size(dim) != 1:
            if tensor.stride(dim) != expected:
                return None
            expected *= tensor.size(dim)
    dims: list[
        tuple[int, int]
    ] = []  # size and stride from the innermost out, those that continue one another as one
    for dim in range(leading - 1, -1, -1):
        size, stride = tensor.size(dim), tensor.stride(dim)
        if size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, stride))
    if not dims:
        return 1, width, width
    inner, stride = dims[0]
    if len(dims) == 1:
        return 1, stride, stride
    return (inner, dims[1][1], stride) if len(dims) == 2 else None
