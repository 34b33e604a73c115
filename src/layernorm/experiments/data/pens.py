"""Drawings and handwriting as the strokes of pens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple
from xml.etree import ElementTree

import numpy as np

from layernorm.experiments.data import archives, finding, sources

_ARCHIVE: Final = "strokes_background_small1.zip"
# IAM-OnDB's lists of the task IAM-OnDB-t1: a training set, two validation sets, a test set.
_LISTS: Final = {
    "train": "trainset.txt",
    "valid": "testset_v.txt",
    "valid2": "testset_t.txt",
    "test": "testset_f.txt",
}


class Drawing(NamedTuple):
    """One character as one person drew it.

    Attributes:
        alphabet: the name, as "Early_Aramaic".
        character: its number in the alphabet, from 1.
        drawer: the person's number, from 1 to 20.
        strokes: arrays (points, 3) of float32: x to the right, y up, both in pixels of a picture of 105 by
            105 whose upper left corner is the origin, and the time since the beginning in seconds.
    """

    alphabet: str
    character: int
    drawer: int
    strokes: tuple[np.ndarray, ...]


class WrittenLine(NamedTuple):
    """One line of handwriting.

    Attributes:
        text: what it says.
        strokes: arrays (points, 3) of float32: x to the right, y down, in the whiteboard's units, and the
            time since the line's first point in seconds.
        writer: a number, or the name of the form where the original files, which have it, are not there.
    """

    text: str
    strokes: tuple[np.ndarray, ...]
    writer: str


def omniglot_strokes() -> list[Drawing]:
    """Load characters of five alphabets drawn by twenty people each, of Omniglot's "background small 1".

    B. Lake, R. Salakhutdinov, J. Tenenbaum, Human-level concept learning through probabilistic program
    induction, 2015.

    Returns:
        2,720 drawings in the order of alphabet, character, drawer.

    Raises:
        MissingData: it is not here and cannot be downloaded.
        ExperimentError: the file is damaged.
    """
    drawings = finding.content(sources.OMNIGLOT, _ARCHIVE, _drawings).decode().split("\n\n")
    return [_drawing(*drawing.split("\n")) for drawing in drawings]


def iam_ondb(part: str = "all") -> list[WrittenLine]:
    """Return lines of English handwriting, IAM-OnDB, read from a copy that the user has; never downloaded.

    M. Liwicki and H. Bunke, IAM-OnDB: an on-line English sentence database, 2005.

    Args:
        part: "all", or where the lists of its benchmark (IAM-OnDB-t1) lie next to it "train", "valid",
            "valid2" or "test".

    Returns:
        The lines in the order of their names; those without a text are left out.

    Raises:
        ValueError: ``part`` is something else.
        MissingData: it is not here.
        ExperimentError: a file is damaged.
    """
    finding.check_part(part, ("all", *_LISTS))
    strokes = _official("lineStrokes", "lineStrokes-all.tar.gz")
    ascii_texts = _official("ascii", "ascii-all.tar.gz")
    original = finding.find(sources.IAM_ONDB, "original", "original-xml-all.tar.gz")
    texts = {}
    for name, content in finding.entries(ascii_texts, ".txt"):
        with finding.reading(ascii_texts / name):
            texts[name.stem] = _transcription(content)
    writers = dict(_writers(original)) if original else {}
    chosen = None if part == "all" else set(finding.text_lines(_official(_LISTS[part])))
    found = {}
    for name, content in finding.entries(strokes, ".xml"):
        form, _, number = name.stem.rpartition("-")
        lines = texts.get(form, [])
        if (chosen is None or form in chosen) and number.isdigit() and 1 <= int(number) <= len(lines):
            pens = _pen_strokes(strokes, name, content)
            found[name.stem] = WrittenLine(lines[int(number) - 1], pens, writers.get(form, form))
    if not found:
        raise finding.damaged(strokes, f"no line in it has a text in {ascii_texts}")
    return [found[name] for name in sorted(found)]


def _drawings(content: bytes) -> bytes:
    """Return the normal form of the archive: each drawing's path and its file, with an empty line between."""
    members = {
        PurePosixPath(name).parts[-3:]: text for name, text in archives.zipped(content, ".txt").items()
    }
    drawings = ["\n".join(["/".join(parts), *members[parts].decode().split()]) for parts in sorted(members)]
    return "\n\n".join(drawings).encode()


def _drawing(path: str, *lines: str) -> Drawing:
    """Read a drawing alphabet/character01/0108_01.txt: lines START, points x,y,milliseconds, BREAK."""
    alphabet, character, name = path.split("/")
    strokes: list[list[list[float]]] = [[]]
    for line in lines:
        if line == "BREAK":
            strokes.append([])
        elif line != "START":
            x, y, milliseconds = map(float, line.split(","))
            strokes[-1].append([x, y, milliseconds / 1000])
    arrays = tuple(np.array(stroke, dtype=np.float32) for stroke in strokes if stroke)
    drawer = name.removesuffix(".txt").split("_")[1]
    return Drawing(alphabet, int(character.removeprefix("character")), int(drawer), arrays)


def _official(*names: str) -> Path:
    found = finding.find(sources.IAM_ONDB, *names)
    if found is None:
        raise finding.missing(sources.IAM_ONDB)
    return found


def _transcription(content: bytes) -> list[str]:
    """Return the lines after "CSR:" (corrected), which comes after those as the recognizer had them."""
    _, _, corrected = finding.decoded(content).partition("CSR:")
    return [line.strip() for line in corrected.split("\n") if line.strip()]


def _pen_strokes(path: Path, name: PurePosixPath, content: bytes) -> tuple[np.ndarray, ...]:
    with finding.reading(path / name):
        strokes = [
            [[float(point.attrib[key]) for key in ("x", "y", "time")] for point in stroke.iter("Point")]
            for stroke in ElementTree.fromstring(content).iter("Stroke")  # noqa: S314 - expat bounds entities
        ]
        arrays = [np.array(stroke) for stroke in strokes if stroke]
        if not all(np.isfinite(array).all() for array in arrays):
            raise ValueError("a point is not finite")
    # Times count from another day's midnight; float32 would keep a hundredth of a second of them.
    start = np.array([0, 0, arrays[0][0, 2]]) if arrays else 0
    return tuple((array - start).astype(np.float32) for array in arrays)


def _writers(original: Path) -> Iterator[tuple[str, str]]:
    """Yield each form's name and writer, out of ``<Form id="a01-000u" writerID="10016" ...>``."""
    for _, content in finding.entries(original, ".xml"):
        form = re.search(rb"<Form\b[^>]*>", content)
        fields = dict(re.findall(rb'(\w+)="([^"]*)"', form[0])) if form else {}
        if fields.get(b"id") and fields.get(b"writerID"):
            with finding.reading(original):
                names = fields[b"id"].decode(), fields[b"writerID"].decode()
            yield names
