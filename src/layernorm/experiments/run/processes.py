"""Data parallel training: the processes that ``torchrun`` started, and what they share.

Without ``torchrun`` only one process runs, and everything here is the identity.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from layernorm.experiments.task import ExperimentError

_Value = TypeVar("_Value")


@contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """Join the processes of ``torchrun`` in one group within the block: gloo on CPUs, NCCL on GPUs.

    Yields:
        The device of this process: ``cuda`` means the GPU of its local rank.

    Raises:
        ExperimentError: there is no such device, or another process was lost.
    """
    try:
        own = torch.device(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ExperimentError(f"--device: cannot use {device!r}: {reason}") from error
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield own
        return
    if device == "cuda":
        own = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield own
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        reason = str(error).splitlines()[0].split("] ")[-1].split(". ")[0]
        raise ExperimentError(
            f"process {rank()} of {count()} lost another one ({reason}); the same command goes on from the "
            "last checkpoint"
        ) from error
    finally:
        # Gloo's threads let go of the last tensors with Python's lock, for which whoever destroys the group
        # while holding it would wait for ever.
        time.sleep(0.1)
        dist.destroy_process_group()


def _is_loss(error: Exception) -> bool:
    """Return whether a collective failed for want of a peer; gloo says so in a plain RuntimeError."""
    told = ("Connection closed by peer", "Connection reset by peer", "Timed out", "Broken pipe", "gloo")
    return isinstance(error, dist.DistError) or any(words in str(error) for words in told)


def rank() -> int:
    """Return the number of this process; 0 leads: it evaluates, writes and speaks."""
    return dist.get_rank() if _several() else 0


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _several() else 1


def summed(*numbers: float) -> list[float]:
    """Sum each number over the processes."""
    if not _several():
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return cast(list[float], sums.tolist())


def from_leader(value: _Value) -> _Value:
    """Return what process 0 has given; the others' values are not used."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(tensor: Tensor) -> Tensor:
    """Gather the tensors (cases, ...) of all processes one after another, with gradients to each.

    The processes may have different numbers of cases.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.run import processes
        >>> processes.gather(torch.ones(2, 3)).shape  # one process
        torch.Size([2, 3])
    """
    if not _several():
        return tensor
    cases = torch.tensor([len(tensor)], device=tensor.device)
    everyone = [torch.empty_like(cases) for _ in range(count())]
    dist.all_gather(everyone, cases)
    sizes = [int(size) for size in everyone]
    # A collective wants equal shapes.
    padding = tensor.new_zeros(max(sizes) - len(tensor), *tensor.shape[1:])
    parts = cast(tuple[Tensor, ...], _Gather.apply(torch.cat((tensor, padding))))  # type: ignore[no-untyped-call]
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    """Every process's tensor; each has a part of the loss, so the gradients of one's own tensor add up."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(tensor) for _ in range(count())]
        dist.all_gather(parts, tensor.contiguous())
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        whole = torch.stack(gradients)
        dist.all_reduce(whole)
        return whole[rank()]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
