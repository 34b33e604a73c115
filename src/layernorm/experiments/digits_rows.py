"""The 8x8 digits read row by row by an LSTM: eight steps of eight pixels."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

import layernorm
from layernorm.experiments import digits, judging
from layernorm.experiments.classification import METRICS, TEST_ERROR, Classification
from layernorm.experiments.section import Card
from layernorm.experiments.task import Preset, Task
from layernorm.variants import PRESETS

_VARIANTS = tuple(name for name, cells in PRESETS.items() if "lstm" in cells and name != "none")


class RowReader(nn.Module):
    """An LSTM over the rows of an image; its last hidden state gives the class."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.lstm: nn.Module
        if norm == "none":
            self.lstm = nn.LSTM(8, 64, batch_first=True)
        else:
            variant = "paper" if norm == "layer" else norm
            self.lstm = layernorm.LayerNormLSTM(8, 64, batch_first=True, variant=variant)
        self.logits = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 8, 8) to logits (N, 10)."""
        _, (h, _) = self.lstm(images)
        logits: Tensor = self.logits(h[0])
        return logits


def problem() -> Classification:
    """The cases of the task ``digits`` as sequences (cases, 8, 8)."""
    flat = digits.load()
    flat.train_inputs = torch.unflatten(flat.train_inputs, 1, (8, 8))
    flat.test_inputs = torch.unflatten(flat.test_inputs, 1, (8, 8))
    return Classification(flat, RowReader)


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Layer norm is sooner than no norm."""
    return (
        judging.sooner(
            results,
            TEST_ERROR,
            claim="A recurrent network with layer norm needs fewer updates than one without.",
            section="§6",
        ),
    )


_PRESET = Preset(epochs=10, batch_sizes=(128, 4), norms=("none", "layer"), seeds=3)

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
    norms=("none", "layer", *_VARIANTS),
    presets={"small": _PRESET, "paper": _PRESET},
    judge=judge,
)
