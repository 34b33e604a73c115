"""Which kernel serves which operator, why, and how to choose another.

There are three kernels: ``native``, this package's compiled one; ``torch``, PyTorch's own operators;
``reference``, the plain definitions of ``layernorm.reference``. The choice depends on the operator,
the device and the dtype, never on the number of rows: a row's bits do not depend on its batch.

The environment variable ``LAYERNORM_BACKEND`` or ``use`` overrides it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from layernorm import ops

KERNELS: Final = ("native", "torch", "reference")
NORMS: Final = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
RECURRENT: Final = ("lstm", "gru", "rnn")
VARIABLE: Final = "LAYERNORM_BACKEND"

_override: str | None = os.environ.get(VARIABLE) or None


class Choice(NamedTuple):
    """The kernel that serves a call, and the reason in one line."""

    kernel: str
    reason: str


def choose(operator: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The kernel for ``operator`` on tensors of this device and dtype, here and now.

    Args:
        operator: one of ``NORMS`` or ``RECURRENT``.
        device: where the input lies.
        dtype: the input's dtype.

    Raises:
        ValueError: ``LAYERNORM_BACKEND`` names no kernel.
        RuntimeError: the override asks for a compiled kernel that does not exist.

    Examples:
        >>> import torch
        >>> from layernorm import backends
        >>> backends.choose("lstm", torch.device("cpu"), torch.float32).kernel
        'reference'
    """
    if _override is not None:
        return _forced(_checked(_override, VARIABLE), operator, device, dtype)
    if operator in RECURRENT:
        return Choice("reference", "no compiled recurrent kernel in this version")
    if operator != "layer_norm":
        return Choice("torch", "no compiled kernel for this operator in this version")
    if not _has_native(operator, device, dtype):
        return Choice("torch", "the compiled kernel is for float32 on the CPU")
    if ops.NATIVE_PROBLEM is not None:
        return Choice("torch", f"no compiled kernels: {ops.NATIVE_PROBLEM}")
    if torch.compiler.is_compiling():
        return Choice("torch", "inside torch.compile PyTorch's norm fuses with its neighbours")
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return Choice("torch", "torch.func transforms and forward-mode derivatives")
    return Choice("native", "float32 on the CPU")


def kernel_for(operator: str, input: Tensor) -> str:
    """The kernel that ``choose`` names for this input.

    Warns, once in a process, where a compiled kernel would have served and there are none.
    """
    kernel = choose(operator, input.device, input.dtype).kernel
    if (
        ops.NATIVE_PROBLEM is not None
        and _override is None
        and _has_native(operator, input.device, input.dtype)
    ):
        _say_once(f"no compiled kernels: {ops.NATIVE_PROBLEM}")
    return kernel


@contextmanager
def use(kernel: str) -> Iterator[None]:
    """Within the ``with`` block every call in this process is served by ``kernel``.

    Args:
        kernel: ``"native"``, ``"torch"`` or ``"reference"``. An operator that has no kernel of that
            kind raises when it is called; recurrent operators have no ``"torch"`` kernel and keep the
            reference then.

    Raises:
        ValueError: ``kernel`` is none of these.

    Examples:
        >>> import torch, layernorm
        >>> with layernorm.backends.use("reference"):
        ...     output = layernorm.LayerNorm(4)(torch.zeros(2, 4))
    """
    global _override
    before, _override = _override, _checked(kernel, "kernel")
    try:
        yield
    finally:
        _override = before


def _forced(kernel: str, operator: str, device: torch.device, dtype: torch.dtype) -> Choice:
    if kernel == "torch" and operator in RECURRENT:
        return Choice("reference", "PyTorch has no normalized recurrent operator")
    if kernel == "native":
        if not _has_native(operator, device, dtype):
            raise RuntimeError(
                f"the override asks for the native kernel, and {operator} has none for {dtype} on "
                f"{device.type}"
            )
        if ops.NATIVE_PROBLEM is not None:
            raise RuntimeError(f"the override asks for the native kernel, but {ops.NATIVE_PROBLEM}")
    return Choice(kernel, "the override asks for it")


def _has_native(operator: str, device: torch.device, dtype: torch.dtype) -> bool:
    return operator == "layer_norm" and device.type == "cpu" and dtype == torch.float32


def _checked(kernel: str, name: str) -> str:
    if kernel not in KERNELS:
        raise ValueError(f"{name} must be one of {', '.join(KERNELS)}; got {kernel!r}")
    return kernel


_said: set[str] = set()


def _say_once(problem: str) -> None:
    if problem not in _said:
        _said.add(problem)
        warnings.warn(
            f"layernorm: {problem}. PyTorch's operators serve instead; `layernorm info` tells more, and "
            f"{VARIABLE}=torch silences this.",
            RuntimeWarning,
            stacklevel=4,
        )
