"""Plays, captions, sentences and cloze questions, in every layout and encoding."""

from __future__ import annotations

import gzip

import pytest
import torch

from layernorm.experiments import data
from layernorm.experiments.data import finding, sources
from layernorm.experiments.task import ExperimentError, MissingData
from tests.experiments.data.files import put, tarred, zipped


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
