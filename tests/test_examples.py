"""Every example runs; documented code blocks and docstrings are collected by the root conftest.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
SHORT = {
    "adding_problem": ["--updates", "20", "--length", "10"],
    "streaming": ["--steps", "100", "--channels", "3"],
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_runs(path):
    command = [sys.executable, str(path), *SHORT[path.stem]]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "LayerNormLSTM" in result.stdout
