"""Runs every documented example: docstrings of the package, README.md and docs/*.md.

Where Sybil is not installed, as on a machine that is there for its GPU, there are only the tests.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# Data and results of whoever runs the tests are neither read nor written.
os.environ.pop("LAYERNORM_BACKEND", None)


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


if importlib.util.find_spec("sybil") is not None:
    from sybil import Sybil
    from sybil.parsers.markdown import PythonCodeBlockParser
    from sybil.parsers.rest import DocTestParser

    pytest_collect_file = (
        Sybil(parsers=[DocTestParser()], path="src", patterns=["*.py"])
        + Sybil(
            parsers=[PythonCodeBlockParser()],
            patterns=["README.md", "docs/*.md"],
            fixtures=["in_empty_folder"],
        )
    ).pytest()

if importlib.util.find_spec("xdist") is not None:
    from xdist.scheduler import LoadScopeScheduling

    class _ByDocument(LoadScopeScheduling):
        """Tests go to any worker; the examples of a document, which need those before them, to one."""

        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if "::line:" in nodeid else nodeid

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _ByDocument:
        return _ByDocument(config, log)
