"""CIFAR-10."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from layernorm.experiments.data import finding, sources

_CASES = 10_000
_SIZE = (3, 32, 32)


def cifar10(part: str) -> tuple[Tensor, Tensor]:
    """Return images and labels of CIFAR-10.

    A. Krizhevsky, Learning multiple layers of features from tiny images, 2009.

    Args:
        part: "train" (50,000 cases) or "test" (10,000).

    Returns:
        Images (cases, 3, 32, 32) and labels (cases), uint8.

    Raises:
        ValueError: ``part`` is something else.
        MissingData: it is not here and cannot be downloaded.
        ExperimentError: a file is damaged.
    """
    finding.check_part(part, ("train", "test"))
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if part == "train" else ["test_batch.bin"]
    content = b"".join(finding.content(sources.CIFAR10, name, bytes) for name in names)
    # A case is a byte of its label and the rows of red, of green and of blue.
    cases = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).reshape(len(names) * _CASES, -1).copy())
    return cases[:, 1:].unflatten(1, _SIZE), cases[:, 0]
