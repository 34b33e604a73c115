"""All experiments by one command, and one report over them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from layernorm.cli import main
from layernorm.experiments import registry
from layernorm.experiments.commands import reproduce
from layernorm.experiments.section import Card, Section
from layernorm.experiments.task import MissingData, Preset, Study, Task
from tests.experiments.commands.cases import refused, silent

pytestmark = pytest.mark.usefixtures("one_thread")


def _measure(folder: Path, say, *, value: int) -> None:
    say(f"measuring {value}")
    (folder / "value").write_text(str(value))


def _read(folder: Path) -> Section:
    value = (folder / "value").read_text()
    return Section("theory", "A study", "s", "", cards=(Card("c", "§1", f"it is {value}", "agrees"),))


@pytest.fixture
def experiments(monkeypatch) -> None:
    """Three experiments in the place of the real ones: a study, a task, and a task without its data."""
    digits = registry.find("digits")
    small = Preset(epochs=1, batch_sizes=(128,), norms=("none", "layer"))
    quick = Task(**{**vars(digits), "presets": {"small": small, "paper": small}})

    def missing() -> None:
        raise MissingData("no MNIST here; put it there")

    found = {
        "theory": Study(
            "theory", "A study", "§1", "s", _measure, _read, {"small": {"value": 3}, "paper": {"value": 4}}
        ),
        "digits": quick,
        "mnist": Task(**{**vars(registry.find("mnist")), "problem": lambda **_: missing()}),
    }
    monkeypatch.setattr(registry, "find", found.__getitem__)
    monkeypatch.setattr(registry, "find_study", found.__getitem__)
    monkeypatch.setattr(registry, "STUDIES", ("theory",))
    monkeypatch.setattr(reproduce, "EXPERIMENTS", tuple(found))


def test_everything_into_one_report(tmp_path, experiments, capsys):
    assert main(["reproduce", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for part in ("1/3 theory", "measuring 3", "2/3 digits", "left out: no MNIST here", "Report: "):
        assert part in text
    page = re.sub(r"<[^>]+>", "", (tmp_path / "report.html").read_text())
    for part in ("it is 3", "no MNIST here; put it there", "layernorm compare digits --preset small"):
        assert part in page
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert set(table.task) == {"digits"}
    assert len(pd.read_csv(tmp_path / "results.csv")) == len(table) == 2 * 5
    # Again: what is done is not done again, and the page can be made elsewhere.
    before = (tmp_path / "digits/runs/none-batch128-rate0.001-seed0.csv").stat().st_mtime_ns
    assert main(["reproduce", "digits", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "digits/runs/none-batch128-rate0.001-seed0.csv").stat().st_mtime_ns == before
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "elsewhere.html")]) == 0
    assert "no MNIST here" in (tmp_path / "elsewhere.html").read_text()
    assert main(["report", str(tmp_path / "digits"), "--out", str(tmp_path / "one.html")]) == 0
    one = (tmp_path / "one.html").read_text()
    assert "no MNIST here" not in one
    # The page of all experiments has that from the study.
    assert ("What the norms do" in one, "What the norms do" in page) == (True, False)


def test_nothing_run_is_a_failure(tmp_path, experiments, capsys):
    assert main(["reproduce", "mnist", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "nothing was run: the data of every experiment that was asked for is missing" in captured.err
    assert (tmp_path / "report.html").is_file()
    assert main(["reproduce", "mnist", "digits", "--out", str(tmp_path)]) == 0


def test_the_sections_are_in_the_order_of_the_experiments(tmp_path, experiments):
    reproduce.reproduce(("digits",), tmp_path, silent())
    reproduce.reproduce(("theory", "mnist"), tmp_path, silent())
    assert [section.name for section in reproduce.read(tmp_path)] == ["theory", "digits", "mnist"]
    assert [section.cards[0].verdict for section in reproduce.read(tmp_path)][::2] == ["agrees", "not run"]


def test_what_cannot_be_reported_is_named(tmp_path, capsys, experiments):
    assert "there is no folder" in refused(capsys, "report", str(tmp_path / "nowhere"))
    assert "neither" in refused(capsys, "report", str(tmp_path))
    assert "unknown experiment 'drwa'; expected some of theory, digits" in refused(
        capsys, "reproduce", "drwa"
    )
    reproduce.reproduce(("theory",), tmp_path, silent())
    config = json.loads((tmp_path / "theory/config.json").read_text())
    for change, message in (
        ({"format": 1}, "was made by another version of layernorm"),
        ({"format": None}, "was made by another version"),
    ):
        (tmp_path / "theory/config.json").write_text(json.dumps(config | change))
        assert message in refused(capsys, "report", str(tmp_path))
        assert message in refused(capsys, "theory", "--out", str(tmp_path / "theory"))
    (tmp_path / "theory/config.json").write_text("[]")
    assert "config.json is damaged" in refused(capsys, "report", str(tmp_path))
    (tmp_path / "theory/config.json").write_text(json.dumps(config | {"sizes": {"value": 9}}))
    message = refused(capsys, "theory", "--out", str(tmp_path / "theory"))
    assert "holds an experiment with sizes {'value': 9}, and {'value': 3} is asked for" in message
    (tmp_path / "left-out.json").write_text("{")
    assert "left-out.json is damaged" in refused(capsys, "report", str(tmp_path))


@pytest.mark.parametrize("name", [*registry.TASKS, *registry.STUDIES])
def test_every_experiment_has_both_presets_a_page_and_a_place_in_the_help(name, capsys):
    experiment = registry.find_study(name) if name in registry.STUDIES else registry.find(name)
    assert experiment.name == name
    assert set(experiment.presets) == {"small", "paper"}
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    page = {"digits": "compare", "digits-rows": "compare", "permuted-mnist": "sequential-mnist"}.get(
        name, name
    )
    assert (Path(__file__).parents[3] / f"docs/{page}.md").is_file()
    assert (
        f"- {page}.md" in (nav := (Path(__file__).parents[3] / "mkdocs.yml").read_text())
        or f" {page}.md" in nav
    )
    if isinstance(experiment, Task):
        for preset in experiment.presets.values():
            assert set(preset.norms) <= set(experiment.norms)
        assert f"  {name} " in capsys.readouterr().out
