"""How far a recurrent layer's numbers may be from the reference's in float64.

That follows from how far these move when the reference rounds everything on the way at random (``noise``):
sixteen times the mean of a few such moves, which is about as many standard deviations, and a few units of
what is largest in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .draws import Draw, Failure, unit
from .noise import roundings

DRAWS = 3
INPUTS = ("input", "h", "c", "input_gates", "hidden_gates")


def has_rows(name: str) -> bool:
    """Return whether this is a state, an input or an output, not a parameter."""
    return name in INPUTS or name.startswith("output")


def per_row(a: Tensor, name: str) -> Tensor:
    """Return the largest magnitude of each row of states and inputs, and of a parameter as a whole."""
    a = a.abs()
    return a.amax(-1) if has_rows(name) else a.amax().reshape(1)


def moved_by_roundings(
    draw: Draw,
    dtype: torch.dtype,
    expected: Mapping[str, Tensor],
    again: Callable[[], Mapping[str, Tensor]],
    squashed: bool = True,
) -> dict[str, Tensor]:
    """Return what each row of the expected numbers is allowed; ``again`` computes them once more."""
    u, most = unit(dtype), torch.finfo(dtype).max / 8
    allowed = {}
    for name, e in expected.items():
        # A squashed state has a unit of 1, however small it is.
        least = float(squashed and name in ("output", "output h"))
        allowed[name] = 8 * u * per_row(e, name).clamp_min(least)
    for _ in range(DRAWS):
        with roundings(draw, u, most):
            other = again()
        for name, e in expected.items():
            moved = per_row(torch.where(other[name] == e, 0, other[name] - e), name)
            allowed[name] += 16 / DRAWS * moved.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return allowed


def within(name: str, found: Tensor, expected: Tensor, allowed: Tensor, dtype: torch.dtype) -> float:
    """Fail unless each row is as exact as it must be; returns the largest share of what is allowed."""
    info = torch.finfo(dtype)
    away = torch.where((found == expected) | (found.isnan() & expected.isnan()), 0, found - expected)
    away = torch.where(expected.abs() > info.max / 8, 0, away)
    allowed = allowed + 64 * info.smallest_normal * info.eps
    share = per_row(away, name).nan_to_num(nan=torch.inf) / allowed
    share = torch.where(allowed.isinf(), 0, share)
    if share.numel() and share.max() > 1:
        i = share.argmax().item()
        row = tuple(int(k) for k in torch.unravel_index(share.argmax(), share.shape))
        f, e = (t[row] if has_rows(name) else t.flatten() for t in (found, expected))
        k = (f - e).abs().nan_to_num(nan=torch.inf).argmax()
        raise Failure(
            f"{name} at {list(row)}, {int(k)} of {list(found.shape)}: found {f[k]:.17g}, exact {e[k]:.17g}, "
            f"allowed {allowed.flatten()[i]:.3g}; {int((share > 1).sum())} such rows of {share.numel()}"
        )
    return float(share.max()) if share.numel() else 0.0
