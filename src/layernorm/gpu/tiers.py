"""The choice among kernels on a GPU, by what was measured on devices of its architecture."""

from __future__ import annotations

import functools
import math
from typing import Final

import torch

from layernorm.gpu import settings
from layernorm.gpu.launching import precision, shared_memory, triton_version
from layernorm.override import Choice, asked_for
from layernorm.spec import LayerSpec

# Earlier ones know no product of fewer than 16 columns, and some no dependent launch.
_TRITON: Final = (3, 5)


@functools.cache
def _architecture(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def name_of(device: torch.device) -> str:
    """Return the name of a device's architecture."""
    major, minor = _architecture(device)
    return f"compute capability {major}.{minor}"


def is_verified(device: torch.device) -> bool:
    """Return whether the Triton kernels of recurrent layers have been measured on such a device."""
    return _architecture(device) in settings.VERIFIED


def is_dependent(device: torch.device) -> bool:
    """Return whether the kernels of a recurrent layer's step are launched before those before them end."""
    return device.type == "cuda" and _architecture(device) in settings.DEPENDENT and _has_triton()


@functools.cache
def least_row(operator: str, device: torch.device, dtype: torch.dtype) -> float | None:
    """Return from how many bytes of a row a Triton norm is at least as fast as PyTorch's.

    It is infinite where none is, and None where nobody measured it.
    """
    faster = settings.FASTER.get(_architecture(device))
    return None if faster is None else faster.get((operator, str(dtype).removeprefix("torch.")), math.inf)


def tier(
    spec: LayerSpec,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    projected: bool = False,
    backward: bool = False,
) -> Choice:
    """Return which kernel computes a recurrent layer, ``persistent``, ``looped`` or ``triton``, and why.

    Args:
        spec: what the layer computes.
        hidden_size: H.
        dtype: of input and parameters.
        device: the GPU; another where Triton interprets its kernels, or they are only listed.
        projected: whether h is projected.
        backward: whether the derivative is asked for.
    """
    is_exact = dtype == torch.float32 and precision() == "ieee"
    return _tier(spec, hidden_size, dtype, device, projected, backward, is_exact, asked_for())


@functools.cache
def _tier(
    spec: LayerSpec,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    projected: bool,
    backward: bool,
    is_exact: bool,
    override: str | None,
) -> Choice:
    if override == "triton":
        return Choice("triton", "the override asks for it")
    problem = _looped_problem(spec, hidden_size, dtype, device, projected, is_exact)
    if override == "looped":
        kernel = "triton" if problem else "looped"
        return Choice(kernel, problem or "the override asks for it")
    found = Choice("triton", "there is no GPU")
    if device.type == "cuda":
        found = _persistent(spec, hidden_size, dtype, device, projected, backward, override)
    if found.kernel == "persistent" or problem or _looped_is_slower(spec, hidden_size, device, backward):
        return found
    return Choice("looped", found.reason if override == "persistent" else "one launch for all steps")


def _looped_problem(
    spec: LayerSpec,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    projected: bool,
    is_exact: bool,
) -> str | None:
    """Return why no kernel can loop over the steps of a layer, or None."""
    if projected:
        return "h is projected"
    if is_exact:
        return "tensor cores have no exact float32 products"
    needed = settings.loop_bytes(spec.gates, hidden_size, dtype)
    if needed is None:
        return "its weights do not fit on a multiprocessor"
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if _architecture(device) < (8, 0):
        return f"{name_of(device)} has no tensor cores for every dtype"
    if not _has_triton():
        return "products of eight columns need Triton 3.5"
    has = shared_memory(device)
    if needed > has:
        return f"it takes {needed >> 10} KiB of shared memory, and a program has {has >> 10}"
    return None


def _has_triton() -> bool:
    return (triton_version() or _TRITON) >= _TRITON


def _looped_is_slower(spec: LayerSpec, hidden_size: int, device: torch.device, backward: bool) -> bool:
    measured = settings.LOOPED.get(_architecture(device)) if device.type == "cuda" else None
    return measured is not None and hidden_size > measured.get(spec.operation, (0, 0))[backward]


def _persistent(
    spec: LayerSpec,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    projected: bool,
    backward: bool,
    override: str | None,
) -> Choice:
    """Return ``persistent`` where it is to serve, else ``triton``, and why."""
    from layernorm.gpu.persistent import launches as persistent

    architecture = _architecture(device)
    problem = persistent.problem(
        spec,
        hidden_size,
        dtype,
        10 * architecture[0] + architecture[1],
        projected=projected,
        backward=backward,
    )
    if problem is not None:
        return Choice("triton", problem)
    reason = "the override asks for it"
    if override != "persistent":
        faster = settings.PERSISTENT.get(architecture)
        if faster is None:
            return Choice("triton", f"the persistent kernel has not been measured on {name_of(device)} yet")
        reason = f"measured as faster on {name_of(device)}"
        if hidden_size > faster.get(spec.operation, (0, 0))[backward]:
            return Choice("triton", reason)
    problem = persistent.device_problem(spec, hidden_size, dtype, device, backward=backward)
    return Choice("persistent", reason) if problem is None else Choice("triton", problem)
