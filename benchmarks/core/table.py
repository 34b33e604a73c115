"""The table of a benchmark: a CSV file that grows point by point."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from benchmarks.core.timing import Samples, quartiles, ratios
from layernorm.experiments.errors import ExperimentError
from layernorm.experiments.storage import files, locks

#: The columns of ``measures``, which every table of benchmarks has.
MEASURES: Final = (
    "calls_per_sample",
    "rounds",
    "median_us",
    "q25_us",
    "q75_us",
    "ratio_to_torch",
    "ratio_q25",
    "ratio_q75",
)


class TableError(ValueError):
    """A file that is no table of this benchmark, or cannot be written; the text says which and why."""


class Table:
    """Write a table, whole each time that rows come: whatever ends the run, no earlier row is lost.

    Until the end of its ``with`` block no other command can write into its folder.

    Args:
        path: the file, which is replaced.
        columns: of the table.
        keep: chooses the rows of an earlier file that stay.

    Raises:
        TableError: the file cannot be written, is damaged, or has other columns, or another command writes
            into its folder.
    """

    def __init__(self, path: Path, columns: Sequence[str], keep: Callable[[dict[str, str]], bool]) -> None:
        self._path = path
        self._text = io.StringIO(newline="")
        self._writer = csv.DictWriter(self._text, columns, restval="", lineterminator="\n")
        self._writer.writeheader()
        with ExitStack() as stack:
            try:
                files.make_folder(path.parent)
                stack.enter_context(locks.held(path.parent))
            except ExperimentError as error:
                raise TableError(str(error)) from error
            except OSError as error:
                raise TableError(f"cannot write {path}: {error.strerror or error}") from error
            self.add([row for row in read(path, columns) if keep(row)] if path.is_file() else [])
            self._lock = stack.pop_all()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, which are on the disk when this returns.

        Raises:
            TableError: the file cannot be written.
        """
        self._writer.writerows(rows)
        try:
            files.write(self._path, self._text.getvalue())
        except OSError as error:
            raise TableError(f"cannot write {self._path}: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        """Return the table; the folder is locked already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others write into the folder."""
        self._lock.close()


def read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a table.

    Raises:
        TableError: there is no such file, it has other columns, or a row has not one cell for each.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TableError(f"cannot read {path}: {reason}") from error
    if tuple(reader.fieldnames or ()) != tuple(columns):
        raise TableError(f"{path} has other columns than this benchmark's; move it away")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise TableError(
                f"{path} is damaged: row {number} has not the {len(columns)} cells of the columns; "
                "delete that row, and --resume measures it again"
            )
    return rows


def measures(samples: Samples, base: Samples) -> dict[str, float | int]:
    """Return one subject's figures, in microseconds per call, by the names in ``MEASURES``.

    ``ratio_to_torch`` is the median over the rounds of base's time / this subject's time: above 1 is
    faster than base.
    """
    time = quartiles([1e6 * seconds for seconds in samples.seconds])
    ratio = quartiles(ratios(base, samples))
    figures = {
        "median_us": time.median,
        "q25_us": time.q25,
        "q75_us": time.q75,
        "ratio_to_torch": ratio.median,
        "ratio_q25": ratio.q25,
        "ratio_q75": ratio.q75,
    }
    rounded = {name: significant(value) for name, value in figures.items()}
    return {"calls_per_sample": samples.calls, "rounds": len(samples.seconds), **rounded}


def significant(value: float) -> float:
    """Return the value with five significant digits, more than any of these figures has.

    Examples:
        >>> from benchmarks.core.table import significant
        >>> significant(12345.678), significant(0.000123456)
        (12346.0, 0.00012346)
    """
    return float(f"{value:.5g}")
