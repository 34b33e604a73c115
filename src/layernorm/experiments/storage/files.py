"""Files that are replaced whole or not at all, survive a power cut, and are verified when they are read.

A table has its SHA-256 in a file of its own, ``NAME.csv.sha256``, which ``sha256sum -c`` reads too; its first
line says what the table is of. JSON carries its SHA-256 in itself, a checkpoint at its end.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from layernorm.experiments.storage import locks

_SUFFIX: Final = ".new"
_SEAL: Final = b"layernorm sha256"
_SUM: Final = "sha256"
# What storage says that has no such thing as flushing.
_UNKNOWN: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a fresh path to write to; it takes the place of ``path`` when the ``with`` block ends well.

    The content is on the disk before it takes that place, and the folder after it: whenever the power fails,
    the old file is there or the new one. Two writers never share a fresh path.

    Raises:
        OSError: it cannot be written; names ``path``.

    Examples:
        >>> import pathlib, tempfile
        >>> from layernorm.experiments.storage.files import replacing
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "a.txt"
        ...     with replacing(path) as fresh:
        ...         _ = fresh.write_text("whole")
        ...     path.read_text()
        'whole'
    """
    fresh: Path | None = None
    descriptor = -1
    try:
        fresh, descriptor = _fresh(path)
        if os.name == "nt":  # an open file cannot be replaced there
            os.close(descriptor)
            descriptor = -1
        yield fresh
        _flush(fresh)
        os.replace(fresh, path)
        fresh = None  # its name is free for others
        _flush(path.parent)
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(_SUFFIX):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        if fresh is not None:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
        if descriptor >= 0:
            os.close(descriptor)


def write(path: Path, content: bytes | str) -> None:
    """Write a file, whole or not at all; text in UTF-8.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    with replacing(path) as fresh:
        fresh.write_bytes(content if isinstance(content, bytes) else _encoded(content))


def move(source: Path, path: Path) -> None:
    """Put a file of the same storage in the place of another one.

    Raises:
        OSError: it cannot be done.
    """
    _flush(source)
    os.replace(source, path)
    _flush(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they are there after a power cut.

    Raises:
        OSError: it cannot be made.
    """
    missing = [place for place in (path, *path.parents) if not place.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _flush(place.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are gone have left half-written in a folder and the folders in it."""
    for path in [*folder.glob(f"*{_SUFFIX}"), *folder.glob(f"*/*{_SUFFIX}")]:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                if locks.take(descriptor) and locks.leads_to(path, descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def write_table(path: Path, text: str, about: str) -> None:
    """Write a table and its checksum, so that at every moment the two that are there agree.

    Args:
        path: the file.
        text: the table as CSV.
        about: one line that says what it is of.

    Raises:
        OSError: it cannot be written.
    """
    content = _encoded(text)
    lines = [f"# {_normal(about)}", _line(content, path)]
    try:  # between the two replacements the old table must still be known
        before = [_line(_encoded(read_table(path, about)), path)]
    except (OSError, ValueError):
        before = []
    write(checksum(path), "\n".join([*lines, *before, ""]))
    write(path, content)
    if before:
        write(checksum(path), "\n".join([*lines, ""]))


def read_table(path: Path, about: str | None = None) -> str:
    """Return the text of a table whose checksum agrees.

    Args:
        path: the file.
        about: what it must be of; None for anything.

    Raises:
        FileNotFoundError: there is no such file.
        UnknownTableError: it has no checksum: this program has not written it.
        OtherTableError: it is whole, but of something else.
        ValueError: it is not as it was written.
    """
    content = path.read_bytes()
    try:
        first, *lines = checksum(path).read_bytes().decode("utf-8").splitlines()
    except FileNotFoundError as error:
        kind = UnknownTableError if content.strip(b"\0") else ValueError
        raise kind(f"it has no {checksum(path).name} beside it") from error
    except ValueError as error:
        raise ValueError(f"its {checksum(path).name} is empty or damaged") from error
    if _line(content, path) not in lines:
        raise ValueError("its content does not have its SHA-256")
    if about is not None and first != f"# {_normal(about)}":
        raise OtherTableError(f"it is of {first.removeprefix('# ')}")
    return content.decode("utf-8")


class OtherTableError(ValueError):
    """A table is whole, but not the one that is wanted."""


class UnknownTableError(ValueError):
    """A table is not by this program: it has no checksum file, or begins with something else."""


def checksum(path: Path) -> Path:
    """Return where the checksum of a table is."""
    return path.with_name(f"{path.name}.{_SUM}")


def write_json(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write an object with its checksum in it; return what ``read_json`` will make of it.

    Raises:
        OSError: it cannot be written.
    """
    plain: dict[str, Any] = json.loads(json.dumps(content))
    write(path, json.dumps({**plain, _SUM: _sum(plain)}, indent=2) + "\n")
    return plain


def read_json(path: Path) -> tuple[dict[str, Any], bool]:
    """Return an object, without its checksum, and whether that agrees.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is no object")
    found = content.pop(_SUM, None)
    return content, found == _sum(content)


def sealed(content: bytes) -> bytes:
    """Return a content with its checksum behind it."""
    return content + _SEAL + hashlib.sha256(content).digest()


def unsealed(content: bytes) -> bytes | None:
    """Return what ``sealed`` was given; None where there is no seal.

    Raises:
        ValueError: the seal is broken.

    Examples:
        >>> from layernorm.experiments.storage.files import sealed, unsealed
        >>> unsealed(sealed(b"weights")), unsealed(b"weights")
        (b'weights', None)
    """
    end = len(content) - hashlib.sha256().digest_size
    start = end - len(_SEAL)
    if start < 0 or content[start:end] != _SEAL:
        return None
    if hashlib.sha256(content[:start]).digest() != content[end:]:
        raise ValueError("its content does not have its SHA-256")
    return content[:start]


def _fresh(path: Path) -> tuple[Path, int]:
    """Make a file next to ``path`` that nobody else writes to; its lock says that its process lives."""
    fresh = path.with_name(path.name + _SUFFIX)
    while True:
        try:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{_SUFFIX}")
        else:
            locks.take(descriptor)
            return fresh, descriptor


def _flush(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
    finally:
        os.close(descriptor)


def _encoded(text: str) -> bytes:
    """Return text in UTF-8; of a name that is not UTF-8 itself the bytes, as escapes."""
    return text.encode("utf-8", "backslashreplace")


def _normal(about: str) -> str:
    """Return what a table is of, as one line of a file in UTF-8."""
    return _encoded(" ".join(about.split())).decode()


def _line(content: bytes, path: Path) -> str:
    """Return a line as ``sha256sum`` writes it."""
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}"


def _sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
