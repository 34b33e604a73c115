"""How many bytes a forward pass keeps for backward."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def kept_for_backward(forward: Callable[[], Sequence[Tensor]]) -> int:
    """Return the bytes that stay allocated after ``forward``, without its outputs.

    PyTorch's profiler sees every allocation of tensor memory, those of C++ operators too, whose saved
    tensors ``torch.autograd.graph.saved_tensors_hooks`` need not show. Inputs and parameters were there
    before and do not count.

    Args:
        forward: returns its outputs, which hold the graph. Has been called before, so that whatever is
            allocated once has been.

    Examples:
        >>> import torch
        >>> from benchmarks.core.memory import kept_for_backward
        >>> x = torch.randn(1024, requires_grad=True)
        >>> kept_for_backward(lambda: [x.exp().sin()])  # the argument of the sine
        4096
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        outputs = forward()
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    grown: int = sum(event.nbytes() for event in events if event.name() == "[memory]")
    return grown - bytes_of(outputs)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
