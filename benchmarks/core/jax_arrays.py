"""JAX's arrays from tensors and back, and jitted functions as peers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.core.subjects import Subject, module


def array(tensor: Tensor) -> Any:
    """Return the tensor as JAX's array of the same dtype."""
    jnp = module("jax.numpy")
    dtype = getattr(jnp, str(tensor.dtype).removeprefix("torch."))
    return jnp.array(tensor.detach().float().numpy(), dtype=dtype)


def tensors(tree: Any) -> list[Tensor]:
    """Return the arrays of a tree as float32 tensors."""
    jax, jnp, numpy = module("jax"), module("jax.numpy"), module("numpy")
    return [torch.tensor(numpy.asarray(a.astype(jnp.float32))) for a in jax.tree_util.tree_leaves(tree)]


def jitted(function: Callable[..., Any], arguments: Sequence[Any]) -> Subject:
    """Return a function as a peer; its first call, here, compiles it."""
    jax = module("jax")
    run = partial(jax.jit(function), *arguments)

    def call() -> Any:
        return jax.block_until_ready(run())

    began = time.perf_counter()
    call()
    return Subject(call, lambda: tensors(call()), compile_s=time.perf_counter() - began)
