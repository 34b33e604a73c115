"""Text as indices: words of a text, a vocabulary of the most frequent ones, and padded batches."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final

import torch
from torch import Tensor

#: The index that fills a row up after its words; as a target it says that the sentence has ended.
PAD: Final = 0
#: The index of all words that are not in a vocabulary.
UNKNOWN: Final = 1

# An anonymized entity keeps its sign (@entity12), a clitic its apostrophe ('ll), a compound its hyphens.
_WORD: Final = re.compile(r"@?\w+(?:-\w+)*|'\w+|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, in lower case.

    Examples:
        >>> from layernorm.experiments.data.words import tokens
        >>> tokens("It's a two-year-old, isn't it?")
        ['it', "'s", 'a', 'two-year-old', ',', 'isn', "'t", 'it', '?']
    """
    # Interned, for a large text must not hold a word as often as it occurs.
    return [sys.intern(word) for word in _WORD.findall(text.lower())]


class Vocabulary:
    """The most frequent words of some sentences, numbered from 2 by falling frequency.

    Index 0 is ``PAD`` and 1 is ``UNKNOWN``; words that are equally frequent are in alphabetical order.

    Args:
        sentences: lists of words.
        size: the greatest number of indices, ``PAD`` and ``UNKNOWN`` among them; None for no limit.

    Raises:
        ValueError: size leaves no room for a word.

    Examples:
        >>> from layernorm.experiments.data.words import Vocabulary
        >>> vocabulary = Vocabulary([["a", "dog"], ["a", "cat", "and", "a", "dog"]], size=4)
        >>> vocabulary.words, len(vocabulary)
        (('a', 'dog'), 4)
        >>> vocabulary.indices(["a", "small", "dog"])
        [2, 1, 3]
    """

    def __init__(self, sentences: Iterable[Sequence[str]], size: int | None = None) -> None:
        if size is not None and size < 3:
            raise ValueError(
                f"size must be at least 3, or None, got {size}: two indices are taken by padding and by "
                "unknown words"
            )
        counts = Counter(chain.from_iterable(sentences))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        #: The words; that of index i is ``words[i - 2]``.
        self.words: tuple[str, ...] = tuple(ranked if size is None else ranked[: size - 2])
        self._indices = {word: index for index, word in enumerate(self.words, start=2)}

    def __len__(self) -> int:
        """Return the number of indices, padding and unknown words among them."""
        return len(self.words) + 2

    def indices(self, words: Iterable[str]) -> list[int]:
        """Return the index of each word, ``UNKNOWN`` for those not in the vocabulary."""
        return [self._indices.get(word, UNKNOWN) for word in words]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return rows of indices as one int64 Tensor (N, T), filled up with ``PAD``, and their lengths (N,).

    Examples:
        >>> from layernorm.experiments.data.words import padded
        >>> padded([[5, 6, 7], [8]])
        (tensor([[5, 6, 7],
                [8, 0, 0]]), tensor([3, 1]))
    """
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    longest = max(map(len, rows), default=0)
    table = torch.full((len(rows), longest), PAD, dtype=torch.int64)
    for row, indices in zip(table, rows, strict=True):
        row[: len(indices)] = torch.tensor(indices, dtype=torch.int64)
    return table, lengths
