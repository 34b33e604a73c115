"""Derivatives of higher order: the reference's own, by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

# The second key is that of batched gradients: is_grads_batched, jacobian(vectorize=True).
_KEYS: Final = ("CompositeImplicitAutograd", "Batched")


def register_composite(name: str, backward: Callable[..., Any]) -> None:
    """Let a function made of differentiable operators compute an operator."""
    for key in _KEYS:
        torch.library.impl(f"layernorm::{name}", key)(backward)


@torch.enable_grad()
def leaves_of(given: Sequence[Tensor | None]) -> list[Any]:
    """Return each tensor under another name, and as one that needs a gradient.

    Under its own, the gradient of one would count again that of another which was computed from it.
    """
    return [
        t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in given
    ]


def gradients_of(
    outputs: Sequence[Tensor], leaves: Sequence[Any], grads: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients of the leaves, themselves differentiable; one not wanted has no element."""
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want and leaf is not None]
    found = iter(
        torch.autograd.grad(
            outputs, asked, grads, create_graph=True, materialize_grads=True, allow_unused=True
        )
    )
    return [
        next(found) if want and leaf is not None else leaves[0].new_empty(0)
        for leaf, want in zip(leaves, wanted, strict=True)
    ]
