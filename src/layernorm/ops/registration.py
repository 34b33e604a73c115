"""What operators are registered with besides a schema: kernels for GPUs, and ``torch.vmap``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from layernorm.ops.loading import native
from layernorm.pytorch_internals import (
    FunctionalTensorMode,
    are_transforms_active,
    below_autograd,
    count_dispatch_modes,
    is_batched,
    is_in_forward_mode,
)


def require_tensors(**tensors: Tensor | None) -> None:
    """Raise for a tensor that an operator needs: PyTorch hands None on for it."""
    for name, tensor in tensors.items():
        if tensor is None:
            raise TypeError(f"layernorm: {name} must be a Tensor, got None")


def register_on_cpu(name: str, entry_name: str, function: Callable[..., Any]) -> None:
    """Let ``function`` compute an operator on the CPU, by an entry of the compiled module if there is one.

    Args:
        name: the operator's.
        entry_name: of the module; the entry returns NotImplemented for tensors that are not plain.
        function: of the entry, made safe, and of the operator's arguments.
    """
    if native is None:
        return
    entry = getattr(native, entry_name)

    def plain(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [plain(one) for one in argument]
        return argument.as_subclass(Tensor) if isinstance(argument, Tensor) else argument

    def compute(*arguments: Any) -> Any:
        result = entry(*arguments)
        if result is NotImplemented:
            result = entry(*map(plain, arguments))
        if result is NotImplemented:
            raise RuntimeError(f"layernorm: {name} takes strided tensors on the CPU that have memory")
        return result

    torch.library.impl(f"layernorm::{name}", "CPU")(functools.partial(function, compute))


def register_derivative(
    name: str, record: Callable[..., Any], definition: Callable[..., Any], tensors_of: Callable[..., Any]
) -> None:
    """Register how an operator is called where derivatives may be wanted.

    Args:
        name: the operator's.
        record: calls it and records its derivative.
        definition: computes it by PyTorch's operators, for transforms and forward-mode derivatives.
        tensors_of: returns those of its arguments that may need a gradient.
    """
    operator = getattr(torch.ops.layernorm, name).default

    @torch.library.impl(f"layernorm::{name}", "Autograd")
    def _call(*arguments: Any) -> Any:
        if are_transforms_active() or is_in_forward_mode():
            return definition(*arguments)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors_of(*arguments)):
            return record(*arguments)
        with below_autograd():
            return operator(*arguments)


def run_beneath(operator: Any, entry_name: str, *arguments: Any) -> Any:
    """Compute an operator beneath autograd: by an entry of the compiled module, or as it is registered."""
    if native is not None and not is_compiling() and count_dispatch_modes() == 0:
        found = getattr(native, entry_name)(*arguments)
        if found is not NotImplemented:
            return found
    return operator(*arguments)


def wants_composite(*grads: Tensor | None) -> bool:
    """Return whether gradients are to be taken as PyTorch's operators take them.

    So it is with those of higher order, and with batches of gradients.
    """
    if torch.is_grad_enabled() or is_compiling():
        return torch.is_grad_enabled()
    return any(grad is not None and is_batched(grad) for grad in grads)


def empty_for_none(like: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return tensors with one without elements in place of each None: operators return no None."""
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def gpu_kernel(room: str, name: str, **options: Any) -> Callable[..., Any]:
    """Return an operator's function in ``layernorm.gpu.<room>``, imported when it is called first."""

    @functools.cache
    def find() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(
            importlib.import_module(f"layernorm.gpu.{room}.operators"), name
        )
        return function

    def call(*arguments: Any) -> Any:
        return find()(*arguments, **options)

    return call


def register_on_gpus(room: str, name: str, *, traced: bool) -> None:
    """Let the function of this name in ``layernorm.gpu.<room>`` compute an operator on GPUs.

    Args:
        room: of ``layernorm.gpu``.
        name: the operator's.
        traced: whether a traced program holds the launches of its kernels in place of the operator, as
            ``torch.library.triton_op`` has it.
    """
    torch.library.impl(f"layernorm::{name}", "cuda", gpu_kernel(room, name))
    if not traced or not hasattr(torch.library, "wrap_triton"):
        return  # before PyTorch 2.6 a traced program holds the operator
    inside = gpu_kernel(room, name, wrap=torch.library.wrap_triton)

    @torch.library.register_torch_dispatch(f"layernorm::{name}", FunctionalTensorMode)
    def _traced(mode: Any, operator: Any, types: Any, arguments: Any, keywords: Any) -> Any:
        if arguments[0].device.type != "cuda":
            return mode.__torch_dispatch__(operator, types, arguments, keywords)
        with mode:
            return inside(*arguments)


def register_autocast_on_gpus(name: str, dtype: torch.dtype) -> None:
    """Let autocast on a GPU give an operator its tensors in this dtype, and do nothing inside of it."""
    if hasattr(torch.library, "register_autocast"):  # PyTorch 2.7
        torch.library.register_autocast(f"layernorm::{name}", "cuda", dtype)
        return
    operator = getattr(torch.ops.layernorm, name).default

    @torch.library.impl(f"layernorm::{name}", "AutocastCUDA")
    def _call(*arguments: Any) -> Any:
        with torch.autocast("cuda", enabled=False):
            return operator(
                *(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
            )


def register_vmap(name: str) -> None:
    """Let ``torch.vmap`` run an operator case by case."""
    if not hasattr(torch.library, "register_vmap"):
        return  # PyTorch 2.4 has none for operators
    operator = getattr(torch.ops.layernorm, name)

    @torch.library.register_vmap(f"layernorm::{name}")
    def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, int]:
        def case(argument: Any, dim: Any, index: int) -> Any:
            if isinstance(dim, (list, tuple)):
                return [case(one, at, index) for one, at in zip(argument, dim, strict=True)]
            return argument if dim is None else argument.select(dim, index)

        def together(results: Sequence[Any]) -> Any:
            if isinstance(results[0], Tensor):
                return torch.stack(list(results))
            return type(results[0])(together(parts) for parts in zip(*results, strict=True))

        cases = [
            operator(*(case(argument, dim, i) for argument, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return together(cases), 0
