"""The list of data sets: its loaders, its page, and the real data where it is present."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layernorm.experiments import data, registry
from layernorm.experiments.data import sources
from layernorm.experiments.task import MissingData
from layernorm.experiments.tasks.skip_thoughts import running_text

REAL = os.environ.get("LAYERNORM_DATA")


CALLS = {
    "mnist": lambda: data.mnist("train"),
    "cifar10": lambda: data.cifar10("test"),
    "binarized_mnist": lambda: data.binarized_mnist("valid"),
    "strokes": data.omniglot_strokes,
    "iam_ondb": data.iam_ondb,
    "text": data.tiny_shakespeare,
    "books": lambda: running_text.load("books"),
    "captions": lambda: data.flickr8k("dev"),
    "coco": lambda: data.coco_features("train"),
    "cnn": lambda: data.cnn_questions("train"),
    "SENTENCE_SETS": lambda: data.sentence_set("MPQA"),
    "SICK": lambda: data.sick("trial"),
}


def test_every_source_has_a_loader_that_says_what_is_missing(tmp_path):
    assert len(CALLS) == len(data.SOURCES)
    for call, source in zip(CALLS.values(), data.SOURCES, strict=True):
        with pytest.raises(MissingData) as error:
            call()
        text = str(error.value)
        cache = str(tmp_path / "cache/layernorm" / source.folder)
        for part in (source.title, source.by, source.licence, source.page, "LAYERNORM_DATA", cache):
            assert part in text
        assert ("cannot be downloaded" if source.files else "is not downloaded") in text
        assert "\n" not in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.mnist("test"), "part: expected one of train, t10k, got 'test'"),
        (lambda: data.cifar10("valid"), "part: expected one of train, test, got 'valid'"),
        (lambda: data.binarized_mnist("dev"), "part: expected one of train, valid, test"),
        (lambda: data.flickr8k("valid"), "part: expected one of train, dev, test"),
        (lambda: data.coco_features("val"), "part: expected one of train, dev, test"),
        (lambda: data.cnn_questions("training"), "part: expected one of train, valid, test"),
        (lambda: data.iam_ondb("dev"), "part: expected one of all, train, valid, valid2, test"),
        (lambda: data.sick("dev"), "part: expected one of train, trial, test"),
        (lambda: data.sentence_set("SST"), "name: expected one of MR, CR, SUBJ, MPQA"),
    ],
)
def test_an_unknown_part_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_registry_is_whole():
    names = [file.name for source in data.SOURCES for file in source.files]
    assert len(set(names)) == len(names) == 30
    for source in data.SOURCES:
        assert set(source.used_by) <= {*registry.TASKS, *registry.STUDIES}, source.title
        for file in source.files:
            assert len(bytes.fromhex(file.sha256)) == 32
            assert all(
                address.startswith("https://") for origin in file.origins for address in origin.addresses
            )


def test_the_page_has_what_the_registry_has():
    page = (Path(__file__).parents[3] / "docs/data.md").read_text(encoding="utf-8")
    assert sources.table() in page
    assert sources.layouts() in page


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (lambda: data.mnist("train")[1].bincount()[:3].tolist(), [5923, 6742, 5958]),
        (lambda: len(data.mnist("t10k")[0]), 10000),
        (lambda: data.cifar10("test")[1].bincount().tolist(), [1000] * 10),
        (lambda: int(data.binarized_mnist("train").count_nonzero()), 5118041),
        (lambda: len(data.omniglot_strokes()), 2720),
        (lambda: len(data.tiny_shakespeare()), 1115394),
        (lambda: [len(data.flickr8k(part)) for part in ("train", "dev", "test")], [6000, 1000, 1000]),
        (lambda: data.sentence_set("MR")[1].bincount().tolist(), [5331, 5331]),
        (lambda: data.sentence_set("CR")[1].bincount().tolist(), [1366, 2405]),
        (lambda: data.sentence_set("SUBJ")[1].bincount().tolist(), [5000, 5000]),
        (lambda: data.sentence_set("MPQA")[1].bincount().tolist(), [7292, 3311]),
        (lambda: [len(data.sick(part)) for part in ("train", "trial", "test")], [4500, 500, 4927]),
    ],
)
def test_the_real_data_where_it_is_present(count, expected, monkeypatch):
    if not REAL:
        pytest.skip("LAYERNORM_DATA is not set")
    monkeypatch.setenv("LAYERNORM_DATA", REAL)
    try:
        assert count() == expected
    except MissingData as error:
        pytest.skip(str(error))
