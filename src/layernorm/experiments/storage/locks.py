"""Who writes to a folder, and who trains a run: one process at a time.

The lock of a folder is the operating system's, which frees it when its process dies, however it dies. The
claim of a run is a file with a name in it: whoever comes last has the run, and a process that was only
thought lost finds another name there and stops before it writes.
"""

from __future__ import annotations

import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from layernorm.experiments.errors import ExperimentError

#: The lock of a folder, in it while a command runs.
LOCK: Final = ".lock"
# Windows locks bytes against readers too: one far behind what the file holds.
_PLACE: Final = 1 << 20


def take(descriptor: int) -> bool:
    """Lock an open file without waiting; return False where another process or thread has it.

    Storage that knows no locks counts as locked: the files on it are still replaced whole.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _PLACE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


def leads_to(path: Path, descriptor: int) -> bool:
    """Return whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder, which must be there, within the block.

    Raises:
        ExperimentError: another command is in it; says which, on which machine, since when.

    Examples:
        >>> import pathlib, tempfile
        >>> from layernorm.experiments.storage import locks
        >>> with tempfile.TemporaryDirectory() as folder, locks.held(pathlib.Path(folder)):
        ...     with locks.held(pathlib.Path(folder)):  # doctest: +ELLIPSIS
        ...         pass
        Traceback (most recent call last):
        layernorm.experiments.errors.ExperimentError: ... is in use by process ...
    """
    path = folder / LOCK
    descriptor = _locked(path)
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        with suppress(OSError):  # a full disk: the lock holds without a name in it
            os.write(descriptor, _who().encode("utf-8", "backslashreplace"))
        yield
    finally:
        if sys.platform == "win32":  # an open file cannot be removed there
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
        else:
            if leads_to(path, descriptor):
                with suppress(OSError):
                    path.unlink()
            os.close(descriptor)


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not take(descriptor):
            os.close(descriptor)
            raise ExperimentError(
                f"{path.parent} is in use by {_read(path) or 'another command'}; wait until it ends or "
                f"choose another folder (if its machine is lost for good, delete {path})"
            )
        # Whoever had it has perhaps just removed it: then this is the lock of nothing.
        if leads_to(path, descriptor):
            return descriptor
        os.close(descriptor)


@contextmanager
def claimed(path: Path) -> Iterator[Callable[[], None]]:
    """Claim a run for this process by a file, which is removed at the end of the block.

    Args:
        path: the file. An earlier claim is replaced: the newest counts.

    Yields:
        A function that raises ``ExperimentError`` where another process has claimed the run since.

    Raises:
        OSError: the file cannot be written.
    """
    mark = f"{_who()} ({uuid.uuid4().hex})"
    try:
        path.write_text(mark, "utf-8", errors="backslashreplace")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error

    def check() -> None:
        found = _read(path)
        if found != mark:
            other = found.partition(" (")[0] if found else "another command"
            raise ExperimentError(
                f"{other} trains {path.stem} now; this process stops and leaves it that run"
            )

    try:
        yield check
    finally:
        if _read(path) == mark:
            with suppress(OSError):
                path.unlink()


def _who() -> str:
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="backslashreplace")
    except OSError:
        return ""
