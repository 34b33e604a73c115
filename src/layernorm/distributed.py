"""The norms of a ``DTensor``, whether each process holds whole rows or only a part of every row.

Where the normalized dimensions are whole (data, sequence and context parallelism), each process normalizes
its own rows with the usual kernels, and the gradients of gain and bias are partial sums. Where they are
sharded (tensor parallelism), the input is not gathered: each process computes the moments of its own part of
every row, and one gather of these few numbers per row combines them (Chan, Golub, LeVeque 1979; sums of
squares about different means cannot be added without losing digits). In backward one all-reduce adds the two
sums that the gradient needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from layernorm import checks


class _Layout(NamedTuple):
    """How the tensors of a call are placed, with one placement for each dimension of the mesh.

    Attributes:
        rows: placements of input, residual and results.
        affine: placements of gain and bias.
        affine_grads: placements of their gradients as each process computes them.
        cut: the dimensions of the mesh along which rows are sharded.
    """

    rows: tuple[Placement, ...]
    affine: tuple[Placement, ...]
    affine_grads: tuple[Placement, ...]
    cut: tuple[int, ...]


def norm(
    operator: str,
    local: Callable[..., Any],
    input: DTensor,
    residual: Tensor | None,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> Any:
    """Compute the named operator; its results have the input's placements.

    An input that is a partial sum is summed first. Residual, gain and bias are redistributed to match the
    input's placements, which costs nothing where they match already or are replicated.

    Args:
        operator: one of ``layernorm.backends.NORMS``.
        local: the function that computes the operator on plain tensors; it takes all other arguments.
        input: (*, *normalized_shape).
        residual: a tensor of the input's shape for an operator that adds one, else None.
        normalized_shape: the sizes of the last dimensions.
        weight: the gain, or None.
        bias: the bias, or None.
        eps: added to the variance or the mean square.

    Raises:
        TypeError: an argument is of the wrong type.
        RuntimeError: shapes, dtypes or devices do not fit together; another tensor is not a DTensor or is on
            another mesh; a second derivative is requested where rows are sharded.
    """
    checks.norm_arguments(operator, input, normalized_shape, weight, bias, eps)
    if operator.startswith("add_"):
        checks.residual_argument(operator, residual, input)
    _check_meshes(operator, input, {"residual": residual, "weight": weight, "bias": bias})
    layout = _layout(input, len(normalized_shape))
    x, other = (_local(t, layout.rows, layout.rows) for t in (input, residual))
    gain, offset = (_local(t, layout.affine, layout.affine_grads) for t in (weight, bias))
    if layout.cut:
        checks.floating_point(operator, "input", input)  # complex rows are normalized whole
        total = x if other is None else x + other
        count = math.prod(normalized_shape)
        groups = tuple(input.device_mesh.get_group(dim) for dim in layout.cut)
        if eps is None:
            eps = torch.finfo(_accumulate(x)).eps
        centred = operator.endswith("layer_norm")
        output = _ShardedNorm.apply(  # type: ignore[no-untyped-call]
            total, gain, offset, eps, centred, len(normalized_shape), count, groups, x.dtype
        )
        results = (output,) if other is None else (output, total)
    else:
        found = local(operator, x, other, normalized_shape, gain, offset, eps)
        results = found if isinstance(found, tuple) else (found,)
    wrapped = tuple(_global(result, input, layout.rows) for result in results)
    return wrapped[0] if residual is None else wrapped


def _check_meshes(operator: str, input: DTensor, others: Mapping[str, Tensor | None]) -> None:
    for name, tensor in others.items():
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        if tensor is not None and mesh != input.device_mesh:
            got = "a plain Tensor" if mesh is None else f"a DTensor on {mesh}"
            raise RuntimeError(
                f"{operator}: input is a DTensor on {input.device_mesh}, so {name} must be one on it too, "
                f"but got {got}; distribute it, for example with torch.distributed.tensor.distribute_module"
            )


def _layout(input: DTensor, tail: int) -> _Layout:
    leading = input.dim() - tail
    rows: list[Placement] = []
    affine: list[Placement] = []
    grads: list[Placement] = []
    cut = []
    for dim, placement in enumerate(input.placements):
        # Exactly these two: a partial sum is summed, and a subclass of Shard may order elements differently.
        kept = placement if type(placement) in (Shard, Replicate) else Replicate()
        rows.append(kept)
        place = Replicate()
        grad: Placement = Replicate()
        if isinstance(kept, Shard):
            at = kept.dim % input.dim()
            if at >= leading:
                cut.append(dim)
                place = grad = Shard(at - leading)  # type: ignore[assignment]
            else:
                grad = Partial()
        affine.append(place)
        grads.append(grad)
    return _Layout(tuple(rows), tuple(affine), tuple(grads), tuple(cut))


def _local(tensor: Tensor | None, places: Sequence[Placement], grads: Sequence[Placement]) -> Any:
    if tensor is None:
        return None
    return tensor.redistribute(placements=places).to_local(grad_placements=grads)  # type: ignore[attr-defined]


def _global(local: Tensor, like: DTensor, placements: Sequence[Placement]) -> DTensor:
    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(
        local.contiguous(), like.device_mesh, placements, run_check=False, shape=like.shape, stride=stride
    )


def _accumulate(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


_Groups = tuple[dist.ProcessGroup, ...]


class _ShardedNorm(torch.autograd.Function):
    """The norm of rows of which this process holds a part."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        tail: int,
        count: int,
        groups: _Groups,
        dtype: torch.dtype,
    ) -> Tensor:
        dims = tuple(range(-tail, 0))
        a = input.to(_accumulate(input))
        mean, square = _moments(a, dims, centred, count, groups)
        rstd = torch.rsqrt(square + eps)
        output = (a - mean) * rstd
        ctx.save_for_backward(input, mean, rstd, weight, bias)
        ctx.of = (dims, centred, count, groups)
        if weight is not None:
            output = output * weight
        if bias is not None:
            output = output + bias
        return output.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, rstd, weight, bias = ctx.saved_tensors
        dims, centred, count, groups = ctx.of
        n = (input.to(rstd.dtype) - mean) * rstd
        g = grad.to(rstd.dtype)
        t = g if weight is None else g * weight
        sums = _all_reduce(torch.stack([t.sum(dims, True), (t * n).sum(dims, True)]), groups) / count
        along_one = sums[0] if centred else 0
        grad_input = (rstd * (t - along_one - n * sums[1])).to(input.dtype)
        leading = tuple(range(grad.dim() - len(dims)))

        def over_rows(a: Tensor, parameter: Tensor | None) -> Tensor | None:
            if parameter is None:
                return None
            return (a.sum(leading) if leading else a).to(parameter.dtype)

        return grad_input, over_rows(g * n, weight), over_rows(g, bias), *([None] * 6)


def _moments(
    a: Tensor, dims: tuple[int, ...], centred: bool, count: int, groups: _Groups
) -> tuple[Tensor, Tensor]:
    """Return the mean of whole rows, and their mean square about it."""
    own = math.prod(a.shape[dim] for dim in dims)
    rows = a.shape[: a.dim() - len(dims)] + (1,) * len(dims)
    if not centred:
        return a.new_zeros(rows), _all_reduce(a.square().sum(dims, True), groups) / count
    # A process may hold no element of the rows.
    mean = a.mean(dims, keepdim=True) if own else a.new_zeros(rows)
    squares = (a - mean).square().sum(dims, True)
    parts = torch.stack([torch.full_like(mean, own), mean, squares])
    for group in groups:
        gathered = [torch.empty_like(parts) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, parts, group)
        n, means, squares = torch.stack(gathered, 1)
        total = n.sum(0)
        mean = (n * means).sum(0) / total.clamp_min(1)
        squares = (squares + n * (means - mean).square()).sum(0)
        parts = torch.stack([total, mean, squares])
    return parts[1], parts[2] / count


def _all_reduce(sums: Tensor, groups: _Groups) -> Tensor:
    for group in groups:
        dist.all_reduce(sums, group=group)
    return sums


__all__ = ["norm"]
