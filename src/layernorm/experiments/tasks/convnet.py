"""A convolutional network on MNIST, the paper's §6.7."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Final

import pandas as pd
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from layernorm.baselines import Norm, start_weight_norm
from layernorm.experiments.classification import METRICS, TEST_ERROR, VALIDATION_ERROR, Classification
from layernorm.experiments.results import judging
from layernorm.experiments.section import Card
from layernorm.experiments.task import TRAIN_LOSS, ExperimentError, Preset, Task
from layernorm.experiments.tasks import mnist

#: What a convolution can be normalized with.
NORMS: Final = ("none", "batch", "layer", "rms", "weight")
_PRESET_NORMS: Final = ("none", "batch", "layer", "weight")
#: Cases from which weight norm's gains and biases start.
_START_CASES: Final = 500


def network(channels: Sequence[int], norm: str) -> nn.Sequential:
    """Build convolutions of 3x3 with ReLU, the image halved after each pair of them; then a linear layer.

    Layer norm takes mean and variance over all channels and places of an image, as in the paper all hidden
    units of a layer share them, with one gain and bias for each channel: ``torch.nn.GroupNorm`` of one group.
    RMS norm divides by the root mean square over the same values and has no bias.
    Batch norm takes them for each channel over all images and places. Weight norm is on the weights of all
    layers. Where a norm has a bias of its own, its convolution has none.

    Args:
        channels: of each pair of convolutions.
        norm: one of ``NORMS``.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.convnet import network
        >>> network((4, 8), "layer")(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 10])
    """
    widths = [1, *(width for width in channels for _ in range(2))]
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(widths)):
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=norm not in ("batch", "layer"))
        layers.append(weight_norm(convolution) if norm == "weight" else convolution)
        if norm in ("batch", "layer", "rms"):
            layers.append(Norm(norm)(after, dim=1))
        layers.append(nn.ReLU())
        if index % 2:
            layers.append(nn.MaxPool2d(2))
    side = 28 // 2 ** len(channels)
    logits = nn.Linear(channels[-1] * side**2, 10)
    layers += [nn.Flatten(), weight_norm(logits) if norm == "weight" else logits]
    return nn.Sequential(*layers)


class ConvolutionalMnist(Classification):
    """MNIST's images and a convolutional network of three pairs of layers.

    Args:
        width: channels of the first pair of convolutions; the second has twice, the third four times as many.
        cases: training cases, at most 55,000.
        held_out: the number of test cases, from the first of the 10,000; half as many validation cases.

    Raises:
        ExperimentError: a size is not possible.
    """

    def __init__(self, width: int = 32, cases: int = 55_000, held_out: int = 10_000) -> None:
        for name, value, most in (("width", width, 512), ("held_out", held_out, 10_000)):
            if not 0 < value <= most:
                raise ExperimentError(f"{name} must be 1 to {most}, got {value}")
        flat = mnist.load(cases, max(1, held_out // 2))
        flat = replace(
            flat, test_inputs=flat.test_inputs[:held_out], test_targets=flat.test_targets[:held_out]
        )
        images = {n: getattr(flat, n).unflatten(1, (1, 28, 28)) for n in vars(flat) if n.endswith("inputs")}
        super().__init__(replace(flat, **images), partial(network, (width, 2 * width, 4 * width)))

    def network(self, norm: str) -> nn.Module:
        """Make the network for a norm; weight norm starts from the first training cases."""
        fresh = super().network(norm)
        if norm == "weight":
            start = self._data.train_inputs[:_START_CASES]
            start_weight_norm(fresh.to(start.device), start)
        return fresh


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Judge whether layer norm needs fewer updates than no norm, and batch norm is better still."""
    return (
        judging.fewer_updates(
            results,
            VALIDATION_ERROR,
            claim="In a convolutional network layer norm is a speedup over the baseline without a norm.",
            section="§6.7",
        ),
        judging.better(
            results,
            TEST_ERROR,
            curve=VALIDATION_ERROR,
            norm="batch",
            than="layer",
            claim="In a convolutional network batch norm outperforms layer norm.",
            section="§6.7",
        ),
        judging.fewer_updates(
            results,
            TRAIN_LOSS,
            norm="batch",
            than="layer",
            claim="In a convolutional network batch norm trains faster than layer norm.",
            section="§6.7",
        ),
    )


TASK = Task(
    name="convnet",
    title="Convolutional network",
    section="§6.7",
    summary=(
        "MNIST (55,000 training, 5,000 validation and 10,000 test cases; small: 6,000, 1,000 and 2,000), "
        "six convolutions of 3x3 with ReLU and pooling after each pair, then a linear layer, Adam"
    ),
    problem=ConvolutionalMnist,
    metrics=METRICS,
    norms=NORMS,
    presets={
        "small": Preset(
            epochs=3,
            batch_sizes=(128,),
            norms=_PRESET_NORMS,
            seeds=tuple(range(5)),
            sizes={"width": 16, "cases": 6_000, "held_out": 2_000},
        ),
        "paper": Preset(
            epochs=20,
            batch_sizes=(128,),
            norms=_PRESET_NORMS,
            sizes={"width": 32, "cases": 55_000, "held_out": 10_000},
        ),
    },
    judge=judge,
)
