"""The 8x8 digits read row by row by an LSTM: eight steps of eight pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from torch import Tensor, nn

from layernorm.experiments.classification import METRICS, VALIDATION_ERROR, Classification, Data
from layernorm.experiments.networks import recurrent
from layernorm.experiments.results import judging
from layernorm.experiments.section import Card
from layernorm.experiments.task import Preset, Task
from layernorm.experiments.tasks import digits
from layernorm.variants import PRESETS

_VARIANTS = tuple(name for name, cells in PRESETS.items() if "lstm" in cells and name != "none")


class RowReader(nn.Module):
    """An LSTM over the rows of an image; its last hidden state gives the class."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.lstm = recurrent.lstm(norm, 8, 64, batch_first=True, max_length=8)
        self.logits = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 8, 8) to logits (N, 10)."""
        logits: Tensor = self.logits(self.states(images))
        return logits

    def states(self, images: Tensor) -> Tensor:
        """Return the last hidden states (N, 64) of images (N, 8, 8), each read as a whole."""
        _, (h, _) = self.lstm(images)
        last: Tensor = h[0]
        return last


def load() -> Data:
    """Return the cases of the task ``digits`` as sequences (cases, 8, 8)."""
    flat = digits.load()
    rows = {name: getattr(flat, name).unflatten(1, (8, 8)) for name in vars(flat) if name.endswith("inputs")}
    return replace(flat, **rows)


def problem() -> Classification:
    """Make the problem: the rows and their reader."""
    return Classification(load(), RowReader)


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Judge whether layer norm needs fewer updates than no norm."""
    return (
        judging.fewer_updates(
            results,
            VALIDATION_ERROR,
            claim="A recurrent network with layer norm needs fewer updates than one without.",
            section="§6",
        ),
    )


_PRESET = Preset(
    epochs=10,
    batch_sizes=(128, 32),
    norms=("none", "layer"),
    seeds=tuple(range(5)),
    learning_rates=(1e-3, 3e-3, 1e-2),
)

TASK = Task(
    name="digits-rows",
    title="Handwritten digits, row by row",
    section="§3.1",
    summary=(
        "scikit-learn's handwritten digits read row by row, LSTM of 64 units "
        "(none: torch.nn.LSTM, layer: LayerNormLSTM, or a variant by name), Adam"
    ),
    problem=problem,
    metrics=METRICS,
    norms=tuple(dict.fromkeys((*recurrent.LSTM_NORMS, *_VARIANTS))),
    presets={"small": _PRESET, "paper": _PRESET},
    judge=judge,
)
