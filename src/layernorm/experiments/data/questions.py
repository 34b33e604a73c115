"""Questions on a text with one word left out."""

from __future__ import annotations

from typing import Final, NamedTuple

from layernorm.experiments.data import finding, sources

_FOLDERS: Final = {"train": "training", "valid": "validation", "test": "test"}


class Question(NamedTuple):
    """A passage and a sentence about it with a gap; names in both are markers such as "@entity3".

    Attributes:
        passage: words with spaces between.
        query: a text of the same form, with "@placeholder" for what is asked.
        answer: the marker in the gap.
        candidates: all markers of the passage and the query.
    """

    passage: str
    query: str
    answer: str
    candidates: tuple[str, ...]


def cnn_questions(part: str) -> list[Question]:
    """Load questions on news, read from a copy that the user has; never downloaded.

    K. M. Hermann et al., Teaching machines to read and comprehend, 2015 (arXiv 1506.03340). The files are
    ``questions/training/*.question`` and so on, a question a file: address, passage, query, answer and the
    names behind the markers, with an empty line between.

    Args:
        part: "train", "valid" or "test".

    Returns:
        The questions in the order of their files' names.

    Raises:
        ValueError: ``part`` is something else.
        MissingData: it is not here.
        ExperimentError: a file is damaged.
    """
    finding.check_part(part, tuple(_FOLDERS))
    folder = f"questions/{_FOLDERS[part]}"
    path = finding.find(sources.CNN_QUESTIONS, folder, f"cnn/{folder}", "cnn.tgz")
    if path is None:
        raise finding.missing(sources.CNN_QUESTIONS)
    found = {}
    for name, content in finding.entries(path, ".question"):
        if path.is_dir() or name.parent.name == _FOLDERS[part]:
            with finding.reading(path / name):
                found[name.name] = _question(finding.decoded(content))
    if not found:
        raise finding.damaged(path, f"there is no {folder}/*.question in it")
    return [found[name] for name in sorted(found)]


def _question(text: str) -> Question:
    blocks = text.replace("\r\n", "\n").strip().split("\n\n")
    if len(blocks) != 5:
        raise ValueError(f"expected 5 blocks of text, got {len(blocks)}")
    _, passage, query, answer, names = blocks
    candidates = tuple(line.partition(":")[0] for line in names.split("\n"))
    if not passage.strip() or "@placeholder" not in query:
        raise ValueError("expected a passage, and a query with @placeholder in it")
    if answer not in candidates or not answer.startswith("@entity"):
        raise ValueError(f"expected one of the markers as the answer, got {answer!r}")
    return Question(passage, query, answer, candidates)
