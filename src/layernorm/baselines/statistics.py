"""Statistics over the cases of a batch, step by step, and over all processes that share the batch.

The rows of a sequence are ordered as in a ``PackedSequence``: those of the first step, then those of the
second, and so on, never more at a step than at the one before. A batch without time has one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Steps:
    """The numbers of rows of each step, in this process and in all together.

    Attributes:
        own: rows of each step in this process; 0 where only other processes have some left.
        total: rows of each step over all processes.
        group: the processes that share the batch; None if there is only this one.
        counts: rows of each process and step (processes, steps); None without a group.
    """

    own: tuple[int, ...]
    total: tuple[int, ...]
    group: dist.ProcessGroup | None = None
    counts: Tensor | None = None

    @staticmethod
    def alone(sizes: Sequence[int]) -> Steps:
        """Return the steps of this process, ignoring all others."""
        return Steps(tuple(sizes), tuple(sizes))

    @staticmethod
    def of(sizes: Sequence[int], process_group: dist.ProcessGroup | None, like: Tensor) -> Steps:
        """Return the steps of all processes; each calls this with its sizes and a tensor on its device."""
        group = shared(process_group)
        if group is None:
            return Steps.alone(sizes)
        length = torch.tensor(len(sizes), device=like.device)
        dist.all_reduce(length, dist.ReduceOp.MAX, group)
        own = [*sizes, *[0] * (int(length) - len(sizes))]
        counts = _gathered(torch.tensor(own, device=like.device), group)
        total = tuple(counts.sum(0).tolist())
        return Steps(tuple(own), total, group, counts.to(like.dtype))

    def blocks(self, rows: Tensor) -> list[Tensor]:
        """Return views of the rows (R, H) as (steps, rows of each, H), one for each run of equal steps."""
        runs = [(size, len(list(run))) for size, run in groupby(self.own)]
        parts = rows.split([size * count for size, count in runs])
        return [part.view(count, size, rows.size(1)) for part, (size, count) in zip(parts, runs, strict=True)]

    def spread(self, steps: Tensor) -> list[Tensor]:
        """Return the row of each step (steps, H) in a form that broadcasts over ``blocks``."""
        return list(steps.unsqueeze(1).split([len(list(run)) for _, run in groupby(self.own)]))

    def sums(self, rows: Tensor) -> Tensor:
        """Return the sums (steps, H) of this process's rows (R, H) over each step."""
        return torch.cat([block.sum(1) for block in self.blocks(rows)])

    def standardized(self, rows: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """Subtract from rows (R, H) the mean of their step and multiply by its rstd, both (steps, H)."""
        parts = zip(self.blocks(rows), self.spread(mean), self.spread(rstd), strict=True)
        return torch.cat([((part - m) * r).flatten(0, 1) for part, m, r in parts])

    def column(self, tensor: Tensor, values: Sequence[float]) -> Tensor:
        """Return one number per step as a column that broadcasts over a tensor (steps, H)."""
        return tensor.new_tensor(values).unsqueeze(1)


def shared(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the group of processes that share a batch, or None if this process has it alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def combined(
    mean: Tensor, squares: Tensor, counts: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Combine means and sums of squares about them over all processes (Chan, Golub, LeVeque 1979).

    Args:
        mean: (*, H), the mean of this process's rows, 0 where it has none.
        squares: (*, H), the sum of their squares about it.
        counts: (processes, *, 1), the number of rows of each process.
        group: the processes.
    """
    means, others = _gathered(torch.stack([mean, squares]), group).unbind(1)
    whole = (counts * means).sum(0) / counts.sum(0).clamp_min(1)
    return whole, (others + counts * (means - whole).square()).sum(0)


def added(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Add the sums of all processes, in place."""
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


def _gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the tensors of all processes: (processes, *own.shape)."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group)
    return torch.stack(parts)


class BatchStandardized(torch.autograd.Function):
    """Rows standardized with the mean and the standard deviation of their step.

    ``apply(rows, mean, var, steps, eps)`` takes rows (R, H) and, for each step, the mean and variance
    (steps, H) to use where the step has only one row and so no statistics of its own. It returns the
    standardized rows, and the means and biased variances that were used.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, mean: Tensor, var: Tensor, steps: Steps, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Standardize the rows; see the class."""
        own, total = steps.column(mean, steps.own), steps.column(mean, steps.total)
        means = steps.sums(rows) / own.clamp_min(1)
        output = torch.empty_like(rows)
        centred = steps.blocks(output)
        for place, block, m in zip(centred, steps.blocks(rows), steps.spread(means), strict=True):
            torch.sub(block, m, out=place)
        squares = torch.cat([block.square().sum(1) for block in centred])
        own_means = means
        if steps.group is not None and steps.counts is not None:
            means, squares = combined(means, squares, steps.counts.unsqueeze(-1), steps.group)
        mean = torch.where(total > 1, means, mean)
        var = torch.where(total > 1, squares / total, var)
        rstd = torch.rsqrt(var + eps)
        for block, m, r in zip(centred, steps.spread(own_means - mean), steps.spread(rstd), strict=True):
            block.add_(m).mul_(r)
        ctx.save_for_backward(output, rstd)
        ctx.steps = steps
        ctx.mark_non_differentiable(mean, var)
        return output, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the rows, and None for the other arguments."""
        output, rstd = ctx.saved_tensors
        steps: Steps = ctx.steps
        # A step of one row was standardized with constants.
        share = steps.column(rstd, [1 / total if total > 1 else 0.0 for total in steps.total])
        result = grad * output
        sums = added(torch.stack([steps.sums(grad), steps.sums(result)]), steps.group) * share
        parts = [steps.blocks(t) for t in (result, grad, output)]
        factors = [steps.spread(t) for t in (sums[0], sums[1], rstd)]
        for place, d, a, along_one, along_a, r in zip(*parts, *factors, strict=True):
            torch.mul(a, along_a, out=place)
            torch.sub(d, place.add_(along_one), out=place)
            place.mul_(r)
        return result, None, None, None, None
