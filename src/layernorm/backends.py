"""Which kernel serves which operator, why, and how to choose another.

There are five kernels: ``native``, this package's compiled ones on the CPU; ``triton``, those on GPUs;
``persistent``, a recurrent layer's on GPUs that keeps the weights on the chip, for sizes that fit there;
``torch``, PyTorch's own operators; ``reference``, the plain definitions of ``layernorm.reference``. The
choice depends on the operator, the device, the dtype and the layer's sizes, never on the number of rows: a
row's bits do not depend on its batch.

The environment variable ``LAYERNORM_BACKEND`` overrides it for the process, ``use`` for a ``with`` block in
one thread or asyncio task. ``LAYERNORM_CPU_CAPABILITY`` chooses the instruction set of the compiled kernels;
``capability`` tells which it is.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_compiling

from layernorm import ops, override
from layernorm.gpu import settings
from layernorm.override import KERNELS as KERNELS
from layernorm.override import use as use
from layernorm.variants import Variant

#: Those that this package's operators have.
OPERATORS: Final = ("native", "triton", "persistent")
NORMS: Final = ops.NORMS
RECURRENT: Final = ("lstm", "gru", "rnn")
#: Recurrent too, but for the CPU alone.
GATES: Final = "lstm_gates"
NATIVE_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRITON_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
VARIABLE: Final = "LAYERNORM_BACKEND"
_HAS_TRITON: Final = importlib.util.find_spec("triton") is not None
_PLAIN: Final = (Tensor, torch.nn.Parameter)
# What stands for them while a program is traced.
_TRACED: Final = (*_PLAIN, FakeTensor, FunctionalTensor)

# Of the process; ``override`` has those of contexts.
_override: str | None = os.environ.get(VARIABLE) or None


class Choice(NamedTuple):
    """The kernel that serves a call, and the reason in one line."""

    kernel: str
    reason: str


def choose(operator: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The kernel for ``operator`` on tensors of this device and dtype, here and now.

    Args:
        operator: one of ``NORMS`` or ``RECURRENT``, or ``GATES``.
        device: where the input lies.
        dtype: the input's dtype.

    Raises:
        ValueError: ``LAYERNORM_BACKEND`` names no kernel, or there is no such operator.
        TypeError: ``device`` or ``dtype`` is something else.
        RuntimeError: the override asks for a compiled kernel that does not exist.

    Examples:
        >>> import torch
        >>> from layernorm import backends
        >>> backends.choose("lstm", torch.device("meta"), torch.float32).kernel
        'reference'
    """
    if operator not in (*NORMS, *RECURRENT, GATES):
        raise ValueError(
            f"operator must be one of {', '.join((*NORMS, *RECURRENT, GATES))}; got {operator!r}"
        )
    for name, given, kind in (("device", device, torch.device), ("dtype", dtype, torch.dtype)):
        if not isinstance(given, kind):
            raise TypeError(f"{name} must be a torch.{kind.__name__}, got {type(given).__name__}")
    return _chosen(operator, device, dtype)


def _chosen(operator: str, device: torch.device, dtype: torch.dtype) -> Choice:
    if operator == GATES and device.type == "cuda":
        return Choice("reference", "it has no kernel for GPUs")
    if (kernel := _asked_for()) is not None:
        return _forced(override.checked(kernel, VARIABLE), operator, device, dtype)
    other = "torch" if operator in NORMS else "reference"
    if device.type == "cuda":
        return _on_gpu(operator, device, dtype, other)
    if not _has_native(device, dtype):
        return Choice(other, "the compiled kernels are for floating-point tensors on the CPU")
    if ops.NATIVE_PROBLEM is not None:
        return Choice(other, f"no compiled kernels: {ops.NATIVE_PROBLEM}")
    if is_compiling() and operator in NORMS:
        return Choice(other, "inside torch.compile PyTorch's norm fuses with its neighbours")
    if torch._C._are_functorch_transforms_active():
        return Choice(other, "torch.func transforms")
    if operator not in NORMS and _in_forward_mode():
        return Choice(other, "forward-mode derivatives")
    if is_traced():
        return Choice(other, "torch.jit.trace records PyTorch's operators")
    return Choice("native", "compiled for the CPU")


def _on_gpu(operator: str, device: torch.device, dtype: torch.dtype, other: str) -> Choice:
    if (problem := triton_problem(dtype)) is not None:
        return Choice(other, problem)
    if is_compiling() and operator in NORMS:
        return Choice(other, "inside torch.compile PyTorch's norm fuses with its neighbours")
    if torch._C._are_functorch_transforms_active():
        return Choice(other, "torch.func transforms")
    if operator in NORMS:
        return _measured(operator, device, dtype)
    if _in_forward_mode():
        return Choice(other, "forward-mode derivatives")
    if is_traced():
        return Choice(other, "torch.jit.trace records PyTorch's operators")
    return Choice("triton", "Triton's, for any size and variant")


def tier(
    cell: str,
    variant: Variant,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    projected: bool = False,
    backward: bool = False,
) -> Choice:
    """Of a recurrent layer that this package's kernels serve on a GPU: ``persistent`` or ``triton``, and why.

    Args:
        cell: ``"lstm"``, ``"gru"``, ``"rnn"``, or the latter with its nonlinearity: ``"rnn_tanh"``.
        variant: the spec.
        hidden_size: H.
        dtype: of input and parameters.
        device: the GPU.
        projected: whether h is projected.
        backward: of the derivative.
    """
    return _tier(cell, variant, hidden_size, dtype, device, projected, backward, _asked_for())


@functools.cache
def _tier(
    cell: str,
    variant: Variant,
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
    architecture = torch.cuda.get_device_capability(device)
    fields = (variant.kind, variant.inputs, variant.scope, variant.cell, hidden_size, projected, dtype)
    ask = persistent.backward_problem if backward else persistent.problem
    problem = ask(cell, *fields, 10 * architecture[0] + architecture[1])
    if problem is not None:
        return Choice("triton", problem)
    if override == "persistent":
        return Choice("persistent", "the override asks for it")
    name = f"compute capability {architecture[0]}.{architecture[1]}"
    faster = settings.PERSISTENT.get(architecture)
    if faster is None:
        return Choice("triton", f"the persistent kernel has not been measured on {name} yet")
    if hidden_size > faster.get(cell, (0, 0))[backward]:
        return Choice("triton", f"measured as faster on {name}")
    return Choice("persistent", f"measured as faster on {name}")


@functools.cache
def _measured(operator: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """What the measurement on devices like this one says."""
    architecture = torch.cuda.get_device_capability(device)
    name = f"compute capability {architecture[0]}.{architecture[1]}"
    faster = settings.FASTER.get(architecture)
    if faster is None:
        return Choice("torch", f"the Triton kernels have not been measured on {name} yet")
    if (operator, str(dtype).removeprefix("torch.")) not in faster:
        return Choice("torch", f"measured as faster on {name}")
    return Choice("triton", f"measured as at least as fast as PyTorch's on {name}")


def triton_problem(dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot serve tensors of this dtype on a GPU, or None."""
    if dtype not in TRITON_DTYPES:
        return "the Triton kernels are for float32, bfloat16 and float16"
    if not _HAS_TRITON:
        return "Triton is not installed"
    if ops.NATIVE_PROBLEM is not None:
        return f"no compiled kernels, which have the derivative: {ops.NATIVE_PROBLEM}"
    return None


def capability() -> str | None:
    """The instruction set of the compiled kernels in use; None without compiled kernels.

    ``"baseline"``, ``"avx2"``, ``"avx512"`` or ``"avx512_bf16"`` on x86-64, ``"neon"`` on ARM; the best
    that the machine can execute, unless ``LAYERNORM_CPU_CAPABILITY`` names another.
    """
    return None if ops.native is None else str(ops.native.capability())


def plain() -> ModuleType | None:
    """The compiled module, where nothing outside a call's own arguments speaks against it."""
    if is_compiling() or _override is not None or (override.used and override.current()):
        return None
    return ops.native


def _asked_for() -> str | None:
    """The kernel that the block around this call or else the process asks for, if any."""
    return (override.used and override.current()) or _override


def foreign(input: object) -> bool:
    """Return whether a tensor is for PyTorch's operators alone: a subclass, sparse, nested, or traced."""
    if not isinstance(input, Tensor) or _asked_for() not in (None, "torch"):
        return False
    if is_traced():
        return True  # and they alone know sizes that are traced themselves
    return type(input) not in _PLAIN or input.layout != torch.strided or input.is_nested


def is_traced() -> bool:
    """Return whether ``torch.jit.trace`` records this call."""
    return torch._C._get_tracing_state() is not None


def distributed(input: object) -> ModuleType | None:
    """``layernorm.distributed`` for a ``DTensor``, unless PyTorch's operators are asked for."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has one who did not import it
    if module is None or not isinstance(input, module.DTensor) or _asked_for() == "torch":
        return None
    return importlib.import_module("layernorm.distributed")


def kernel_for(operator: str, input: Tensor) -> str:
    """The kernel that ``choose`` names for this input.

    Warns, once in a process, where a compiled kernel would have served and there are none.
    """
    kernel = _chosen(operator, input.device, input.dtype).kernel
    if ops.NATIVE_PROBLEM is not None and _asked_for() is None and _has_native(input.device, input.dtype):
        _say_once(f"no compiled kernels: {ops.NATIVE_PROBLEM}")
    return kernel


def recurrent_kernel_for(operator: str, input: Tensor, others: Sequence[Tensor]) -> str:
    """As ``kernel_for``, with the tensors beside the input.

    Where these differ in dtype or device it is the reference, for whose calls those are checked.
    """
    kernel = kernel_for(operator, input)
    if kernel not in OPERATORS:
        return kernel
    device, dtype = input.device, input.dtype  # asking each tensor again would take a microsecond
    autocast = torch.is_autocast_enabled(device.type)
    for t in (input, *others):
        if t.device != device or not (autocast or t.dtype == dtype):
            return "reference"
        if (type(t) not in _TRACED or t.layout != torch.strided) and _asked_for() is None:
            return "reference"
    return kernel


def _in_forward_mode() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def _forced(kernel: str, operator: str, device: torch.device, dtype: torch.dtype) -> Choice:
    if kernel == "torch" and operator not in NORMS:
        return Choice("reference", "the override asks for torch, which has no normalized recurrent operator")
    if kernel == "persistent" and operator in NORMS:
        return Choice("torch", "the override asks for persistent, which is for recurrent operators")
    if kernel == "native":
        if not _has_native(device, dtype):
            raise RuntimeError(
                f"the override asks for the native kernel, and {operator} has none for {dtype} on "
                f"{device.type}"
            )
        if ops.NATIVE_PROBLEM is not None:
            raise RuntimeError(f"the override asks for the native kernel, but {ops.NATIVE_PROBLEM}")
    if kernel in ("triton", "persistent"):
        problem = triton_problem(dtype) if device.type == "cuda" else f"it has no kernel for {device.type}"
        if problem is not None:
            raise RuntimeError(f"the override asks for the {kernel} kernel of {operator}, but {problem}")
    return Choice(kernel, "the override asks for it")


def _has_native(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in NATIVE_DTYPES


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
