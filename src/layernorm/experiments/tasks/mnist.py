"""Permutation-invariant MNIST, the paper's §6.6 and figure 6: 784-1000-1000-10."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd
from torch import Tensor

from layernorm.experiments import data
from layernorm.experiments.classification import METRICS, TEST_ERROR, VALIDATION_ERROR, Classification, Data
from layernorm.experiments.networks import feedforward
from layernorm.experiments.results import judging
from layernorm.experiments.section import Card
from layernorm.experiments.task import TRAIN_LOSS, ExperimentError, Preset, Task


def load(cases: int = 55_000, held_out: int = 5_000) -> Data:
    """Return MNIST's cases of 784 pixels in [0, 1].

    The training cases are the first ``cases`` of the last 55,000 of MNIST's 60,000, the validation cases the
    last ``held_out`` of the 5,000 before them, as is customary; there are 10,000 test cases.

    Raises:
        ExperimentError: MNIST has fewer cases, or cannot be had.
    """
    for name, value, most in (("cases", cases, 55_000), ("held_out", held_out, 5_000)):
        if not 0 < value <= most:
            raise ExperimentError(f"{name} must be 1 to {most}, got {value}")
    train_images, train_labels = data.mnist("train")
    test_images, test_labels = data.mnist("t10k")
    train, valid = slice(5000, 5000 + cases), slice(5000 - held_out, 5000)
    return Data(
        train_inputs=_flat(train_images[train]),
        train_targets=train_labels[train].long(),
        valid_inputs=_flat(train_images[valid]),
        valid_targets=train_labels[valid].long(),
        test_inputs=_flat(test_images),
        test_targets=test_labels.long(),
    )


def _flat(images: Tensor) -> Tensor:
    return images.flatten(1).float() / 255


def problem(cases: int = 55_000, held_out: int = 5_000) -> Classification:
    """Return MNIST and the paper's network as a problem."""
    return Classification(load(cases, held_out), partial(feedforward.network, (784, 1000, 1000, 10)))


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Judge whether layer norm is better than batch norm at small batches, and in fewer updates than both."""
    return (
        judging.better(
            results,
            TEST_ERROR,
            curve=VALIDATION_ERROR,
            than="batch",
            batch_sizes=judging.small_batches(results),
            claim="Layer norm is robust to small batches, batch norm is not.",
            section="§6.6, figure 6",
        ),
        judging.fewer_updates(
            results,
            TRAIN_LOSS,
            than="batch",
            claim="Training with layer norm converges faster than with batch norm on all layers.",
            section="§6.6, figure 6",
        ),
        judging.fewer_updates(
            results,
            VALIDATION_ERROR,
            claim="A network with layer norm needs fewer updates than one without.",
            section="§6.6",
        ),
    )


TASK = Task(
    name="mnist",
    title="Permutation-invariant MNIST",
    section="§6.6, figure 6",
    summary=(
        "permutation-invariant MNIST (55,000 training, 5,000 validation and 10,000 test cases; small: "
        "10,000, 1,000 and 10,000), 784-1000-1000-10 with ReLU, Adam"
    ),
    problem=problem,
    metrics=METRICS,
    norms=feedforward.NORMS,
    presets={
        "small": Preset(
            epochs=2,
            batch_sizes=(128, 4),
            norms=("none", "batch", "layer"),
            seeds=tuple(range(5)),
            sizes={"cases": 10_000, "held_out": 1_000},
        ),
        "paper": Preset(
            epochs=60,
            batch_sizes=(128, 4),
            norms=("none", "batch", "layer"),
            sizes={"cases": 55_000, "held_out": 5_000},
        ),
    },
    judge=judge,
)
