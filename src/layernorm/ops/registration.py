"""What operators are registered with besides a schema: kernels for GPUs, and ``torch.vmap``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layernorm.pytorch_internals import FunctionalTensorMode


def require_tensors(**tensors: Tensor | None) -> None:
    """Raise for a tensor that an operator needs: PyTorch hands None on for it."""
    for name, tensor in tensors.items():
        if tensor is None:
            raise TypeError(f"layernorm: {name} must be a Tensor, got None")


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
    if not traced:
        return
    inside = gpu_kernel(room, name, wrap=torch.library.wrap_triton)

    @torch.library.register_torch_dispatch(f"layernorm::{name}", FunctionalTensorMode)
    def _traced(mode: Any, operator: Any, types: Any, arguments: Any, keywords: Any) -> Any:
        if arguments[0].device.type != "cuda":
            return mode.__torch_dispatch__(operator, types, arguments, keywords)
        with mode:
            return inside(*arguments)


def register_vmap(name: str) -> None:
    """Let ``torch.vmap`` run an operator case by case."""
    operator = getattr(torch.ops.layernorm, name)

    @torch.library.register_vmap(f"layernorm::{name}")
    def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, int]:
        def case(argument: Any, dim: Any, index: int) -> Any:
            if isinstance(dim, list | tuple):
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
