"""Tasks and studies are found by name: this package's own, and those of other packages by entry points."""

from __future__ import annotations

import dataclasses
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from layernorm.cli import main
from layernorm.experiments import registry
from layernorm.experiments.errors import ExperimentError


class Distributed(EntryPoint):
    """An entry point of an installed package."""

    def __new__(cls, name, value, package):
        return super().__new__(cls)

    def __init__(self, name, value, package):
        super().__init__(name, value, registry.GROUP)
        vars(self)["dist"] = SimpleNamespace(name=package)


@pytest.fixture
def install(monkeypatch):
    """Installs entry points: (name, value, package)."""

    def put(*points):
        entries = [Distributed(*point) for point in points]
        monkeypatch.setattr(
            registry,
            "entry_points",
            lambda group, name=None: [e for e in entries if group == e.group and name in (None, e.name)],
        )

    return put


@pytest.fixture
def mine(monkeypatch):
    """A module of another package with the task ``mine``: the digits under that name."""
    module = ModuleType("their_package")
    module.TASK = dataclasses.replace(registry.find("digits"), name="mine")
    module.NUMBER = 3
    monkeypatch.setitem(sys.modules, "their_package", module)
    return module.TASK


@pytest.mark.parametrize("name", registry.TASKS)
def test_every_task_of_this_package_is_found(name):
    assert registry.find(name).name == name


@pytest.mark.parametrize("name", registry.STUDIES)
def test_every_study_of_this_package_is_found(name):
    assert registry.find_study(name).name == name


def test_a_task_of_another_package_is_compared_and_reported(mine, install, tmp_path, capsys):
    install(("mine", "their_package:TASK", "their-package"))
    assert registry.names() == (*registry.TASKS, "mine")
    assert registry.find("mine") is mine
    few = ["--norms", "none", "--batch-sizes", "256", "--epochs", "1", "--seeds", "1"]
    few += ["--learning-rates", "0.001", "--out", str(tmp_path)]
    assert main(["compare", "mine", *few]) == 0
    assert main(["report", str(tmp_path)]) == 0
    assert mine.title in (tmp_path / "report.html").read_text("utf-8")
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "  mine              of another package\n" in capsys.readouterr().out


def test_a_name_of_this_package_cannot_be_taken(mine, install):
    install(("digits", "their_package:TASK", "their-package"))
    assert registry.find("digits").name == "digits"
    assert registry.names() == tuple(registry.TASKS)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (
            [("mine", "no_such_module:TASK", "theirs")],
            "mine' of theirs .* cannot be loaded: ModuleNot",
        ),
        ([("mine", "their_package:ABSENT", "theirs")], "cannot be loaded: AttributeError"),
        ([("mine", "their_package:NUMBER", "theirs")], "must be a layernorm.experiments.task.Task, got int"),
        ([("yours", "their_package:TASK", "theirs")], "calls itself 'mine'; both names must be the same"),
        ([("mine", "a:TASK", "one"), ("mine", "b:TASK", "two")], "in several packages, one, two"),
        ([], "unknown task 'mine'; expected one of digits, "),
    ],
)
def test_what_is_wrong_with_another_packages_task_is_said(mine, install, points, expected):
    install(*points)
    with pytest.raises(ExperimentError, match=expected):
        registry.find(points[0][0] if points else "mine")


def test_a_preset_that_the_task_does_not_have(install, monkeypatch, mine, capsys):
    small = dataclasses.replace(mine, presets={"small": mine.presets["small"]})
    monkeypatch.setattr(sys.modules["their_package"], "TASK", small)
    install(("mine", "their_package:TASK", "theirs"))
    assert main(["compare", "mine", "--preset", "paper"]) == 2
    assert capsys.readouterr().err == "layernorm: --preset: mine has no preset 'paper', only small\n"


@pytest.mark.parametrize(
    "name",
    [
        *("order-embeddings", "attentive-reader", "skip-thoughts", "draw", "handwriting", "mnist", "convnet"),
        "sequential-mnist",
    ],
)
def test_the_page_of_an_experiment_lists_where_it_differs(name):
    assert registry.find(name).name == name
    text = (Path(__file__).parents[2] / f"docs/{name}.md").read_text("utf-8")
    _, found, rest = text.partition("\n## Where this differs from the original\n")
    assert found
    assert "\n- " in rest.partition("\n## ")[0]
