"""The optimizers by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from layernorm.experiments.task import Optimizer


class UncorrectedAdam(torch.optim.Optimizer):
    """Adam as the paper's authors have it in §6.1 and §6.3, whose first steps are larger.

    Their code writes 1 - β for β in the correction of the moments' bias, 1 - 0.1^t in place of 1 - 0.9^t,
    which corrects next to nothing: the first step is 3.2 times the learning rate, and steps are larger than
    Adam's for some thousand updates.

    Args:
        parameters: to optimize.
        lr: the learning rate.
        betas: of the two moments.
        eps: added to the root of the second.
    """

    def __init__(
        self,
        parameters: object,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make an update."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
                state["step"] += 1
                mean, square, count = state["exp_avg"], state["exp_avg_sq"], state["step"]
                mean.lerp_(parameter.grad, 1 - first)
                square.lerp_(parameter.grad.square(), 1 - second)
                rate = group["lr"] * (1 - (1 - second) ** count) ** 0.5 / (1 - (1 - first) ** count)
                parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-rate)
        return loss


def make(name: Optimizer, learning_rate: float, network: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a name for a network's parameters."""
    parameters = network.parameters()
    if name == "adam-uncorrected":
        return UncorrectedAdam(parameters, learning_rate)
    if name == "sgd":
        return torch.optim.SGD(parameters, learning_rate, momentum=0.9, fused=True)
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, learning_rate, momentum=0.9)
    return torch.optim.Adam(parameters, learning_rate, fused=True)


__all__ = ["UncorrectedAdam", "make"]
