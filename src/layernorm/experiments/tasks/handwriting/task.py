"""Handwriting of a given text: the paper's §6.5 and figure 5, long sequences in small batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, cast

import pandas as pd
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor, nn

from layernorm.experiments.results import judging
from layernorm.experiments.section import Card
from layernorm.experiments.task import Batch, ExperimentError, Loss, Metric, Preset, Problem, Task
from layernorm.experiments.tasks.handwriting import lines as handwriting_lines
from layernorm.experiments.tasks.handwriting.density import negative_log_likelihood
from layernorm.experiments.tasks.handwriting.lines import Lines
from layernorm.experiments.tasks.handwriting.network import NORMS, HandwritingNetwork

#: Negative log likelihood of the writers held out, offsets standardized; a density can be above 1.
LINE: Final = Metric("valid_nll", "validation NLL (nats a line)", form="{:.1f}")
STEP: Final = Metric("valid_nll_step", "validation NLL (nats a step)", form="{:.3f}")

#: Held-out lines in a picture, and how much likelier than at random the network writes.
_SHOWN: Final = 3
_BIAS: Final = 1.0
_AT_ONCE: Final = 64  # lines of an evaluation


class Handwriting(Problem):
    """Lines of handwriting, and the network that writes a text; the loss is in nats a step of the pen.

    Args:
        source: ``"omniglot"``, characters written side by side, or ``"iam"``, the paper's IAM-OnDB.
        steps: to which lines are cut.
        lines: to learn from, at most.
        valid_lines: of other writers, at most.
        hidden: units of each of the three layers.
        mixtures: bivariate Gaussians in the output.
        components: Gaussians in the window over the text.

    Raises:
        MissingData: the source is not here.
        ExperimentError: a size is not positive, or there is no such source.
    """

    def __init__(
        self,
        source: str = "omniglot",
        steps: int = 500,
        lines: int = 10_000,
        valid_lines: int = 1_000,
        hidden: int = 400,
        mixtures: int = 20,
        components: int = 10,
    ) -> None:
        self._sizes = {"hidden_size": hidden, "mixtures": mixtures, "components": components}
        for name, size in (("hidden", hidden), ("mixtures", mixtures), ("components", components)):
            if size < 1:
                raise ExperimentError(f"{name} of handwriting must be at least 1, got {size}")
        self._corpus = handwriting_lines.load(source, steps, lines, valid_lines)
        self._train, self._valid = self._corpus.train, self._corpus.valid
        self.cases = len(self._train)

    def to(self, device: torch.device) -> None:
        """Move the lines to a device."""
        self._train, self._valid = self._train.to(device), self._valid.to(device)

    def network(self, norm: str) -> HandwritingNetwork:
        """Make Graves' network with this norm; its window begins at the pace of the training lines."""
        alphabet = self._corpus.alphabet
        characters = int((self._corpus.train.text < len(alphabet)).sum())
        pace = characters / int(self._corpus.train.steps.sum())
        return HandwritingNetwork(norm, len(alphabet), **self._sizes, pace=pace)

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """Compute the negative log likelihood of the lines, by step."""
        return _loss(network, self._train[batch.cases])

    def evaluate(self, network: nn.Module) -> Mapping[str, float]:
        """Compute the negative log likelihood by line and by step."""
        cases = torch.arange(len(self._valid), device=self._valid.steps.device)
        parts = [_loss(network, self._valid[part]) for part in cases.split(_AT_ONCE)]
        total = sum(part.total.item() for part in parts)
        return {
            LINE.name: total / len(self._valid),
            STEP.name: total / sum(part.count for part in parts),
        }

    def pictures(self, network: nn.Module) -> Mapping[str, Figure]:
        """Draw texts of people held out, as they wrote them and as the network does; none if it diverged."""
        if not all(parameter.isfinite().all() for parameter in network.parameters()):
            return {}
        device = self._valid.steps.device
        valid = self._valid[torch.arange(min(_SHOWN, len(self._valid)), device=device)]
        steps = 2 * self._valid.pen.size(1)
        drawn = cast(HandwritingNetwork, network).write(
            valid.text, steps, torch.Generator(device).manual_seed(0), bias=_BIAS
        )
        rows = []
        for number, line in enumerate(drawn):
            real = valid.pen[number, : int(valid.steps[number]) + 1]
            rows += [("a person", self._strokes(real)), ("the network", self._strokes(line))]
        return {"handwriting": _figure(rows)}

    def _strokes(self, pen: Tensor) -> list[Tensor]:
        """Turn standardized steps (steps, 3) into strokes (points, 2) on the page."""
        offsets = self._corpus.offsets(pen).cpu()
        offsets[0] = 0.0
        points = offsets.cumsum(0)
        ends = pen[:, 2].cpu().nonzero().flatten() + 1
        return [stroke for stroke in points.tensor_split(ends) if len(stroke)]


def _loss(network: nn.Module, lines: Lines) -> Loss:
    """Return the sum over the lines' steps, and their number; what is beyond a line's end does not count."""
    pen = lines.pen.transpose(0, 1)
    parameters = network(pen[:-1], lines.text)
    nats = negative_log_likelihood(parameters.to(pen.dtype), pen[1:])
    real = torch.arange(len(nats), device=nats.device).unsqueeze(1) < lines.steps
    return Loss(torch.where(real, nats, 0.0).sum(), int(lines.steps.sum()))


def _figure(rows: Sequence[tuple[str, list[Tensor]]]) -> Figure:
    """Draw lines of handwriting below one another, all at one scale."""
    pages, ticks, top, widest = [], [], 0.0, 0.0
    for _, strokes in rows:
        points = torch.cat(strokes)
        left, low = points.amin(0).tolist()
        right, high = points.amax(0).tolist()
        pages += [(stroke - torch.tensor((left, high - top))).numpy() for stroke in strokes]
        ticks.append(top - (high - low) / 2)
        top -= 1.25 * (high - low)
        widest = max(widest, right - left)
    figure = Figure(figsize=(8, min(16.0, 6.8 * -top / max(widest, 1e-6))))
    axes = figure.add_axes((0.12, 0.01, 0.87, 0.98))
    axes.add_collection(LineCollection(pages, colors="black", linewidths=1.2, capstyle="round"))
    axes.margins(0.01)
    axes.autoscale_view()
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks(ticks, [writer for writer, _ in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _judge(results: pd.DataFrame) -> Sequence[Card]:
    return [
        judging.fewer_updates(
            results,
            LINE,
            claim="Layer norm converges faster, to a log likelihood comparable to the baseline's",
            section="§6.5, figure 5",
        ),
    ]


TASK: Final = Task(
    name="handwriting",
    title="Handwriting generation",
    section="§6.5, figure 5",
    summary=(
        "Graves' network writes a given text: three LSTM layers, a window over the characters, a mixture "
        "of 20 Gaussians for the pen's next step; Omniglot's characters side by side, or IAM-OnDB; Adam"
    ),
    problem=Handwriting,
    metrics=(LINE, STEP),
    norms=tuple(NORMS),
    presets={
        "small": Preset(
            epochs=2,
            batch_sizes=(8,),
            norms=("none", "layer"),
            seeds=tuple(range(3)),
            clip=10.0,
            evaluate_every=50,
            sizes={"steps": 120, "lines": 3_200, "valid_lines": 100, "hidden": 100},
        ),
        # 1,522 updates an epoch: the 200,000 of figure 5.
        "paper": Preset(
            epochs=131,
            batch_sizes=(8,),
            norms=("none", "layer"),
            clip=10.0,
            sizes={"source": "iam", "steps": 500, "lines": 12_179, "valid_lines": 2_000, "hidden": 400},
        ),
    },
    judge=_judge,
)
