"""A log for TensorBoard that is written as it goes: an error comes where it happens, not in a thread."""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from layernorm.experiments.storage import files


class Log:
    """Write scalars into a fresh event file in a folder.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        files.make_folder(folder)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb", buffering=0)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, name: str, value: float, step: int) -> None:
        """Write one value."""
        self._write(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def _write(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        rest = record.getvalue()
        try:
            while rest:  # a disk that fills up takes a part first
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def __enter__(self) -> Self:
        """Return itself; the file is open already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()
