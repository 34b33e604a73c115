"""Sentences and pairs of sentences that judge what a sentence encoder has learned."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from layernorm.experiments.data import finding, sources

# The file of label 1, then the file of label 0.
_SETS: Final = {
    "MR": ("rt-polarity.pos", "rt-polarity.neg"),
    "CR": ("custrev.pos", "custrev.neg"),
    "SUBJ": ("subj.subjective", "subj.objective"),
    "MPQA": ("mpqa.pos", "mpqa.neg"),
}
_SICK_PARTS: Final = {"train": "train", "trial": "trial", "test": "test_annotated"}
_SICK_COLUMNS: Final = ("pair_ID", "sentence_A", "sentence_B", "relatedness_score")


class Pair(NamedTuple):
    """Two sentences and how related they are.

    Attributes:
        first: a sentence.
        second: a sentence.
        score: from 1, not related, to 5, of the same meaning; the mean of ten people's judgements.
    """

    first: str
    second: str
    score: float


def sentence_set(name: str) -> tuple[list[str], Tensor]:
    """Return sentences of two classes, split into words by spaces.

    Args:
        name: "MR" (films), "CR" (products), "SUBJ" (1 is subjective) or "MPQA" (opinions).

    Returns:
        The sentences, those of label 1 first, and the labels (sentences), int64.

    Raises:
        ValueError: ``name`` is something else.
        MissingData: it is not here and cannot be downloaded.
        ExperimentError: a file is damaged.
    """
    if name not in _SETS:
        raise ValueError(f"name: expected one of {', '.join(_SETS)}, got {name!r}")
    ones, zeros = (
        finding.content(sources.SENTENCE_SETS, file, finding.normal_lines).decode().split("\n")
        for file in _SETS[name]
    )
    labels = torch.tensor([1] * len(ones) + [0] * len(zeros))
    return ones + zeros, labels


def sick(part: str) -> list[Pair]:
    """Return pairs of sentences with their semantic relatedness, SemEval 2014 task 1.

    Args:
        part: "train" (4,500 pairs), "trial" (500) or "test" (4,927).

    Raises:
        ValueError: ``part`` is something else.
        MissingData: it is not here and cannot be downloaded.
        ExperimentError: a file is damaged.
    """
    finding.check_part(part, tuple(_SICK_PARTS))
    table = finding.content(sources.SICK, f"SICK_{_SICK_PARTS[part]}.txt", _sick_rows)
    rows = [line.split("\t") for line in table.decode().split("\n")]
    return [Pair(first, second, float(score)) for _, first, second, score in rows]


def _sick_rows(content: bytes) -> bytes:
    """Return the columns that are used, in a fixed order, without the header."""
    header, *rows = [line.split("\t") for line in finding.lines(content)]
    places = [header.index(column) for column in _SICK_COLUMNS]
    return "\n".join("\t".join(row[place].strip() for place in places) for row in rows).encode()
