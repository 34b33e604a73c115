"""Strokes of pens: Omniglot and IAM-OnDB, packed and unpacked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from layernorm.experiments import data
from layernorm.experiments.task import ExperimentError, MissingData
from tests.experiments.data.files import put, tarred, zipped


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
