"""Every private name of PyTorch's that this package uses: what to look through when PyTorch changes.

Most are aliases, which cost nothing per call.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, Final

with warnings.catch_warnings():
    # PyTorch says so on import where there is no NumPy, which nothing here needs.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
    from torch.nn.utils.parametrizations import _WeightNorm as WeightNormParametrization
    from torch.utils import _python_dispatch


#: What ``torch.nn.RNNBase`` does in its own way, as other modules do it.
module_apply: Final = torch.nn.Module._apply
replicate_module: Final = torch.nn.Module._replicate_for_data_parallel
#: What a ``torch.nn.RNNBase`` does after its parameters have been set from outside.
init_flat_weights: Final = torch.nn.RNNBase._init_flat_weights
#: The name of a module's extra state in its state dict.
EXTRA_STATE: Final[str] = torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX
#: Whether a transform of ``torch.func`` or ``torch.vmap`` is at work around this call.
are_transforms_active: Final = torch._C._are_functorch_transforms_active
#: Whether autocast is on for any device.
is_any_autocast_enabled: Final = torch._C._is_any_autocast_enabled
#: How many modes of ``__torch_dispatch__`` are active.
count_dispatch_modes: Final = torch._C._len_torch_dispatch_stack
#: A context in which operators are called beneath autograd.
below_autograd: Final = torch._C._AutoDispatchBelowAutograd
#: Those modes.
dispatch_modes: Final = _python_dispatch._get_current_dispatch_mode_stack


def is_jit_tracing() -> bool:
    """Return whether ``torch.jit.trace`` records this call."""
    return torch._C._get_tracing_state() is not None


def is_cast_by_autocast(operator: str) -> bool:
    """Return whether autocast on GPUs has an operator of PyTorch's on its list."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "AutocastCUDA"))


def is_batched(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds a batch of gradients (``is_grads_batched``), which no kernel can read."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))


def saved_tensors_hooks() -> tuple[Any, Any] | None:
    """Return the hooks that autograd would now pack and unpack saved tensors with, if there are any.

    PyTorch before 2.6 does not tell.
    """
    tell = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks: tuple[Any, Any] | None = None if tell is None else tell(False)
    return hooks


def recorder_of(function: type[torch.autograd.Function]) -> Any:
    """Return ``function.apply`` for calls outside of ``torch.func``'s transforms."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _increment_versions(tensors: tuple[torch.Tensor]) -> None:
    """Do what ``torch._C._increment_version`` does, for PyTorch before 2.7, which takes one tensor."""
    torch._C._increment_version(*tensors)


def used_by_the_kernels() -> dict[str, Any]:
    """Return what the compiled kernels use of PyTorch, by the names that ``csrc/binding`` has for it.

    The symbols are of C functions, but for the one that gives Python's object for a tensor. Where one is
    missing the kernels do without, and take a little longer.
    """
    tensor = torch.Tensor
    increment_version: Any = torch._C._increment_version
    try:
        increment_version(())
    except (TypeError, RuntimeError):
        increment_version = _increment_versions
    prefix, suffix = {"win32": ("", "dll"), "darwin": ("lib", "dylib")}.get(sys.platform, ("lib", "so"))
    libraries = os.path.join(os.path.dirname(torch.__file__), "lib", prefix)
    return {
        "Tensor": tensor,
        "Parameter": torch.nn.Parameter,
        "dtypes": (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool),
        "strided": torch.strided,
        **{name: getattr(tensor, name) for name in ("is_neg", "new_empty", "fill_", "contiguous", "to")},
        "increment_version": increment_version,
        "function_modes": torch._C._len_torch_function_stack,
        "dispatch_modes": count_dispatch_modes,
        "is_tracing": torch._C._is_tracing,
        "transforms": are_transforms_active,
        "forward_ad": torch.autograd.forward_ad,
        "grad_mode": torch.is_grad_enabled,
        "num_threads": torch.get_num_threads,
        "exchange": getattr(tensor, "__dlpack_c_exchange_api__", None),
        "cpu_library": f"{libraries}torch_cpu.{suffix}",
        "parallel_for": "torch_parallel_for",
        "count_threads": "torch_get_num_threads",
        "empty_strided": "aoti_torch_empty_strided",
        "data_of": "aoti_torch_get_data_ptr",
        "sizes_of": "aoti_torch_get_sizes",
        "strides_of": "aoti_torch_get_strides",
        "destroy": "aoti_torch_delete_tensor_object",
        "python_library": f"{libraries}torch_python.{suffix}",
        "wrap": "_Z16THPVariable_WrapRKN2at10TensorBaseE",
        "wrap_by_value": "_Z16THPVariable_WrapN2at10TensorBaseE",  # before PyTorch 2.9
    }


def is_in_forward_mode() -> bool:
    """Return whether a level of forward-mode derivatives is entered."""
    return torch.autograd.forward_ad._current_level >= 0


def context_of_backward() -> Any:
    """Return the context (``contextvars``) that called backward, in PyTorch's threads for it; else None."""
    return torch._C._get_obj_in_tls("context") if torch._C._is_key_in_tls("context") else None


def global_forward_pre_hooks() -> dict[int, Any]:
    """Return the forward pre-hooks that every module runs."""
    hooks: dict[int, Any] = getattr(torch.nn.modules.module, "_global_forward_pre_hooks", {})
    return hooks


def is_flop_counter_mode(mode: Any, counter: Any) -> bool:
    """Return whether a dispatch mode is one of ``torch.utils.flop_counter``'s."""
    return isinstance(mode, getattr(counter, "_FlopCounterMode", counter.FlopCounterMode))


__all__ = [
    "EXTRA_STATE",
    "BatchNormBase",
    "FakeTensor",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "WeightNormParametrization",
    "are_transforms_active",
    "below_autograd",
    "context_of_backward",
    "count_dispatch_modes",
    "dispatch_modes",
    "global_forward_pre_hooks",
    "init_flat_weights",
    "is_any_autocast_enabled",
    "is_batched",
    "is_cast_by_autocast",
    "is_flop_counter_mode",
    "is_in_forward_mode",
    "is_jit_tracing",
    "module_apply",
    "recorder_of",
    "replicate_module",
    "saved_tensors_hooks",
    "used_by_the_kernels",
]
