"""What tests ask of the process and change in it for a while: versions, threads, the instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from layernorm import ops

#: PyTorch's version.
TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

#: The instruction sets of the compiled kernels that this machine can execute, the best last.
CAPABILITIES: tuple[str, ...] = tuple(ops.native.capabilities()) if ops.native is not None else ("none",)


def needs_torch(major: int, minor: int, why: str) -> pytest.MarkDecorator:
    """Skip a test where PyTorch is older, and say what that cannot do."""
    return pytest.mark.skipif((major, minor) > TORCH, reason=f"PyTorch {TORCH[0]}.{TORCH[1]} {why}")


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Let PyTorch have this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def instruction_set(capability: str) -> Iterator[None]:
    """Let the compiled kernels use this instruction set."""
    before = ops.native.capability()
    assert ops.native.use_capability(capability)
    try:
        yield
    finally:
        ops.native.use_capability(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors with NaN, so that an element that nobody wrote shows."""
    deterministic = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]
