"""The interface between an experiment and the program that runs it.

A ``Task`` trains the same network with different norms; a ``Study`` measures something else. Both come in
the sizes of their presets: ``paper`` as published, ``small`` for minutes on two cores.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from layernorm.experiments.errors import ExperimentError as ExperimentError
from layernorm.experiments.errors import MissingData as MissingData
from layernorm.experiments.section import Card, Section, Table

Optimizer: TypeAlias = Literal["adam", "adam-uncorrected", "sgd", "rmsprop"]
Schedule: TypeAlias = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True)
class Metric:
    """Something measured on the cases held out.

    Attributes:
        name: the column of the results.
        label: as in tables and on axes, with the unit.
        higher: whether more is better.
        form: how a value is written.
        log: whether its axis is logarithmic.
        is_test: whether it is of test cases, which choose nothing.
    """

    name: str
    label: str
    higher: bool = False
    form: str = "{:.2f}"
    log: bool = False
    is_test: bool = False


def final_metric(metrics: Sequence[Metric]) -> Metric:
    """Return the one that tells how good a trained network is: the first of test cases, else the first."""
    return next((metric for metric in metrics if metric.is_test), metrics[0])


#: What every task minimizes: the mean over the updates since the last record.
TRAIN_LOSS: Final = Metric("train_loss", "training loss", form="{:.3g}", log=True)


@dataclass(frozen=True)
class Preset:
    """The size of a task, all of which the command line can override.

    Attributes:
        epochs: passes over the training cases.
        batch_sizes: cases per update.
        norms: what is compared.
        seeds: of the repetitions.
        learning_rates: the greatest of the schedule; of several every norm has its own best, by the
            validation cases.
        warmups: updates over which the learning rate first rises from 0; of several likewise.
        optimizer: Adam with PyTorch's other defaults, or without its correction of bias (see
            ``run.optimizers``); SGD with momentum 0.9, or RMSprop.
        schedule: of the learning rate: constant, or down to 0 as half a cosine or a line.
        clip: the greatest norm of all gradients together; None for no limit.
        clip_each: whether it is that of each parameter's gradient by itself.
        evaluate_every: updates between evaluations; None for four evaluations an epoch.
        sizes: keyword arguments of the task's problem.
    """

    epochs: int
    batch_sizes: tuple[int, ...]
    norms: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = (1e-3,)
    warmups: tuple[int, ...] = (0,)
    optimizer: Optimizer = "adam"
    schedule: Schedule = "constant"
    clip: float | None = None
    clip_each: bool = False
    evaluate_every: int | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """The training cases of one update, or this process's part of them.

    What is random in a loss is drawn here and depends on nothing but the run's seed, the update and the place
    of a case in the batch: so it is the same after a restart, and with any number of processes.

    Attributes:
        cases: indices of training cases, on the device where the problem's data is.
        start: the place of the first of them in the whole batch.
        size: of the whole batch, over all processes.
        generator: of this update, on the CPU.
    """

    cases: Tensor
    start: int
    size: int
    generator: torch.Generator

    def normal(self, *size: int) -> Tensor:
        """Draw standard normal numbers (cases, *size) in float32."""
        return self._draw(torch.randn, size)

    def uniform(self, *size: int) -> Tensor:
        """Draw numbers uniform in [0, 1), (cases, *size) in float32."""
        return self._draw(torch.rand, size)

    def _draw(self, source: Callable[..., Tensor], size: tuple[int, ...]) -> Tensor:
        numbers = source(self.size, *size, generator=self.generator)
        return numbers[self.start : self.start + len(self.cases)].to(self.cases.device)


@dataclass(frozen=True)
class Loss:
    """The loss of a batch, minimized as ``total / count`` with both summed over all processes.

    Attributes:
        total: the sum over this process's cases, a scalar with a gradient.
        count: what it is divided by: cases, time steps, characters.
        is_summed: whether the sum itself is minimized, and only told divided by ``count``: where a source
            limits the gradient of the sum.
    """

    total: Tensor
    count: int
    is_summed: bool = False


class Problem(abc.ABC):
    """A task's data, networks, loss and metrics, at one size.

    Attributes:
        cases: the number of training cases.
    """

    cases: int

    @abc.abstractmethod
    def to(self, device: torch.device) -> None:
        """Move the data to a device."""

    @abc.abstractmethod
    def network(self, norm: str) -> nn.Module:
        """Make a network with fresh weights from the global generator, normalized with this norm."""

    @abc.abstractmethod
    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """Compute the loss of a batch, in training mode."""

    @abc.abstractmethod
    def evaluate(self, network: nn.Module) -> Mapping[str, float]:
        """Compute the task's metrics by name, on cases held out; the network is in evaluation mode.

        Draws nothing from the global generator.
        """

    def pictures(self, network: nn.Module) -> Mapping[str, Figure]:
        """Draw samples of a trained network by the name of their file, at the end of a run."""
        return {}


@dataclass(frozen=True)
class Task:
    """One experiment that compares norms.

    Attributes:
        name: as given on the command line.
        title: a heading.
        section: of the paper, as "§6.6, figure 6".
        summary: one sentence: data, network, optimizer.
        problem: makes the problem; its keyword arguments are a preset's ``sizes``.
        metrics: what is measured on the cases held out; the first decides on the learning rate and on when
            a run is as good as another, so it is of validation cases where there are such.
        norms: what the network can be normalized with; the first is the baseline.
        presets: by name, "small" and "paper".
        judge: the cards of the results (the columns of ``results.csv``), each norm at its best learning rate.
        judge_settings: further cards, of the results at all learning rates and warm-ups.
        tables: further tables of the results, such as the paper's own numbers.
    """

    name: str
    title: str
    section: str
    summary: str
    problem: Callable[..., Problem]
    metrics: tuple[Metric, ...]
    norms: tuple[str, ...]
    presets: Mapping[str, Preset]
    judge: Callable[[pd.DataFrame], Sequence[Card]]
    judge_settings: Callable[[pd.DataFrame], Sequence[Card]] = lambda results: ()
    tables: Callable[[pd.DataFrame], Sequence[Table]] = lambda results: ()

    @property
    def final(self) -> Metric:
        """The metric that tells how good a trained network is; see ``final_metric``."""
        return final_metric(self.metrics)


@dataclass(frozen=True)
class Study:
    """One experiment that is no comparison of trainings.

    Attributes:
        name: as given on the command line.
        title: a heading.
        section: of the paper.
        summary: one sentence.
        run: measures and writes its files into a folder: ``run(folder, say, **sizes)``, where ``say`` shows
            a line of progress. What it had finished when it was stopped it does not do again.
        read: what the report shows, read from the folder: cards, tables, charts and pictures.
        presets: by name, the keyword arguments ``sizes`` of ``run``.
    """

    name: str
    title: str
    section: str
    summary: str
    run: Callable[..., None]
    read: Callable[[Path], Section]
    presets: Mapping[str, Mapping[str, Any]]
