"""Questions on a passage with one name left out: where they come from, and as indices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor

from layernorm.experiments.data import Question, words

#: What stands in a query in the place of the name that is asked for.
PLACEHOLDER: Final = "@placeholder"

_MARKER: Final = re.compile(r"@entity\d+")
_SENTENCE_ENDS: Final = frozenset(".!?")


def who_speaks(text: str, speeches: int = 5, length: int = 8) -> list[Question]:
    r"""Make questions on a play: who speaks next, given the speeches before and what is said.

    As in the data of Hermann et al. names are markers, "@entity3": those of the speakers, and in the speeches
    the names of one word that speakers have. The passage holds the last speeches, each after its speaker's
    marker; the query is the next one after a placeholder. Only what is said by a speaker of the passage is
    asked.

    Args:
        text: speeches with an empty line between, each after the speaker's name, a colon and a line's end.
        speeches: in a passage.
        length: the number of words kept from the start of each speech.

    Examples:
        >>> from layernorm.experiments.tasks.attentive_reader.cloze import who_speaks
        >>> play = "ROMEO:\nIs the day so young?\n\nBENVOLIO:\nBut new struck nine.\n\nROMEO:\nAy me!"
        >>> question, = who_speaks(play, speeches=2)
        >>> question.passage
        '@entity1 : is the day so young ? @entity0 : but new struck nine .'
        >>> question.query, question.answer
        ('@placeholder : ay me !', '@entity1')
    """
    parts = [part.partition(":\n") for part in text.strip().split("\n\n")]
    spoken = [(name, speech) for name, colon, speech in parts if colon]
    names = sorted({name for name, _ in spoken})
    markers = {name: f"@entity{number}" for number, name in enumerate(names)}
    # Names of persons are in capitals where they speak; "Nurse" or "All" are words too.
    proper = {name.capitalize(): markers[name] for name in names if name.isupper() and name.isalpha()}
    mention = re.compile(rf"\b(?:{'|'.join(proper)})\b") if proper else None
    lines = []
    for name, speech in spoken:
        named = mention.sub(lambda found: proper[found[0]], speech) if mention else speech
        lines.append((markers[name], " ".join([":", *words.tokens(named)[:length]])))
    questions = []
    for place in range(speeches, len(lines)):
        before = lines[place - speeches : place]
        answer, said = lines[place]
        if answer in {speaker for speaker, _ in before}:
            passage = " ".join(f"{speaker} {words}" for speaker, words in before)
            query = f"{PLACEHOLDER} {said}"
            candidates = tuple(dict.fromkeys(_MARKER.findall(f"{passage} {query}")))
            questions.append(Question(passage, query, answer, candidates))
    return questions


def nearest_sentences(passage: Sequence[str], query: Iterable[str], count: int) -> list[str]:
    """Return the sentences of a passage that are most like the query, in the passage's order.

    Likeness is the number of different words in common by the square root of the sentence's different words.

    Examples:
        >>> from layernorm.experiments.tasks.attentive_reader.cloze import nearest_sentences
        >>> passage = "a dog barks . the cat sleeps . it rains .".split()
        >>> " ".join(nearest_sentences(passage, "the dog barks".split(), 2))
        'a dog barks . the cat sleeps .'
    """
    sentences: list[list[str]] = [[]]
    for word in passage:
        sentences[-1].append(word)
        if word in _SENTENCE_ENDS:
            sentences.append([])
    asked = set(query)

    def likeness(place: int) -> float:
        sentence = set(sentences[place])
        return len(sentence & asked) / math.sqrt(max(len(sentence), 1))

    best = sorted(range(len(sentences)), key=likeness, reverse=True)[:count]
    return [word for place in sorted(best) for word in sentences[place]]


@dataclass
class Cloze:
    """Questions as indices.

    A marker's index is the vocabulary's length plus its number, which is the order of its first appearance in
    its question.

    Attributes:
        passages: (cases, T), filled up with ``words.PAD``.
        passage_lengths: (cases,).
        queries: (cases, Q).
        query_lengths: (cases,).
        answers: the number of the marker that is asked for, (cases,).
        markers: how many there are in the question, (cases,).
    """

    passages: Tensor
    passage_lengths: Tensor
    queries: Tensor
    query_lengths: Tensor
    answers: Tensor
    markers: Tensor

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.answers)

    def to(self, device: torch.device) -> Cloze:
        """Return the same questions on a device."""
        return Cloze(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def part(self, cases: Tensor | slice) -> Cloze:
        """Return some of the questions, as short as their longest."""
        chosen = Cloze(**{field.name: getattr(self, field.name)[cases] for field in fields(self)})
        chosen.passages = chosen.passages[:, : int(chosen.passage_lengths.max())]
        chosen.queries = chosen.queries[:, : int(chosen.query_lengths.max())]
        return chosen

    def renumbered(self, numbers: Tensor, first: int) -> Cloze:
        """Return the questions with other numbers for their markers.

        Args:
            numbers: the new number of each old one, (cases, markers).
            first: the index of marker 0.
        """

        def changed(indices: Tensor) -> Tensor:
            new = first + numbers.gather(1, (indices - first).clamp_min(0))
            return torch.where(indices < first, indices, new)

        return Cloze(
            changed(self.passages),
            self.passage_lengths,
            changed(self.queries),
            self.query_lengths,
            numbers.gather(1, self.answers[:, None]).squeeze(1),
            self.markers,
        )


@dataclass(frozen=True)
class Indexer:
    """Makes questions into indices.

    Attributes:
        vocabulary: of the words that are no markers.
        sentences: of a passage that are kept, the nearest to the query; None for the whole passage.
    """

    vocabulary: words.Vocabulary
    sentences: int | None = None

    def __call__(self, questions: Sequence[Question]) -> Cloze:
        """Return the questions as indices."""
        passages, queries, answers, markers = [], [], [], []
        for question in questions:
            passage, query = _texts(question, self.sentences)
            numbers: dict[str, int] = {}
            for word in (*passage, *query, question.answer):
                if _MARKER.fullmatch(word):
                    numbers.setdefault(word, len(numbers))
            passages.append(self._indices(passage, numbers))
            queries.append(self._indices(query, numbers))
            answers.append(numbers[question.answer])
            markers.append(len(numbers))
        return Cloze(
            *words.padded(passages), *words.padded(queries), torch.tensor(answers), torch.tensor(markers)
        )

    def _indices(self, text: Sequence[str], numbers: dict[str, int]) -> list[int]:
        found = self.vocabulary.indices(text)
        first = len(self.vocabulary)
        return [
            first + numbers[word] if word in numbers else index
            for word, index in zip(text, found, strict=True)
        ]


def _texts(question: Question, sentences: int | None) -> tuple[list[str], list[str]]:
    """Return the words of a question's passage, or of its nearest sentences, and of the query."""
    passage, query = words.tokens(question.passage), words.tokens(question.query)
    return passage if sentences is None else nearest_sentences(passage, query, sentences), query


def vocabulary(questions: Sequence[Question], size: int, sentences: int | None = None) -> words.Vocabulary:
    """Return the most frequent words of questions, without their markers."""
    texts = (text for question in questions for text in _texts(question, sentences))
    return words.Vocabulary(([word for word in text if not _MARKER.fullmatch(word)] for text in texts), size)
