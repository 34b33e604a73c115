"""MNIST pixel by pixel in a fixed random order: ``sequential_mnist`` with its pixels permuted."""

from __future__ import annotations

from layernorm.experiments.task import Preset
from layernorm.experiments.tasks import sequential_mnist

TASK = sequential_mnist.task(
    "permuted-mnist",
    "Permuted sequential MNIST",
    permuted=True,
    small=Preset(
        epochs=6,
        batch_sizes=(64,),
        norms=("none", "batch", "layer"),
        seeds=tuple(range(3)),
        learning_rates=(1e-3,),
        optimizer="rmsprop",
        clip=1.0,
        evaluate_every=100,
        sizes={"hidden": 100, "down": 4, "cases": 16_000, "held_out": 1000},
    ),
)
