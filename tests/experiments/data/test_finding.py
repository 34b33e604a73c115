"""Where data is found, or downloaded from; the network is never asked."""

from __future__ import annotations

import dataclasses
import gzip
import http.server
import threading

import numpy as np
import pytest

from layernorm.experiments import data
from layernorm.experiments.data import finding, sources
from layernorm.experiments.task import ExperimentError, MissingData
from tests.experiments.data.files import put

RETRIEVE = finding.pooch.retrieve


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def digits(stand_in) -> dict[str, bytes]:
    """Two cases in the place of MNIST's."""
    images = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    contents = {IMAGES: idx(images), LABELS: idx(np.array([7, 1], np.uint8))}
    stand_in("MNIST", contents)
    return contents


@pytest.mark.parametrize("folder", ["named/mnist", "named", "cache/layernorm/mnist"])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_found_in_the_named_folder_and_in_the_cache(folder, packed, digits, named, tmp_path):
    for name, content in digits.items():
        put(
            tmp_path / folder / (f"{name}.gz" if packed else name),
            gzip.compress(content) if packed else content,
        )
    images, labels = data.mnist("train")
    assert images.shape == (2, 3, 3)
    assert images[1, 2, 2] == 17
    assert labels.tolist() == [7, 1]


def test_a_named_folder_that_is_none_is_no_reason_to_download(network, monkeypatch, tmp_path):
    monkeypatch.setenv("LAYERNORM_DATA", str(tmp_path / "dtaa"))
    with pytest.raises(ExperimentError, match=r"LAYERNORM_DATA names .*dtaa, which is no folder"):
        data.mnist("train")
    assert not network[1]


def test_the_named_folder_comes_before_the_cache(digits, named, tmp_path):
    for name, content in digits.items():
        put(named / "mnist" / name, content)
        put(tmp_path / "cache/layernorm/mnist" / name, b"another")
    assert data.mnist("train")[1].tolist() == [7, 1]


def test_it_is_downloaded_into_the_cache_from_the_first_mirror_that_has_it(digits, network, tmp_path):
    given, asked = network
    first, second = (file.origins[0].addresses for file in sources.MNIST.files)
    given[first[0]] = b"<html>a page of errors</html>"
    given[first[1]] = gzip.compress(digits[IMAGES])
    given[second[0]] = gzip.compress(digits[LABELS])
    images, _ = data.mnist("train")
    assert images.shape == (2, 3, 3)
    assert asked == [*first, second[0]]
    data.mnist("train")
    assert len(asked) == 3


def test_a_download_cut_off_leaves_nothing_behind(digits, tmp_path, monkeypatch):
    content = gzip.compress(digits[IMAGES])
    lengths = [len(content) + 9, len(content)]  # what the server promises: too much, then the truth

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(lengths.pop(0)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    monkeypatch.setattr(finding.pooch, "retrieve", RETRIEVE)
    monkeypatch.setenv("NO_PROXY", "*")
    cache = tmp_path / "cache/layernorm/mnist"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        origin = sources.Origin((f"http://127.0.0.1:{server.server_port}/{IMAGES}.gz",))
        file = dataclasses.replace(sources.MNIST.files[0], origins=(origin,))
        source = dataclasses.replace(sources.MNIST, files=(file,))
        with pytest.raises(MissingData, match="cannot be downloaded"):
            finding.content(source, IMAGES, bytes)
        assert not list(cache.iterdir())
        assert finding.content(source, IMAGES, bytes) == digits[IMAGES]
        server.shutdown()
    assert [path.name for path in cache.iterdir()] == [f"{IMAGES}.gz"]


def test_what_is_not_what_was_wanted_is_not_kept(digits, network, tmp_path):
    given, _ = network
    for address in sources.MNIST.files[0].origins[0].addresses:
        given[address] = gzip.compress(b"something else")
    with pytest.raises(MissingData, match=r"train-images-idx3-ubyte.gz \(not the train-images"):
        data.mnist("train")
    assert not list((tmp_path / "cache/layernorm/mnist").iterdir())


def test_a_failed_download_says_all_that_was_tried(digits):
    with pytest.raises(MissingData) as error:
        data.mnist("train")
    for address in sources.MNIST.files[0].origins[0].addresses:
        assert f"{address} (OSError)" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "is damaged"),
        (gzip.compress(b"other content" * 100, mtime=0)[:-20], "is damaged"),
        (gzip.compress(b"other content", mtime=0), "is not the train-images-idx3-ubyte expected"),
    ],
)
def test_a_damaged_file_of_the_users_is_named_and_kept(content, message, digits, named):
    path = put(named / "mnist" / f"{IMAGES}.gz", content)
    with pytest.raises(ExperimentError, match=message) as error:
        data.mnist("train")
    assert str(path) in str(error.value)
    assert path.read_bytes() == content
