"""The reference page lists everything public."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

PAGE = (Path(__file__).parents[1] / "docs/api.md").read_text("utf-8")
MODULES = ("", "backends", "baselines", "interop", "reference", "theory")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_on_the_page(module):
    name = f"layernorm.{module}".rstrip(".")
    found = importlib.import_module(name)
    shown = re.search(rf"^::: {re.escape(name)}\n((?: .*\n?)*)", PAGE, re.MULTILINE)
    is_whole = shown is not None and "members" not in shown[1]  # all that the module defines is there
    words = set(re.findall(r"\w+", PAGE))
    for public in set(found.__all__) - {"__version__"}:
        value = getattr(found, public)
        if isinstance(value, ModuleType):
            assert f"{name}.{public}" in PAGE
        else:
            assert public in words or (is_whole and callable(value)), f"{name}.{public}"


def test_every_function_is_on_the_page():
    functional = importlib.import_module("layernorm.functional")
    members = re.search(r"::: layernorm.functional\n.*?members: \[(.*?)\]", PAGE, re.DOTALL)[1].split(", ")
    defined = {name for name, value in vars(functional).items() if is_defined_in(value, functional)}
    assert set(members) == {name for name in defined if not name.startswith("_")} - {"recurrent_layer"}


def is_defined_in(value, module):
    return callable(value) and getattr(value, "__module__", "") == module.__name__
