"""The 8x8 digits read row by row by an LSTM: eight steps of eight pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layernorm
from layernorm.experiments import digits
from layernorm.experiments.task import Data, Task, misclassified
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


def load() -> Data:
    """The cases of the task ``digits`` as sequences (cases, 8, 8)."""
    flat = digits.load()
    return Data(
        train_inputs=torch.unflatten(flat.train_inputs, 1, (8, 8)),
        train_targets=flat.train_targets,
        test_inputs=torch.unflatten(flat.test_inputs, 1, (8, 8)),
        test_targets=flat.test_targets,
    )


TASK = Task(
    name="digits-rows",
    summary=(
        "scikit-learn's handwritten digits read row by row, LSTM of 64 units "
        "(none: torch.nn.LSTM, layer: LayerNormLSTM, or a variant by name), Adam"
    ),
    data=load,
    network=RowReader,
    loss=F.cross_entropy,
    error=misclassified,
    norms=("none", "layer", *_VARIANTS),
    default_norms=("none", "layer"),
    default_epochs=10,
    default_seeds=3,
)
