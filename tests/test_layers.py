"""The modules of the package import downwards only, and in no circle. The layers are declared here."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import layernorm

PACKAGE = Path(layernorm.__file__).parent

#: The lowest layer first. A name stands for a module or for a whole folder; modules of one layer may import
#: one another if they are in one folder. ``layernorm`` is the package's ``__init__``.
LAYERS = (
    ("pytorch_internals", "variants", "arguments"),
    ("spec", "override", "autocast"),
    ("checks",),
    ("recurrent_checks", "stream_checks", "initialization"),
    ("reference", "distributed"),
    ("gpu", "regularization"),
    ("ops",),
    ("backends",),
    ("functional",),
    ("parameters", "modules", "other_norms"),
    ("current_weights", "replace"),
    ("streaming",),
    ("recurrent", "cells", "parametrizations"),
    ("interop",),
    ("layernorm",),
    ("theory", "baselines", "machine", "info"),
    ("experiments.errors",),
    ("experiments.storage", "experiments.section"),
    ("experiments.task",),
    ("experiments.registry",),
    ("experiments.data",),
    ("experiments.networks",),
    ("experiments.run",),
    ("experiments.results",),
    ("experiments.report",),
    ("experiments.classification", "experiments.own_task"),
    ("experiments.tasks",),
    ("experiments.studies",),
    ("experiments.commands",),
    ("experiments",),
    ("cli",),
    ("__main__",),
)


def modules():
    """The file of each module by its name without the package's."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "layernorm"] = path
    return found


def imports(path, known):
    """The modules of the package that a file imports anywhere, by name, but for those of types alone."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (inside(alias.name, known) for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and is_ours(node.module or ""):
            yield from (inside(f"{node.module}.{alias.name}", known) for alias in node.names)


def is_ours(name):
    return name.partition(".")[0] == "layernorm"


def inside(name, known):
    """The module that a dotted name is, or is found in."""
    name = name.removeprefix("layernorm").lstrip(".") or "layernorm"
    while name not in known:
        name = name.rpartition(".")[0] or "layernorm"
    return name


def layer(name):
    """The number and the entry of a module's layer: of the longest entry that it is in."""
    places = [
        (entry, number)
        for number, entries in enumerate(LAYERS)
        for entry in entries
        if name == entry or name.startswith(f"{entry}.")
    ]
    assert places, f"{name} is in no layer"
    entry, number = max(places, key=lambda place: len(place[0]))
    return number, entry


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {name: {other for other in imports(path, known) if other != name} for name, path in known.items()}


def test_there_is_no_circle(graph):
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"the imports form a circle: {' -> '.join(error.args[1])}")


def test_no_import_goes_upwards(graph):
    upwards = []
    for name, others in graph.items():
        (number, entry), found = layer(name), {other: layer(other) for other in others}
        upwards += [
            f"{name} imports {other}"
            for other, (number_of_other, entry_of_other) in found.items()
            if number_of_other >= number and entry_of_other != entry
        ]
    assert not upwards


def test_every_entry_is_there():
    known = modules()
    assert [entry for entries in LAYERS for entry in entries if entry not in known] == []


def test_the_test_sees_an_arrow_upwards():
    assert layer("ops.norm") == (layer("ops")[0], "ops")
    assert layer("ops")[0] > layer("gpu.norm.operators")[0]
    assert inside("layernorm.ops.norm.NORMS", modules()) == "ops.norm"
