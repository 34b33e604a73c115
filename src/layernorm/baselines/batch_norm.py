"""Batch normalization with the statistics of the whole batch, however many processes share it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from layernorm.baselines.statistics import BatchStandardized, Steps, shared
from layernorm.pytorch_internals import BatchNormBase


class BatchNorm(BatchNormBase):
    """Batch normalization of features or channels (Ioffe and Szegedy 2015, arXiv 1502.03167).

    In training y = (x - mean)·rstd·weight + bias with the mean and the biased variance of each feature over
    all cases of the batch (and all positions of an image), and

        running = (1 - momentum)·running + momentum·batch,

    where the running variance takes the unbiased variance, n/(n - 1) times the biased one. In evaluation
    the running mean and variance are used.

    This one layer takes any number of spatial dimensions. Its constructor, parameters and state dict are
    those of ``torch.nn.BatchNorm1d`` and ``BatchNorm2d``, and state dicts can be exchanged with them. Where
    ``torch.distributed`` is initialized, the statistics in training are those of the whole batch over all
    processes, on CPUs too: two processes with half the batch each compute the same as one process with all
    of it. Processes may hold different numbers of cases, even none.

    Args:
        num_features: C, the number of features or channels of the input.
        eps: added to the variance.
        momentum: the momentum of the running statistics; None for the mean over all batches.
        affine: whether there are ``weight`` (the gain) and ``bias``.
        track_running_stats: whether to keep running statistics; without them, evaluation uses the
            statistics of its batch.
        device: the device of the parameters.
        dtype: their dtype.
        process_group: the processes that share a batch; None for all.
        unbiased: whether training divides by the root of the unbiased variance too (paper §6.6).

    Shape:
        Input and output (N, C) or (N, C, *).

    Raises:
        ValueError: the second dimension of the input is not of size ``num_features``, or in training there
            is only one value per channel.

    Examples:
        >>> import torch
        >>> from layernorm.baselines import BatchNorm
        >>> norm = BatchNorm(3)
        >>> norm(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])).round(decimals=2)
        tensor([[-1.,  0.,  1.],
                [ 1.,  0., -1.]], grad_fn=<RoundBackward1>)
        >>> norm.running_mean
        tensor([0.2000, 0.2000, 0.2000])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        unbiased: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.process_group = process_group
        self.unbiased = unbiased

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, *) to the same shape."""
        self._check_input_dim(input)
        if self.training and shared(self.process_group) is not None:
            return self._over_processes(input)
        if self.training and self.unbiased:
            return self._by_unbiased_variance(input)
        return super().forward(input)

    def _by_unbiased_variance(self, input: Tensor) -> Tensor:
        """Normalize by √(n/(n - 1)·var + eps): by √(var + eps·(n - 1)/n), and times √((n - 1)/n)."""
        count = input.numel() // self.num_features
        share, eps = (count - 1) / count, self.eps
        try:
            self.eps = eps * share
            output: Tensor = super().forward(input)
        finally:
            self.eps = eps
        bias: Tensor | float = 0.0
        if self.affine:
            bias = self.bias.reshape(-1, *[1] * (input.dim() - 2))
        result: Tensor = (output - bias) * share**0.5 + bias
        return result

    def _over_processes(self, input: Tensor) -> Tensor:
        channels_last = input.movedim(1, -1)
        rows = channels_last.reshape(-1, self.num_features)
        if input.dtype.itemsize < 4:
            rows = rows.float()
        steps = Steps.of([len(rows)], self.process_group, rows)
        total = steps.total[0]
        if total < 2:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{list(input.shape)} and none in the other processes"
            )
        unused = rows.new_zeros(1, self.num_features)
        share = (total - 1) / total if self.unbiased else 1.0
        output, mean, var = BatchStandardized.apply(rows, unused, unused, steps, self.eps * share)  # type: ignore[no-untyped-call]
        output = output * share**0.5
        if self.running_mean is not None and self.running_var is not None:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            factor = self.momentum
            if factor is None:
                factor = 1 / int(self.num_batches_tracked)  # type: ignore[arg-type]
            self.running_mean.lerp_(mean[0].to(self.running_mean.dtype), factor)
            self.running_var.lerp_((var[0] * (total / (total - 1))).to(self.running_var.dtype), factor)
        if self.weight is not None:
            output = output * self.weight + self.bias
        result: Tensor = output.to(input.dtype).view(channels_last.shape).movedim(-1, 1)
        return result

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.size(1) != self.num_features:
            raise ValueError(
                f"BatchNorm: input must be (N, {self.num_features}) or (N, {self.num_features}, *), got "
                f"{list(input.shape)}; make the layer with num_features= the size of the second dimension"
            )


__all__ = ["BatchNorm"]
