"""MNIST pixel by pixel, and in a fixed random order: Cooijmans et al. 2016, arXiv 1603.09025, §5.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layernorm.experiments import data
from layernorm.experiments.networks import recurrent
from layernorm.experiments.results import judging
from layernorm.experiments.section import Card, Table
from layernorm.experiments.task import Batch, ExperimentError, Loss, Metric, Preset, Problem, Task

NORMS: Final = ("none", "batch", "layer", "rms", "weight")
#: The standard deviation of the noise that training adds to the initial hidden state.
NOISE: Final = 0.1
VALIDATION_ERROR: Final = Metric("validation_error", "validation error (%)", log=True)
VALIDATION_LOSS: Final = Metric("validation_loss", "validation loss", form="{:.3g}", log=True)
TEST_ERROR: Final = Metric("test_error", "test error (%)", log=True, is_test=True)

_AT_ONCE: Final = 1000


class PixelReader(nn.Module):
    """An LSTM that takes one pixel a step; its last hidden state gives the class.

    The weights start as in Cooijmans et al.: orthogonal, the candidate's hidden-to-hidden matrix the
    identity, the forget gate's bias 1; the initial states are trained, from 0 on.

    Args:
        norm: one of ``NORMS``.
        hidden: units of the LSTM.
        steps: the pixels of an image.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.sequential_mnist import PixelReader
        >>> PixelReader("layer", hidden=20, steps=49)(torch.rand(49, 3, 1)).shape
        torch.Size([3, 10])
    """

    def __init__(self, norm: str, hidden: int, steps: int) -> None:
        super().__init__()
        self.lstm = recurrent.lstm(norm, 1, hidden, max_length=steps)
        self.h0 = nn.Parameter(torch.zeros(hidden))
        self.c0 = nn.Parameter(torch.zeros(hidden))
        self.logits = nn.Linear(hidden, 10)
        self._initialize(hidden)

    @torch.no_grad()
    def _initialize(self, hidden: int) -> None:
        gates = nn.init.orthogonal_(torch.empty(3 * hidden, hidden))
        input_gate, forget_gate, output_gate = gates.split(hidden)
        values = {"weight_hh_l0": torch.cat((input_gate, forget_gate, torch.eye(hidden), output_gate))}
        values["weight_ih_l0"] = nn.init.orthogonal_(torch.empty(4 * hidden, 1))
        biases = ("bias_ih_l0", "bias_hh_l0", "bias_l0")
        values |= {name: torch.zeros(4 * hidden) for name in biases if hasattr(self.lstm, name)}
        # torch.nn.LSTM has two biases, which are added.
        values["bias_ih_l0" if "bias_ih_l0" in values else "bias_l0"][hidden : 2 * hidden] = 1.0
        recurrent.start(self.lstm, values)
        nn.init.orthogonal_(self.logits.weight)
        self.logits.bias.zero_()

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map pixels (T, N, 1), and what is added to the initial state (N, hidden), to logits (N, 10)."""
        cases = pixels.size(1)
        h0 = self.h0.expand(cases, -1)
        h = h0 if noise is None else h0 + noise
        c = self.c0.expand(cases, -1)
        _, (h, _) = self.lstm(pixels, (h[None].contiguous(), c[None].contiguous()))
        logits: Tensor = self.logits(h[0])
        return logits


class PixelByPixel(Problem):
    """MNIST's images as sequences of pixels in [0, 1]; the last state is classified.

    As in Cooijmans et al. the first 50,000 of MNIST's 60,000 training cases are trained on and the last
    10,000 are the validation cases; the test cases are MNIST's.

    Args:
        permuted: whether the pixels come in a random order, the same for all images.
        hidden: units of the LSTM.
        down: the side of the squares of pixels that are replaced by their mean: 1, 2 or 4, for 784, 196 or 49
            steps.
        cases: the number of training cases, from the first.
        held_out: the number of validation cases and of test cases, each from the first.

    Raises:
        ExperimentError: a size is not possible.
    """

    def __init__(
        self,
        permuted: bool,
        hidden: int = 100,
        down: int = 1,
        cases: int = 50_000,
        held_out: int = 10_000,
    ) -> None:
        for name, value, most in (("cases", cases, 50_000), ("held_out", held_out, 10_000)):
            if not 0 < value <= most:
                raise ExperimentError(f"{name} must be 1 to {most}, got {value}")
        if down not in (1, 2, 4):
            raise ExperimentError(f"down must be 1, 2 or 4, got {down}")
        self.hidden = hidden
        images, classes = data.mnist("train")
        test_images, test_classes = data.mnist("t10k")
        self.cases = min(cases, len(images))
        self._sets = {
            "train": (_sequences(images[:cases], down, permuted), classes[:cases].long()),
            "validation": (
                _sequences(images[50_000:][:held_out], down, permuted),
                classes[50_000:][:held_out].long(),
            ),
            "test": (_sequences(test_images[:held_out], down, permuted), test_classes[:held_out].long()),
        }

    def to(self, device: torch.device) -> None:
        """Move the data to a device."""
        self._sets = {
            name: (pixels.to(device), classes.to(device)) for name, (pixels, classes) in self._sets.items()
        }

    def network(self, norm: str) -> nn.Module:
        """Make a ``PixelReader``."""
        return PixelReader(norm, self.hidden, self._sets["train"][0].size(1))

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """Compute the cross-entropy in nats, by case; the initial hidden state is noisy with every norm."""
        pixels, classes = self._sets["train"]
        logits = network(_steps(pixels[batch.cases]), NOISE * batch.normal(self.hidden))
        return Loss(F.cross_entropy(logits, classes[batch.cases], reduction="sum"), len(batch.cases))

    def evaluate(self, network: nn.Module) -> Mapping[str, float]:
        """Compute errors and mean cross-entropy, without noise."""
        validation_loss, validation_error = self._evaluate(network, "validation")
        _, test_error = self._evaluate(network, "test")
        return {
            VALIDATION_ERROR.name: validation_error,
            VALIDATION_LOSS.name: validation_loss,
            TEST_ERROR.name: test_error,
        }

    def _evaluate(self, network: nn.Module, name: str) -> tuple[float, float]:
        """Return mean cross-entropy, and the percentage of errors."""
        all_pixels, all_classes = self._sets[name]
        loss, errors = 0.0, 0
        for pixels, classes in zip(all_pixels.split(_AT_ONCE), all_classes.split(_AT_ONCE), strict=True):
            logits = network(_steps(pixels))
            loss += F.cross_entropy(logits, classes, reduction="sum").item()
            errors += int((logits.argmax(-1) != classes).sum())
        return loss / len(all_classes), 100.0 * errors / len(all_classes)


def _sequences(images: Tensor, down: int, permuted: bool) -> Tensor:
    """Turn images (N, 28, 28) of bytes into bytes (N, T), row by row or in one fixed random order."""
    means = F.avg_pool2d(images[:, None].float(), down).round().byte() if down > 1 else images
    pixels = means.flatten(1)
    if not permuted:
        return pixels
    order = torch.randperm(pixels.size(1), generator=torch.Generator().manual_seed(0))
    return pixels[:, order]


def _steps(pixels: Tensor) -> Tensor:
    """Turn bytes (N, T) into time steps (T, N, 1) in [0, 1]."""
    return pixels.t().unsqueeze(-1).float() / 255


def task(name: str, title: str, permuted: bool, small: Preset) -> Task:
    """Make the task with pixels in reading order, or permuted.

    Args:
        name: of the task.
        title: of the task.
        permuted: the order.
        small: the small preset.
    """
    return Task(
        name=name,
        title=title,
        section="beyond the paper: Cooijmans et al. 2016, §5.1",
        summary=(
            f"MNIST one pixel a step{', in a fixed random order' if permuted else ''} (784 steps; small: "
            "fewer), LSTM of 100 units, its last state classified, RMSprop"
        ),
        problem=partial(PixelByPixel, permuted),
        metrics=(VALIDATION_ERROR, VALIDATION_LOSS, TEST_ERROR),
        norms=NORMS,
        presets={
            "small": small,
            "paper": Preset(
                epochs=200,
                batch_sizes=(100,),
                norms=("none", "batch", "layer"),
                learning_rates=(1e-3,),
                optimizer="rmsprop",
                clip=1.0,
                evaluate_every=500,
                sizes={"hidden": 100, "down": 1, "cases": 50_000, "held_out": 10_000},
            ),
        },
        judge=judge,
        tables=partial(_published, permuted),
    )


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Judge layer norm and batch norm against no norm."""
    section = "Cooijmans et al. §5.1"
    claim = "An LSTM with {} that reads pixel by pixel needs fewer updates than one without."
    return (
        judging.fewer_updates(
            results,
            VALIDATION_ERROR,
            claim=claim.format("layer norm"),
            section="§3.1, with their task",
            remark="of a single number as input the norm leaves the sign: grey pixels become black or white",
        ),
        judging.fewer_updates(
            results,
            VALIDATION_ERROR,
            claim=claim.format("recurrent batch norm"),
            section=section,
            norm="batch",
        ),
        judging.better(
            results,
            TEST_ERROR,
            curve=VALIDATION_ERROR,
            claim="Recurrent batch norm has a lower error in the end than no norm.",
            section=section,
            norm="batch",
        ),
    )


def _published(permuted: bool, results: pd.DataFrame) -> Sequence[Table]:
    """Show Cooijmans et al.'s test errors, and these at the least validation error."""
    published = {"none": "9.8", "batch": "4.6"} if permuted else {"none": "1.1", "batch": "1.0"}
    rows = []
    for (norm, batch_size), runs in results.groupby(["norm", "batch_size"], sort=False):
        best = runs.loc[runs.groupby("seed")[VALIDATION_ERROR.name].idxmin()]
        mean = TEST_ERROR.form.format(best[TEST_ERROR.name].mean())
        rows.append((str(norm), str(batch_size), mean, published.get(str(norm), "")))
    return (
        Table(
            "Test error (%) of the network with the least validation error",
            ("norm", "batch", "here", "Cooijmans et al. 2016"),
            rows,
            note="Theirs are with 784 steps, 100 units and up to 200 epochs.",
        ),
    )


TASK = task(
    "sequential-mnist",
    "Sequential MNIST",
    permuted=False,
    small=Preset(
        epochs=2,
        batch_sizes=(64,),
        norms=("none", "batch", "layer"),
        seeds=tuple(range(3)),
        learning_rates=(1e-3,),
        optimizer="rmsprop",
        clip=1.0,
        evaluate_every=50,
        sizes={"hidden": 100, "down": 2, "cases": 12_000, "held_out": 500},
    ),
)
