"""The tables of the studies: written with their checksums, verified when they are read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from layernorm.experiments.errors import DamagedFile, ExperimentError, reason
from layernorm.experiments.storage import files


def write(path: Path, table: pd.DataFrame, about: str) -> None:
    """Write a table.

    Args:
        path: the file.
        table: what goes there.
        about: what it is of: the study and its sizes.

    Raises:
        OSError: it cannot be written.
    """
    files.write_table(path, table.to_csv(index=False, lineterminator="\n"), about)


def read(
    path: Path,
    parse: Callable[[pd.DataFrame], pd.DataFrame],
    remedy: str,
    about: str | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Return a table that is as it was written.

    Args:
        path: the file.
        parse: checks the columns and gives them their types.
        remedy: what to do where it is damaged.
        about: what it must be of; None for anything.
        options: of ``pandas.read_csv``.

    Raises:
        DamagedFile: it is empty, torn or changed.
        ExperimentError: it is missing, or of something else.
    """
    try:
        text = files.read_table(path, about)
        return parse(pd.read_csv(io.StringIO(text), **options))
    except FileNotFoundError as error:
        raise ExperimentError(f"{path} is missing; the same command measures it") from error
    except OSError as error:
        raise ExperimentError(f"cannot read {path}: {reason(error)}") from error
    except files.OtherTableError as error:
        raise ExperimentError(
            f"{path} cannot be used ({error}); choose another folder, or {remedy}"
        ) from error
    except (ValueError, KeyError) as error:
        kind = ExperimentError if isinstance(error, files.UnknownTableError) else DamagedFile
        raise kind(f"{path} is damaged ({reason(error)}); {remedy}") from error


def will_be_repeated(error: DamagedFile) -> str:
    """Return the line that says that the contents of a damaged file are measured again."""
    return f"{str(error).partition('; ')[0]}; it is measured again"
