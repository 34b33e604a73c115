"""Measuring on a GPU: its clock, its graphs, its memory, and whether there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from benchmarks.core.subjects import Subject
from benchmarks.core.timing import Call, Clock
from layernorm import backends


class Instant:
    """A place in the GPU's queue; the difference of two is seconds."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Instant) -> float:
        """Wait for both and return the GPU's seconds between them."""
        self._event.synchronize()
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1e3


def clock(device: str) -> Clock:
    """Return what tells the time of work on a device."""
    return Instant if device == "cuda" else time.perf_counter


def synchronize(device: str) -> None:
    """Wait for the device's work."""
    if device == "cuda":
        torch.cuda.synchronize()


def kernels(device: str, kernel: str = "triton") -> Callable[[], Any]:
    """Return a context in which this package's kernels are used, on a GPU those of this name.

    On a GPU the choice may still be PyTorch's; a benchmark measures ours next to it.
    """
    return (lambda: backends.use(kernel)) if device == "cuda" else nullcontext


def in_graph(call: Call, device: str) -> Call:
    """Return the same work as a CUDA graph, which the CPU issues at once; elsewhere the call itself."""
    if device != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # workspaces and plans are made before the capture
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(subject: Subject, device: str) -> int | None:
    """Return the most memory that a call allocates at a time; None without a GPU."""
    if device != "cuda":
        return None
    subject.release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with subject.context():
        subject.call()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def exact_float32() -> Iterator[None]:
    """Multiply float32 as float32 within the block; cuDNN may round it to TF32 otherwise."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@contextmanager
def as_cudnn() -> Iterator[None]:
    """Multiply float32 matrices within the block as cuDNN's recurrent layers do, by default in TF32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def problem() -> str | None:
    """Return why nothing can be measured on a GPU here, None where it can."""
    if not torch.cuda.is_available():
        return "this benchmark needs a GPU, and PyTorch finds none (torch.cuda.is_available() is False)"
    return backends.triton_problem(torch.float32)
