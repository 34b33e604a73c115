"""Text as indices: tokens, vocabularies, padding."""

from __future__ import annotations

import pytest
import torch

from layernorm.experiments.data.words import PAD, UNKNOWN, Vocabulary, padded, tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two dogs .", ["two", "dogs", "."]),
        ("tri-colored dog's -- toy", ["tri-colored", "dog", "'s", "-", "-", "toy"]),
        ("@entity12 met @placeholder", ["@entity12", "met", "@placeholder"]),
        ("'Tis 3 o'clock!", ["'tis", "3", "o", "'clock", "!"]),
        (" \n", []),
    ],
)
def test_tokens(text, expected):
    assert tokens(text) == expected


def test_a_vocabulary_is_ranked_by_frequency_then_alphabet():
    sentences = [["b", "a", "c"], ["c", "b"], ["c", "d"]]
    vocabulary = Vocabulary(sentences)
    assert vocabulary.words == ("c", "b", "a", "d")
    assert len(vocabulary) == 6
    assert vocabulary.indices(["d", "c", "x"]) == [5, 2, UNKNOWN]
    assert Vocabulary(reversed(sentences)).words == vocabulary.words


def test_a_vocabulary_is_cut_to_its_size():
    vocabulary = Vocabulary([["a", "a", "b", "b", "c"]], size=4)
    assert vocabulary.words == ("a", "b")
    assert max(vocabulary.indices("abcd")) == len(vocabulary) - 1 == 3
    with pytest.raises(ValueError, match="size must be at least 3, or None, got 2"):
        Vocabulary([["a"]], size=2)


def test_rows_are_padded_to_the_longest():
    table, lengths = padded([[3], [], [4, 5]])
    assert table.tolist() == [[3, PAD], [PAD, PAD], [4, 5]]
    assert lengths.tolist() == [1, 0, 2]
    assert table.dtype == lengths.dtype == torch.int64
    table, lengths = padded([])
    assert table.shape == (0, 0)
    assert lengths.shape == (0,)
