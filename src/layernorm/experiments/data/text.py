"""Running text."""

from __future__ import annotations

from layernorm.experiments.data import finding, sources


def tiny_shakespeare() -> str:
    """Return about a third of Shakespeare's plays, 1,115,394 characters.

    Speeches stand one after another, each after the speaker's name and a colon, with an empty line between.

    Raises:
        MissingData: it is not here and cannot be downloaded.
        ExperimentError: the file is damaged.
    """
    text = finding.content(sources.TINY_SHAKESPEARE, "tinyshakespeare.txt", _unix)
    return text.decode("ascii")


def _unix(content: bytes) -> bytes:
    return content.replace(b"\r\n", b"\n")
