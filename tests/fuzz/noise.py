"""The reference with random roundings: the changes that they cause are the errors that others may have.

Within ``roundings`` every product, norm and activation of ``layernorm.reference.recurrent`` is off by random
units of roundoff of what it is given and of what it returns, and so are its derivative and what that keeps.
A difference of terms that cancel, be it in a state or in a gradient, then moves as it does for a kernel that
rounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from layernorm.reference import recurrent

from .draws import Draw

Noise = Callable[[Tensor], Tensor]


@contextmanager
def roundings(draw: Draw, u: float, most: float) -> Iterator[None]:
    """Make the reference round to a unit ``u``; a gradient beyond ``most`` becomes NaN."""

    def off(a: Tensor) -> Tensor:
        return a * (1 + u * draw.normal(*a.shape))

    def product(a: Tensor, b: Tensor) -> Tensor:
        """a @ b: the K sums on the way to each, of which the last are the largest, are rounded too."""
        a, b, count = off(a), off(b), a.size(-1)
        rounding = u * (count / 2) ** 0.5 * (a.square() @ b.square()).sqrt()
        return a @ b + rounding * draw.normal(*rounding.shape)

    def linear(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = _Product.apply(a, weight, product)
        return _Passed.apply(found if bias is None else found + bias, off, most)

    def norm(centred: bool) -> Callable[..., Tensor]:
        return lambda a, shape, eps: _Norm.apply(a, eps, centred, off)

    normalized = recurrent._normalized
    replaced = {
        "linear": linear,
        "layer_norm": norm(True),
        "rms_norm": norm(False),
        "_normalized": lambda *arguments: _Passed.apply(normalized(*arguments), off, most),
        "torch": _Torch(
            {f.__name__: lambda a, f=f: _Squashed.apply(a, f, off) for f in (torch.tanh, torch.sigmoid)}
        ),
    }
    before = {name: getattr(recurrent, name) for name in replaced}
    for name, value in replaced.items():
        setattr(recurrent, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(recurrent, name, value)


class _Torch:
    """The module ``torch`` with some functions replaced."""

    def __init__(self, functions: dict[str, Callable[..., Tensor]]) -> None:
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        return self._functions.get(name) or getattr(torch, name)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(a, weight)
        ctx.product = product
        return product(a, weight.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, weight = ctx.saved_tensors
        grad_weight = ctx.product(grad.reshape(-1, grad.size(-1)).T, a.reshape(-1, a.size(-1)))
        return ctx.product(grad, weight), grad_weight, None


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, off: Noise, most: float) -> Tensor:
        ctx.off, ctx.most = off, most
        return off(a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.off(grad.masked_fill(grad.abs() > ctx.most, torch.nan)), None, None


class _Squashed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, squash: Callable[[Tensor], Tensor], off: Noise) -> Tensor:
        ctx.squash, ctx.off, ctx.kept = squash, off, off(squash(off(a)))
        return ctx.kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, rounded = ctx.off(ctx.kept), ctx.off(ctx.kept)  # each factor rounds by itself
        slope = kept * (1 - rounded) if ctx.squash is torch.sigmoid else 1 - rounded.square()
        return ctx.off(grad) * slope, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, eps: float, centred: bool, off: Noise) -> Tensor:
        a = off(a)
        rest = a - a.mean(-1, keepdim=True) if centred else a
        rstd = torch.rsqrt(rest.square().mean(-1, keepdim=True) + eps)
        ctx.n, ctx.rstd, ctx.centred, ctx.off = off(rest * rstd), off(rstd), centred, off
        return ctx.n

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        t, n = ctx.off(grad), ctx.off(ctx.n)
        along = n * (t * n).mean(-1, keepdim=True)
        if ctx.centred:
            along = along + t.mean(-1, keepdim=True)
        return ctx.off(t - along) * ctx.rstd, None, None, None
