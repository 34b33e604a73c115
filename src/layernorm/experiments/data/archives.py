"""Reading a file or a member of an archive of no more than ``LIMIT`` bytes; nothing touches the disk.

Readers of a damaged archive raise whatever they like: ``finding.reading`` makes one error of it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Final, cast

#: The most bytes that a file of a data set may have, packed or not: twice the largest one.
LIMIT: Final = 1 << 28
# The most bytes of each member where all of a kind are read.
_SMALL: Final = 1 << 24
_BLOCK: Final = 512


def stored(path: Path) -> bytes:
    """Return the bytes of a file as they are stored."""
    with path.open("rb") as file:
        return _read(file)


def content(path: Path, member: str = "") -> bytes:
    """Return what is in a file, or in a member of an archive, looked up by its path or else by its name."""
    if not member:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _read(cast(IO[bytes], file))
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive, archive.open(_choose(archive.namelist(), member)) as file:
            return _read(file)
    with _tar(path) as tar:
        opened = tar.extractfile(_choose(tar.getnames(), member))
        if opened is None:
            raise ValueError(f"{member} in it is no file")
        return _read(opened)


def members(path: Path, suffix: str) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield the paths and contents of all files with a suffix in a tar archive, which must be whole."""
    with _tar(path) as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            # "._*": macOS adds such files.
            wanted = name.suffix == suffix and not name.name.startswith("._")
            opened = archive.extractfile(member) if wanted else None
            if opened is not None:
                yield name, _read(opened, _SMALL)
        # A header that cannot be read ends an archive without a word.
        stream = cast(_Bounded, archive.fileobj)
        stream.seek(archive.offset)
        if stream.read(_BLOCK) != bytes(_BLOCK):
            raise ValueError("it is cut off or damaged")
        while stream.read(1 << 20):  # the checksum of what is packed comes at its end
            pass


def zipped(packed: bytes, suffix: str) -> dict[str, bytes]:
    """Return the contents of all files with a suffix in a zip archive by their paths."""
    found, left = {}, LIMIT
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        for name in archive.namelist():
            if name.endswith(suffix) and not name.startswith("__MACOSX"):
                with archive.open(name) as file:
                    found[name] = _read(file, min(left, _SMALL))
                left -= len(found[name])
    return found


class _Bounded:
    """A stream that never reads more than ``LIMIT`` bytes at once, whatever a header asks for."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LIMIT:
            raise ValueError(f"a part of it claims to have {size} bytes")
        return self._stream.read(size)


@contextmanager
def _tar(path: Path) -> Iterator[tarfile.TarFile]:
    with path.open("rb") as file:
        start = file.read(6)
    unpack = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}.get(start[:2], open)
    with unpack(path, "rb") as stream:  # type: ignore[operator]
        bounded = cast(IO[bytes], _Bounded(stream))
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            yield archive


def _read(file: IO[bytes], limit: int | None = None) -> bytes:
    limit = LIMIT if limit is None else limit
    found = file.read(limit + 1)
    if len(found) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return found


def _choose(names: Sequence[str], member: str) -> str:
    if member in names:
        return member
    for name in map(PurePosixPath, names):
        if name.name == PurePosixPath(member).name:
            return str(name)
    raise ValueError(f"it has no {member}")
