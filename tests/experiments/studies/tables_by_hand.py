"""Tables of experiments with other numbers in them, as if a command had written them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from layernorm.experiments.results import study_tables
from layernorm.experiments.storage import files


def put(path: Path, table: pd.DataFrame) -> None:
    """Write a table in the place of one that a command has written."""
    study_tables.write(path, table, files.checksum(path).read_text().splitlines()[0].removeprefix("# "))
