"""Problems whose cases are an input and a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layernorm.experiments.task import Batch, Loss, Metric, Problem

VALIDATION_ERROR: Final = Metric("validation_error", "validation error (%)", log=True)
VALIDATION_LOSS: Final = Metric("validation_loss", "validation loss", form="{:.3g}", log=True)
TEST_ERROR: Final = Metric("test_error", "test error (%)", log=True, is_test=True)
METRICS: Final = (VALIDATION_ERROR, VALIDATION_LOSS, TEST_ERROR)


@dataclass
class Data:
    """Training, validation and test cases: inputs (cases, ...) and classes (cases)."""

    train_inputs: Tensor
    train_targets: Tensor
    valid_inputs: Tensor
    valid_targets: Tensor
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
        """Return cross-entropy and percentage of errors over validation cases, and errors over test cases."""
        data = self._data
        error, loss = self._measured(network, data.valid_inputs, data.valid_targets)
        test_error, _ = self._measured(network, data.test_inputs, data.test_targets)
        return {VALIDATION_ERROR.name: error, VALIDATION_LOSS.name: loss, TEST_ERROR.name: test_error}

    def _measured(self, network: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
        """Return the percentage of errors, and the mean cross-entropy."""
        loss, errors = 0.0, 0
        for start in range(0, len(inputs), self._at_once):
            part = slice(start, start + self._at_once)
            logits = network(inputs[part])
            loss += F.cross_entropy(logits, targets[part], reduction="sum").item()
            errors += int((logits.argmax(-1) != targets[part]).sum())
        return 100.0 * errors / len(inputs), loss / len(inputs)
