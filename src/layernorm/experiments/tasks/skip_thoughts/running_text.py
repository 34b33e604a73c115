"""Running text as sentences of words, in their order."""

from __future__ import annotations

import re
from typing import Final

from layernorm.experiments import data
from layernorm.experiments.data import finding
from layernorm.experiments.data.sources import BOOKS
from layernorm.experiments.data.words import tokens
from layernorm.experiments.task import ExperimentError

#: Where running text can come from.
TEXTS: Final = ("shakespeare", "books")

_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+")


def load(text: str) -> list[list[list[str]]]:
    """Return documents, each a list of sentences, each a list of words.

    Args:
        text: "shakespeare" (one document, the speakers' names left out) or "books" (a document for each file
            of the user's).

    Raises:
        ExperimentError: there is no such text.
        MissingData: the text is not here.
    """
    if text not in TEXTS:
        raise ExperimentError(f"unknown text {text!r}; expected one of {', '.join(TEXTS)}")
    documents = [sentences(data.tiny_shakespeare())] if text == "shakespeare" else _books()
    split = [[words for sentence in document if (words := tokens(sentence))] for document in documents]
    return [document for document in split if document]


def sentences(play: str) -> list[str]:
    r"""Return what is said in a play, sentence by sentence.

    Speeches are separated by empty lines and begin with the speaker's name in a line of its own.

    Examples:
        >>> from layernorm.experiments.tasks.skip_thoughts.running_text import sentences
        >>> sentences("ALL:\nSpeak, speak.\n\nFirst Citizen:\nYou are all resolved\nto die? Hear me.")
        ['Speak, speak.', 'You are all resolved to die?', 'Hear me.']
    """
    speeches = [speech.partition("\n")[2] for speech in play.split("\n\n")]
    return [part for speech in speeches for part in _SENTENCE_END.split(" ".join(speech.split())) if part]


def _books() -> list[list[str]]:
    for folder in finding.folders(BOOKS):
        files = sorted(folder.glob("*.txt")) if folder.name == BOOKS.folder else []
        if files:
            return [finding.text_lines(file) for file in files]
    raise finding.missing(BOOKS)
