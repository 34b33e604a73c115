"""The examples of the docstrings run."""

from __future__ import annotations

import doctest
import importlib

import pytest

from benchmarks.core.workers import ROOT

MODULES = [path.stem for path in (ROOT / "benchmarks/core").glob("*.py") if ">>> " in path.read_text("utf-8")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    found = doctest.testmod(importlib.import_module(f"benchmarks.core.{name}"))
    assert found.attempted > found.failed == 0
