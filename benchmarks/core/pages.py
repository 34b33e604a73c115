"""What the reports of all benchmarks share: tables read and sorted, and pieces of Markdown."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd

from benchmarks.core.table import TableError, read
from benchmarks.core.timing import geometric_mean


def load(
    path: Path, columns: Sequence[str], numbers: Sequence[str], orders: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """A table with its numbers as such, and for each named column one, ``NAME_place``, to sort by.

    Args:
        path: the file.
        columns: of the table.
        numbers: the columns of numbers; nothing is NaN.
        orders: all values that a column may have, in their order.

    Raises:
        TableError: the file is missing or damaged, or has no rows.
    """
    data = pd.DataFrame(read(path, columns), columns=list(columns))
    if data.empty:
        raise TableError(f"{path} has no rows; measure first")
    try:
        for name in numbers:
            data[name] = pd.to_numeric(data[name].replace("", None))
        places = {f"{name}_place": data[name].map(list(order).index) for name, order in orders.items()}
    except (ValueError, TypeError) as error:
        raise TableError(f"{path} is damaged: {error}") from error
    return data.assign(**places)


#: Columns with the versions of peers' packages, and their names.
_PACKAGES: Final = {"jax": "JAX", "onnxruntime": "ONNX Runtime"}


def environments(
    rows: pd.DataFrame, device: str = "machine", packages: Mapping[str, str] = _PACKAGES
) -> Iterator[str]:
    """What was measured where, once for each run that the rows come from.

    Args:
        rows: of the table.
        device: the column that names it.
        packages: the names of those whose versions matter, by their columns.
    """
    for _, part in rows.groupby("date"):
        row = part.iloc[0]
        commit = f" ({_commit(row.commit)})" if row.commit else ""
        versions = [f"Python {row.python}", f"PyTorch {row.torch}", f"layernorm {row.layernorm}{commit}"]
        versions += [f"{name} {row[column]}" for column, name in packages.items()]
        yield f"{row[device]}. {', '.join(versions)}. Measured on {row.date[:10]}."


def _commit(commit: str) -> str:
    return f"commit {commit[:-1]} with changes" if commit.endswith("+") else f"commit {commit}"


def rounds(data: pd.DataFrame) -> str:
    """How many rounds there were, and how much other work."""
    if data.rounds.isna().all():
        return "Nothing could be measured."
    fewest, most = int(data.rounds.min()), int(data.rounds.max())
    text = f"There are {most} rounds" + (
        f", down to {fewest} where they take long." if fewest < most else "."
    )
    if data.other_cpus.notna().any():
        text += f" Other work on the machine took at most {data.other_cpus.max():.2f} CPUs during a point."
    return text


def options(data: pd.DataFrame, defaults: Mapping[str, tuple[str, Collection[Any]]]) -> list[str]:
    """The options that a run needs for what the columns hold.

    Args:
        data: the table.
        defaults: by column the option, and what it is by default.
    """
    return [
        f"--{option} {joined(data[column])}"
        for column, (option, default) in defaults.items()
        if set(data[column]) != set(default)
    ]


def asked_for(data: pd.DataFrame, rounds: int) -> list[str]:
    """The options for threads and rounds, where one number of threads and other rounds were measured."""
    found = [f"--threads {joined(data.threads)}"] if data.threads.nunique() == 1 else []
    if data.rounds.notna().any() and data.rounds.max() != rounds:
        found.append(f"--rounds {data.rounds.max():.0f}")
    return found


def joined(values: Any) -> str:
    """Each value once, with commas."""
    return ",".join(dict.fromkeys(values.astype(str)))


def by_peer(data: pd.DataFrame, keys: Sequence[str], column: str) -> pd.DataFrame:
    """A figure of each peer as a column, a row for each point, in the order of the data."""
    found = data.pivot_table(index=list(keys), columns="peer", values=column, sort=False)
    return found.reset_index()


def mean_and_worst(ratios: pd.Series[float]) -> str:
    """The geometric mean, and in brackets the smallest; nothing is a dash."""
    ratios = ratios.dropna()
    return f"{geometric_mean(ratios):.2f} ({ratios.min():.2f})" if len(ratios) else "–"


def time(row: Mapping[Hashable, Any]) -> str:
    """Three digits of microseconds, or why there are none."""
    return str(row["status"]) if pd.isna(row["median_us"]) else microseconds(row["median_us"])


def microseconds(value: float) -> str:
    """Three digits.

    Examples:
        >>> from benchmarks.core.pages import microseconds
        >>> microseconds(1.234), microseconds(12345.6)
        ('1.23', '12,346')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(row: Mapping[Hashable, Any]) -> str:
    """The ratio to PyTorch with its quartiles, or a dash."""
    if pd.isna(row["ratio_to_torch"]):
        return "–"
    return f"{row['ratio_to_torch']:.2f} ({row['ratio_q25']:.2f}–{row['ratio_q75']:.2f})"


def markdown(heads: Sequence[str], align: str, body: Sequence[Sequence[str]]) -> str:
    """A table; ``align`` has "l" or "r" for each column."""
    marks = ["---:" if side == "r" else "---" for side in align]
    rows = [" | ".join(cells) for cells in (heads, *body)]
    return "\n".join([f"| {rows[0]} |", f"|{'|'.join(marks)}|", *(f"| {row} |" for row in rows[1:])]) + "\n"
