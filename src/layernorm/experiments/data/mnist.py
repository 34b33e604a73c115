"""MNIST, and MNIST binarized once and for all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from layernorm.experiments.data import finding, matlab, sources


def mnist(part: str) -> tuple[Tensor, Tensor]:
    """Return images and labels of MNIST.

    Args:
        part: "train" (60,000 cases) or "t10k" (10,000).

    Returns:
        Images (cases, 28, 28) and labels (cases), uint8.

    Raises:
        ValueError: ``part`` is something else.
        MissingData: it is not here and cannot be downloaded.
        ExperimentError: a file is damaged.
    """
    finding.check_part(part, ("train", "t10k"))
    images = finding.content(sources.MNIST, f"{part}-images-idx3-ubyte", bytes)
    labels = finding.content(sources.MNIST, f"{part}-labels-idx1-ubyte", bytes)
    return _idx(images), _idx(labels)


def binarized_mnist(part: str) -> Tensor:
    """Return images of MNIST with every pixel drawn once as 0 or 1, as models of images are compared on.

    R. Salakhutdinov and I. Murray, On the quantitative analysis of deep belief networks, 2008.

    Args:
        part: "train" (50,000 cases), "valid" (10,000) or "test" (10,000).

    Returns:
        Images (cases, 784), uint8, 0 or 1, row by row.

    Raises:
        ValueError: ``part`` is something else.
        MissingData: it is not here and cannot be downloaded.
        ExperimentError: a file is damaged.
    """
    finding.check_part(part, ("train", "valid", "test"))
    pixels = finding.content(sources.BINARIZED_MNIST, f"binarized_mnist_{part}.amat", _pixels)
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 784)


def _idx(content: bytes) -> Tensor:
    """Return an idx file: a magic number with the rank, the sizes as big-endian int32, uint8 values."""
    rank = content[3]
    start = 4 + 4 * rank
    sizes = np.frombuffer(content[4:start], dtype=">i4")
    values = np.frombuffer(content, dtype=np.uint8, offset=start).reshape(sizes)
    return torch.from_numpy(values.copy())


def _pixels(content: bytes) -> bytes:
    """Return the pixels as bytes 0 and 1, out of text or out of a MATLAB file with a matrix X."""
    if content.startswith(b"MATLAB"):
        matrix = matlab.matrix(content, "X", finding.LIMIT)
        with np.errstate(invalid="ignore"):
            pixels = np.ascontiguousarray(matrix, dtype=np.uint8)
        if matrix.shape[1:] != (784,) or not np.array_equal(pixels, matrix) or pixels.max(initial=0) > 1:
            raise ValueError("expected a matrix X with rows of 784 numbers 0 or 1")
        return pixels.tobytes()
    characters = np.frombuffer(content, dtype=np.uint8)
    values = characters[characters > ord(" ")] - ord("0")
    if not values.size or values.max() > 1 or values.size % 784:
        raise ValueError("expected rows of 784 numbers 0 or 1")
    return values.tobytes()
