"""The growth of the weights during training, and what it does to the learning rate (paper §5.2.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layernorm.theory.invariances import weights


@dataclass(frozen=True)
class Step:
    """One weight matrix W at one update of gradient descent.

    Attributes:
        update: the number of the update, from 0.
        loss: the loss of the batch before the update.
        norm: ‖W‖ before the update (Frobenius); with weight norm, that of the unnormalized W.
        angle: the angle between W before and after the update, in degrees.
        cosine: the cosine of the angle between W and its gradient; 0 where the network does not change with
            the scale of W.
        effective_rate: learning rate/‖W‖², the rate at which a W of length 1 with the same outputs turns.
    """

    update: int
    loss: float
    norm: float
    angle: float
    cosine: float
    effective_rate: float


def weight_growth(
    network: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    learning_rate: float,
    updates: int,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Step]:
    """Train a classifier by plain gradient descent and follow the weights of its first linear layer.

    Where the outputs do not change with the scale of W, its gradient is orthogonal to W and proportional to
    1/‖W‖. So every update makes W longer, ‖W'‖² = ‖W‖² + (learning rate·‖gradient‖)², and turns it by an
    angle whose tangent, learning rate·‖gradient‖/‖W‖, is proportional to 1/‖W‖².

    Args:
        network: maps inputs to logits; it is trained in place.
        inputs: (cases, features).
        targets: class numbers (cases,).
        learning_rate: constant, without momentum or weight decay.
        updates: the number of updates.
        batch_size: cases per update, drawn without replacement.
        seed: the seed of the batches.

    Returns:
        One ``Step`` for each update.

    Raises:
        ValueError: the network has no linear layer, or ``batch_size`` exceeds the number of cases.

    Examples:
        >>> import torch, layernorm
        >>> from torch import nn
        >>> from layernorm.theory import weight_growth
        >>> network = nn.Sequential(nn.Linear(4, 8, bias=False), layernorm.LayerNorm(8), nn.Linear(8, 2))
        >>> x = torch.randn(64, 4)
        >>> steps = weight_growth(network, x, (x[:, 0] > 0).long(), learning_rate=0.1, updates=20)
        >>> steps[0].norm < steps[10].norm < steps[19].norm
        True
    """
    if not weights(network):
        raise ValueError("network: expected one with an nn.Linear, got none")
    if batch_size > len(inputs):
        raise ValueError(f"batch_size: expected at most the {len(inputs)} cases, got {batch_size}")
    weight = weights(network)[0]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate)
    network.train()
    steps = []
    for update in range(updates):
        cases = torch.randperm(len(inputs), generator=generator)[:batch_size]
        loss = F.cross_entropy(network(inputs[cases]), targets[cases])
        optimizer.zero_grad()
        loss.backward()
        before = weight.detach().double().clone()
        optimizer.step()
        steps.append(_step(update, loss.item(), before, weight, learning_rate))
    return steps


def _step(update: int, loss: float, before: Tensor, weight: Tensor, learning_rate: float) -> Step:
    """Return what an update did to a weight, which still has its gradient."""
    assert weight.grad is not None  # noqa: S101 - the loss depends on it
    gradient = weight.grad.double()
    length = float(before.norm())
    return Step(
        update=update,
        loss=loss,
        norm=length,
        angle=_angle(before, weight.detach().double()),
        cosine=float((before * gradient).sum() / (before.norm() * gradient.norm())),
        effective_rate=learning_rate / length**2,
    )


def _angle(first: Tensor, second: Tensor) -> float:
    """Return the angle in degrees, exact for small angles too, where the arc cosine is not (Kahan 2006)."""
    first, second = first / first.norm(), second / second.norm()
    return math.degrees(2 * math.atan2(float((first - second).norm()), float((first + second).norm())))
