"""Damaged, truncated, encrypted, wrong and hostile data: one error names the file, the cache stays clean."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import struct
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from layernorm.cli import main
from layernorm.experiments import data
from layernorm.experiments.data import archives, finding, matlab
from layernorm.experiments.task import ExperimentError, MissingData
from layernorm.experiments.tasks.skip_thoughts import running_text
from tests.experiments.data.files import matlab_file, put, tarred, zipped

TEXT = "\n".join(f"line {i} of some text" for i in range(300)).encode()


@pytest.fixture(autouse=True)
def folder(named) -> Path:
    """Return the user's folder; the cache is empty, and there is no network."""
    return named


def encrypted(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[6] |= 1
    changed[content.rfind(b"PK\x01\x02") + 8] |= 1
    return bytes(changed)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


QUESTION = b"http://news\n\na\n\n@placeholder\n\n@entity0\n\n@entity0:A"
PIXELS = (np.arange(30 * 784).reshape(30, 784) % 7 == 0).astype(np.uint8)
KINDS: dict[str, tuple[str, bytes, Callable[[], object]]] = {
    **{
        f"zip {how}": (
            "Flickr8k_text.zip",
            zipped({"Flickr_8k.trainImages.txt": TEXT}, how),
            lambda: data.flickr8k("train"),
        )
        for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    },
    **{
        f"tar {how}": (
            "rt-polaritydata.tar.gz",
            tarred({"rt-polaritydata/rt-polarity.pos": TEXT}, how),
            lambda: data.sentence_set("MR"),
        )
        for how in ("", "gz", "bz2", "xz")
    },
    "gz": ("train-images-idx3-ubyte.gz", gzip.compress(TEXT), lambda: data.mnist("train")),
    "strokes": (
        "strokes_background_small1.zip",
        zipped({"a/b/c/character01/0101_01.txt": TEXT}),
        data.omniglot_strokes,
    ),
    "text": ("tinyshakespeare.txt", TEXT, data.tiny_shakespeare),
    "table": (
        "SICK_trial.txt",
        b"pair_ID\tsentence_A\tsentence_B\trelatedness_score\n",
        lambda: data.sick("trial"),
    ),
    "pixels as text": ("binarized_mnist_test.amat", b"0 1 " * 392, lambda: data.binarized_mnist("test")),
    "matlab": (
        "binarized_mnist_test.amat",
        matlab_file(False, X=PIXELS),
        lambda: data.binarized_mnist("test"),
    ),
    "matlab, compressed": (
        "binarized_mnist_test.amat",
        matlab_file(True, X=PIXELS),
        lambda: data.binarized_mnist("test"),
    ),
    "tar of questions": (
        "cnn.tgz",
        tarred({"cnn/questions/test/a.question": b"a\n\nb\n\nc\n\nd"}),
        lambda: data.cnn_questions("test"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_named(kind, folder):
    name, whole, load = KINDS[kind]
    path, chance = folder / name, random.Random(0)
    contents = [
        b"",
        b"\0" * len(whole),
        whole[: len(whole) // 2],
        whole[:-1],
        bytes(range(256)),
        whole + b"more",
    ]
    contents += [encrypted(whole)] if whole.startswith(b"PK") else []
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[chance.randrange(min(len(whole), 600))] ^= 1 << chance.randrange(8)
        contents.append(bytes(flipped))
    for content in contents:
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile's, of names it meets twice
            with pytest.raises(ExperimentError) as error:
                load()
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        assert path.read_bytes() == content


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.float64, np.float32, np.int32, bool])
def test_a_matlab_matrix_is_read(compressed, kind):
    content = matlab_file(compressed, other=np.arange(5), X=PIXELS.astype(kind), text="text")
    assert np.array_equal(matlab.matrix(content, "X", 1 << 20), PIXELS)
    with pytest.raises(ValueError, match="it has no matrix Y"):
        matlab.matrix(content, "Y", 1 << 20)
    if compressed:
        with pytest.raises(ValueError, match="cut off, or larger than 100 bytes"):
            matlab.matrix(content, "X", 100)


def test_a_matlab_matrix_of_the_other_byte_order():
    def element(kind: int, content: bytes) -> bytes:
        return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)

    parts = (
        element(6, struct.pack(">II", 6, 0)) + element(5, struct.pack(">ii", 2, 3))
        + struct.pack(">HHc3x", 1, 1, b"X") + element(9, struct.pack(">6d", 1, 4, 2, 5, 3, 6))
    )  # fmt: skip
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI"
    assert matlab.matrix(header + element(14, parts), "X", 99).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("compressed", [True, False])
def test_no_bit_of_a_matlab_file_does_more_than_raise(compressed):
    whole = matlab_file(compressed, X=PIXELS[:2])
    for at in range(124, len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[at] ^= 1 << bit
            try:
                found = matlab.matrix(bytes(content), "X", 1 << 16)
            except (ValueError, zlib.error):
                continue
            assert found.size == 2 * 784


def test_matlab_files_of_other_kinds_say_what_they_are(folder):
    path = folder / "binarized_mnist_test.amat"
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(512))
    with pytest.raises(ExperimentError, match=r"it is of MATLAB 7\.3, which is HDF5; save it with -v7"):
        data.binarized_mnist("test")
    for wrong in (PIXELS.T, PIXELS + 1, PIXELS - 0.5, PIXELS * np.nan, PIXELS * 1j, PIXELS[None]):
        path.write_bytes(matlab_file(True, X=wrong))
        with pytest.raises(ExperimentError, match="is damaged: "):
            data.binarized_mnist("test")


def test_bombs_are_not_unpacked(folder, monkeypatch):
    monkeypatch.setattr(archives, "LIMIT", 1 << 16)
    monkeypatch.setattr(archives, "_SMALL", 1 << 16)
    zeros = bytes(1 << 20)
    bombs = {
        "train-images-idx3-ubyte.gz": (gzip.compress(zeros), lambda: data.mnist("train")),
        "sick_trial.zip": (
            zipped({"SICK_trial.txt": zeros}),
            lambda: data.sick("trial"),
        ),
        "strokes_background_small1.zip": (
            zipped({"a/b/c.txt": zeros}),
            data.omniglot_strokes,
        ),
        "rt-polaritydata.tar.gz": (
            tarred({"rt-polaritydata/rt-polarity.pos": zeros}, "xz"),
            lambda: data.sentence_set("MR"),
        ),
        "cnn.tgz": (tarred({"questions/test/a.question": zeros}), lambda: data.cnn_questions("test")),
        "tinyshakespeare.txt": (zeros, data.tiny_shakespeare),
        "binarized_mnist_test.amat": (matlab_file(True, X=np.zeros((200, 784), np.uint8)), None),
    }
    monkeypatch.setattr(finding, "LIMIT", 1 << 16)
    for name, (content, load) in bombs.items():
        (folder / name).write_bytes(content)
        with pytest.raises(ExperimentError, match=f"{name} is damaged: .*65536 bytes"):
            (load or (lambda: data.binarized_mnist("test")))()
    # A header of a tar archive that claims to be followed by 8 GB of fields.
    entry = tarfile.TarInfo("fields")
    entry.size, entry.type = 8 << 30, tarfile.XHDTYPE
    (folder / "cnn.tgz").write_bytes(gzip.compress(entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))
    with pytest.raises(ExperimentError, match=r"cnn\.tgz is damaged: a part of it claims to have 8589934592"):
        data.cnn_questions("test")


@pytest.mark.parametrize("how", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_an_archive_that_ends_too_early_is_not_a_smaller_one(folder, how):
    both = (
        tarred({"questions/test/a.question": QUESTION}, ""),
        tarred({"questions/test/b.question": QUESTION}, ""),
    )
    whole = both[0][:1024] + both[1]
    path = folder / "cnn.tgz"
    path.write_bytes(how(whole))
    assert len(data.cnn_questions("test")) == 2
    broken = bytearray(whole)
    broken[1024 + 150] ^= 1  # the checksum of the second header
    for content in (
        how(whole[:1024]),
        how(bytes(broken)),
        how(whole)[:-1] if how is not bytes else whole[:1300],
    ):
        path.write_bytes(content)
        with pytest.raises(ExperimentError, match=r"cnn\.tgz is damaged"):
            data.cnn_questions("test")


def test_members_with_hostile_names_stay_in_memory(folder, tmp_path):
    for name in ("../../questions/test/a.question", "/questions/test/a.question"):
        (folder / "cnn.tgz").write_bytes(tarred({name: QUESTION}))
        assert len(data.cnn_questions("test")) == 1
    for link in ("a.question", "/etc/hostname", "../b.question"):
        fields = {"type": tarfile.SYMTYPE, "linkname": link, "size": 0}
        (folder / "cnn.tgz").write_bytes(tarred({"questions/test/a.question": b""}, **fields))
        with pytest.raises(ExperimentError, match=r"cnn\.tgz is damaged"):
            data.cnn_questions("test")
    assert {path.name for path in tmp_path.rglob("*")} == {"named", "cnn.tgz"}


@pytest.mark.parametrize("bad", [b"\x81 caf\xe9", b"\xff\xfe\x00\xd8"])
def test_text_that_is_none_is_named(bad, folder):
    bad = bad + b"\x8d"  # in no encoding that is tried
    books = put(folder / "books/a.txt", bad)
    question = put(folder / "cnn/questions/test/a.question", bad)
    captions = put(folder / "coco/train.txt", bad)
    put(folder / "coco/images/10crop/train.npy", npy(np.zeros((1, 4096), np.float32)))
    for path, load in (
        (books, lambda: running_text.load("books")),
        (question, lambda: data.cnn_questions("test")),
        (captions, lambda: data.coco_features("train")),
    ):
        with pytest.raises(ExperimentError, match="is damaged: 'charmap' codec can't decode") as error:
            load()
        assert str(path) in str(error.value)
    lists = [("ascii/a/a01.txt", b"CSR:\n\nA\n"), ("lineStrokes/a01-01.xml", b"<a/>"), ("trainset.txt", bad)]
    for name, content in lists:
        put(folder / f"iam_ondb/{name}", content)
    with pytest.raises(ExperimentError, match=r"trainset\.txt is damaged"):
        data.iam_ondb("train")
    transcription = put(folder / "iam_ondb/ascii/a/a01.txt", bad)
    with pytest.raises(ExperimentError, match=r"a01\.txt is damaged") as error:
        data.iam_ondb()
    assert str(transcription) in str(error.value)


def test_strokes_that_are_not_finite_or_expand_are_named(folder):
    (folder / "ascii").mkdir()
    (folder / "ascii/a01.txt").write_text("CSR:\n\nA\n")
    (folder / "lineStrokes").mkdir()
    path = folder / "lineStrokes/a01-01.xml"
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    laughs = f'<!DOCTYPE a [<!ENTITY e0 "ha">{entities}]><a>&e11;</a>'
    for content in ("<a><Stroke><Point x='nan' y='1' time='2'/></Stroke></a>", laughs, "<a>" * 100_000):
        path.write_text(content)
        with pytest.raises(ExperimentError, match=r"a01-01\.xml is damaged"):
            data.iam_ondb()


def test_features_are_what_their_header_says(folder):
    path = folder / "images/10crop/train.npy"
    path.parent.mkdir(parents=True)
    (folder / "train.txt").write_text("\n".join(map(str, range(15))))
    numbers = np.random.default_rng(0).random((3, 4096), dtype=np.float32)
    whole = npy(numbers)
    refused = [
        npy(numbers.astype(">f4")), npy(numbers.astype(np.complex64)), npy(numbers.astype(int)),
        npy(numbers[:2]), npy(numbers * np.nan), npy(numbers)[:-4], npy(numbers) + b"more", b"",
        zipped({"a.npy": whole}),
        npy(np.zeros(3, [("a", "f4")])), npy(numbers.reshape(3, 64, 64)),
    ]  # fmt: skip
    header = whole[:128]
    refused += [header.replace(b"(3, 4096), ", b"(10**9, 4096)") + whole[128:]]
    refused += [header[:10] + (b"(" * 50 + b")" * 50).ljust(117) + b"\n" + whole[128:]]
    for content in refused:
        path.write_bytes(content)
        with pytest.raises(ExperimentError, match=r"train\.npy is damaged"):
            data.coco_features("train")
    for at in range(128):
        for bit in range(8):
            content = bytearray(whole)
            content[at] ^= 1 << bit
            path.write_bytes(content)
            try:
                found = data.coco_features("train")[0].numpy()
            except ExperimentError:
                continue
            assert np.array_equal(found, numbers)


@pytest.mark.parametrize(
    "content",
    [
        encrypted(zipped({"SICK_train.txt": TEXT})),
        b"<html>",
        b"",
        zipped({"SICK_train.txt": TEXT}),
    ],
)
def test_a_download_that_is_not_what_it_should_be_is_not_kept(content, monkeypatch, tmp_path):
    def retrieve(address: str, known: None, name: str, path: Path, downloader: object) -> str:
        assert address.startswith("https://")
        Path(path, name).write_bytes(content)
        assert not (tmp_path / "cache/layernorm/sentences" / name).exists()  # before it is verified
        return str(Path(path, name))

    monkeypatch.setattr(finding.pooch, "retrieve", retrieve)
    left = tmp_path / "cache/layernorm/sentences/.download-of-a-killed-process"
    left.mkdir(parents=True)
    os.utime(left, (0, time.time() - 100_000))
    with pytest.raises(MissingData, match=r"not the SICK_train\.txt expected"):
        data.sick("train")
    assert not list((tmp_path / "cache/layernorm/sentences").iterdir())


def test_a_full_cache_is_named(monkeypatch, tmp_path):
    def retrieve(address: str, known: None, name: str, path: Path, downloader: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finding.pooch, "retrieve", retrieve)
    with pytest.raises(ExperimentError, match=r"cannot write into .*: No space left on device") as error:
        data.sick("train")
    assert not isinstance(error.value, MissingData)


def test_the_command_says_it_in_one_line(folder, capsys, tmp_path):
    path = folder / "binarized_mnist_train.amat"
    path.write_bytes(matlab_file(True, X=PIXELS)[:-20])
    assert main(["compare", "draw", "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"layernorm: {path} is damaged: it is cut off. Replace it by a whole copy, or take it away\n"
    )
    assert not (tmp_path / "out").exists()
