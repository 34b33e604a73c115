"""Launches of Triton kernels."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from layernorm.pytorch_internals import FakeTensor, FunctionalTensor

#: What an address, in bytes, and a width or stride, in elements, must be a multiple of to be read by vectors.
ALIGNED: Final = 16
#: Wraps a kernel for a traced program: ``torch.library.wrap_triton``; None outside of one.
Wrap = Callable[[Any], Any] | None


_TYPES: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@functools.cache
def triton_type(dtype: torch.dtype) -> Any:
    """Return what Triton calls a dtype."""
    import triton.language as tl

    return getattr(tl, _TYPES[dtype])


@functools.cache
def triton_version() -> tuple[int, ...] | None:
    """Return major and minor version of Triton, which is not imported; None for a build of another name."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in version.split(".")[:2])


class Launch(NamedTuple):
    """A kernel with its grid and arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """List the launches within the ``with`` block instead of running them."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def launch(
    kernel: Any, grid: tuple[int, ...], on: Tensor, *arguments: Any, wrap: Wrap = None, **options: Any
) -> None:
    """Run the kernel on the device of ``on``, whichever is the current one."""
    if (launches := _recorded.get()) is not None:
        launches.append(Launch(kernel, grid, arguments, options))
        return
    if wrap is not None:
        wrap(kernel)[grid](*arguments, **options)
        return
    if not on.is_cuda or on.device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(on.device):
        kernel[grid](*arguments, **options)


_ran: Final[set[Hashable]] = set()


@contextmanager
def compiled_by(key: Hashable, on: Tensor) -> Iterator[None]:
    """Launch kernels within the ``with`` block, which compiles them the first time.

    Args:
        key: what they are compiled for.
        on: a tensor on their device.

    Raises:
        RuntimeError: that first time is inside the capture of a CUDA graph.
    """
    key = (key, on.device)
    if on.is_cuda and key not in _ran:
        refuse_capture()
    yield
    _ran.add(key)


def refuse_capture() -> None:
    """Raise where the current stream is captured: a kernel is to be compiled and loaded."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "layernorm: kernels are compiled and loaded by the first call of a layer or norm, which is not "
            "possible while a CUDA graph is captured; call it once, with these shapes, before capturing"
        )


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a device, None for another than a GPU."""
    # A program may be traced for a GPU where there is none.
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device) if on_gpu else None


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program can have on a GPU; 0 where PyTorch does not tell."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


def precision() -> str:
    """Return the precision of float32 products, as ``torch.nn.LSTM`` has it on GPUs: "tf32" or "ieee"."""
    of_rnn: str | None = getattr(torch.backends.cudnn.rnn, "fp32_precision", None)
    is_tf32 = torch.backends.cudnn.allow_tf32 if of_rnn is None else of_rnn == "tf32"  # before PyTorch 2.9
    return "tf32" if is_tf32 else "ieee"


def is_aligned(tensor: Tensor) -> bool:
    """Return whether a tensor begins where vectors can be read."""
    # A traced tensor has no address; what runs the program aligns its own tensors.
    return isinstance(tensor, (FakeTensor, FunctionalTensor)) or tensor.data_ptr() % ALIGNED == 0


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor if it is contiguous and aligned, else a copy that is."""
    if tensor.is_contiguous() and is_aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
