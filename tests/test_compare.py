"""The comparison: what it writes, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from layernorm.cli import main
from layernorm.experiments import report
from layernorm.experiments import task as tasks
from layernorm.experiments.compare import Comparison, compare
from layernorm.experiments.feedforward import NORMS
from layernorm.experiments.training import Interrupted, Run, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = {"config.json", "results.csv", "curves.png", "curves.svg", "report.html", "runs"}


def small(out: Path, **changes) -> Comparison:
    fields = {"task": "digits", "norms": ("none", "layer"), "batch_sizes": (128, 64), "epochs": 2, "seeds": 2}
    return Comparison(**{"learning_rate": 1e-3} | fields | changes, out=out)


def silent() -> Console:
    return Console(file=io.StringIO(), width=120)


def records(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "results.csv").drop(columns="seconds")


def test_it_writes_the_table_the_curves_and_the_report(tmp_path):
    console = silent()
    path = compare(small(tmp_path), console)
    assert path == tmp_path / "report.html"
    assert {p.name for p in tmp_path.iterdir()} == FILES
    results = records(tmp_path)
    # 2 norms, 2 batch sizes, 2 seeds; before training and four times in each of 2 epochs.
    assert len(results) == 2 * 2 * 2 * 9
    assert set(results.norm) == {"none", "layer"}
    for batch_size, rows in results.groupby("batch_size"):
        assert rows["update"].max() == 2 * (1347 // batch_size)
        assert rows.epoch.max() == 2
    assert results.test_error.between(0, 100).all()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["task"] == "digits"
    assert config["versions"]["torch"] == torch.__version__
    page = path.read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    text = console.file.getvalue()
    assert f"Report: {path}" in text
    assert "best test error (%)" in text
    for row in report.cells(report.summarize(pd.read_csv(tmp_path / "results.csv"), ("none", "layer"))):
        assert row["best_test_error"] in page
        assert row["best_test_error"] in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_repeated_and_more_seeds_can_be_added(tmp_path):
    compare(small(tmp_path, seeds=1), silent())
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    console = silent()
    compare(small(tmp_path), console)
    assert console.file.getvalue().count("finished before") == 4
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    assert before.items() <= after.items()
    assert len(after) == 8


def test_a_stopped_run_ends_like_an_undisturbed_one(tmp_path):
    digits = tasks.find("digits")
    # Dropout draws from the global generator in every update.
    dropout = torch.nn.Dropout(0.2)
    task = dataclasses.replace(digits, network=lambda norm: digits.network(norm).append(dropout))
    data = task.data()
    run = Run("batch", 32, 1)
    whole = Trainer(task, data, run, 2, tmp_path / "whole")
    whole.train(lambda t: None, lambda: False)
    stopped = None
    for stop_at in (1, 10, 42, 43, 60, 10_000):  # 42 updates an epoch
        torch.rand(3)  # whatever else uses the global generator
        stopped = Trainer(task, data, run, 2, tmp_path / "stopped")
        if stop_at < stopped.updates:
            with pytest.raises(Interrupted):
                stopped.train(lambda t: None, lambda t=stopped, n=stop_at: t.update >= n)
        else:
            stopped.train(lambda t: None, lambda: False)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, stopped.network.state_dict()[name]), name
    kept = [[r._replace(seconds=0.0) for r in t.records] for t in (whole, stopped)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_command_goes_on_when_given_again(tmp_path, signum):
    arguments = [
        "compare",
        "digits",
        "--norms",
        "none,layer",
        "--batch-sizes",
        "4",
        "--epochs",
        "6",
        "--seeds",
        "1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "layernorm.cli", *arguments, "--out", str(out)]

    out = tmp_path / "interrupted"
    process = subprocess.Popen(
        command(out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    first = out / "runs/none-batch4-seed0.csv"
    deadline = time.monotonic() + 120
    while not first.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert first.is_file()
    time.sleep(0.3)  # now the second run trains
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    if signum != signal.SIGKILL:
        assert process.returncode == 130
        assert errors == (
            "layernorm: interrupted; what is finished is kept, and the same command goes on from there\n"
        )
        assert (out / "runs/layer-batch4-seed0.checkpoint").is_file()
        assert set(pd.read_csv(out / "results.csv").norm) == {"none"}
        assert not list(out.rglob("*.new"))
    again = subprocess.run(command(out), env=environment, capture_output=True, text=True, check=True)
    assert "none, batch 4, seed 0: finished before" in again.stdout
    assert ("layer, batch 4, seed 0: goes on from update" in again.stdout) == (signum != signal.SIGKILL)
    assert {p.name for p in out.iterdir()} == FILES
    assert not list(out.rglob("*.checkpoint"))
    undisturbed = tmp_path / "undisturbed"
    subprocess.run(command(undisturbed), env=environment, capture_output=True, check=True)
    pd.testing.assert_frame_equal(records(out), records(undisturbed))


def test_the_learning_rate_is_the_one_asked_for(tmp_path):
    options = {"norms": ("none",), "batch_sizes": (128,), "epochs": 1, "seeds": 1}
    for rate in (1e-3, 1e-9):
        compare(small(tmp_path / str(rate), learning_rate=rate, **options), silent())
    learned, stood_still = (records(tmp_path / str(rate)).test_loss for rate in (1e-3, 1e-9))
    assert learned.iloc[-1] < learned.iloc[0] - 0.01
    assert abs(stood_still.iloc[-1] - stood_still.iloc[0]) < 1e-4


def test_a_checkpoint_is_written_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("layernorm.experiments.training.CHECKPOINT_SECONDS", 0.0)
    task = tasks.find("digits")
    trainer = Trainer(task, task.data(), Run("none", 128, 0), 1, tmp_path / "a.checkpoint")
    trainer.train(lambda t: None, lambda: False)
    state = torch.load(tmp_path / "a.checkpoint", weights_only=True)
    assert state["update"] == trainer.updates


@pytest.mark.parametrize("name", ["digits", "digits-rows"])
def test_every_norm_of_a_task_trains(name, tmp_path):
    task = tasks.find(name)
    data = task.data()
    assert set(task.default_norms) <= set(task.norms)
    for norm in task.norms:
        trainer = Trainer(task, data, Run(norm, 64, 0), 1, tmp_path / "none")
        trainer.train(lambda t: None, lambda: False)
        assert trainer.records[-1].test_loss < trainer.records[0].test_loss, norm


def test_norms_are_where_the_paper_has_them():
    task = tasks.find("mnist")
    kinds = {norm: [type(m).__name__ for m in task.network(norm)] for norm in NORMS}
    assert kinds["none"] == ["Linear", "ReLU"] * 2 + ["Linear"]
    assert kinds["layer"] == ["Linear", "LayerNorm", "ReLU"] * 2 + ["Linear"]
    assert kinds["rms"] == ["Linear", "RMSNorm", "ReLU"] * 2 + ["Linear"]
    assert kinds["batch"] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert kinds["weight"] == ["ParametrizedLinear", "ReLU"] * 2 + ["ParametrizedLinear"]
    linear = [m for m in task.network("layer") if isinstance(m, torch.nn.Linear)]
    sizes = [(m.in_features, m.out_features) for m in linear]
    assert sizes == [(784, 1000), (1000, 1000), (1000, 10)]


def test_the_summary_is_what_the_records_say():
    def rows(norm, seed, errors, losses):
        return [
            {"norm": norm, "batch_size": 4, "seed": seed, "update": i, "epoch": i / 2, "seconds": i * 10.0}
            | {"train_loss": loss, "test_loss": 1.0, "test_error": error}
            for i, (error, loss) in enumerate(zip(errors, losses, strict=True))
        ]

    results = pd.DataFrame(
        rows("none", 0, [90, 8, 5], [None, 2.0, 1.0])
        + rows("none", 1, [90, 6, 7], [None, 2.0, 3.0])
        + rows("layer", 0, [90, 5, 2], [None, 1.0, 0.5])
        + rows("layer", 1, [90, 8, 7], [None, 1.0, 0.5])
    )
    none, layer = report.summarize(results, ("none", "layer")).to_dict("records")
    assert (none["norm"], layer["norm"]) == ("none", "layer")
    assert none["best_test_error"] == 5.5
    assert none["best_test_error_std"] == 0.5
    assert none["epochs_to_baseline"] == (1.0 + 0.5) / 2
    assert layer["epochs_to_baseline"] == 0.5
    assert layer["seconds_to_baseline"] == 10.0
    assert (layer["reached"], layer["seeds"]) == (1, 2)
    assert none["final_loss"] == 2.0
    cells = report.cells(report.summarize(results, ("none", "layer")))
    assert cells[0]["best_test_error"] == "5.50 ± 0.50"
    assert cells[1]["epochs_to_baseline"] == "0.50 ± 0.00 (1 of 2)"
    never = results[results.norm == "none"].assign(norm="layer", test_error=99.0)
    both = pd.concat([results[results.norm == "none"], never])
    assert report.cells(report.summarize(both, ("none", "layer")))[1]["epochs_to_baseline"] == "not reached"


def refused(capsys, *arguments: str) -> str:
    """The one line with which the command refuses."""
    try:
        code = main(["compare", *arguments])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "unknown task 'digit'; expected one of digits, digits-rows, mnist"),
        (
            ["--norms", "none,lyer"],
            "--norms: unknown norm 'lyer' for digits; expected some of none, batch, layer",
        ),
        (["--norms", ",none"], "argument --norms: expected names separated by commas, got ',none'"),
        (["--batch-sizes", "1348"], "--batch-sizes: 1348 is more than the 1347 training cases of digits"),
        (["--batch-sizes", "4,x"], "argument --batch-sizes: expected a whole number of at least 1, got 'x'"),
        (["--batch-sizes", "-4"], "argument --batch-sizes: expected a whole number of at least 1, got '-4'"),
        (
            ["--batch-sizes", "1", "--norms", "batch"],
            "--batch-sizes: batch norm needs at least 2 cases, got 1",
        ),
        (["--epochs", "0"], "argument --epochs: expected a whole number of at least 1, got '0'"),
        (["--seeds", "1.5"], "argument --seeds: expected a whole number of at least 1, got '1.5'"),
        (["--device", "meta"], "--device: cannot use 'meta'"),
        (["--device", "nonsense"], "--device: cannot use 'nonsense'"),
        (["--learning-rate", "0"], "argument --learning-rate: expected a number greater than 0, got '0'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["digits-rows", "--norms", "sheeprl"], "unknown norm 'sheeprl' for digits-rows"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message, capsys, tmp_path):
    assert message in refused(capsys, *arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out: cannot write into" in refused(capsys, "--out", str(tmp_path / "file" / "out"))


def test_a_folder_of_another_comparison_is_refused(capsys, tmp_path):
    compare(small(tmp_path, seeds=1), silent())
    message = refused(capsys, "--epochs", "3", "--out", str(tmp_path))
    assert "holds a comparison with epochs 2, and 3 is asked for; choose another --out" in message
    message = refused(capsys, "--epochs", "2", "--learning-rate", "0.01", "--out", str(tmp_path))
    assert "holds a comparison with learning rate 0.001, and 0.01 is asked for" in message
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged" in refused(capsys, "--out", str(tmp_path))


def test_damaged_files_are_named(capsys, tmp_path):
    arguments = [
        "--norms",
        "none",
        "--batch-sizes",
        "128",
        "--epochs",
        "1",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
    ]
    (tmp_path / "runs").mkdir()
    checkpoint = tmp_path / "runs/none-batch128-seed0.checkpoint"
    checkpoint.write_bytes(b"half a checkpoint")
    message = refused(capsys, *arguments)
    assert str(checkpoint) in message
    assert "delete it to train this run from its start" in message
    checkpoint.unlink()
    assert main(["compare", *arguments]) == 0
    capsys.readouterr()
    (tmp_path / "runs/none-batch128-seed0.csv").write_text("half a")
    assert main(["compare", *arguments]) == 2
    assert "none-batch128-seed0.csv is damaged (wrong columns)" in capsys.readouterr().err


def test_missing_extras_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["compare"]) == 2
    assert "this command needs rich" in capsys.readouterr().err


def test_a_live_display_shows_what_runs_and_the_time_left(tmp_path):
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    compare(small(tmp_path, seeds=1, batch_sizes=(16,), epochs=8), console)
    text = console.file.getvalue()
    for part in ("whole comparison", "layer, batch 16, seed 0", "test error", "1/2 runs", "left", "2/2 runs"):
        assert part in text
