"""The comparison: what it writes, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from layernorm.cli import main
from layernorm.experiments.commands import compare as compare_module
from layernorm.experiments.commands.compare import Comparison, compare
from layernorm.experiments.networks import feedforward
from layernorm.experiments.networks.feedforward import NORMS
from layernorm.experiments.registry import TASKS, find
from layernorm.experiments.results import results_table
from layernorm.experiments.run.training import Interrupted
from layernorm.experiments.task import Preset
from layernorm.variants import PRESETS
from tests.experiments.commands.cases import records, refused, silent

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = {"config.json", "results.csv", "results.parquet", "curves.png", "curves.svg", "report.html", "runs"}


def small(out: Path, **changes) -> Comparison:
    preset = Preset(epochs=2, batch_sizes=(128, 64), norms=("none", "layer"), seeds=(0, 1))
    return Comparison("digits", dataclasses.replace(preset, **changes), out)


def test_it_writes_the_table_the_curves_and_the_report(tmp_path):
    console = silent()
    path = compare(small(tmp_path), console)
    assert path == tmp_path / "report.html"
    assert {p.name for p in tmp_path.iterdir()} == FILES
    assert "What the norms do" in path.read_text("utf-8")
    table = records(tmp_path)
    # 2 norms, 2 batch sizes, 2 seeds; before training and four times in each of 2 epochs.
    assert len(table) == 2 * 2 * 2 * 9
    assert set(table.norm) == {"none", "layer"}
    for batch_size, rows in table.groupby("batch_size"):
        assert rows["update"].max() == 2 * (1097 // batch_size)
        assert rows.epoch.max() == 2
    assert table.test_error.between(0, 100).all()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["task"] == "digits"
    assert config["versions"]["torch"] == torch.__version__
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "results.parquet"), pd.read_csv(tmp_path / "results.csv")
    )
    page = path.read_text()
    text = console.file.getvalue()
    assert f"Report: {path}" in text
    assert "test error (%)" in text
    task = find("digits")
    summary = results_table.summarize(pd.read_csv(tmp_path / "results.csv"), ("none", "layer"), task)
    for row in results_table.cells(summary, task):
        for name in ("final", "difference"):
            assert row[name] in page
            assert row[name] in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_repeated_and_more_seeds_can_be_added(tmp_path):
    compare(small(tmp_path, seeds=(0,)), silent())
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*.csv")}
    console = silent()
    compare(small(tmp_path), console)
    assert console.file.getvalue().count("finished before") == 4
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*.csv")}
    assert before.items() <= after.items()
    assert len(after) == 8
    assert {p.name for p in (tmp_path / "runs").iterdir()} - set(after) == {
        f"{name}.sha256" for name in after
    }


def test_rates_and_seeds_are_those_asked_for_and_more_can_be_added(tmp_path, capsys):
    few = [
        "compare",
        "digits",
        "--norms",
        "none",
        "--batch-sizes",
        "256",
        "--epochs",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert main([*few, "--seed-list", "7,3", "--learning-rates", "0.01,3e-05"]) == 0
    names = {path.stem for path in (tmp_path / "runs").glob("*.csv")}
    assert names == {f"none-batch256-rate{rate}-seed{seed}" for rate in ("0.01", "3e-05") for seed in (3, 7)}
    table = records(tmp_path)
    assert set(zip(table.learning_rate, table.seed, strict=True)) == {
        (r, s) for r in (0.01, 3e-05) for s in (3, 7)
    }
    assert "0.01" in capsys.readouterr().out
    assert main([*few, "--seeds", "1", "--learning-rates", "0.1"]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["seeds"], config["learning_rates"]) == ([0, 3, 7], [3e-05, 0.01, 0.1])
    assert "--learning-rates 3e-05,0.01,0.1 --" in config["command"] or config["command"].endswith(
        "3e-05,0.01,0.1"
    )
    assert "--seed-list 0,3,7" in config["command"]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Learning rates" in page


ARGUMENTS = ("compare", "digits", "--norms", "none,layer", "--batch-sizes", "4", "--epochs", "3")
ONE = ("--seeds", "1", "--learning-rates", "0.001")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(out: Path) -> list[str]:
    return [sys.executable, "-m", "layernorm", *ARGUMENTS, *ONE, "--out", str(out)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(out), env=ENVIRONMENT, capture_output=True, check=True)
    return records(out)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_stop_and_a_later_one_stops(signum, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    before = signal.getsignal(signum)
    with compare_module.stop_flag() as is_asked:
        assert not is_asked()
        for _ in range(2):  # a terminal and what runs the command both pass it on
            os.kill(os.getpid(), signum)
            assert is_asked()
        now = 1.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signum)
    assert signal.getsignal(signum) == before


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_command_goes_on_when_given_again(tmp_path, signum, undisturbed):
    out = tmp_path / "interrupted"
    process = subprocess.Popen(
        command(out), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    first = out / "runs/none-batch4-rate0.001-seed0.csv"
    deadline = time.monotonic() + 120
    while not first.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert first.is_file()
    time.sleep(0.1)  # now the second run trains
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    if signum != signal.SIGKILL:
        assert process.returncode == 130
        assert errors == (
            "layernorm: interrupted; what is finished is kept, and the same command goes on from there\n"
        )
        assert (out / "runs/layer-batch4-rate0.001-seed0.checkpoint").is_file()
        assert set(pd.read_csv(out / "results.csv").norm) == {"none"}
        assert not list(out.rglob("*.new"))
    again = subprocess.run(command(out), env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "none, batch 4, rate 0.001, seed 0: finished before" in again.stdout
    assert ("layer, batch 4, rate 0.001, seed 0: goes on from update" in again.stdout) == (
        signum != signal.SIGKILL
    )
    assert {p.name for p in out.iterdir()} == FILES
    assert not list(out.rglob("*.checkpoint"))
    pd.testing.assert_frame_equal(records(out), undisturbed)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_records_also_go_to_tensorboard_with_those_before_an_interruption(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"norms": ("none",), "batch_sizes": (128,), "epochs": 1, "seeds": (0,)}
    comparison = dataclasses.replace(small(tmp_path, **options), tensorboard=True)
    updates = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "stop_flag", lambda: nullcontext(lambda: next(updates) == 6))
        with pytest.raises(Interrupted):
            compare(comparison, silent())
    assert list((tmp_path / "runs").glob("*.checkpoint"))
    # What was written since the checkpoint, or was not written any more, does not matter.
    (event_file,) = (tmp_path / "tensorboard/none-batch128-rate0.001-seed0").iterdir()
    event_file.write_bytes(event_file.read_bytes()[:100])
    compare(comparison, silent())
    found = EventAccumulator(str(tmp_path / "tensorboard/none-batch128-rate0.001-seed0"))
    found.Reload()
    table = pd.read_csv(tmp_path / "results.csv")
    shown = {event.step: event.value for event in found.Scalars("test_error")}
    assert shown == pytest.approx(dict(zip(table["update"], table.test_error, strict=True)), rel=1e-6)
    assert len(found.Scalars("train_loss")) == len(table) - 1  # there is none before the first update


def test_the_learning_rate_is_the_one_asked_for(tmp_path):
    options = {"norms": ("none",), "batch_sizes": (128,), "epochs": 1, "seeds": (0,)}
    for rate in (1e-3, 1e-9):
        compare(small(tmp_path / str(rate), learning_rates=(rate,), **options), silent())
    learned, stood_still = (records(tmp_path / str(rate)).validation_loss for rate in (1e-3, 1e-9))
    assert learned.iloc[-1] < learned.iloc[0] - 0.01
    assert abs(stood_still.iloc[-1] - stood_still.iloc[0]) < 1e-4


def test_norms_are_where_the_paper_has_them():
    network = partial(feedforward.network, (784, 1000, 1000, 10))
    kinds = {norm: [type(m).__name__ for m in network(norm)] for norm in NORMS}
    assert kinds["none"] == ["Linear", "ReLU"] * 2 + ["Linear"]
    assert kinds["layer"] == ["Linear", "LayerNorm", "ReLU"] * 2 + ["Linear"]
    assert kinds["rms"] == ["Linear", "RMSNorm", "ReLU"] * 2 + ["Linear"]
    assert kinds["batch"] == ["Linear", "BatchNorm", "ReLU"] * 2 + ["Linear", "BatchNorm"]
    assert kinds["batch-hidden"] == ["Linear", "BatchNorm", "ReLU"] * 2 + ["Linear"]
    assert kinds["weight"] == ["ParametrizedLinear", "ReLU"] * 2 + ["ParametrizedLinear"]
    linear = [m for m in network("layer") if isinstance(m, torch.nn.Linear)]
    sizes = [(m.in_features, m.out_features) for m in linear]
    assert sizes == [(784, 1000), (1000, 1000), (1000, 10)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "unknown task 'digit'; expected one of digits, digits-rows, "),
        (
            ["--norms", "none,lyer"],
            "--norms: unknown norm 'lyer' for digits; expected some of none, batch, batch-hidden",
        ),
        (["--norms", ",none"], "argument --norms: expected names separated by commas, got ',none'"),
        (["--batch-sizes", "1098"], "--batch-sizes: 1098 is more than the 1097 training cases of digits"),
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
        (["--learning-rates", "0"], "argument --learning-rates: expected a number greater than 0, got '0'"),
        (["--seed-list", "1,-2"], "argument --seed-list: expected a whole number of at least 0, got '-2'"),
        (["--seeds", "2", "--seed-list", "1"], "argument --seed-list: not allowed with argument --seeds"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--clip", "0"], "argument --clip: expected a number greater than 0, got '0'"),
        (["--size", "cases"], "argument --size: expected NAME=VALUE, got 'cases'"),
        (["--size", "cases=4"], "--size: unknown size 'cases'; this task has: none"),
        (["--ray", "nowhere:1"], "--ray: cannot reach the cluster 'nowhere:1'"),
        (["--jobs", "0"], "argument --jobs: expected a whole number of at least 1, got '0'"),
        (["--jobs", "2", "--ray"], "--jobs: Ray has its own number of runs"),
        (["--cpus-per-run", "2"], "--cpus-per-run is for --ray, which is not given"),
        (["--preset", "tiny"], "argument --preset: invalid choice: 'tiny'"),
        (["digits-rows", "--norms", "sheeprl"], "unknown norm 'sheeprl' for digits-rows"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message, capsys, tmp_path):
    assert message in refused(capsys, "compare", *arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out: cannot write into" in refused(capsys, "compare", "--out", str(tmp_path / "file" / "out"))


def test_a_folder_of_another_comparison_is_refused(capsys, tmp_path):
    compare(small(tmp_path, seeds=(0,)), silent())
    message = refused(capsys, "compare", "--epochs", "3", "--out", str(tmp_path))
    assert "holds an experiment with epochs 2, and 3 is asked for; choose another --out" in message
    message = refused(capsys, "compare", "--epochs", "2", "--optimizer", "sgd", "--out", str(tmp_path))
    assert "holds an experiment with optimizer adam, and sgd is asked for" in message
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged" in refused(capsys, "compare", "--out", str(tmp_path))


def test_damaged_files_are_named(capsys, tmp_path):
    arguments = [
        "--norms",
        "none",
        "--batch-sizes",
        "128",
        "--epochs",
        "1",
        *ONE,
        "--out",
        str(tmp_path),
    ]
    (tmp_path / "runs").mkdir()
    checkpoint = tmp_path / "runs/none-batch128-rate0.001-seed0.checkpoint"
    checkpoint.write_bytes(b"half a checkpoint")
    message = refused(capsys, "compare", *arguments)
    assert str(checkpoint) in message
    assert "delete it to train this run from its start" in message
    checkpoint.unlink()
    assert main(["compare", *arguments]) == 0
    capsys.readouterr()
    (tmp_path / "runs/none-batch128-rate0.001-seed0.csv").write_text("half a")
    assert main(["compare", *arguments]) == 2
    assert (
        "none-batch128-rate0.001-seed0.csv is damaged (its columns should be norm, batch_size,"
        in capsys.readouterr().err
    )


def test_missing_extras_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["compare"]) == 2
    assert "this command needs rich" in capsys.readouterr().err


def test_a_live_display_shows_what_runs_and_the_time_left(tmp_path):
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    compare(small(tmp_path, seeds=(0,), batch_sizes=(16,), epochs=8), console)
    text = console.file.getvalue()
    for part in (
        "whole comparison",
        "layer, batch 16, rate 0.001, seed 0",
        "validation error",
        "1/2 runs",
        "left",
        "2/2 runs",
    ):
        assert part in text


@pytest.mark.parametrize("name", TASKS)
def test_the_documentation_lists_the_norms_of_each_task(name):
    page = (Path(__file__).parents[3] / "docs" / "compare.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| ") and f"`{name}`" in line)
    listed = re.findall(r"[a-z][a-z0-9.:-]*", re.sub(r"\(.*?\)|\[.*", "", row.split("|")[-2]))
    offered = [norm for norm in find(name).norms if norm not in PRESETS or norm in ("none", "rms")]
    assert sorted(set(listed) - {"or", "a"}) == sorted(offered)
