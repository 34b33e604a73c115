"""Pieces of Markdown that the reports of all benchmarks share."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Final

import pandas as pd

from benchmarks.core.timing import geometric_mean

#: The names of peers' packages whose versions matter, by the columns that have them.
PACKAGES: Final = {"jax": "JAX", "onnxruntime": "ONNX Runtime"}


def environments(
    rows: pd.DataFrame, device: str = "machine", packages: Mapping[str, str] = PACKAGES
) -> Iterator[str]:
    """Yield where and when the rows were measured, once for each run that they come from.

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
    """Return how many rounds there were, and how much other work."""
    if data.rounds.isna().all():
        return "Nothing could be measured."
    fewest, most = int(data.rounds.min()), int(data.rounds.max())
    text = f"There are {most} rounds" + (
        f", down to {fewest} where they take long." if fewest < most else "."
    )
    if data.other_cpus.notna().any():
        text += f" Other work on the machine took at most {data.other_cpus.max():.2f} CPUs during a point."
    return text


def joined(values: Any) -> str:
    """Return each value once, with commas."""
    return ",".join(dict.fromkeys(values.astype(str)))


def by_peer(data: pd.DataFrame, keys: Sequence[str], column: str) -> pd.DataFrame:
    """Return a figure of each peer as a column, a row for each point, in the order of the data."""
    found = data.pivot_table(index=list(keys), columns="peer", values=column, sort=False)
    return found.reset_index()


def mean_and_worst(ratios: pd.Series[float]) -> str:
    """Return the geometric mean, and in brackets the least; a dash where there are no ratios."""
    ratios = ratios.dropna()
    return f"{geometric_mean(ratios):.2f} ({ratios.min():.2f})" if len(ratios) else "–"


def time(row: Mapping[Hashable, Any]) -> str:
    """Return three digits of a row's microseconds, or why there are none."""
    return str(row["status"]) if pd.isna(row["median_us"]) else microseconds(row["median_us"])


def microseconds(value: float) -> str:
    """Return microseconds with three digits.

    Examples:
        >>> from benchmarks.core.pages import microseconds
        >>> microseconds(1.234), microseconds(12345.6)
        ('1.23', '12,346')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(row: Mapping[Hashable, Any]) -> str:
    """Return the ratio to PyTorch with its quartiles, or a dash."""
    if pd.isna(row["ratio_to_torch"]):
        return "–"
    return f"{row['ratio_to_torch']:.2f} ({row['ratio_q25']:.2f}–{row['ratio_q75']:.2f})"


def markdown(heads: Sequence[str], align: str, body: Sequence[Sequence[str]]) -> str:
    """Return a table; ``align`` has "l" or "r" for each column."""
    marks = ["---:" if side == "r" else "---" for side in align]
    rows = [" | ".join(cells) for cells in (heads, *body)]
    return "\n".join([f"| {rows[0]} |", f"|{'|'.join(marks)}|", *(f"| {row} |" for row in rows[1:])]) + "\n"
