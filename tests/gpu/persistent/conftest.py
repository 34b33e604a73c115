"""Fixtures of the persistent kernels' tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from layernorm.gpu.persistent import compiling
from layernorm.gpu.persistent import launches as persistent
from tests.gpu.persistent.cases import builder
from tests.gpu.persistent.passed import have_passed

#: Run them though nothing has changed.
ALWAYS = "LAYERNORM_TEST_PERSISTENT"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests of this folder where they have passed with these files."""
    if os.environ.get(ALWAYS) or not have_passed():
        return
    skip = pytest.mark.skip(reason=f"they have passed with these files; {ALWAYS}=1 runs them")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def compiler() -> str:
    """Return a C++ compiler."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


@pytest.fixture(scope="session")
def emulator(compiler, tmp_path_factory):
    """Return what builds the emulator of a plan."""
    return builder(compiler, tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulated(emulator, monkeypatch):
    """Run in the emulator what is launched, and list it: (plan, clusters, groups, device)."""
    runs = []

    def launch(loaded, plan, clusters, arguments, device):
        runs.append((plan, clusters, loaded, device))
        emulator(plan).run(arguments)

    monkeypatch.setattr(persistent, "_architecture", lambda index: 90)
    monkeypatch.setattr(compiling, "load", lambda plan, device, groups: groups)
    monkeypatch.setattr(compiling, "launch", launch)
    return runs
