"""Permutation-invariant MNIST, the paper's §6.6 and figure 6: 784-1000-1000-10."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd

from layernorm.experiments import data
from layernorm.experiments.classification import METRICS, TEST_ERROR, Classification, Data
from layernorm.experiments.networks import feedforward
from layernorm.experiments.results import judging
from layernorm.experiments.section import Card
from layernorm.experiments.task import TRAIN_LOSS, ExperimentError, Preset, Task


def load(cases: int = 55_000) -> Data:
    """Return ``cases`` training and 10,000 test cases of 784 pixels in [0, 1].

    The training cases are the first of the last 55,000 of MNIST's 60,000; the 5,000 before them are the
    validation cases of the customary split and stay unused.

    Raises:
        ExperimentError: MNIST has fewer cases, or cannot be had.
    """
    if not 0 < cases <= 55_000:
        raise ExperimentError(f"cases must be 1 to 55000, got {cases}")
    train_images, train_labels = data.mnist("train")
    test_images, test_labels = data.mnist("t10k")
    return Data(
        train_inputs=train_images[5000 : 5000 + cases].flatten(1).float() / 255,
        train_targets=train_labels[5000 : 5000 + cases].long(),
        test_inputs=test_images.flatten(1).float() / 255,
        test_targets=test_labels.long(),
    )


def problem(cases: int = 55_000) -> Classification:
    """Return MNIST and the paper's network as a problem."""
    return Classification(load(cases), partial(feedforward.network, (784, 1000, 1000, 10)))


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Judge whether layer norm is better than batch norm at small batches, and in fewer updates than both."""
    small = min(results.batch_size)
    return (
        judging.better(
            results,
            TEST_ERROR,
            than="batch",
            batch_sizes=(small,),
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
            TEST_ERROR,
            claim="A network with layer norm needs fewer updates than one without.",
            section="§6.6",
            remark=(
                "the lead over no norm depends on the rate and the length: it is large at batch size 4 in "
                "ten epochs with 0.001, and at 128 with 0.0003; elsewhere the two are level after an epoch"
            ),
        ),
    )


TASK = Task(
    name="mnist",
    title="Permutation-invariant MNIST",
    section="§6.6, figure 6",
    summary=(
        "permutation-invariant MNIST (55,000 training and 10,000 test cases; small: the first 15,000), "
        "784-1000-1000-10 with ReLU, Adam"
    ),
    problem=problem,
    metrics=METRICS,
    norms=feedforward.NORMS,
    presets={
        "small": Preset(
            epochs=2, batch_sizes=(128, 4), norms=("none", "batch", "layer"), sizes={"cases": 15_000}
        ),
        "paper": Preset(
            epochs=60, batch_sizes=(128, 4), norms=("none", "batch", "layer"), sizes={"cases": 55_000}
        ),
    },
    judge=judge,
)
