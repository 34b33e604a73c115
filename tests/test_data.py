"""Where MNIST comes from, on small idx files in its place."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from layernorm.experiments import data
from layernorm.experiments.task import ExperimentError

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def contents(monkeypatch, tmp_path) -> dict[str, bytes]:
    """Two cases in the place of MNIST's, their checksums registered, and an empty cache."""
    images = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    found = {IMAGES: idx(images), LABELS: idx(np.array([7, 1], np.uint8))}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    monkeypatch.setattr(data, "_MNIST_SHA256", digests)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LAYERNORM_DATA", raising=False)
    return found


def put(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(gzip.compress(content))


@pytest.mark.parametrize("folder", ["named/mnist", "named", "cache/layernorm/mnist"])
def test_it_is_found_in_the_named_folder_and_in_the_cache(folder, contents, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERNORM_DATA", str(tmp_path / "named"))
    put(tmp_path / folder, contents)
    images, labels = data.mnist("train")
    assert images.shape == (2, 3, 3)
    assert images[1, 2, 2] == 17
    assert labels.tolist() == [7, 1]


def test_it_is_downloaded_whole_into_the_cache(contents, tmp_path, monkeypatch):
    asked = []

    class Downloader:
        def __init__(self, **options):
            assert {"total", "update", "reset", "close"} <= set(dir(options["progressbar"]))
            self.bar = options["progressbar"]

        def __call__(self, url, output, pooch):
            asked.append(url)
            if len(asked) == 1:
                raise OSError("no route")
            content = gzip.compress(contents[url.rsplit("/", 1)[1]])
            self.bar.total = len(content)
            self.bar.update(len(content))
            Path(output).write_bytes(content)

    monkeypatch.setattr(data.pooch, "HTTPDownloader", Downloader)
    images, _ = data.mnist("train")
    assert images.shape == (2, 3, 3)
    assert [url.rsplit("/", 1)[1] for url in asked] == [IMAGES, IMAGES, LABELS]
    data.mnist("train")
    assert len(asked) == 3
    contents[IMAGES] = b"something else"
    (tmp_path / "cache/layernorm/mnist" / IMAGES).unlink()
    with pytest.raises(ExperimentError, match="is not the train-images"):
        data.mnist("train")
    assert not (tmp_path / "cache/layernorm/mnist" / IMAGES).exists()


def test_a_failed_download_says_what_from_where_and_where_to_put_it(contents, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(data.pooch, "retrieve", fail)
    with pytest.raises(ExperimentError) as error:
        data.mnist("train")
    text = str(error.value)
    for part in (
        IMAGES,
        "https://ossci-datasets",
        "https://storage.googleapis.com",
        str(tmp_path / "cache"),
        "LAYERNORM_DATA",
    ):
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"not gzip", "is damaged"),
        (gzip.compress(b"other content" * 100, mtime=0)[:-20], "is damaged"),
        (gzip.compress(b"other content", mtime=0), "is not the train-images-idx3-ubyte.gz expected"),
    ],
)
def test_a_damaged_file_is_named(damaged, message, contents, tmp_path, monkeypatch):
    put(tmp_path / "mnist", contents)
    (tmp_path / "mnist" / IMAGES).write_bytes(damaged)
    monkeypatch.setenv("LAYERNORM_DATA", str(tmp_path))
    with pytest.raises(ExperimentError, match=message) as error:
        data.mnist("train")
    assert str(tmp_path / "mnist" / IMAGES) in str(error.value)
    assert "Delete it" in str(error.value)


def test_the_real_mnist_where_it_is_present():
    named = os.environ.get("LAYERNORM_DATA")
    if not named or not (Path(named) / "mnist" / IMAGES).is_file():
        pytest.skip("LAYERNORM_DATA names no folder with mnist/")
    images, labels = data.mnist("train")
    assert images.shape == (60000, 28, 28)
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
