"""Autocast's one rule for recurrent layers, cells and gates: everything in its precision.

It is that of PyTorch's own layers on GPUs. Here it holds for every kernel and device: floating-point tensors
but those of float64 are cast before a kernel is chosen, and within a kernel autocast is off.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from layernorm.pytorch_internals import is_any_autocast_enabled


def cast(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors in autocast's precision for a device; as they are where it is off."""
    if not torch.is_autocast_enabled(device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device.type)
    return [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def disabled(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast for a device."""
    if not is_any_autocast_enabled():
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
