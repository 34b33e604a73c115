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

from layernorm.experiments.classification import METRICS, TEST_ERROR, VALIDATION_ERROR, Classification, Data
from layernorm.experiments.networks import feedforward
from layernorm.experiments.results import judging
from layernorm.experiments.section import Card
from layernorm.experiments.task import Preset, Task


def load() -> Data:
    """Return 1,097 training, 250 validation and 450 test cases of 64 pixels in [0, 1], by classes alike."""
    images, labels = load_digits(return_X_y=True)
    parts, rest = {}, (images / 16.0, labels)
    for name, count in (("test", 450), ("valid", 250)):
        kept, parts[name + "_inputs"], kept_labels, parts[name + "_targets"] = train_test_split(
            *rest, test_size=count, stratify=rest[1], random_state=0
        )
        rest = (kept, kept_labels)
    parts["train_inputs"], parts["train_targets"] = rest
    return Data(
        **{
            name: torch.tensor(values, dtype=torch.float32 if name.endswith("inputs") else torch.int64)
            for name, values in parts.items()
        }
    )


def problem() -> Classification:
    """Make the problem: the digits and a network of 64-128-128-10."""
    return Classification(load(), partial(feedforward.network, (64, 128, 128, 10)))


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Judge layer norm: its updates against no norm, and its error against batch norm at small batches."""
    return (
        judging.fewer_updates(
            results,
            VALIDATION_ERROR,
            claim="A network with layer norm needs fewer updates than one without.",
            section="§6.6",
        ),
        judging.better(
            results,
            TEST_ERROR,
            curve=VALIDATION_ERROR,
            than="batch",
            batch_sizes=judging.small_batches(results),
            claim="Layer norm works with small batches, where batch norm does not.",
            section="§6.6, figure 6",
        ),
    )


_PRESET = Preset(
    epochs=10,
    batch_sizes=(128, 4),
    norms=("none", "batch", "layer"),
    seeds=tuple(range(5)),
    learning_rates=(1e-3, 3e-3, 1e-2),
)

TASK = Task(
    name="digits",
    title="Handwritten digits",
    section="§6.6",
    summary=(
        "scikit-learn's handwritten digits (1,097 training, 250 validation and 450 test cases of 64 pixels), "
        "64-128-128-10 with ReLU, Adam"
    ),
    problem=problem,
    metrics=METRICS,
    norms=feedforward.NORMS,
    presets={"small": _PRESET, "paper": _PRESET},
    judge=judge,
)
