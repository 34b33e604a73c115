"""Calls of the commands under test, and what they leave."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
from rich.console import Console

from layernorm.cli import main


def silent(width: int = 120) -> Console:
    """Return a console that keeps its text in ``file``."""
    return Console(file=io.StringIO(), width=width)


def records(out: Path) -> pd.DataFrame:
    """Return the records of a folder without what differs from run to run."""
    return pd.read_csv(out / "results.csv").drop(columns="seconds")


def refused(capsys, *arguments: str) -> str:
    """Return the one line with which the command refuses."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err
