"""Handwritten digits of 8x8 pixels by a feed-forward network: real data that scikit-learn ships.

The paper's permutation-invariant MNIST (§6.6) at a size that trains in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from layernorm.experiments.classification import METRICS, TEST_ERROR, Classification, Data
from layernorm.experiments.networks import feedforward
from layernorm.experiments.results import judging
from layernorm.experiments.section import Card
from layernorm.experiments.task import Preset, Task


def load() -> Data:
    """Return 1,347 training and 450 test cases of 64 pixels in [0, 1], the classes in equal shares."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=450, stratify=labels, random_state=0)
    train, test, train_labels, test_labels = split
    return Data(
        train_inputs=torch.tensor(train, dtype=torch.float32),
        train_targets=torch.tensor(train_labels),
        test_inputs=torch.tensor(test, dtype=torch.float32),
        test_targets=torch.tensor(test_labels),
    )


def problem() -> Classification:
    """Make the problem: the digits and a network of 64-128-128-10."""
    return Classification(load(), partial(feedforward.network, (64, 128, 128, 10)))


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Judge layer norm: its updates against no norm, and its error against batch norm at small batches."""
    small = min(results.batch_size)
    return (
        judging.fewer_updates(
            results,
            TEST_ERROR,
            claim="A network with layer norm needs fewer updates than one without.",
            section="§6.6",
        ),
        judging.better(
            results,
            TEST_ERROR,
            than="batch",
            batch_sizes=(small,),
            claim="Layer norm works with small batches, where batch norm does not.",
            section="§6.6, figure 6",
        ),
    )


_PRESET = Preset(epochs=15, batch_sizes=(128, 4), norms=("none", "batch", "layer"), seeds=3)

TASK = Task(
    name="digits",
    title="Handwritten digits",
    section="§6.6",
    summary=(
        "scikit-learn's handwritten digits (1,347 training and 450 test cases of 64 pixels), "
        "64-128-128-10 with ReLU, Adam"
    ),
    problem=problem,
    metrics=METRICS,
    norms=feedforward.NORMS,
    presets={"small": _PRESET, "paper": _PRESET},
    judge=judge,
)
