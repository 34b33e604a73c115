"""Every private name of PyTorch's that this package uses: what to look through when PyTorch changes.

Most are aliases, which cost nothing per call.
"""

from __future__ import annotations

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


#: Whether a transform of ``torch.func`` or ``torch.vmap`` is at work around this call.
are_transforms_active: Final = torch._C._are_functorch_transforms_active
#: Whether autocast is on for any device.
is_any_autocast_enabled: Final = torch._C._is_any_autocast_enabled
#: How many modes of ``__torch_dispatch__`` are active.
count_dispatch_modes: Final = torch._C._len_torch_dispatch_stack
#: Those modes.
dispatch_modes: Final = _python_dispatch._get_current_dispatch_mode_stack


def is_jit_tracing() -> bool:
    """Return whether ``torch.jit.trace`` records this call."""
    return torch._C._get_tracing_state() is not None


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
    return isinstance(mode, counter._FlopCounterMode)


__all__ = [
    "BatchNormBase",
    "FakeTensor",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "WeightNormParametrization",
    "are_transforms_active",
    "context_of_backward",
    "count_dispatch_modes",
    "dispatch_modes",
    "global_forward_pre_hooks",
    "is_any_autocast_enabled",
    "is_flop_counter_mode",
    "is_in_forward_mode",
    "is_jit_tracing",
]
