"""What an experiment is to the runner: data, a network for each norm, a loss and a metric."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

#: The tasks, each a module of this package that defines ``TASK``.
TASKS: Final = ("digits", "digits-rows", "mnist")


class ExperimentError(Exception):
    """Something that the person at the keyboard can mend; the message is one line that says how."""


@dataclass(frozen=True)
class Data:
    """Training and test cases: inputs (cases, ...) and targets (cases)."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


@dataclass(frozen=True)
class Task:
    """One experiment.

    Attributes:
        name: as given on the command line.
        summary: one sentence: data, network, optimizer.
        data: loads the data.
        network: makes the network for one of ``norms``, with fresh weights.
        loss: the mean loss of (output, targets), minimized in training.
        error: for each case 1 if (output, targets) disagree and 0 if they agree.
        norms: what the network can be normalized with.
        default_norms: the norms compared when none are named.
        default_epochs: passes over the training cases.
        default_seeds: repetitions.
        default_batch_sizes: cases per update.
        learning_rate: of Adam.
    """

    name: str
    summary: str
    data: Callable[[], Data]
    network: Callable[[str], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]
    norms: tuple[str, ...]
    default_norms: tuple[str, ...]
    default_epochs: int
    default_seeds: int
    default_batch_sizes: tuple[int, ...] = (128, 4)
    learning_rate: float = 1e-3


def find(name: str) -> Task:
    """The task of this name.

    Raises:
        ExperimentError: there is none.
    """
    if name not in TASKS:
        raise ExperimentError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    module = importlib.import_module(f"layernorm.experiments.{name.replace('-', '_')}")
    task: Task = module.TASK
    return task


def misclassified(output: Tensor, targets: Tensor) -> Tensor:
    """For logits (cases, classes): 1 where the largest is not the target's."""
    return (output.argmax(-1) != targets).float()
