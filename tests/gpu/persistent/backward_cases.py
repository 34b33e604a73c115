"""What the backward of the persistent kernels is given, and should find, by autograd of the reference."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch

from layernorm.reference import recurrent as reference
from tests.gpu.persistent.cases import DTYPES, Case, scan


@dataclasses.dataclass
class Backward:
    """A case with the gradients of its results, what forward keeps of it, and what backward should find."""

    case: Case
    given: dict[str, torch.Tensor | None]
    exact: dict[str, torch.Tensor]


class Kept:
    """The reference's steps of a case, with values rounded where they are kept, and what they compute."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, DTYPES[case.plan.dtype]
        self.normalize = reference._normalized
        self.steps = collections.defaultdict(list)

    def rounded(self, a):
        """Return the rounded value, with the gradient of what was rounded."""
        return a + (a.to(self.dtype).double() - a).detach()

    def normalized(self, a, counts, gain, bias, spec, *, of_cell):
        """Do what the reference's function does, and keep what it computes."""
        if of_cell:
            a = self.rounded(a)
        a.retain_grad()
        layer = spec.variant.kind == "layer"
        parts = a.detach().split([count * (a.size(-1) // sum(counts)) for count in counts], -1)
        means = torch.stack([p.mean(-1) * layer for p in parts], -1)
        moments = [p.var(-1, correction=0) if layer else p.square().mean(-1) for p in parts]
        stats = torch.stack([(m + spec.eps).rsqrt() for m in moments], -1)
        n = self.normalize(a, counts, None, None, spec)
        if not of_cell:
            n = self.rounded(n)
        result = reference._plus(n if gain is None else n * gain, bias)
        result.retain_grad()
        if of_cell:
            self.keep(seen=result, cell_n=n, cell_stats=torch.cat([means, stats], -1))
        else:
            self.keep(product=a, n=n, gates=result, stats=stats)
        return result

    def cell(self, step, x, state, weights):
        """Take one step, as ``scan`` calls it."""
        x = x + torch.zeros_like(x, requires_grad=True)
        x.retain_grad()

        def normalized(a, counts, gain, bias, spec, _eps=None):
            of_cell = gain is weights["gain_cell"]
            return self.normalized(a, counts, gain, bias, spec, of_cell=of_cell)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "_normalized", normalized)
            new = tuple(self.rounded(s) for s in step(x, state))
        self.keep(x=x, h=state[0], c=new[-1])
        return new

    def keep(self, **tensors):
        for name, tensor in tensors.items():
            self.steps[name].append(tensor)

    def whole(self, name, *, grad=False):
        """Return what was kept of all steps, or its gradient, in the order of the data."""
        order = reversed if self.case.reverse else list
        return torch.cat([t.grad if grad else t.detach() for t in order(self.steps[name])])


def prepare(case: Case) -> Backward:
    """Return a case with what backward should find, by autograd of the reference in float64."""
    plan, dtype, kept = case.plan, DTYPES[case.plan.dtype], Kept(case)
    lstm, summed = plan.cell == "lstm", case.spec.products == "summed"
    state, output, final = scan(case, kept.cell, grad=True)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator) for t in (output, *final)]
    grads[0] = grads[0].to(dtype)
    sum((t * grad.double()).sum() for t, grad in zip((output, *final), grads, strict=True)).backward()
    stats = kept.whole("stats").float()
    given = (
        case.vectors
        | case.tensors
        | {
            "x": kept.whole("n").to(dtype) if summed else case.tensors["x"],
            "saved_h": None if summed else kept.whole("n").to(dtype),
            "saved_c": kept.whole("c").to(dtype) if lstm else None,
            "stats": stats if summed else torch.cat([torch.full_like(stats, float("nan")), stats], -1),
            "grad_output": grads[0],
            "grad_h": grads[1],
            "grad_c": grads[2] if lstm else None,
            "h_before": kept.whole("h").to(dtype) if plan.cell == "gru" else None,
            "cell_stats": kept.whole("cell_stats").float() if "seen" in kept.steps else None,
        }
    )
    exact = {
        "grad_gates": kept.whole("gates" if summed else "x", grad=True),
        "grad_wh": kept.whole("product", grad=True),
        "grad_h": state[0].grad,
    }
    if lstm:
        exact["grad_c"] = state[1].grad
    if plan.cell == "gru" and not summed:
        exact["grad_own"] = kept.whole("gates", grad=True)[:, 2 * plan.hidden :]
    if "seen" in kept.steps:
        exact |= {"grad_cell": kept.whole("seen", grad=True), "normalized_cell": kept.whole("cell_n")}
    return Backward(case, given, exact)
