"""The tensors of a point, and a function of them as a peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.core.subjects import Subject
from layernorm.variants import parameter_shapes, resolve

#: How PyTorch and this package call the layers of a cell.
CLASSES: Final = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


@dataclass(frozen=True)
class Case:
    """The tensors of a point.

    Attributes:
        cell: "lstm", "gru" or "rnn".
        training: forward and backward, or forward alone.
        x: the input (T, N, F).
        grad: the gradient of the output (T, N, H).
        normalized: the weights of the normalized variant, by name.
        unnormalized: those of ``torch.nn``'s layer, by name.
    """

    cell: Any
    training: bool
    x: Tensor
    grad: Tensor
    normalized: dict[str, Tensor]
    unnormalized: dict[str, Tensor]

    @property
    def hidden(self) -> int:
        """Features of the state, H."""
        return self.normalized["weight_hh"].size(1)

    def to(self, dtype: torch.dtype) -> Case:
        """Return the same numbers in another dtype."""
        normalized, unnormalized = (
            {name: t.to(dtype) for name, t in weights.items()}
            for weights in (self.normalized, self.unnormalized)
        )
        return replace(
            self,
            x=self.x.to(dtype),
            grad=self.grad.to(dtype),
            normalized=normalized,
            unnormalized=unnormalized,
        )


def make_case(
    cell: Any,
    batch: int,
    hidden: int,
    steps: int,
    training: bool,
    device: str = "cpu",
    *,
    variant: str = "paper",
) -> Case:
    """Return random float32 tensors, the same ones each time, whose values bfloat16 holds exactly."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    def weights(variant: str) -> dict[str, Tensor]:
        found = {}
        for name, shape in parameter_shapes(cell, resolve(variant, cell), hidden, hidden).items():
            if name.startswith("weight"):
                value = (2 * torch.rand(shape, generator=random, device=device) - 1) / hidden**0.5
            else:
                # A normalized LSTM whose gain_hh is 1 amplifies every rounding from step to step: after
                # a hundred of them bfloat16 results share nothing with float32's, in any implementation.
                mean = 0.5 if name == "gain_hh" else float("gain" in name)
                value = mean + 0.1 * normal(*shape)
            found[name] = value.bfloat16().float()
        return found

    x, grad = normal(steps, batch, hidden), normal(steps, batch, hidden)
    normalized = weights(variant)
    matrices = {name: value for name, value in normalized.items() if name.startswith("weight")}
    unnormalized = weights("none") | matrices
    return Case(cell, training, x.bfloat16().float(), grad.bfloat16().float(), normalized, unnormalized)


def subject(forward: Callable[[Tensor], Tensor], x: Tensor, leaves: list[Tensor], case: Case) -> Subject:
    """Return a function of x as a peer; its other leaves have gradients too."""
    if not case.training:
        call = partial(forward, x)
        return Subject(call, lambda: [call()])
    every = [x, *leaves]

    def release() -> None:
        for leaf in every:
            leaf.grad = None

    def step() -> Tensor:
        release()
        output = forward(x)
        output.backward(case.grad)
        return output

    def results() -> list[Tensor]:
        output = step()
        grads = [leaf.grad for leaf in every]
        if any(grad is None for grad in grads):
            raise RuntimeError("a parameter has no gradient")
        return [output.detach(), *(grad for grad in grads if grad is not None)]

    return Subject(step, results, forward=lambda: [forward(x)], release=release)


def of_function(function: Callable[..., Tensor], case: Case, weights: dict[str, Tensor]) -> Subject:
    """Return a function of x and the weights, in the order that these have, as a peer."""
    x = case.x.detach().requires_grad_(case.training)
    leaves = [value.detach().requires_grad_(case.training) for value in weights.values()]
    return subject(lambda x: function(x, *leaves), x, leaves, case)


def load(module: Any, weights: dict[str, Tensor], suffix: str = "_l0") -> list[Tensor]:
    """Put the weights into a layer; return its parameters in their order."""
    parameters = [getattr(module, f"{name}{suffix}") for name in weights]
    with torch.no_grad():
        for parameter, value in zip(parameters, weights.values(), strict=True):
            parameter.copy_(value)
    return parameters
