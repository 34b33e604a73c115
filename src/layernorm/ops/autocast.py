"""What autocast does to the tensors of a recurrent operator."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(tensors: list[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Return all tensors in autocast's precision where it is on, as ``torch.nn``'s layers do."""
    if not torch.is_autocast_enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
