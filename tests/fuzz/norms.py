"""The norm operators: values, gradients, second derivatives, and rows that are the same in any batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import exact_norm
from .draws import Draw, Failure, check, computed, same_bits, setting, unit
from .exact_norm import Array, Exact, wide
from .norm_cases import Case, case_of


class Wrong(Failure):
    """A number in this row is too far from the exact one."""

    def __init__(self, row: int | None, message: str) -> None:
        super().__init__(message)
        self.row = row


def judge(name: str, found: Tensor, exact: Exact, dtype: torch.dtype) -> float:
    """Fail unless the number is the exact one, rounded, within its bound; return the share of the bound."""
    first = not name.startswith("second")
    value, bound = exact.value, np.where(np.isnan(exact.bound), np.inf, exact.bound)
    a = wide(found).reshape(value.shape)
    rounding = unit(found.dtype) * (np.abs(value) + bound) + (8 if first else 32) * least(found.dtype)
    with np.errstate(invalid="ignore"):
        away = np.abs(a - value)
        fits = away <= bound + rounding
    fits |= np.isnan(a) & np.isnan(value) | (a == value)
    # Where the bound is no number a row has no direction, to the rounding of its elements. Beyond the largest
    # number is infinity; and on the way there, the sum of terms that are.
    most = longdouble_max(found.dtype)
    fits |= np.isinf(bound) | (np.isinf(a) & (np.abs(value) + bound > most * (1 - 2 * unit(found.dtype))))
    fits |= bound > longdouble_max(computed(dtype)) * unit(computed(dtype))
    if not fits.all():
        i = tuple(int(k) for k in np.argwhere(~fits)[0])
        raise Wrong(
            i[0] if value.ndim == 2 else None,
            f"{name} of {found.dtype} at {list(i)} of {list(value.shape)}: found {a[i]!s}, "
            f"exact {value[i]!s}, allowed {(bound + rounding)[i]!s}; {int((~fits).sum())} such elements",
        )
    if value.size == 0:
        return 0.0
    inside = np.isfinite(away) & (bound > 0) & np.isfinite(bound)
    return float(np.where(inside, np.maximum(away - rounding, 0) / np.where(inside, bound, 1), 0).max())


def longdouble_max(dtype: torch.dtype) -> np.longdouble:
    return np.longdouble(torch.finfo(dtype).max)


def least(dtype: torch.dtype) -> float:
    """Return the smallest positive number."""
    return float(torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps


@dataclass
class Judge:
    """The exact results of a case for the rows that were normalized."""

    case: Case
    rows: Array
    stats: exact_norm.Normalized
    gain: Array | None
    grad: Array

    @classmethod
    def of(cls, case: Case) -> Judge:
        total = case.input if case.residual is None else case.input + case.residual
        rows = wide(total).reshape(-1, case.width)
        kind = computed(case.input.dtype)
        eps = torch.finfo(kind).eps if case.eps is None else case.eps
        gain = None if case.weight is None else wide(case.weight).reshape(-1)
        grad = wide(case.grad).reshape(-1, case.width)
        stats = exact_norm.normalized(rows, eps, case.centred, unit(kind), least(kind))
        return cls(case, rows, stats, gain, grad)

    def output(self) -> Exact:
        bias = None if self.case.bias is None else wide(self.case.bias).reshape(-1)
        return exact_norm.output(self.stats, self.gain, bias)

    @property
    def of_n(self) -> Array:
        """Return the gradient of the normalized rows."""
        return self.grad if self.gain is None else self.grad * self.gain

    def summed(self, terms: Exact) -> Exact:
        """Return the sum over rows, with its own roundings."""
        total = exact_norm.over_rows(terms)
        return Exact(total.value, total.bound * (1 + terms.value.shape[0] ** 0.5))

    def first(self, name: str) -> Exact:
        """Return the gradient of the named tensor."""
        if name == "weight":
            return self.summed(exact_norm.of_gain(self.stats, self.grad))
        if name == "bias":
            return self.summed(self.of_bias(self.grad))
        found = exact_norm.gradient(self.stats, self.of_n)
        if self.gain is not None:
            # The product of a denormal gradient with a - mean, before that with the gain.
            s, lost = self.stats, self.stats.least * np.abs(self.gain).mean()
            found.bound = found.bound + np.where(s.plain, s.rstd * s.size * s.rstd * lost, 0)
        if self.case.grad_sum is not None:
            sums = wide(self.case.grad_sum).reshape(found.value.shape)
            found = found + Exact(sums, 2 * unit(computed(self.case.input.dtype)) * np.abs(sums))
        return found

    def of_bias(self, grad: Array) -> Exact:
        return Exact(grad, 8 * unit(computed(self.case.input.dtype)) * np.abs(grad))

    def in_graph(self, name: str) -> Exact:
        """Return the gradient of the named tensor by PyTorch's operators, which compute means from sums."""
        found = self.first(name)
        if name in ("weight", "bias"):
            return found
        sums = np.abs(self.of_n).max(-1, keepdims=True) * self.stats.size * self.case.width
        beyond = sums > longdouble_max(computed(self.case.input.dtype)) / 8
        return Exact(found.value, np.where(beyond.any(-1, keepdims=True), np.inf, found.bound))

    def second(self, name: str, v: dict[str, Array]) -> Exact:
        """Return the gradient of Σ v·(first gradients) for the named tensor."""
        found = self._second(name, v)
        # What PyTorch's operators make on the way is in range up to sums of rstd²·v·t.
        largest = [np.abs(a).max(-1, keepdims=True) for a in (self.grad, self.of_n, *v.values())]
        product = np.maximum(self.stats.rstd, 1) ** 2 * self.case.width
        for a in largest:
            product = product * np.maximum(a, 1)
        beyond = product > longdouble_max(computed(self.case.input.dtype)) / 1024
        beyond = beyond if name in ("input", "grad") else beyond.any()
        return Exact(found.value, np.where(beyond, np.inf, found.bound))

    def _second(self, name: str, v: dict[str, Array]) -> Exact:
        zero = Exact(np.zeros_like(self.grad), np.zeros_like(self.grad))
        s, rows, weight, bias = self.stats, v.get("input"), v.get("weight"), v.get("bias")
        moved = None if rows is None else exact_norm.tangent(s, rows).n
        if name == "weight":
            if moved is None:
                return exact_norm.over_rows(zero)
            return self.summed(Exact(self.grad * moved.value, np.abs(self.grad) * moved.bound))
        total = zero
        if name == "grad":
            gain = np.ones(self.case.width, np.longdouble) if self.gain is None else self.gain
            if moved is not None:
                total = Exact(gain * moved.value, np.abs(gain) * moved.bound)
            if weight is not None:
                total = (
                    total + exact_norm.output(s, weight, None) if not s.centred else total + self._n(weight)
                )
            if bias is not None:
                total = total + self.of_bias(np.broadcast_to(bias, self.grad.shape))
            return total
        if rows is not None:
            total = exact_norm.gradient_along(s, self.of_n, rows)
        if weight is not None:
            total = total + exact_norm.gradient(s, self.grad * weight)
        return total

    def _n(self, weight: Array) -> Exact:
        return exact_norm.of_gain(self.stats, np.broadcast_to(weight, self.grad.shape))


# ---- one case ----


def run(seed: int) -> float:
    """Draw a case, run it and judge it; return the largest share of a bound."""
    draw, case = case_of(seed)
    try:
        with setting(draw), np.errstate(all="ignore"):
            return judged(draw, case)
    except Failure as failure:
        row = getattr(failure, "row", None)
        raise Failure(f"{failure}\n  {draw.notes}" + ("" if row is None else described(case, row))) from None


def described(case: Case, row: int) -> str:
    """Describe the content of a row."""
    with np.errstate(all="ignore"):
        judge_of = Judge.of(case)
    s = judge_of.stats
    return (
        f"\n  row {row}: max {np.abs(judge_of.rows[row]).max()!s}, min {np.abs(judge_of.rows[row]).min()!s}, "
        f"rstd {s.rstd[row, 0]!s}, 1 + κ {s.loss[row, 0]!s}, max grad {np.abs(judge_of.grad[row]).max()!s}, "
        f"max of n's {np.abs(judge_of.of_n[row]).max()!s}"
    )


def judged(draw: Draw, case: Case) -> float:
    judge_of = Judge.of(case)
    dtype = case.input.dtype
    leaves = {
        name: tensor.detach().requires_grad_(case.wanted[name]) for name, tensor in case.tensors().items()
    }
    outputs = case.call(leaves)
    share = judge("output", outputs[0], judge_of.output(), dtype)
    if case.residual is not None:
        check(same_bits([outputs[1]], [case.input + case.residual]), "the sum is not input + residual")
    plain = case.call(case.tensors())
    check(same_bits(plain, [o.detach() for o in outputs]), "with and without a gradient the bits differ")
    needed = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not needed:
        return share
    if case.grad_sum is not None and not outputs[1].requires_grad:
        case.grad_sum = None  # the sum depends on nothing that needs a gradient
    given = [case.grad] if case.grad_sum is None else [case.grad, case.grad_sum]
    grads = torch.autograd.grad(outputs[: len(given)], list(needed.values()), given, retain_graph=True)
    for name, grad in zip(needed, grads, strict=True):
        leaf = needed[name]
        check(
            grad.shape == leaf.shape and grad.dtype == leaf.dtype,
            f"gradient of {name}: {grad.dtype} {grad.shape}",
        )
        share = max(share, judge(f"gradient of {name}", grad, judge_of.first(name), dtype))
    in_company(draw, case, plain, dict(zip(needed, grads, strict=True)))
    if draw.chance(0.4):
        share = max(share, second_order(draw, case, judge_of, leaves, needed))
    return share


def in_company(draw: Draw, case: Case, outputs: tuple[Tensor, ...], grads: dict[str, Tensor]) -> None:
    """Fail unless a few rows are bit-identical when computed by themselves."""
    rows = outputs[0].numel() // case.width
    if rows == 0:
        return
    count = draw.randint(1, min(rows, 6))
    chosen = torch.tensor(sorted(draw.sample(range(rows), count)))

    def some(a: Tensor | None) -> Tensor | None:
        return None if a is None else a.reshape(-1, *case.tail)[chosen]

    fewer = Case(
        **vars(case) | {name: some(getattr(case, name)) for name in ("input", "residual", "grad", "grad_sum")}
    )
    leaves = {
        name: t.detach().requires_grad_(name in ("input", "residual")) for name, t in fewer.tensors().items()
    }
    found = fewer.call(leaves)
    check(
        same_bits([some(a) for a in outputs], [a.detach() for a in found]),
        f"rows {chosen.tolist()} alone: other bits",
    )
    if "input" in grads:
        given = [fewer.grad] if fewer.grad_sum is None else [fewer.grad, fewer.grad_sum]
        (grad,) = torch.autograd.grad(found[: len(given)], leaves["input"], given)
        check(
            same_bits([some(grads["input"])], [grad]), f"gradient of rows {chosen.tolist()} alone: other bits"
        )


def second_order(
    draw: Draw, case: Case, judge_of: Judge, leaves: dict[str, Tensor], needed: dict[str, Tensor]
) -> float:
    """Judge the gradient of Σ v·(first gradients), and those first gradients."""
    dtype = case.input.dtype
    named = {name: leaf for name, leaf in needed.items() if name != "residual" or "input" not in needed}
    grad = case.grad.detach().requires_grad_()
    output = case.call(leaves)[0]
    firsts = torch.autograd.grad(output, list(named.values()), grad, create_graph=True)
    alone = Judge(
        Case(**vars(case) | {"grad_sum": None}), judge_of.rows, judge_of.stats, judge_of.gain, judge_of.grad
    )
    share, directions = 0.0, {}
    for name, first in zip(named, firsts, strict=True):
        share = max(share, judge(f"gradient of {name} with a graph", first, alone.in_graph(name), dtype))
        directions[name] = draw.tensor(first.dtype, *first.shape, extremes=draw.chance(0.1))
    targets = {name: leaf for name, leaf in (*named.items(), ("grad", grad)) if name != "bias"}
    seconds = torch.autograd.grad(
        firsts, list(targets.values()), list(directions.values()), materialize_grads=True, allow_unused=True
    )
    v = {
        ("input" if name == "residual" else name): wide(d).reshape(-1, case.width)[
            slice(None) if name in ("input", "residual") else 0
        ]
        for name, d in directions.items()
    }
    for name, second in zip(targets, seconds, strict=True):
        exact = alone.second("input" if name == "residual" else name, v)
        share = max(share, judge(f"second derivative for {name} from {sorted(v)}", second, exact, dtype))
    return share
