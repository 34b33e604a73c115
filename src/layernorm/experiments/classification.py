"""Problems whose cases are an input and a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layernorm.experiments.task import Batch, Loss, Metric, Problem

TEST_ERROR: Final = Metric("test_error", "test error (%)", log=True)
TEST_LOSS: Final = Metric("test_loss", "test loss", form="{:.3g}", log=True)
METRICS: Final = (TEST_ERROR, TEST_LOSS)


@dataclass
class Data:
    """Training and test cases: inputs (cases, ...) and classes (cases)."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


class Classification(Problem):
    """Cross-entropy of a network's logits; the metrics are ``METRICS``.

    Args:
        data: the cases.
        network: makes the network for a norm: inputs (N, ...) to logits (N, classes).
        at_once: test cases in one call of the network.
    """

    def __init__(self, data: Data, network: Callable[[str], nn.Module], at_once: int = 1000) -> None:
        self.cases = len(data.train_inputs)
        self._data, self._network, self._at_once = data, network, at_once

    def to(self, device: torch.device) -> None:
        """Move the data to a device."""
        self._data = Data(**{name: tensor.to(device) for name, tensor in vars(self._data).items()})

    def network(self, norm: str) -> nn.Module:
        """Make the network for a norm."""
        return self._network(norm)

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """Compute the cross-entropy in nats, by case."""
        logits = network(self._data.train_inputs[batch.cases])
        total = F.cross_entropy(logits, self._data.train_targets[batch.cases], reduction="sum")
        return Loss(total, len(batch.cases))

    def evaluate(self, network: nn.Module) -> Mapping[str, float]:
        """Return mean cross-entropy and percentage of errors over the test cases."""
        inputs, targets = self._data.test_inputs, self._data.test_targets
        loss, errors = 0.0, 0
        for start in range(0, len(inputs), self._at_once):
            part = slice(start, start + self._at_once)
            logits = network(inputs[part])
            loss += F.cross_entropy(logits, targets[part], reduction="sum").item()
            errors += int((logits.argmax(-1) != targets[part]).sum())
        return {TEST_ERROR.name: 100.0 * errors / len(inputs), TEST_LOSS.name: loss / len(inputs)}
