"""Where data comes from and in which forms, on small stand-ins; the network is never asked."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from layernorm.experiments import data, registry
from layernorm.experiments.data import finding, sources
from layernorm.experiments.task import ExperimentError, MissingData
from layernorm.experiments.tasks.skip_thoughts import running_text

RETRIEVE = finding.pooch.retrieve
# The data of whoever runs the tests; all but the last test run without it.
REAL = os.environ.get("LAYERNORM_DATA")
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch, tmp_path) -> None:
    """An empty cache, no folder of the user's, no network."""

    def retrieve(address: str, *_: object, **__: object) -> str:
        raise OSError(f"no network: {address}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LAYERNORM_DATA", raising=False)
    monkeypatch.setattr(finding.pooch, "retrieve", retrieve)


@pytest.fixture
def named(monkeypatch, tmp_path) -> Path:
    """The user's folder."""
    folder = tmp_path / "named"
    folder.mkdir()
    monkeypatch.setenv("LAYERNORM_DATA", str(folder))
    return folder


@pytest.fixture
def stand_in(monkeypatch) -> Callable[[str, Mapping[str, bytes]], None]:
    """Registers the checksums of small contents, in normal form, in the place of a source's own."""

    def register(constant: str, contents: Mapping[str, bytes]) -> None:
        source = getattr(sources, constant)
        files = [
            dataclasses.replace(file, sha256=hashlib.sha256(contents[file.name]).hexdigest())
            for file in source.files
            if file.name in contents
        ]
        assert len(files) == len(contents)
        monkeypatch.setattr(sources, constant, dataclasses.replace(source, files=tuple(files)))

    return register


@pytest.fixture
def network(monkeypatch) -> tuple[dict[str, bytes], list[str]]:
    """What each address would give, to be filled in by a test, and the addresses asked for."""
    given: dict[str, bytes] = {}
    asked: list[str] = []

    def retrieve(address: str, known_hash: None, name: str, folder: Path, downloader: Callable) -> str:
        asked.append(address)
        assert {"total", "update", "reset", "close"} <= set(dir(downloader.progressbar))
        if address not in given:
            raise OSError("no such page")
        downloader.progressbar.total = len(given[address])
        downloader.progressbar.update(1)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(given[address])
        return str(folder / name)

    monkeypatch.setattr(finding.pooch, "retrieve", retrieve)
    return given, asked


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def zipped(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


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


CALLS = {
    "mnist": lambda: data.mnist("train"),
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.mnist("test"), "part: expected one of train, t10k, got 'test'"),
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


def as_text(pixels: np.ndarray) -> bytes:
    return b"".join(b" ".join(b"%d" % value for value in row) + b" \n" for row in pixels)


def as_matlab(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, {"X": pixels}, do_compression=True)
    return buffer.getvalue()


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


def test_omniglot_out_of_an_archive_packed_anew(stand_in, named):
    folder = "strokes_background_small1/Greek"
    members = {
        f"{folder}/character02/0102_07.txt": b"START\n1.5,-2.5,0\n3,-4,1500\nBREAK\n5,-6,2000\nBREAK\n",
        f"{folder}/character01/0101_20.txt": b"START\r\n7,-8,0\r\nBREAK\r\n",
        f"{folder}/.DS_Store": b"\x00\x01",
        f"__MACOSX/{folder}/character01/._0101_20.txt": b"\x00\x02",
    }
    normal = (
        b"Greek/character01/0101_20.txt\nSTART\n7,-8,0\nBREAK\n\n"
        b"Greek/character02/0102_07.txt\nSTART\n1.5,-2.5,0\n3,-4,1500\nBREAK\n5,-6,2000\nBREAK"
    )
    stand_in("OMNIGLOT", {"strokes_background_small1.zip": normal})
    path = put(named / "strokes/omniglot_strokes_background_small1.zip", zipped(members))
    first, second = data.omniglot_strokes()
    assert first[:3] == ("Greek", 1, 20)
    assert second[:3] == ("Greek", 2, 7)
    assert [stroke.tolist() for stroke in second.strokes] == [[[1.5, -2.5, 0], [3, -4, 1.5]], [[5, -6, 2]]]
    assert second.strokes[0].dtype == np.float32
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ExperimentError, match="is damaged"):
        data.omniglot_strokes()


def test_tiny_shakespeare_with_the_line_ends_of_windows(stand_in, named):
    stand_in("TINY_SHAKESPEARE", {"tinyshakespeare.txt": b"All:\nSpeak.\n"})
    put(named / "text/tinyshakespeare.txt", b"All:\r\nSpeak.\r\n")
    assert data.tiny_shakespeare() == "All:\nSpeak.\n"


CAPTIONS = {
    "Flickr8k.token.txt": "".join(f"{image}.jpg#{k}\t {image} {k} .\n" for image in "abc" for k in range(5)),
    "Flickr_8k.testImages.txt": "c.jpg\na.jpg",
}


@pytest.mark.parametrize("layout", ["archive", "unpacked", "alone"])
def test_flickr8k_in_the_order_of_the_published_list(layout, stand_in, named):
    contents = {name: text.encode() for name, text in CAPTIONS.items()}
    stand_in("FLICKR8K", {name: finding.normal_lines(content) for name, content in contents.items()})
    if layout == "archive":
        decoys = {f"__MACOSX/._{name}": b"\x00" for name in contents}
        put(named / "captions/Flickr8k_text.zip", zipped(decoys | contents))
    for name, content in contents.items():
        if layout == "unpacked":
            put(named / "captions/Flickr8k_text" / name, content)
        elif layout == "alone":
            put(named / "captions" / f"{name}.gz", gzip.compress(content.replace(b"\n", b"\r\n")))
    assert data.flickr8k("test") == [tuple(f"{image} {k} ." for k in range(5)) for image in "ca"]


SENTENCES = {"subj.subjective": "a café . \n\nnice…\n", "subj.objective": "he walks .\n"}


@pytest.mark.parametrize("layout", ["gz", "collection", "authors", "authors unpacked"])
def test_sentences_in_every_layout_and_encoding(layout, stand_in, named):
    normal = {name: finding.normal_lines(text.encode()) for name, text in SENTENCES.items()}
    stand_in("SENTENCE_SETS", normal)
    utf8, windows, folder = {}, {}, named / "sentences"
    for name, text in SENTENCES.items():
        utf8[name] = text.encode()
        windows[name] = text.replace("\n", "\r\n").encode("cp1252")
    theirs = {
        "quote.tok.gt9.5000": windows["subj.subjective"],
        "plot.tok.gt9.5000": windows["subj.objective"],
    }
    if layout == "gz":
        for name, content in utf8.items():
            put(folder / f"{name}.gz", gzip.compress(content))
    elif layout == "collection":
        members = {f"data/subj/{name}": content for name, content in windows.items()}
        put(folder / "datasmall_NB_ACL12.zip", zipped(members))
    elif layout == "authors":
        put(folder / "rotten_imdb.tar.gz", tarred({"subjdata.README.1.0": b"", **theirs}))
    else:
        for name, content in theirs.items():
            put(folder / "rotten_imdb" / name, content)
    sentences, labels = data.sentence_set("SUBJ")
    assert sentences == ["a café .", "nice…", "he walks ."]
    assert labels.tolist() == [1, 1, 0]
    assert labels.dtype == torch.int64


def test_an_archive_without_the_file_is_named(stand_in, named):
    stand_in("SENTENCE_SETS", dict.fromkeys(SENTENCES, b""))
    path = put(named / "sentences/datasmall_NB_ACL12.zip", zipped({"data/subj/other": b""}))
    with pytest.raises(ExperimentError, match=f"{path.name} is damaged: it has no data/subj/subj.subjective"):
        data.sentence_set("SUBJ")


def test_one_origin_after_another_is_tried(stand_in, network):
    normal = {name: finding.normal_lines(text.encode()) for name, text in SENTENCES.items()}
    stand_in("SENTENCE_SETS", normal)
    given, asked = network
    wanted = [origin.addresses[0] for origin in sources.SENTENCE_SETS.files[0].origins]
    theirs = {"quote.tok.gt9.5000": "subj.subjective", "plot.tok.gt9.5000": "subj.objective"}
    given[wanted[-1]] = tarred({name: SENTENCES[ours].encode("cp1252") for name, ours in theirs.items()})
    assert len(data.sentence_set("SUBJ")[0]) == 3
    assert asked == wanted
    assert len(wanted) == 3


@pytest.mark.parametrize("packed", [True, False])
def test_sick_whatever_the_order_of_its_columns(packed, stand_in, named):
    stand_in("SICK", {"SICK_test_annotated.txt": b"6\tA boy runs\tNo boy runs\t3.3\n7\tA cat\tA cat\t5"})
    table = (
        b"pair_ID\tsentence_A\tsentence_B\tentailment_judgment\trelatedness_score\r\n"
        b"6\tA boy runs\tNo boy runs\tCONTRADICTION\t3.3\r\n7\tA cat\tA cat\tENTAILMENT\t5\r\n"
    )
    name = "SICK_test_annotated.txt"
    if packed:
        put(named / "sentences/sick_test_annotated.zip", zipped({"readme.txt": b"", name: table}))
    else:
        put(named / "sentences" / name, table)
    assert data.sick("test") == [("A boy runs", "No boy runs", 3.3), ("A cat", "A cat", 5.0)]


def test_sick_without_a_column_is_damaged(named):
    put(named / "sentences/SICK_trial.txt", b"pair_ID\tsentence_A\n1\tA boy\n")
    with pytest.raises(ExperimentError, match=r"SICK_trial\.txt is damaged: 'sentence_B' is not in list"):
        data.sick("trial")


def written(*strokes: list[tuple[int, int, float]]) -> bytes:
    """A file of IAM-OnDB's lineStrokes."""
    points = "".join(
        "<Stroke colour='black' start_time='1' end_time='2'>"
        + "".join(f"<Point x='{x}' y='{y}' time='{time}'/>" for x, y, time in stroke)
        + "</Stroke>"
        for stroke in strokes
    )
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?><WhiteboardCaptureSession><WhiteboardDescription>'
        f'<SensorLocation corner="top_left"/></WhiteboardDescription><StrokeSet>{points}</StrokeSet>'
        "</WhiteboardCaptureSession>"
    ).encode()


IAM = {
    "lineStrokes/a01/a01-000/a01-000u-02.xml": written([(5, 6, 769.05), (7, 8, 769.15)]),
    "lineStrokes/a01/a01-000/a01-000u-01.xml": written([(1, 2, 13090000.25)], [(3, 4, 13090000.75)]),
    "lineStrokes/a01/a01-000/a01-000u-03.xml": written([(0, 0, 0.0)]),
    "lineStrokes/b02/b02-001/b02-001z-01.xml": written([(9, 9, 1.0)]),
    "ascii/a01/a01-000/a01-000u.txt": b"OCR:\n\nA WOVE\nto stop\n\nCSR:\n\nA MOVE\nto stop\n\n",
    "ascii/b02/b02-001/b02-001z.txt": b"OCR:\n\nnext\n\nCSR:\r\n\r\nNext .\r\n",
    "original/a01/a01-000/strokesu.xml": b'<General><Form id="a01-000u" writerID="10016" saveTime="1"/>',
    "trainset.txt": b"b02-001z\n",
    "testset_v.txt": b" a01-000u\n",
}


def put_iam(folder: Path, packed: bool) -> None:
    archives = {"lineStrokes": "lineStrokes-all", "ascii": "ascii-all", "original": "original-xml-all"}
    for name, content in IAM.items():
        if not packed or "/" not in name:
            put(folder / name, content)
    for part, archive in archives.items():
        members = {name: content for name, content in IAM.items() if name.startswith(part)}
        if packed:
            put(folder / f"{archive}.tar.gz", tarred(members))


@pytest.mark.parametrize("packed", [True, False])
def test_iam_ondb_as_it_is_handed_out(packed, named):
    put_iam(named / "iam_ondb", packed)
    lines = data.iam_ondb()
    assert [(line.text, line.writer) for line in lines] == [
        ("A MOVE", "10016"),
        ("to stop", "10016"),
        ("Next .", "b02-001z"),
    ]
    assert [stroke.tolist() for stroke in lines[0].strokes] == [[[1, 2, 0]], [[3, 4, 0.5]]]
    assert lines[1].strokes[0].dtype == np.float32
    assert [line.text for line in data.iam_ondb("train")] == ["Next ."]
    assert [line.text for line in data.iam_ondb("valid")] == ["A MOVE", "to stop"]
    with pytest.raises(MissingData, match="IAM-OnDB is not here"):
        data.iam_ondb("test")


def test_iam_ondb_without_its_original_files_knows_the_forms(named):
    put_iam(named, packed=True)
    (named / "original-xml-all.tar.gz").unlink()
    assert {line.writer for line in data.iam_ondb()} == {"a01-000u", "b02-001z"}


def test_iam_ondb_damaged(named):
    put_iam(named, packed=False)
    path = put(named / "lineStrokes/b02/b02-001/b02-001z-01.xml", IAM["ascii/b02/b02-001/b02-001z.txt"])
    with pytest.raises(ExperimentError, match=f"{path} is damaged"):
        data.iam_ondb()
    path.write_bytes(
        b"<WhiteboardCaptureSession><Stroke><Point x='1' y='2'/></Stroke></WhiteboardCaptureSession>"
    )
    with pytest.raises(ExperimentError, match="is damaged: 'time'"):
        data.iam_ondb()
    for text in (named / "ascii").rglob("*.txt"):
        text.unlink()
    with pytest.raises(ExperimentError, match="no line in it has a text"):
        data.iam_ondb()


def test_iam_ondb_in_an_archive_cut_off(named):
    put_iam(named, packed=True)
    path = named / "lineStrokes-all.tar.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExperimentError, match=f"{path} is damaged"):
        data.iam_ondb()


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


def question(answer: str) -> bytes:
    return (
        f"http://news/{answer}\n\n( @entity1 ) saw @entity0\n\n@placeholder was seen\n\n{answer}\n\n"
        "@entity0:Ann: the second\n@entity1:CNN"
    ).encode()


@pytest.mark.parametrize("packed", [True, False])
def test_cnn_questions_as_generated(packed, named):
    members = {
        "cnn/questions/validation/b.question": question("@entity1"),
        "cnn/questions/validation/a.question": question("@entity0"),
        "cnn/questions/test/c.question": question("@entity1"),
        "cnn/questions/validation/._a.question": b"\x00, as macOS adds",
        "cnn/stories/validation/d.story": b"",
    }
    if packed:
        put(named / "cnn.tgz", tarred(members))
    else:
        for name, content in members.items():
            put(named / name, content)
    found = data.cnn_questions("valid")
    markers = ("@entity0", "@entity1")
    assert [each.answer for each in found] == ["@entity0", "@entity1"]
    assert found[0] == ("( @entity1 ) saw @entity0", "@placeholder was seen", "@entity0", markers)
    with pytest.raises(ExperimentError, match="training") if packed else pytest.raises(MissingData):
        data.cnn_questions("train")


def test_a_question_that_is_none_is_named(named):
    path = put(named / "cnn/questions/test/e.question", b"http://news\n\nonly a passage")
    with pytest.raises(ExperimentError, match=f"{path} is damaged: expected 5 blocks of text, got 2"):
        data.cnn_questions("test")


@pytest.mark.parametrize(
    ("passage", "query", "answer", "message"),
    [
        (" ", "@placeholder", "@entity0", "expected a passage"),
        ("a", "b", "@entity0", "a query with @placeholder in it"),
        ("a", "@placeholder", "@entity1", "expected one of the markers as the answer, got '@entity1'"),
        ("a", "@placeholder", "Ann", "expected one of the markers as the answer, got 'Ann'"),
    ],
)
def test_a_question_that_cannot_be_answered_is_named(named, passage, query, answer, message):
    content = "\n\n".join(("http://news", passage, query, answer, "@entity0:A\nAnn:B"))
    path = put(named / "cnn/questions/test/e.question", content.encode())
    with pytest.raises(ExperimentError, match=message) as error:
        data.cnn_questions("test")
    assert f"{path} is damaged: " in str(error.value)


def test_the_registry_is_whole():
    names = [file.name for source in data.SOURCES for file in source.files]
    assert len(set(names)) == len(names) == 24
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
