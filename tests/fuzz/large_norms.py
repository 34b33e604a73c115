"""Norms of many or wide rows, which take other paths: some rows and all parameter gradients are judged."""

from __future__ import annotations

import torch

from .draws import HALVES, Draw, check, run_case, same_bits, unit
from .norm_cases import OPERATORS, Case
from .norms import Judge, judge

#: The size in bytes from which a tensor is written past the caches, and sizes next to it.
BYTES = (1 << 20, 8 << 20, 9 << 20)


def run(seed: int) -> float:
    """Draw a large case, run it and judge it; return the largest share of a bound."""
    draw = Draw("large norms", seed)
    dtype = draw.choice((torch.float32, torch.float64, *HALVES))
    size = torch.finfo(dtype).bits // 8
    width = draw.choice((1, 16, 63, 64, 768, 769, 4096, 5000, 70001))
    rows = max(1, draw.choice(BYTES) // size // width + draw.choice((-1, 0, 1)))
    operator = draw.choice(OPERATORS)
    shape = (rows, width)
    added, centred = operator.startswith("add"), "layer" in operator

    def numbers() -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(draw.getrandbits(60))).to(dtype)

    case = Case(
        operator=operator,
        shape=shape,
        width=width,
        tail=(width,),
        eps=draw.choice((1e-12, 1e-5)),
        input=numbers(),
        residual=numbers() if added else None,
        weight=draw.tensor(dtype, width, extremes=False),
        bias=draw.tensor(dtype, width, extremes=False) if centred else None,
        grad=numbers(),
        grad_sum=None,
        entry="function",
    )
    exponents = torch.tensor(
        [[draw.exponent(dtype) if draw.chance(0.2) else 0] for _ in range(min(rows, 40))]
    )
    if dtype != torch.float16:
        case.input[: len(exponents)] = torch.ldexp(case.input[: len(exponents)].double(), exponents).to(dtype)
    draw.note(operator=operator, dtype=dtype, shape=shape, eps=case.eps)
    return run_case((draw, case), judged)


def judged(draw: Draw, case: Case) -> float:
    rows = case.shape[0]
    leaves = {name: t.detach().requires_grad_() for name, t in case.tensors().items()}
    outputs = case.call(leaves)
    grads = dict(zip(leaves, torch.autograd.grad(outputs[0], list(leaves.values()), case.grad), strict=True))
    chosen = torch.tensor(
        sorted({0, rows - 1, *(draw.randrange(min(rows, 40)) for _ in range(4)), draw.randrange(rows)})
    )
    named = {name: getattr(case, name) for name in ("input", "residual", "grad")}
    few = Case(**vars(case) | {name: None if t is None else t[chosen] for name, t in named.items()})
    some = few.call(few.tensors())
    check(same_bits(some, [o.detach()[chosen] for o in outputs]), f"rows {chosen.tolist()} alone: other bits")
    judge_of = Judge.of(few)
    share = judge("output", outputs[0].detach()[chosen], judge_of.output(), case.input.dtype)
    share = max(
        share, judge("gradient of input", grads["input"][chosen], judge_of.first("input"), case.input.dtype)
    )
    return max(share, parameters(case, grads))


def parameters(case: Case, grads: dict[str, torch.Tensor]) -> float:
    """Judge the gradients of gain and bias, sums over all rows, by float64."""
    if case.input.dtype == torch.float64:
        return 0.0  # there is nothing wider that is fast
    total = (case.input if case.residual is None else case.input + case.residual).double()
    rest = total - total.mean(-1, keepdim=True) if case.centred else total
    n = rest * torch.rsqrt(rest.square().mean(-1, keepdim=True) + case.eps)
    grad, u, share = case.grad.double(), unit(torch.float32), 0.0
    kappa = total.abs().amax(-1, keepdim=True) / rest.square().mean(-1, keepdim=True).add(case.eps).sqrt()
    for name, terms, loss in (("weight", grad * n, 1 + kappa), ("bias", grad, torch.ones(()))):
        if name not in grads or (name == "weight" and case.width == 1 and case.centred):
            continue
        exact = terms.sum(0)
        size = (grad.abs() * (n.abs() + 1) if name == "weight" else grad.abs()) * loss
        bound = u * (8 + 2 * case.shape[0] ** 0.5) * size.sum(0) + unit(case.input.dtype) * exact.abs()
        ratio = ((grads[name].double() - exact).abs() / bound).max().item()
        check(ratio <= 1, f"gradient of {name}: {ratio:.3g} of what is allowed")
        share = max(share, ratio)
    return share
