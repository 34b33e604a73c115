"""Binarized MNIST and COCO's features, in every published form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layernorm.experiments import data
from layernorm.experiments.task import ExperimentError, MissingData
from tests.experiments.data.files import matlab_file, put


def as_text(pixels: np.ndarray) -> bytes:
    return b"".join(b" ".join(b"%d" % value for value in row) + b" \n" for row in pixels)


def as_matlab(pixels: np.ndarray) -> bytes:
    return matlab_file(True, X=pixels)


@pytest.mark.parametrize("form", [as_text, as_matlab])
def test_binarized_mnist_as_text_and_as_matlab_file(form, stand_in, named):
    pixels = (np.arange(3 * 784).reshape(3, 784) % 5 == 0).astype(np.uint8)
    stand_in("BINARIZED_MNIST", {"binarized_mnist_valid.amat": pixels.tobytes()})
    path = put(named / "binarized_mnist/binarized_mnist_valid.amat", form(pixels))
    found = data.binarized_mnist("valid")
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), pixels)
    path.write_bytes(form(1 - pixels))
    with pytest.raises(ExperimentError, match=r"is not the binarized_mnist_valid\.amat expected"):
        data.binarized_mnist("valid")
    path.write_bytes(form(pixels)[:-9])
    with pytest.raises(ExperimentError, match="is damaged"):
        data.binarized_mnist("valid")
    path.write_bytes(as_text(pixels + 1))
    with pytest.raises(ExperimentError, match="is damaged: expected rows of 784 numbers 0 or 1"):
        data.binarized_mnist("valid")


def test_coco_features_as_published(named):
    folder = named / "coco"
    features = np.arange(2 * 4096, dtype=np.float64).reshape(2, 4096)
    put(folder / "val.txt", b"".join(b"caption %d\n" % k for k in range(10)))
    (folder / "images/10crop").mkdir(parents=True)
    np.save(folder / "images/10crop/val.npy", features)
    found, captions = data.coco_features("dev")
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), features)
    assert captions == [tuple(f"caption {5 * image + k}" for k in range(5)) for image in range(2)]
    np.save(folder / "images/10crop/val.npy", features[:1])
    with pytest.raises(ExperimentError, match=r"one row for every 5 lines of .*val.txt, which has 10, got"):
        data.coco_features("dev")
    np.save(folder / "images/10crop/val.npy", np.array([{}] * 2), allow_pickle=True)
    with pytest.raises(ExperimentError, match="is damaged: Object arrays cannot be loaded"):
        data.coco_features("dev")
    path = put(folder / "images/10crop/val.npy", b"\x93NUMPY\x01")
    with pytest.raises(ExperimentError, match=f"{path} is damaged"):
        data.coco_features("dev")
    with pytest.raises(MissingData, match="COCO features is not here"):
        data.coco_features("train")
