"""The allowed difference between a recurrent layer and the reference in float64.

That follows from how far these move when the reference rounds everything on the way at random (``noise``):
32 times the mean of a few such moves, since that of a single number may be small by chance, and a few units
of what is largest in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layernorm import backends

from .draws import Draw, Failure, by_reference, check, unit
from .noise import roundings

DRAWS = 3
INPUTS = ("input", "h", "c", "state", "input_gates", "hidden_gates")


def largest_share(
    names: Iterable[str],
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    allowed: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> float:
    """Fail unless the named results are exact enough; return the largest share of what is allowed."""
    return max(within(name, found[name].double(), expected[name], allowed[name], dtype) for name in names)


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
    seeds: Sequence[Tensor],
    compute: Callable[[list[Tensor], torch.dtype], Mapping[str, Tensor]],
    squashed: bool = True,
) -> dict[str, Tensor]:
    """Return the allowed error of each row of the expected numbers.

    ``compute`` gives them for other seeds, in float64; or in float32, where rows that differ may be equal.
    """
    u, most = unit(dtype), torch.finfo(dtype).max / 8
    allowed = {}
    for name, e in expected.items():
        # A squashed state has a unit of 1, however small it is.
        least = float(squashed and name in ("output", "output h"))
        allowed[name] = 8 * u * per_row(e, name).clamp_min(least)

    def add(other: Mapping[str, Tensor], factor: float, beyond: float) -> None:
        for name, e in expected.items():
            moved = per_row(torch.where(other[name] == e, 0, other[name] - e), name)
            allowed[name] += factor * moved.nan_to_num(nan=beyond, posinf=beyond)

    for _ in range(DRAWS):
        with roundings(draw, u, most):
            # A bias's gradient may be a plain sum of them over the rows, which rounds.
            scale = [u * (1 + s[..., 0].numel() ** 0.5) for s in seeds]
            moved = [s * (1 + a * draw.normal(*s.shape)) for s, a in zip(seeds, scale, strict=True)]
            add(compute(moved, torch.float64), 32 / DRAWS, torch.inf)
    if dtype != torch.float64:
        add(compute(list(seeds), torch.float32), 8, 0)  # its range is not that of the kernels
    return allowed


def second_order(
    draw: Draw, call: Callable[[Mapping[str, Tensor]], Sequence[Tensor]], tensors: Mapping[str, Tensor]
) -> None:
    """Fail unless the second derivative is the reference's, all in float64 and of ordinary magnitude."""
    results: list[dict[str, Tensor]] = []
    directions = {name: draw.normal(*t.shape) for name, t in tensors.items()}
    grads: list[Tensor] = []
    given: dict[str, Any] = {"materialize_grads": True, "allow_unused": True}
    for kernel in ("native", "reference"):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        with by_reference() if kernel == "reference" else backends.use(kernel):
            outputs = call(leaves)
            grads = grads or [draw.normal(*o.shape) for o in outputs]
            seeds = [g.clone().requires_grad_() for g in grads]
            first = torch.autograd.grad(outputs, list(leaves.values()), seeds, create_graph=True, **given)
            total = sum((f * v).sum() for f, v in zip(first, directions.values(), strict=True))
            wanted = {**leaves, **{f"seed {i}": seed for i, seed in enumerate(seeds)}}
            second = torch.autograd.grad(total, list(wanted.values()), **given)
        results.append({f"first, {name}": f for name, f in zip(leaves, first, strict=True)})
        results[-1] |= {f"second, {name}": s for name, s in zip(wanted, second, strict=True)}
    for name, expected in results[1].items():
        # Sums of a hundred terms round to 1e-15 of what is largest; a norm amplifies by at most 1/√eps, here
        # 316, and its second derivative by the square of that.
        pair = (results[0][name] - expected).detach(), expected.detach()
        away, largest = (float(a.abs().max()) if a.numel() else 0.0 for a in pair)
        check(away <= 1e-10 * (1 + largest), f"derivative {name}: off by {away:.3g} of {largest:.3g}")


def within(name: str, found: Tensor, expected: Tensor, allowed: Tensor, dtype: torch.dtype) -> float:
    """Fail unless each row is exact enough; return the largest share of what is allowed."""
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
