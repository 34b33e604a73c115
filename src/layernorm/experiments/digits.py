"""Handwritten digits of 8x8 pixels by a feed-forward network: real data that scikit-learn ships.

The paper's permutation-invariant MNIST (§6.6) at a size that trains in seconds.
"""

from __future__ import annotations

from functools import partial

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

from layernorm.experiments import feedforward
from layernorm.experiments.task import Data, Task, misclassified


def load() -> Data:
    """1,347 training and 450 test cases of 64 pixels in [0, 1], the classes in equal shares."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=450, stratify=labels, random_state=0)
    train, test, train_labels, test_labels = split
    return Data(
        train_inputs=torch.tensor(train, dtype=torch.float32),
        train_targets=torch.tensor(train_labels),
        test_inputs=torch.tensor(test, dtype=torch.float32),
        test_targets=torch.tensor(test_labels),
    )


TASK = Task(
    name="digits",
    summary=(
        "scikit-learn's handwritten digits (1,347 training and 450 test cases of 64 pixels), "
        "64-128-128-10 with ReLU, Adam"
    ),
    data=load,
    network=partial(feedforward.network, (64, 128, 128, 10)),
    loss=F.cross_entropy,
    error=misclassified,
    norms=feedforward.NORMS,
    default_norms=("none", "batch", "layer"),
    default_epochs=15,
    default_seeds=3,
)
