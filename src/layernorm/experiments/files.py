"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A fresh path to write to; it takes the place of ``path`` when the ``with`` block ends well.

    Examples:
        >>> import pathlib, tempfile
        >>> from layernorm.experiments.files import replacing
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "a.txt"
        ...     with replacing(path) as fresh:
        ...         _ = fresh.write_text("whole")
        ...     path.read_text()
        'whole'
    """
    fresh = path.with_name(path.name + ".new")
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
