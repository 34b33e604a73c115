"""The time loop of a batch-normalized LSTM, forward and backward.

Its derivative is written by hand for three reasons: a step needs no autograd nodes, the gradient of the
recurrent weights is one matrix product over all steps, and all processes that share a batch communicate in
the same order, even if the sequences of one are shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layernorm.baselines.statistics import Steps, added, combined


@dataclass(frozen=True)
class Recurrence:
    """The settings of a time loop, and what it does with the rows of its steps.

    Attributes:
        steps: the rows of each step.
        eps: added to the variances.
        training: whether to use the statistics of the batch, where a step has more than one row.
    """

    steps: Steps
    eps: float
    training: bool

    def from_batch(self, t: int) -> bool:
        """Return whether step t is standardized with the statistics of its batch."""
        return self.training and self.steps.total[t] > 1

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of each step."""
        parts: tuple[Tensor, ...] = rows.split(self.steps.own)
        return parts

    def before(self, first: Tensor, rows: Tensor) -> Tensor:
        """Return for each row (R, H) the row of the step before; ``first`` (N, H) precedes the first step."""
        parts = [first, *self.parts(rows)]
        return torch.cat([part[:n] for part, n in zip(parts, self.steps.own, strict=False)])

    def last(self, rows: Tensor) -> Tensor:
        """Return the last row of each sequence (N, H)."""
        ends = zip(self.parts(rows), pairwise((*self.steps.own, 0)), strict=True)
        return torch.cat([part[after:n] for part, (n, after) in reversed(list(ends))])

    def standardize(self, t: int, rows: Tensor, mean: Tensor, var: Tensor, out: Tensor) -> Tensor:
        """Write the standardized rows of step t to ``out`` and return rstd (H).

        ``mean`` and ``var`` (H) are the running statistics; those of the batch, where used, overwrite them.
        """
        if not self.from_batch(t):
            rstd = torch.rsqrt(var + self.eps)
            torch.sub(rows, mean, out=out)
            out.mul_(rstd)
            return rstd
        own, steps = len(rows), self.steps
        means = rows.sum(0).div_(max(own, 1))
        torch.sub(rows, means, out=out)
        squares = out.square().sum(0)
        if steps.group is not None and steps.counts is not None:
            own_means = means
            means, squares = combined(means, squares, steps.counts[:, t : t + 1], steps.group)
            out.add_(own_means - means)
        mean.copy_(means)
        torch.div(squares, steps.total[t], out=var)
        rstd = torch.rsqrt(var + self.eps)
        out.mul_(rstd)
        return rstd

    def derivative(self, t: int, grad: Tensor, standardized: Tensor, rstd: Tensor) -> Tensor:
        """Turn the gradient of the standardized rows of step t into that of the rows, in place."""
        if self.from_batch(t):
            sums = torch.stack([grad.sum(0), (grad * standardized).sum(0)])
            sums = added(sums, self.steps.group).div_(self.steps.total[t])
            grad.sub_(sums[0]).addcmul_(standardized, sums[1], value=-1)
        return grad.mul_(rstd)


class BatchNormRecurrence(torch.autograd.Function):
    """All steps of one layer and direction, with rows as in a ``PackedSequence``.

    ``apply(gates, h, c, weight, gain, gain_cell, bias_cell, statistics, recurrence)``:

    - gates (R, 4H): the contribution of the input and the bias to i, f, g, o;
    - h, c (N, H): the initial state;
    - weight (4H, H), gain (4H): the weight of the recurrent product and the gain of its norm;
    - gain_cell, bias_cell (H): the gain and bias of the cell's norm;
    - statistics: mean and variance (steps, 4H) of the recurrent product, and (steps, H) of the cell, used
      where the batch has none.

    It returns h of each row (R, H), the last h and c (N, H), and the four statistics that were used.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        h: Tensor,
        c: Tensor,
        weight: Tensor,
        gain: Tensor,
        gain_cell: Tensor,
        bias_cell: Tensor,
        statistics: tuple[Tensor, Tensor, Tensor, Tensor],
        recurrence: Recurrence,
    ) -> tuple[Tensor, ...]:
        """Compute the steps one by one; see the class."""
        size = h.size(1)
        mean, var, mean_cell, var_cell = (s.clone() for s in statistics)
        rstd, rstd_cell = torch.empty_like(var), torch.empty_like(var_cell)
        product, activations = torch.empty_like(gates), torch.empty_like(gates)
        cells, standard_cells, squashed, output = (gates.new_empty(len(gates), size) for _ in range(4))
        across = weight.t().contiguous()
        h_before, c_before = h, c
        for t, (begin, end) in enumerate(_places(recurrence.steps.own)):
            n = end - begin
            h_before, c_before = h_before[:n], c_before[:n]
            standard = product[begin:end]
            rstd[t] = recurrence.standardize(t, h_before @ across, mean[t], var[t], standard)
            active = torch.addcmul(gates[begin:end], standard, gain, out=activations[begin:end])
            i_f, g, o = active[:, : 2 * size], active[:, 2 * size : 3 * size], active[:, 3 * size :]
            i_f.sigmoid_()
            g.tanh_()
            o.sigmoid_()
            c_new = torch.mul(i_f[:, size:], c_before, out=cells[begin:end])
            c_new.addcmul_(i_f[:, :size], g)
            standard = standard_cells[begin:end]
            rstd_cell[t] = recurrence.standardize(t, c_new, mean_cell[t], var_cell[t], standard)
            out = torch.addcmul(bias_cell, standard, gain_cell, out=squashed[begin:end]).tanh_()
            h_before, c_before = torch.mul(o, out, out=output[begin:end]), c_new
        tapes = (product, activations, cells, standard_cells, squashed, output, rstd, rstd_cell)
        ctx.save_for_backward(h, c, weight, gain, gain_cell, *tapes)
        ctx.recurrence = recurrence
        ctx.mark_non_differentiable(mean, var, mean_cell, var_cell)
        return output, recurrence.last(output), recurrence.last(cells), mean, var, mean_cell, var_cell

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor, grad_h: Tensor, grad_c: Tensor, *_: Tensor
    ) -> tuple[Any, ...]:
        """Return the gradients of the arguments of ``forward``."""
        h, c, weight, gain, gain_cell, *tapes = ctx.saved_tensors
        product, activations, cells, standard_cells, squashed, output, rstd, rstd_cell = tapes
        recurrence: Recurrence = ctx.recurrence
        size = h.size(1)
        places = _places(recurrence.steps.own)
        grad_gates, grad_product = torch.empty_like(activations), torch.empty_like(activations)
        grad_squashed = torch.empty_like(squashed)
        grad_h, grad_c = grad_h.clone(), grad_c.clone()
        for t, (begin, end) in reversed(list(enumerate(places))):
            n, rows = end - begin, slice(begin, end)
            active, out = activations[rows], squashed[rows]
            i, f, g, o = active.split(size, 1)
            c_before = cells[slice(*places[t - 1])][:n] if t else c[:n]
            dh = grad_h[:n].add_(grad_output[rows])
            d = torch.mul(dh, o, out=grad_squashed[rows]).mul_(1 - out * out)
            dc = grad_c[:n].add_(recurrence.derivative(t, d * gain_cell, standard_cells[rows], rstd_cell[t]))
            d_gates = grad_gates[rows]
            for place, left, right in zip(
                d_gates.split(size, 1), (dc, dc, dc, dh), (g, c_before, i, out), strict=True
            ):
                torch.mul(left, right, out=place)
            slopes = active * (1 - active)
            slopes[:, 2 * size : 3 * size] = 1 - g * g
            d_product = torch.mul(d_gates.mul_(slopes), gain, out=grad_product[rows])
            recurrence.derivative(t, d_product, product[rows], rstd[t])
            torch.mm(d_product, weight, out=dh)
            dc.mul_(f)
        grad_weight = grad_product.t() @ recurrence.before(h, output)
        grad_gain = torch.mul(grad_gates, product, out=grad_product).sum(0)
        grad_gain_cell = (grad_squashed * standard_cells).sum(0)
        affine = grad_gain, grad_gain_cell, grad_squashed.sum(0)
        return grad_gates, grad_h, grad_c, grad_weight, *affine, None, None


def _places(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return where each step's rows begin and end."""
    return list(pairwise(accumulate(sizes, initial=0)))
