"""The choice among kernels on a GPU, by what was measured on devices of its architecture."""

from __future__ import annotations

import functools
import math

import torch

from layernorm.gpu import settings
from layernorm.override import Choice, asked_for
from layernorm.spec import LayerSpec


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
    """Return which kernel computes a recurrent layer, ``persistent`` or ``triton``, and why.

    Args:
        spec: what the layer computes.
        hidden_size: H.
        dtype: of input and parameters.
        device: the GPU.
        projected: whether h is projected.
        backward: whether the derivative is asked for.
    """
    return _tier(spec, hidden_size, dtype, device, projected, backward, asked_for())


@functools.cache
def _tier(
    spec: LayerSpec,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    projected: bool,
    backward: bool,
    override: str | None,
) -> Choice:
    from layernorm.gpu.persistent import launches as persistent

    if override == "triton":
        return Choice("triton", "the override asks for it")
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
