"""The file that keeps an unfinished run: ``torch.save``'s, with its checksum behind it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from layernorm.experiments.errors import DamagedFile, ExperimentError, reason
from layernorm.experiments.storage import files

# What ``torch.save`` writes begins and ends so.
_BEGINNING: Final = b"PK\x03\x04"
_END: Final = b"PK\x05\x06"
_END_SIZE: Final = 22


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Replace a checkpoint.

    Raises:
        OSError: it cannot be written.
    """
    files.write(path, files.sealed(packed(state)))


def read(path: Path) -> dict[str, Any]:
    """Return the state in a checkpoint that is as it was written.

    Raises:
        FileNotFoundError: there is none.
        DamagedFile: it is empty, torn or changed.
        ExperimentError: it is no checkpoint of this version, or cannot be read.
    """
    try:
        content = path.read_bytes()
        payload = files.unsealed(content)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unusable(path, error) from error
    except ValueError as error:
        raise unusable(path, error, DamagedFile) from error
    if payload is None:
        if _is_torn(content):
            raise unusable(path, "it is empty or cut off", DamagedFile)
        raise unusable(path, "it is of another version of layernorm, or no checkpoint")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    except Exception as error:  # of another version of PyTorch
        raise unusable(path, error) from error
    return state


def unusable(
    path: Path, why: BaseException | str, kind: type[ExperimentError] = ExperimentError
) -> ExperimentError:
    """Return the error of a checkpoint that a run cannot go on from."""
    text = why if isinstance(why, str) else reason(why)
    return kind(f"the checkpoint {path} cannot be used ({text}); delete it to train this run from its start")


def drop_damaged(path: Path, say: Callable[[str], None]) -> None:
    """Remove a checkpoint that is empty, torn or changed, so that its run begins again; say so.

    Raises:
        ExperimentError: it is something else than a checkpoint of this version.
    """
    try:
        read(path)
    except FileNotFoundError:
        return
    except DamagedFile as error:
        say(f"{str(error).partition('; delete')[0]}; this run begins again")
        path.unlink(missing_ok=True)


def packed(state: Mapping[str, Any]) -> bytes:
    """Return what ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _is_torn(content: bytes) -> bool:
    """Return whether this is what a power cut can leave of a checkpoint: nothing, zeros, or its beginning."""
    if not content.strip(b"\0"):
        return True
    whole = content[-_END_SIZE:].startswith(_END)
    return not whole and (content.startswith(_BEGINNING) or _BEGINNING.startswith(content))
