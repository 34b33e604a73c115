"""Which kernel computes which operator, why, and how to choose another.

There are six kernels: ``native``, this package's compiled ones on the CPU; ``triton``, those on GPUs;
``looped`` and ``persistent``, a recurrent layer's on GPUs that take it through all steps in one launch and
keep the weights on the chip, of one multiprocessor or of several, for sizes that fit there;
``torch``, PyTorch's own operators; ``reference``, the plain definitions of ``layernorm.reference``. The
choice depends on the operator, the device, the dtype, the layer's sizes and a norm's width, never on the
number of rows: a row's bits do not depend on its batch.

The environment variable ``LAYERNORM_BACKEND`` overrides it for the process, ``use`` for a ``with`` block in
one thread or asyncio task. ``LAYERNORM_CPU_CAPABILITY`` chooses the instruction set of the compiled kernels;
``capability`` tells which it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from layernorm import checks, ops, override
from layernorm.gpu import tiers
from layernorm.gpu.launching import triton_version
from layernorm.override import KERNELS, VARIABLE, Choice, asked_for, use
from layernorm.pytorch_internals import (
    FakeTensor,
    FunctionalTensor,
    are_transforms_active,
    is_in_forward_mode,
    is_jit_tracing,
)
from layernorm.spec import LayerSpec
from layernorm.variants import Variant

#: Those that this package's operators have.
OPERATORS: Final = ("native", "triton", "looped", "persistent")
NORMS: Final = ops.NORMS
RECURRENT: Final = ("lstm", "gru", "rnn")
#: Recurrent too, but for the CPU alone.
GATES: Final = ("lstm_gates", "gru_gates")
# The kernels of their operators on GPUs, beside "triton".
_RECURRENT_ALONE: Final = ("looped", "persistent")
NATIVE_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRITON_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
# Of a norm's row, where nobody says.
_WIDEST: Final = sys.maxsize
_PLAIN: Final = (Tensor, torch.nn.Parameter)
# What stands for them while a program is traced.
_TRACED: Final = (*_PLAIN, FakeTensor, FunctionalTensor)


def _triton_problem() -> str | None:
    """Return why Triton, which is not imported, cannot compile the kernels here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = triton_version()
    if version is None or version >= (3, 2):
        return None
    return f"Triton {'.'.join(map(str, version))} is too old; PyTorch 2.6 comes with the oldest, 3.2"


TRITON_PROBLEM: Final = _triton_problem()


class Call(NamedTuple):
    """What the choice depends on."""

    operator: str
    device: torch.device
    dtype: torch.dtype
    width: int = _WIDEST

    @property
    def is_norm(self) -> bool:
        """Whether a norm is called."""
        return self.operator in NORMS

    @property
    def least_row(self) -> float | None:
        """From how many bytes of a row the Triton norm is chosen; None where nobody measured it."""
        return tiers.least_row(self.operator, self.device, self.dtype)


class Row(NamedTuple):
    """A kernel, when it is the one, and why; a reason may depend on the call."""

    kernel: str | None  # None where this package has none: PyTorch's norm, or the reference
    applies: Callable[[Call], bool]
    reason: str | Callable[[Call], str]


_FUSED: Final = Row(
    None,
    lambda call: call.is_norm and is_compiling(),
    "inside torch.compile PyTorch's norm fuses with its neighbours",
)
_TRANSFORMED: Final = Row(None, lambda call: are_transforms_active(), "torch.func transforms")
_FORWARD_MODE: Final = Row(
    None, lambda call: not call.is_norm and is_in_forward_mode(), "forward-mode derivatives"
)
_JIT: Final = Row(None, lambda call: is_jit_tracing(), "torch.jit.trace records PyTorch's operators")
_ONNX: Final = Row(
    None,
    lambda call: is_compiling() and torch.onnx.is_in_onnx_export(),
    "torch.onnx.export translates PyTorch's operators",
)

#: The choice on a CPU and on any device but a GPU: the first row that applies.
ON_CPU: Final = (
    Row(
        None,
        lambda call: not _is_native(call.device, call.dtype),
        "the compiled kernels are for floating-point tensors on the CPU",
    ),
    Row(
        None,
        lambda call: ops.NATIVE_PROBLEM is not None,
        lambda call: f"no compiled kernels: {ops.NATIVE_PROBLEM}",
    ),
    _FUSED,
    _TRANSFORMED,
    _FORWARD_MODE,
    _JIT,
    _ONNX,
    Row("native", lambda call: True, "compiled for the CPU"),
)

#: The choice on a GPU.
ON_GPU: Final = (
    Row(
        None,
        lambda call: triton_problem(call.dtype) is not None,
        lambda call: str(triton_problem(call.dtype)),
    ),
    _FUSED,
    _TRANSFORMED,
    Row(
        "torch",
        lambda call: call.is_norm and call.least_row is None,
        lambda call: f"the Triton kernels have not been measured on {tiers.name_of(call.device)} yet",
    ),
    Row(
        "torch",
        lambda call: call.is_norm and call.width * call.dtype.itemsize < (call.least_row or 0),
        lambda call: f"measured as faster on {tiers.name_of(call.device)} for such rows",
    ),
    Row(
        "triton",
        lambda call: call.is_norm,
        lambda call: (
            f"measured as at least as fast as PyTorch's on {tiers.name_of(call.device)}, from "
            f"{call.least_row} bytes of a row"
        ),
    ),
    _FORWARD_MODE,
    _JIT,
    _ONNX,
    Row("triton", lambda call: True, "Triton's, for any size and variant"),
)


def choose(operator: str, device: torch.device, dtype: torch.dtype, width: int = _WIDEST) -> Choice:
    """Return the kernel for ``operator`` on tensors of this device and dtype, here and now.

    Args:
        operator: one of ``NORMS``, ``RECURRENT`` or ``GATES``.
        device: where the input lies.
        dtype: the input's dtype.
        width: the elements of a norm's row, on which its kernel may depend on a GPU.

    Raises:
        ValueError: ``LAYERNORM_BACKEND`` names no kernel, or there is no such operator.
        TypeError: ``device``, ``dtype`` or ``width`` is something else.
        RuntimeError: the override asks for a compiled kernel that does not exist.

    Examples:
        >>> import torch
        >>> from layernorm import backends
        >>> backends.choose("lstm", torch.device("meta"), torch.float32).kernel
        'reference'
    """
    if operator not in (*NORMS, *RECURRENT, *GATES):
        raise ValueError(
            f"operator must be one of {', '.join((*NORMS, *RECURRENT, *GATES))}; got {operator!r}"
        )
    for name, given, kind in (("device", device, torch.device), ("dtype", dtype, torch.dtype)):
        if not isinstance(given, kind):
            raise TypeError(f"{name} must be a torch.{kind.__name__}, got {type(given).__name__}")
    if not isinstance(width, int):
        raise TypeError(f"width must be an int, got {type(width).__name__}")
    return _choose(Call(operator, device, dtype, width))


def _choose(call: Call) -> Choice:
    on_gpu = call.device.type == "cuda"
    if on_gpu and call.operator in GATES:
        return Choice("reference", "it has no kernel for GPUs")
    if (kernel := asked_for()) is not None:
        return _forced(override.checked(kernel, VARIABLE), call)
    for row in ON_GPU if on_gpu else ON_CPU:
        if row.applies(call):
            kernel = row.kernel or ("torch" if call.is_norm else "reference")
            return Choice(kernel, row.reason if isinstance(row.reason, str) else row.reason(call))
    raise AssertionError("the last row of a table applies to every call")


def _forced(kernel: str, call: Call) -> Choice:
    """Return the kernel that the override asks for, or the nearest to it; raise where it does not exist."""
    if kernel == "torch" and not call.is_norm:
        return Choice("reference", "the override asks for torch, which has no normalized recurrent operator")
    if kernel in _RECURRENT_ALONE and call.is_norm:
        return Choice("torch", f"the override asks for {kernel}, which is for recurrent operators")
    if kernel == "native":
        if not _is_native(call.device, call.dtype):
            raise RuntimeError(
                f"the override asks for the native kernel, and {call.operator} has none for {call.dtype} on "
                f"{call.device.type}"
            )
        if ops.NATIVE_PROBLEM is not None:
            raise RuntimeError(f"the override asks for the native kernel, but {ops.NATIVE_PROBLEM}")
    if kernel in ("triton", *_RECURRENT_ALONE):
        on_gpu = call.device.type == "cuda"
        problem = triton_problem(call.dtype) if on_gpu else f"it has no kernel for {call.device.type}"
        if problem is not None:
            raise RuntimeError(f"the override asks for the {kernel} kernel of {call.operator}, but {problem}")
    return Choice(kernel, "the override asks for it")


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
    """Return which kernel computes a recurrent layer on a GPU, and why.

    It is ``persistent``, ``looped`` or, with launches for each step, ``triton``.

    Args:
        cell: ``"lstm"``, ``"gru"``, ``"rnn"``, or the last with its nonlinearity: ``"rnn_relu"``.
        variant: the spec.
        hidden_size: H.
        dtype: of input and parameters.
        device: the GPU.
        projected: whether h is projected.
        backward: whether the derivative is asked for.
    """
    name, _, nonlinearity = cell.partition("_")
    spec = LayerSpec(name, variant, checks.nonlinearity(nonlinearity or "tanh"))  # type: ignore[arg-type]
    return tiers.tier(spec, hidden_size, dtype, device, projected=projected, backward=backward)


def triton_problem(dtype: torch.dtype) -> str | None:
    """Return why the Triton kernels cannot take tensors of this dtype on a GPU, or None."""
    if dtype not in TRITON_DTYPES:
        return "the Triton kernels are for float32, bfloat16 and float16"
    return TRITON_PROBLEM


def capability() -> str | None:
    """Return the instruction set of the compiled kernels in use; None without compiled kernels.

    ``"baseline"``, ``"avx2"``, ``"avx512"`` or ``"avx512_bf16"`` on x86-64, ``"neon"`` on ARM; the best
    that the machine can execute, unless ``LAYERNORM_CPU_CAPABILITY`` names another.
    """
    return None if ops.native is None else str(ops.native.capability())


def compiled_module() -> ModuleType | None:
    """Return the compiled module where nothing but a call's own arguments speaks against its kernels."""
    if is_compiling() or override.process is not None or (override.used and override.current()):
        return None
    return ops.native


def distributed_module(input: object) -> ModuleType | None:
    """Return ``layernorm.distributed`` for a ``DTensor``, unless PyTorch's operators are asked for."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has one who did not import it
    if module is None or not isinstance(input, module.DTensor) or asked_for() == "torch":
        return None
    return importlib.import_module("layernorm.distributed")


def is_for_pytorch_alone(input: object) -> bool:
    """Return whether only PyTorch's operators take a tensor: a subclass, sparse, nested, or traced."""
    if not isinstance(input, Tensor) or asked_for() not in (None, "torch"):
        return False
    if is_jit_tracing():
        return True  # and they alone know sizes that are traced themselves
    return type(input) not in _PLAIN or input.layout != torch.strided or input.is_nested


def kernel_for(operator: str, input: Tensor, width: int = _WIDEST) -> str:
    """Return the kernel that ``choose`` names for this input, and for this width of a norm's rows.

    Warns, once in a process, where a compiled kernel would have been chosen and there are none, and where a
    recurrent layer on a GPU is computed by the reference, or by kernels that have not been measured there.
    """
    call = Call(operator, input.device, input.dtype, width)
    kernel = _choose(call).kernel
    if asked_for() is None and not is_compiling():  # a traced program cannot warn
        if ops.NATIVE_PROBLEM is not None and _is_native(call.device, call.dtype):
            _warn_once("native", _WITHOUT_KERNELS.format(ops.NATIVE_PROBLEM))
        elif call.device.type == "cuda" and not call.is_norm and kernel not in _said:
            _warn_once(kernel, notice_on_gpu(kernel, call.device, call.dtype))
    return kernel


def notice_on_gpu(kernel: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what is said of a recurrent kernel on a GPU where it is not known to be fast, or None."""
    problem = triton_problem(dtype)
    if not torch.cuda.is_available():  # a program is traced for a GPU elsewhere
        return None
    if kernel == "triton" and not tiers.is_verified(device):
        return _UNMEASURED.format(tiers.name_of(device))
    if kernel == "reference" and problem is not None:
        return _REFERENCE.format(tiers.name_of(device), problem)
    return None


def recurrent_kernel_for(operator: str, input: Tensor, others: Sequence[Tensor]) -> str:
    """Return the kernel for this input together with other tensors.

    Where these differ in dtype or device it is the reference, for whose calls those are checked.
    """
    kernel = kernel_for(operator, input)
    if kernel not in OPERATORS:
        return kernel
    device, dtype = input.device, input.dtype  # asking each tensor again would take a microsecond
    for t in (input, *others):
        if t.device != device or not (
            t.dtype == dtype or (kernel == "native" and checks.is_wide_vector(t, dtype))
        ):
            return "reference"
        if (type(t) not in _TRACED or t.layout != torch.strided) and asked_for() is None:
            return "reference"
    return kernel


def _is_native(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether there are compiled kernels for such tensors."""
    return device.type == "cpu" and dtype in NATIVE_DTYPES


# Of which kernels it has been said.
_said: set[str] = set()
# What is said where kernels are missing, and where it is not known what they are worth.
_WITHOUT_KERNELS: Final = (
    "no compiled kernels: {}. PyTorch's operators serve instead, and recurrent layers go step by step in "
    "Python: an LSTM that takes 2 ms takes 60. To compile the kernels, or to be told what is missing: "
    "LAYERNORM_NATIVE=1 pip install --force-reinstall --no-cache-dir --no-deps layernorm. "
    f"{VARIABLE}=torch silences this"
)
_CHOOSE: Final = f'{VARIABLE}=reference or layernorm.backends.use("reference")'
_UNMEASURED: Final = (
    "the Triton kernels compute the recurrent layers, and no measurement has covered them on {} yet; "
    f"{_CHOOSE} chooses PyTorch's operators, step by step, and {VARIABLE}=triton silences this"
)
_REFERENCE: Final = (
    "the reference computes the recurrent layers on {}, step by step by PyTorch's operators, because {}; "
    f"{_CHOOSE} silences this"
)


def _warn_once(what: str, text: str | None) -> None:
    if text is not None and what not in _said:
        _said.add(what)
        warnings.warn(f"layernorm: {text}.", RuntimeWarning, stacklevel=4)


__all__ = [
    "GATES",
    "KERNELS",
    "NORMS",
    "RECURRENT",
    "Choice",
    "capability",
    "choose",
    "tier",
    "use",
]
