"""Finds data: a folder that the user names, else a cache folder, else a download with checksums."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import pooch
import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from layernorm.experiments.task import ExperimentError

VARIABLE: Final = "LAYERNORM_DATA"

_MNIST_ADDRESSES: Final = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# SHA-256 of what is inside the archives: copies of MNIST in the wild are compressed differently.
_MNIST_SHA256: Final = {
    "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def mnist(part: str) -> tuple[Tensor, Tensor]:
    """Images (cases, 28, 28) and labels (cases) of MNIST as uint8; part is "train" or "t10k".

    Raises:
        ExperimentError: a file cannot be had or is damaged.
    """
    images = _idx(_content("mnist", f"{part}-images-idx3-ubyte.gz"))
    labels = _idx(_content("mnist", f"{part}-labels-idx1-ubyte.gz"))
    return images, labels


def _content(dataset: str, name: str) -> bytes:
    """What is inside a compressed file of a dataset, found or downloaded, its checksum verified."""
    named = os.environ.get(VARIABLE)
    folders = [Path(named) / dataset, Path(named)] if named else []
    cache = Path(pooch.os_cache("layernorm")) / dataset
    for path in [folder / name for folder in (*folders, cache)]:
        if path.is_file():
            return _verified(path, name)
    path = _download(name, cache)
    try:
        return _verified(path, name)
    except ExperimentError:
        path.unlink()
        raise


def _verified(path: Path, name: str) -> bytes:
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ExperimentError(
            f"{path} is damaged: {error}. Delete it, and it will be downloaded again"
        ) from error
    if hashlib.sha256(content).hexdigest() != _MNIST_SHA256[name]:
        raise ExperimentError(
            f"{path} is not the {name} expected: the SHA-256 of its content should begin with "
            f"{_MNIST_SHA256[name][:12]}. Delete it, and it will be downloaded again"
        )
    return content


def _download(name: str, folder: Path) -> Path:
    """Fetches a file into ``folder``, whole or not at all."""
    problems = []
    pooch.get_logger().setLevel("ERROR")
    for address in _MNIST_ADDRESSES:
        try:
            with _Bar(name) as bar:
                fetch = pooch.HTTPDownloader(progressbar=bar, timeout=30)
                return Path(pooch.retrieve(address + name, None, name, folder, downloader=fetch))
        except (OSError, ValueError) as error:
            problems.append(f"{address}{name} ({type(error).__name__})")
    raise ExperimentError(
        f"cannot download {name}; tried {' and '.join(problems)}. Get it by hand and put it into "
        f"{folder}, or into the folder mnist of a folder that the environment variable {VARIABLE} names"
    )


class _Bar:
    """A download's progress as pooch wants it: ``total``, ``update``, ``reset``, ``close``."""

    def __init__(self, name: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), transient=True)
        self._task = self._progress.add_task(name, total=None)
        self.total = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def update(self, amount: int) -> None:
        self._progress.update(self._task, advance=amount, total=self.total or None)

    def reset(self) -> None:
        self._progress.reset(self._task)

    def close(self) -> None:
        """The display is closed by the ``with`` block."""


def _idx(content: bytes) -> Tensor:
    """An idx file: a magic number with the rank, the sizes as big-endian int32, uint8 values."""
    rank = content[3]
    start = 4 + 4 * rank
    sizes = np.frombuffer(content[4:start], dtype=">i4")
    values = np.frombuffer(content, dtype=np.uint8, offset=start).reshape(sizes)
    return torch.from_numpy(values.copy())
