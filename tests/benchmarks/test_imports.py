"""The benchmarks' files import one another in no circle, and ``core`` imports no benchmark."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

from benchmarks.core.workers import ROOT


def imported(path):
    """Return the modules of the benchmarks that a file imports, those within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    return found


def modules():
    """Return the imports of each module, as far as they are modules of the benchmarks."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / "benchmarks").rglob("*.py")
        if path.name != "__init__.py"
    }
    return {name: imported(path) & files.keys() for name, path in files.items()}


def test_imports_make_no_circle():
    tuple(TopologicalSorter(modules()).static_order())  # raises CycleError, which names it


def test_core_imports_no_benchmark():
    for name, found in modules().items():
        if name.startswith("benchmarks.core."):
            assert all(other.startswith("benchmarks.core.") for other in found), name


def test_the_package_imports_no_benchmark():
    for path in (ROOT / "src").rglob("*.py"):
        assert not [name for name in imported(path) if name.partition(".")[0] == "benchmarks"], path
