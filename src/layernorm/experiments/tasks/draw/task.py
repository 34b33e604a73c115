"""DRAW on binarized MNIST, the paper's §6.4 and figure 4: layer norm on the LSTMs' cells alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, cast

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torch.nn import functional as F

from layernorm.experiments import data
from layernorm.experiments.results import judging
from layernorm.experiments.section import Card, Table
from layernorm.experiments.task import Batch, ExperimentError, Loss, Metric, Preset, Problem, Task
from layernorm.experiments.tasks.draw.network import DRAW, NORMS, Bound, Grid

#: Pixels along each side of a digit.
SIDE: Final = 28
VALID_BOUND: Final = Metric("valid_bound", "validation bound (nats)", log=True)
TEST_BOUND: Final = Metric("test_bound", "test bound (nats)", log=True, is_test=True)
RECONSTRUCTION: Final = Metric("valid_reconstruction", "validation reconstruction (nats)", log=True)
DIVERGENCE: Final = Metric("valid_divergence", "validation KL divergence (nats)")
#: The paper's test bounds in nats, and after how many epochs.
PUBLISHED: Final[Mapping[str, float]] = {"none": 82.36, "layer": 82.09}
PUBLISHED_EPOCHS: Final = 200

#: Digits along each side of the samples, and the columns of their stages.
_SAMPLES: Final = 8
_STAGES: Final = 11
_GAP: Final = 1  # pixels between pictures
_EVALUATION_SEED: Final = 0
_PICTURES_SEED: Final = 1
_AT_ONCE: Final = 500  # cases of an evaluation


class DigitDrawing(Problem):
    """Binarized MNIST and the network that draws it; the loss is the variational bound, in nats a case.

    Args:
        cases: training cases, evenly spread over the 50,000.
        held_out: validation cases, and test cases, evenly spread over the 10,000 of each.
        glimpses: of each case.
        hidden: units of the encoder and of the decoder.
        latent: features of the latent sample of a glimpse.
        read: Gaussian filters along each side of the reading window.
        write: of the writing window.

    Raises:
        ExperimentError: a size is too small for a network, or greater than the data.
    """

    def __init__(
        self,
        *,
        cases: int,
        held_out: int,
        glimpses: int,
        hidden: int,
        latent: int,
        read: int,
        write: int,
    ) -> None:
        self._sizes = {"hidden": hidden, "latent": latent, "read": read, "write": write}
        least = {"read": 2, "write": 2}  # the stride is between filters
        for name, size in {"glimpses": glimpses, **self._sizes}.items():
            if size < least.get(name, 1):
                raise ExperimentError(f"{name} must be at least {least.get(name, 1)}, got {size}")
        self.cases, self._glimpses = cases, glimpses
        self._train = _spread(cases, "train", "cases")
        self._valid, self._test = (_spread(held_out, part, "held_out") for part in ("valid", "test"))

    def to(self, device: torch.device) -> None:
        """Move the digits to a device."""
        self._train, self._valid, self._test = (
            digits.to(device) for digits in (self._train, self._valid, self._test)
        )

    def network(self, norm: str) -> DRAW:
        """Make DRAW with this norm on the cells of both LSTMs."""
        return DRAW(norm, side=SIDE, **self._sizes)

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """Compute the bound, one latent sample for each glimpse of each case."""
        noise = batch.normal(self._glimpses, self._sizes["latent"])
        bound: Bound = network(self._train[batch.cases].float(), noise)
        return Loss(bound.reconstruction.sum() + bound.divergence.sum(), len(batch.cases))

    def evaluate(self, network: nn.Module) -> Mapping[str, float]:
        """Compute the bound and its parts, by one latent sample that is the same at every evaluation."""
        reconstruction, divergence = self._bound(network, self._valid)
        return {
            VALID_BOUND.name: reconstruction + divergence,
            TEST_BOUND.name: sum(self._bound(network, self._test)),
            RECONSTRUCTION.name: reconstruction,
            DIVERGENCE.name: divergence,
        }

    def pictures(self, network: nn.Module) -> Mapping[str, Figure]:
        """Draw digits from latent samples alone, and the stages of a few of them."""
        (latent,) = self._noise(_PICTURES_SEED, (_SAMPLES**2,))
        with torch.no_grad():
            canvases, windows = cast(DRAW, network).generate(latent.to(self._train.device))
        samples = canvases[:, -1].unflatten(0, (_SAMPLES, _SAMPLES))
        shown = torch.linspace(0, self._glimpses, min(_STAGES, self._glimpses + 1)).long()
        stages = _mosaic(canvases[:_SAMPLES, shown.to(canvases.device)])
        extent = self._sizes["write"] - 1
        for column, glimpse in enumerate(shown.tolist()):
            if glimpse:  # nothing was written before the first
                for row in range(_SAMPLES):
                    _frame(stages, row, column, windows[glimpse - 1], extent)
        return {"digits": _mosaic(samples), "stages": stages}

    def _bound(self, network: nn.Module, digits: Tensor) -> tuple[float, float]:
        """Compute reconstruction and divergence by case."""
        parts = digits.split(_AT_ONCE)
        sums = torch.zeros(2, dtype=torch.float64)
        for part, noise in zip(parts, self._noise(_EVALUATION_SEED, map(len, parts)), strict=True):
            bound: Bound = network(part.float(), noise.to(part.device))
            sums += torch.stack(bound).cpu().double().sum(1)
        reconstruction, divergence = (sums / len(digits)).tolist()
        return reconstruction, divergence

    def _noise(self, seed: int, sizes: Iterable[int]) -> Iterator[Tensor]:
        """Yield standard normal (size, glimpses, latent) for each size, from a generator of this seed."""
        generator = torch.Generator().manual_seed(seed)
        for size in sizes:
            yield torch.randn(size, self._glimpses, self._sizes["latent"], generator=generator)


def _spread(count: int, part: str, name: str) -> Tensor:
    """Return digits (count, SIDE, SIDE) of a part as uint8, evenly spread: test digits lie by class."""
    digits: Tensor = data.binarized_mnist(part)
    if not 1 <= count <= len(digits):
        raise ExperimentError(f"{name} must be from 1 to {len(digits)}, the digits of {part}; got {count}")
    return digits[torch.arange(count) * len(digits) // count].view(-1, SIDE, SIDE)


def _mosaic(pictures: Tensor) -> Figure:
    """Show pictures (rows, columns, SIDE, SIDE) of values from 0 to 1 on one pair of axes, white on black."""
    rows, columns = pictures.shape[:2]
    framed = F.pad(pictures.cpu(), (0, _GAP, 0, _GAP), value=0.5)
    image = framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-_GAP, :-_GAP]
    figure = Figure(figsize=(0.6 * columns, 0.6 * rows))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    return figure


def _frame(mosaic: Figure, row: int, column: int, windows: Grid, extent: int) -> None:
    """Draw where the case of this row wrote: the square of the outermost filters' centres."""
    axes = mosaic.axes[0]
    left, top = column * (SIDE + _GAP), row * (SIDE + _GAP)
    x, y = (windows.centre[:, row] - 1).tolist()  # pixels are counted from 1
    width = extent * windows.stride[row].item()
    corner = (left + x - width / 2, top + y - width / 2)
    frame = Rectangle(corner, width, width, fill=False, edgecolor="red", linewidth=0.8)
    axes.add_patch(frame)
    frame.set_clip_path(Rectangle((left - 0.5, top - 0.5), SIDE, SIDE, transform=axes.transData))


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Judge whether layer norm reaches no norm's bound in fewer updates, and ends with a better one."""
    earlier = judging.fewer_updates(
        results,
        VALID_BOUND,
        claim="Over the first 100 epochs DRAW with layer norm converges almost twice as fast.",
        section="§6.4, figure 4",
        at_most=0.6,
    )
    better = judging.better(
        results,
        TEST_BOUND,
        curve=VALID_BOUND,
        claim="After 200 epochs the test bound is 82.09 nats with layer norm and 82.36 without.",
        section="§6.4",
    )
    epochs = results.epoch.max()
    if better.verdict == "agrees" and epochs < PUBLISHED_EPOCHS:
        remark = f"After {epochs:g} of {PUBLISHED_EPOCHS} epochs this tells who is ahead, not where both end."
        better = replace(better, verdict="partly", remark=remark)
    return (earlier, better)


def tables(results: pd.DataFrame) -> Sequence[Table]:
    """Return the test bounds next to the paper's."""
    rows = []
    for (norm, batch_size), runs in results.groupby(["norm", "batch_size"], sort=False):
        last = runs.groupby("seed").tail(1)
        published = PUBLISHED.get(str(norm))
        rows.append(
            (
                str(norm),
                str(batch_size),
                TEST_BOUND.form.format(last[TEST_BOUND.name].mean()),
                f"{last['epoch'].mean():g}",
                "–" if published is None else TEST_BOUND.form.format(published),
            )
        )
    columns = ("norm", "batch", TEST_BOUND.label, "epochs", f"the paper's, after {PUBLISHED_EPOCHS} epochs")
    note = "At the last update, mean over the seeds; one latent sample a glimpse."
    return (Table("The test bound beside the paper's", columns, rows, note),)


TASK = Task(
    name="draw",
    title="Drawing binarized MNIST with DRAW",
    section="§6.4, figure 4",
    summary=(
        "binarized MNIST (Larochelle's: 50,000 training, 10,000 validation and 10,000 test digits), DRAW "
        "with selective attention, layer norm only on the cells that its LSTMs put out (eq. 29-31), Adam"
    ),
    problem=DigitDrawing,
    metrics=(VALID_BOUND, TEST_BOUND, RECONSTRUCTION, DIVERGENCE),
    norms=NORMS,
    presets={
        "small": Preset(
            epochs=15,
            batch_sizes=(128,),
            norms=("none", "layer"),
            seeds=tuple(range(3)),
            evaluate_every=39,
            sizes={
                "cases": 10_000,
                "held_out": 1000,
                "glimpses": 8,
                "hidden": 128,
                "latent": 32,
                "read": 5,
                "write": 5,
            },
        ),
        "paper": Preset(
            epochs=PUBLISHED_EPOCHS,
            batch_sizes=(128,),
            norms=("none", "layer"),
            evaluate_every=390,
            # The paper tells glimpses and hidden; the others are Gregor et al.'s for MNIST, table 3.
            sizes={
                "cases": 50_000,
                "held_out": 10_000,
                "glimpses": 64,
                "hidden": 256,
                "latent": 100,
                "read": 2,
                "write": 5,
            },
        ),
    },
    judge=judge,
    tables=tables,
)
