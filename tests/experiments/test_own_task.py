"""Norms compared on a model of one's own: from Python, from a file, and what is said where it is no task."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import layernorm
from layernorm.cli import main
from layernorm.experiments.errors import ExperimentError
from layernorm.experiments.own_task import Options
from tests.experiments.commands.cases import refused

pytestmark = pytest.mark.usefixtures("one_thread")

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(90, 6))
Y = (X.sum(1) > 0).astype(np.int64)


def model(norm):
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 2))


def error(outputs, targets):
    return 100 * (outputs.argmax(-1) != targets).float().mean()


DATA = {"train": (X[:50], Y[:50]), "valid": (X[50:70], Y[50:70]), "test": (X[70:], Y[70:])}
TASK = {"model": model, "loss": nn.functional.cross_entropy, "metrics": {"error": error}} | DATA
FEW = {
    "norms": ("none", "layer"),
    "batch_sizes": (10,),
    "learning_rates": (0.01, 0.1),
    "seeds": 2,
    "epochs": 2,
}


def compare(out, **changes):
    return layernorm.compare(**TASK | FEW | {"out": out, "quiet": True} | changes)


def test_a_comparison_in_a_few_lines(tmp_path, capsys):
    class Halved(nn.Module):
        def __init__(self, width):
            super().__init__()

        def forward(self, x):
            return x / 2

    result = compare(tmp_path, norms=["none", "layer", "group:4", Halved], name="mine")
    assert capsys.readouterr().out == ""
    table = result.table
    assert table.norm.tolist() == ["none", "layer", "group:4", "Halved"]
    assert set(table.learning_rate) <= {0.01, 0.1}
    assert table.seeds.tolist() == [2] * 4
    records = result.records
    assert len(records) == 4 * 2 * 2 * 9
    # What is told is the test error at the end, at the rate that the validation error chose.
    for row in table.itertuples():
        runs = records[(records.norm == row.norm) & (records.learning_rate == row.learning_rate)]
        ends = runs.groupby("seed").tail(1)
        assert row.final == pytest.approx(ends.test_error.mean())
        others = records[records.norm == row.norm].groupby(["learning_rate", "seed"]).tail(1)
        least = others.groupby("learning_rate").validation_error.mean().min()
        assert ends.validation_error.mean() == pytest.approx(least)
    assert result.best() == table.norm[table.final.idxmin()]
    assert result.best(10) == result.best()
    with pytest.raises(ValueError, match="batch_size must be one of 10; got 4"):
        result.best(4)
    page = result.report().read_text("utf-8")
    assert "At batch size 10" in page
    assert "group:4" in page
    assert "What the norms do" in page
    # The report can be made again where the task is not.
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "again.html")]) == 0
    assert "Learning rates" in (tmp_path / "again.html").read_text("utf-8")


def test_more_norms_and_seeds_are_added_and_what_is_there_stays(tmp_path):
    compare(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.csv")}
    assert len(before) == 8
    result = compare(tmp_path, seeds=[5])
    assert len(result.records.seed.unique()) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    with pytest.raises(ExperimentError, match=r"holds an experiment with sizes .*; choose another --out"):
        compare(tmp_path, train=(X[:49], Y[:49]))
    with pytest.raises(ExperimentError, match="holds an experiment with sizes"):
        compare(tmp_path, model=lambda norm: nn.Sequential(nn.Linear(6, 9), norm(9), nn.Linear(9, 2)))


def test_without_metrics_the_loss_decides_and_without_tests_the_validation_cases_tell(tmp_path):
    result = compare(tmp_path, metrics=None, test=None)
    ends = result.records.groupby(["norm", "learning_rate", "seed"]).tail(1)
    assert list(ends.columns[-1:]) == ["validation_loss"]
    assert result.task.final.name == "validation_loss"


def test_more_may_be_better(tmp_path):
    def accuracy(outputs, targets):
        return (outputs.argmax(-1) == targets).double().mean().item()

    result = compare(tmp_path, metrics={"accuracy": accuracy, "error": error}, maximize=["accuracy"])
    records = result.records
    assert (records.test_accuracy * 100 + records.test_error).round(4).eq(100).all()
    best = result.table.sort_values("final").norm.iloc[-1]
    assert result.table.set_index("norm").final[result.best()] == result.table.set_index("norm").final[best]


class TwoInputs(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.net = model(norm)

    def forward(self, a, b):
        return {"logits": self.net(torch.cat([a, b], -1))}


def test_datasets_and_several_inputs(tmp_path):
    x, y = torch.from_numpy(X).float(), torch.from_numpy(Y)
    parts = {
        "train": ((x[:50, :2], x[:50, 2:]), y[:50]),
        "valid": ((x[50:, :2], x[50:, 2:]), y[50:]),
    }
    result = compare(
        tmp_path / "b",
        **parts,
        test=None,
        model=TwoInputs,
        loss=lambda out, y: nn.functional.cross_entropy(out["logits"], y),
        metrics={"error": lambda out, y: error(out["logits"], y)},
    )
    assert result.records.validation_error.between(0, 100).all()
    whole = compare(tmp_path / "c", train=TensorDataset(x[:50], y[:50]))
    given = compare(tmp_path / "d")
    pd.testing.assert_frame_equal(
        whole.records.drop(columns="seconds"), given.records.drop(columns="seconds")
    )


def test_both_functions_take_the_same_options():
    taken = inspect.signature(layernorm.task).parameters
    assert set(Options.__annotations__) == {n for n, p in taken.items() if p.default is not p.empty}


WRONG = [
    ({"model": nn.Linear(2, 2)}, TypeError, "model must be a function of a norm .*, got Linear"),
    ({"model": lambda norm: None}, TypeError, "model must return a torch.nn.Module, got NoneType"),
    (
        {"train": (X[:5], Y[:6])},
        ValueError,
        "train: inputs and targets must have equal .* got 5 and 6",
    ),
    ({"valid": (X[:0], Y[:0])}, ValueError, "valid: .*at least 1; got 0 and 0"),
    ({"valid": X}, TypeError, "valid must be a pair of inputs and targets, got one ndarray"),
    ({"test": (X, Y, Y)}, TypeError, "test must be a pair .*; got 3 of them"),
    ({"train": (X, object())}, TypeError, "train must be of tensors or arrays of numbers"),
    (
        {"norms": ["lyer"]},
        ValueError,
        "unknown norm 'lyer'; expected one of none, batch, layer, rms, instance",
    ),
    ({"norms": []}, ValueError, "norms must not be empty"),
    ({"loss": 3}, TypeError, "loss must be a function"),
    ({"metrics": {"error": 3}}, TypeError, "metric 'error' must be a function"),
    ({"metrics": {"loss": error}}, ValueError, "a metric cannot be called 'loss'"),
    ({"maximize": ["x"]}, ValueError, "there is no metric 'x', only error"),
    ({"seeds": 0}, ValueError, "seeds must be a whole number of at least 1, got 0"),
    ({"seeds": []}, ValueError, "seeds must not be empty"),
    ({"epochs": 1.5}, ValueError, "epochs must be a whole number"),
    ({"learning_rates": [0.0]}, ValueError, "learning_rates must be a finite number greater than 0, got 0.0"),
    ({"seeds": [1, -1]}, ValueError, "seeds must be a whole number of at least 0, got -1"),
    (
        {"optimizer": "adamm"},
        ValueError,
        "optimizer must be one of adam, adam-uncorrected, sgd, rmsprop; got",
    ),
    ({"schedule": "cos"}, ValueError, "schedule must be one of constant, cosine, linear; got 'cos'"),
    ({"warmups": [-1]}, ValueError, "warmups must be a whole number of at least 0"),
    ({"clip": 0}, ValueError, "clip must be a finite number greater than 0, got 0"),
    ({"evaluate_every": 0}, ValueError, "evaluate_every must be a whole number of at least 1"),
    ({"precision": "half"}, ValueError, "precision must be one of float32, bfloat16, float16; got 'half'"),
    ({"batch_sizes": [51]}, ExperimentError, "51 is more than the 50 training cases"),
    (
        {"metrics": {"error": lambda a, b: "x"}},
        ExperimentError,
        "metric 'error' must give one number, .*str",
    ),
    ({"metrics": {"error": lambda a, b: a}}, ExperimentError, r"must give one number, got \[20, 2\]"),
    ({"loss": lambda a, b: a.sum(-1)}, ExperimentError, r"loss must return a scalar tensor.*got \[20\]"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG)
def test_what_is_wrong_is_said_in_one_line(changes, kind, message, tmp_path):
    with pytest.raises(kind, match=message) as caught:
        compare(tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)


FILE = """\
import torch, layernorm
from torch import nn

x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
y = (x.sum(1) > 0).long()
TASK = layernorm.task(
    model=lambda norm: nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 2)),
    train=(x[:40], y[:40]), valid=(x[40:], y[40:]),
    loss=nn.functional.cross_entropy, norms=["none", "layer"], batch_sizes=[8], learning_rates=[0.01],
    seeds=2, epochs=1, name="mine",
)
OTHER = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mytask.py"
    path.write_text(FILE)
    return path


def test_a_file_is_a_task(file, tmp_path, capsys):
    assert main(["compare", "mytask.py", "--seeds", "1", "--out", "out"]) == 0
    assert main(["compare", f"{file}:TASK", "--norms", "layer", "--out", "out"]) == 0  # the same task
    records = pd.read_csv("out/results.csv")
    assert {*zip(records.norm, records.seed, strict=True)} == {("none", 0), ("layer", 0), ("layer", 1)}
    assert json.loads(Path("out/config.json").read_text())["task"] == f"{file}:TASK"
    file.unlink()  # the report does not need it
    assert main(["report", "out"]) == 0
    capsys.readouterr()
    assert sys.path[0] != str(tmp_path)


def test_a_module_is_a_task(file, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(file.parent))
    assert main(["compare", "mytask:TASK", "--seeds", "1", "--norms", "none", "--out", "out"]) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.py", None, "there is no file none.py"),
        ("t.py", "x = 1", "t.py has no TASK; it should say TASK = layernorm.task(…)"),
        ("t.py:OTHER", "OTHER = 3", "t.py:OTHER must be what layernorm.task(…) returns, got int"),
        ("t.py", "import nothing_here", "t.py cannot be loaded: ModuleNotFoundError: No module named"),
        ("t.py", "x = (", "t.py cannot be loaded: SyntaxError"),
        ("t.py", FILE.replace('"layer"', '"lyer"'), "t.py cannot be loaded: ValueError: unknown norm 'lyer'"),
        ("nowhere:TASK", None, "nowhere cannot be loaded: ModuleNotFoundError"),
        ("nothing", None, "unknown task 'nothing'; expected one of digits,"),
    ],
)
def test_what_is_no_task_is_said_in_one_line(name, content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("t.py").write_text(content)
    assert message in refused(capsys, "compare", name, "--out", "out")
    assert not Path("out").exists()
