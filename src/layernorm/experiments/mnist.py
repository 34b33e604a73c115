"""Permutation-invariant MNIST, the paper's §6.6 and figure 6: 784-1000-1000-10."""

from __future__ import annotations

from functools import partial

from torch.nn import functional as F

from layernorm.experiments import data, feedforward
from layernorm.experiments.task import Data, Task, misclassified


def load() -> Data:
    """55,000 training and 10,000 test cases of 784 pixels in [0, 1].

    The training cases are the last 55,000 of MNIST's 60,000; the first 5,000 are the validation cases
    of the customary split and stay unused.
    """
    train_images, train_labels = data.mnist("train")
    test_images, test_labels = data.mnist("t10k")
    return Data(
        train_inputs=train_images[5000:].flatten(1).float() / 255,
        train_targets=train_labels[5000:].long(),
        test_inputs=test_images.flatten(1).float() / 255,
        test_targets=test_labels.long(),
    )


TASK = Task(
    name="mnist",
    summary=(
        "permutation-invariant MNIST (paper §6.6; 55,000 training and 10,000 test cases), "
        "784-1000-1000-10 with ReLU, Adam"
    ),
    data=load,
    network=partial(feedforward.network, (784, 1000, 1000, 10)),
    loss=F.cross_entropy,
    error=misclassified,
    norms=feedforward.NORMS,
    default_norms=("none", "batch", "layer"),
    default_epochs=60,
    default_seeds=1,
)
