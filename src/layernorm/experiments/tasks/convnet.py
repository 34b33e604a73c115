"""A convolutional network on MNIST or CIFAR-10, the paper's §6.7."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Final

import pandas as pd
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from layernorm.baselines import Norm, start_weight_norm
from layernorm.experiments import data
from layernorm.experiments.classification import METRICS, TEST_ERROR, VALIDATION_ERROR, Classification, Data
from layernorm.experiments.results import judging
from layernorm.experiments.section import Card
from layernorm.experiments.task import TRAIN_LOSS, ExperimentError, Preset, Task

#: The data sets, and how many training cases they have without the 5,000 for validation.
IMAGES: Final = {"mnist": 55_000, "cifar10": 45_000}
#: What a convolution can be normalized with.
NORMS: Final = ("none", "batch", "layer", "rms", "group:8", "instance", "weight")
_PRESET_NORMS: Final = ("none", "batch", "layer", "group:8", "instance", "weight")
#: Cases from which weight norm's gains and biases start.
_START_CASES: Final = 500


def network(channels: Sequence[int], norm: str, shape: tuple[int, int] = (1, 28)) -> nn.Sequential:
    """Build convolutions of 3x3 with ReLU, the image halved after each pair of them; then a linear layer.

    Layer norm takes mean and variance over all channels and places of an image, as in the paper all hidden
    units of a layer share them, with one gain and bias for each channel: ``torch.nn.GroupNorm`` of one group.
    RMS norm divides by the root mean square over the same values and has no bias. Group norm takes them over
    eight groups of channels, instance norm for each channel by itself, both of one image.
    Batch norm takes them for each channel over all images and places. Weight norm is on the weights of all
    layers. Where a norm has a bias of its own, its convolution has none.

    Args:
        channels: of each pair of convolutions.
        norm: one of ``NORMS``.
        shape: channels and side of the images.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.convnet import network
        >>> network((4, 8), "layer")(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 10])
    """
    widths = [shape[0], *(width for width in channels for _ in range(2))]
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(widths)):
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=norm in ("none", "rms", "weight"))
        layers.append(weight_norm(convolution) if norm == "weight" else convolution)
        if norm not in ("none", "weight"):
            layers.append(Norm(norm)(after, dim=1))
        layers.append(nn.ReLU())
        if index % 2:
            layers.append(nn.MaxPool2d(2))
    side = shape[1] // 2 ** len(channels)
    logits = nn.Linear(channels[-1] * side**2, 10)
    layers += [nn.Flatten(), weight_norm(logits) if norm == "weight" else logits]
    return nn.Sequential(*layers)


def load(images: str, cases: int, held_out: int) -> Data:
    """Return the cases of MNIST or CIFAR-10 as images (N, channels, side, side) in [0, 1].

    Of the training images the first 5,000 are for validation.

    Args:
        images: one of ``IMAGES``.
        cases: training cases.
        held_out: test cases, from the first; half as many validation cases.

    Raises:
        ExperimentError: there are fewer cases, or the data cannot be had.
    """
    if images not in IMAGES:
        raise ExperimentError(f"images must be one of {', '.join(IMAGES)}, got {images!r}")
    for name, value, most in (("cases", cases, IMAGES[images]), ("held_out", held_out, 10_000)):
        if not 0 < value <= most:
            raise ExperimentError(f"{name} must be 1 to {most}, got {value}")
    if images == "mnist":
        train, test = data.mnist("train"), data.mnist("t10k")
    else:
        train, test = data.cifar10("train"), data.cifar10("test")
    valid = max(1, held_out // 2)
    parts = {}
    for name, (pixels, labels), part in (
        ("train", train, slice(5000, 5000 + cases)),
        ("valid", train, slice(5000 - valid, 5000)),
        ("test", test, slice(held_out)),
    ):
        chosen = pixels[part].float() / 255
        parts[f"{name}_inputs"] = chosen if images == "cifar10" else chosen.unsqueeze(1)
        parts[f"{name}_targets"] = labels[part].long()
    return Data(**parts)


class ConvolutionalImages(Classification):
    """Images and a convolutional network of three pairs of layers.

    Args:
        images: one of ``IMAGES``.
        width: channels of the first pair of convolutions; the second has twice, the third four times as many.
        cases: training cases, at most 55,000 of MNIST and 45,000 of CIFAR-10.
        held_out: the number of test cases, from the first of the 10,000; half as many validation cases.

    Raises:
        ExperimentError: a size is not possible, or the data cannot be had.
    """

    def __init__(
        self, images: str = "mnist", width: int = 32, cases: int = 45_000, held_out: int = 10_000
    ) -> None:
        if not 0 < width <= 512:
            raise ExperimentError(f"width must be 1 to 512, got {width}")
        loaded = load(images, cases, held_out)
        shape = (loaded.train_inputs.size(1), loaded.train_inputs.size(2))
        super().__init__(loaded, partial(network, (width, 2 * width, 4 * width), shape=shape))

    def network(self, norm: str) -> nn.Module:
        """Make the network for a norm; weight norm starts from the first training cases.

        Raises:
            ExperimentError: the norm cannot be of this width.
        """
        try:
            fresh = super().network(norm)
        except ValueError as error:
            raise ExperimentError(f"the norm {norm} cannot be of this width: {error}") from error
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
        "MNIST (55,000 training, 5,000 validation and 10,000 test cases; small: 6,000, 1,000 and 2,000) or "
        "CIFAR-10, six convolutions of 3x3 with ReLU and pooling after each pair, then a linear layer, Adam"
    ),
    problem=ConvolutionalImages,
    metrics=METRICS,
    norms=NORMS,
    presets={
        "small": Preset(
            epochs=3,
            batch_sizes=(128,),
            norms=_PRESET_NORMS,
            seeds=tuple(range(5)),
            sizes={"images": "mnist", "width": 16, "cases": 6_000, "held_out": 2_000},
        ),
        "paper": Preset(
            epochs=20,
            batch_sizes=(128,),
            norms=_PRESET_NORMS,
            sizes={"images": "mnist", "width": 32, "cases": 55_000, "held_out": 10_000},
        ),
    },
    judge=judge,
)
