"""Finds data: a folder that the user names, else a cache folder, else a download; verifies checksums.

Whatever is in a file, the worst that it can do is to be named in an error: archives are never unpacked onto
the disk, nothing unpacks to more than ``LIMIT``, and any exception of a reader becomes that error.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pooch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from layernorm.experiments.data import archives
from layernorm.experiments.data.archives import LIMIT as LIMIT
from layernorm.experiments.data.sources import File, Origin, Source
from layernorm.experiments.errors import ExperimentError, MissingData, reason
from layernorm.experiments.storage import files

#: The environment variable that names the user's folder of data.
VARIABLE: Final = "LAYERNORM_DATA"

# The folders of downloads that are not yet verified, and when one is nobody's any more.
_FRESH: Final = ".download-"
_STALE_SECONDS: Final = 86_400.0
# What a folder that cannot be written to says, as against a network.
_UNWRITABLE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def content(source: Source, name: str, normal: Callable[[bytes], bytes]) -> bytes:
    """Return a file of a data set in its normal form, found or downloaded, its checksum verified.

    Args:
        source: the data set.
        name: of one of its files.
        normal: turns what is in the file into what all copies of it have in common.

    Raises:
        MissingData: it is not here and cannot be downloaded.
        ExperimentError: it is damaged or is something else.
    """
    (file,) = [file for file in source.files if file.name == name]
    for folder in folders(source):
        for path, member in _places(folder, file):
            if path.is_file():
                return _verified(path, member, file, normal)
    return _downloaded(source, file, normal)


def folders(source: Source) -> Sequence[Path]:
    """Return where a data set is looked for, in this order.

    Raises:
        ExperimentError: the folder that the user names is none.
    """
    named = os.environ.get(VARIABLE)
    if named and not Path(named).is_dir():
        raise ExperimentError(f"the environment variable {VARIABLE} names {named}, which is no folder")
    own = [Path(named) / source.folder, Path(named)] if named else []
    return (*own, _cache(source))


def find(source: Source, *names: str) -> Path | None:
    """Return the first file or folder of these names (paths within the data set), or None."""
    for folder in folders(source):
        for name in names:
            if (folder / name).exists():
                return folder / name
    return None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever the readers of a file raise within the block into the error that names it.

    Raises:
        ExperimentError: the file is damaged.
    """
    try:
        yield
    except ExperimentError:
        raise
    except Exception as error:  # whatever a damaged file makes of a reader
        raise damaged(path, reason(error)) from error


def text_lines(path: Path) -> list[str]:
    """Return the lines of a text file, as ``lines`` does.

    Raises:
        ExperimentError: it is no text.
    """
    with reading(path):
        return lines(archives.stored(path))


def entries(path: Path, suffix: str) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield the paths and contents of all files with a suffix in a folder or in a tar archive.

    Raises:
        ExperimentError: the archive is damaged.
    """
    if path.is_dir():
        for file in sorted(path.rglob(f"*{suffix}")):
            if not file.name.startswith("._") and file.is_file():  # "._*": macOS adds such files
                with reading(file):
                    content = archives.stored(file)
                yield PurePosixPath(file.relative_to(path).as_posix()), content
        return
    members = archives.members(path, suffix)
    while True:
        with reading(path):
            entry = next(members, None)
        if entry is None:
            return
        yield entry


def missing(source: Source, tried: Sequence[str] = ()) -> MissingData:
    """Return the error that says what is missing, whose it is, where to get it and where to put it."""
    where = (
        f"the folder {source.folder} of a folder that the environment variable {VARIABLE} names, or into "
        f"{_cache(source)}"
    )
    how = f"cannot be downloaded (tried {', '.join(tried)})" if tried else "is not downloaded by this program"
    return MissingData(
        f"{source.title} is not here and {how}: {source.what}, by {source.by}; licence: {source.licence}. "
        f"Get it at {source.page} and put {source.layout.replace('`', '')} into {where}"
    )


def damaged(path: Path, error: object) -> ExperimentError:
    """Return the error of a file that cannot be read."""
    return ExperimentError(f"{path} is damaged: {error}. Replace it by a whole copy, or take it away")


def check_part(part: str, parts: Sequence[str]) -> None:
    """Raise ValueError where ``part`` is none of these."""
    if part not in parts:
        raise ValueError(f"part: expected one of {', '.join(parts)}, got {part!r}")


def decoded(content: bytes) -> str:
    """Decode text in UTF-8, or else in Windows-1252, as the older data sets are."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252")


def lines(content: bytes) -> list[str]:
    r"""Return the lines of a text that are not empty, without white space at their ends.

    Examples:
        >>> from layernorm.experiments.data import finding
        >>> finding.lines("one \r\n\r\ncafé".encode("cp1252"))
        ['one', 'café']
    """
    return [line.strip() for line in decoded(content).split("\n") if line.strip()]


def normal_lines(content: bytes) -> bytes:
    """Return the normal form of a text of lines: UTF-8, no empty lines, no white space at line ends."""
    return "\n".join(lines(content)).encode()


def _cache(source: Source) -> Path:
    return Path(pooch.os_cache("layernorm")) / source.folder


def _places(folder: Path, file: File) -> Iterator[tuple[Path, str]]:
    """Return files that may hold a file, and its path within them if they are archives."""
    for name in (file.name, *file.aliases):
        yield folder / name, ""
        yield folder / f"{name}.gz", ""
    for origin in file.origins:
        if origin.member:
            yield folder / origin.archive, origin.member
            # The archive unpacked, into the folder or into one of the archive's name.
            yield folder / origin.member, ""
            yield folder / origin.archive.split(".")[0] / origin.member, ""


def _verified(path: Path, member: str, file: File, normal: Callable[[bytes], bytes]) -> bytes:
    with reading(path):
        found = normal(archives.content(path, member))
    if hashlib.sha256(found).hexdigest() != file.sha256:
        raise ExperimentError(
            f"{path} is not the {file.name} expected: the SHA-256 of its content should begin with "
            f"{file.sha256[:12]}. Replace it by the original, or take it away"
        )
    return found


def _downloaded(source: Source, file: File, normal: Callable[[bytes], bytes]) -> bytes:
    """Fetch a file, and put it into the cache when it is whole and what it should be."""
    tried = []
    cache = _cache(source)
    for left in cache.glob(f"{_FRESH}*"):  # of a process that was killed
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    for origin in file.origins:
        for address in origin.addresses:
            name = _stored(file, origin, address)
            try:
                files.make_folder(cache)
                with tempfile.TemporaryDirectory(prefix=_FRESH, dir=cache) as fresh:
                    path = _fetch(address, name, Path(fresh))
                    found = _verified(path, origin.member, file, normal)
                    files.move(path, cache / name)
            except ExperimentError:
                tried.append(f"{address} (not the {file.name} expected)")
            except Exception as error:  # whatever a network and its libraries raise
                if isinstance(error, OSError) and error.errno in _UNWRITABLE:
                    raise ExperimentError(f"cannot write into {cache}: {reason(error)}") from error
                tried.append(f"{address} ({type(error).__name__})")
            else:
                return found
    raise missing(source, tried)


def _stored(file: File, origin: Origin, address: str) -> str:
    return origin.archive or file.name + (".gz" if address.endswith(".gz") else "")


def _fetch(address: str, name: str, folder: Path) -> Path:
    pooch.get_logger().setLevel("ERROR")
    with _Bar(name) as bar:
        fetch = pooch.HTTPDownloader(progressbar=bar, timeout=30)
        return Path(pooch.retrieve(address, None, name, folder, downloader=fetch))


class _Bar:
    """A download's progress as pooch wants it: ``total``, ``update``, ``reset``, ``close``."""

    def __init__(self, name: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), transient=True)
        self._task = self._progress.add_task(name, total=None)
        self.total = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def update(self, amount: int) -> None:
        self._progress.update(self._task, advance=amount, total=self.total or None)

    def reset(self) -> None:
        self._progress.reset(self._task)

    def close(self) -> None:
        """Leave the display open: its ``with`` block closes it."""
