"""Images' captions, and their features where the user has them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from layernorm.experiments.data import finding, sources

# The validation set has another name in each data set; here it is always "dev".
_PARTS: Final = ("train", "dev", "test")
_CAPTIONS_PER_IMAGE: Final = 5


def flickr8k(part: str) -> list[tuple[str, ...]]:
    """Return the five captions of each image of Flickr8k.

    M. Hodosh, P. Young, J. Hockenmaier, Framing image description as a ranking task, 2013.

    Args:
        part: "train" (6,000 images), "dev" (1,000) or "test" (1,000).

    Returns:
        An item an image, in the order of the published list, each of five captions.

    Raises:
        ValueError: ``part`` is something else.
        MissingData: it is not here and cannot be downloaded.
        ExperimentError: a file is damaged.
    """
    finding.check_part(part, _PARTS)
    names = finding.content(sources.FLICKR8K, f"Flickr_8k.{part}Images.txt", finding.normal_lines)
    texts = finding.content(sources.FLICKR8K, "Flickr8k.token.txt", finding.normal_lines)
    captions: dict[str, list[str]] = {}
    for line in texts.decode().split("\n"):
        label, caption = line.split("\t")
        captions.setdefault(label.split("#")[0], []).append(caption.strip())
    return [tuple(captions[name]) for name in names.decode().split("\n")]


def coco_features(part: str) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Load features and captions of the images of COCO, as Vendrov et al. (arXiv 1511.06361) published them.

    Read from a copy that the user has, never downloaded: ``{train,val,test}.txt`` with a caption a line, five
    lines an image, and ``images/10crop/{train,val,test}.npy`` with a row an image.

    Args:
        part: "train", "dev" (the files named val) or "test".

    Returns:
        Features (images, 4096) in float32, as they are stored (not scaled), and each image's five captions.

    Raises:
        ValueError: ``part`` is something else.
        MissingData: it is not here.
        ExperimentError: a file is damaged, or the two do not fit together.
    """
    finding.check_part(part, _PARTS)
    name = "val" if part == "dev" else part
    texts = finding.find(sources.COCO_FEATURES, f"{name}.txt")
    rows = finding.find(sources.COCO_FEATURES, f"images/10crop/{name}.npy")
    if texts is None or rows is None:
        raise finding.missing(sources.COCO_FEATURES)
    captions = finding.text_lines(texts)
    with finding.reading(rows):
        features = _matrix(rows)
        if features.ndim != 2 or len(captions) != _CAPTIONS_PER_IMAGE * len(features):
            raise ValueError(
                f"expected a matrix with one row for every {_CAPTIONS_PER_IMAGE} lines of {texts}, which has "
                f"{len(captions)}, got the shape {features.shape}"
            )
        features = np.array(features, dtype=np.float32, order="C")
        if not np.isfinite(features).all():
            raise ValueError("expected finite numbers")
    grouped = [
        tuple(captions[start : start + _CAPTIONS_PER_IMAGE])
        for start in range(0, len(captions), _CAPTIONS_PER_IMAGE)
    ]
    return torch.from_numpy(features), grouped


def _matrix(path: Path) -> np.ndarray:
    """Return the numbers in a .npy file, whose header must say no more and no less than the file has."""
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        if "Python objects" in str(error):
            raise ValueError("Object arrays cannot be loaded, expected numbers") from error
        raise
    if not isinstance(features, np.memmap) or features.dtype.str not in ("<f2", "<f4", "<f8"):
        raise ValueError(f"expected little-endian floating-point numbers, got {features.dtype}")
    if features.offset + features.nbytes != path.stat().st_size:
        raise ValueError(f"its size is not that of {features.shape} numbers of type {features.dtype}")
    return features
