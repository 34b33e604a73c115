"""A comparison's folder under kills, power cuts, full disks and other commands: nothing whole is lost."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch

from layernorm.cli import main
from layernorm.experiments import registry
from layernorm.experiments.commands.compare import Comparison, Interrupted, compare, train
from layernorm.experiments.errors import ExperimentError
from layernorm.experiments.report import drawing, page
from layernorm.experiments.run import training
from layernorm.experiments.storage import locks
from layernorm.experiments.task import Preset
from tests.experiments.commands.cases import records, silent

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = (
    "compare", "digits", "--batch-sizes", "128", "--epochs", "1", "--learning-rates", "0.001", "--seeds", "1",
)  # fmt: skip
ARGUMENTS = (*SETTINGS, "--norms", "none,layer")


@pytest.fixture
def without_report(monkeypatch) -> None:
    """Draw no picture and write no page, which take their time."""
    monkeypatch.setattr(drawing, "save", lambda *_: None)
    monkeypatch.setattr(page, "write", lambda path, *_: path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with two runs that are finished, and one that was stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    updates = itertools.count()
    preset = Preset(epochs=1, batch_sizes=(128,), norms=("rms",))
    comparison = Comparison("digits", dataclasses.replace(_preset(), norms=preset.norms), out)
    with pytest.raises(Interrupted):
        train(
            comparison,
            comparison.runs[0],
            registry.find("digits").problem(),
            None,
            lambda: next(updates) == 5,
        )
    torch.set_num_threads(threads)
    assert (out / "runs/rms-batch128-rate0.001-seed0.checkpoint").is_file()
    return out


def _preset() -> Preset:
    small = registry.find("digits").presets["small"]
    return dataclasses.replace(
        small, epochs=1, batch_sizes=(128,), norms=("none", "layer"), seeds=(0,), learning_rates=(1e-3,)
    )


def test_a_command_that_names_only_what_is_new_keeps_the_rest(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    before = pd.read_csv(out / "results.csv")
    assert main([*SETTINGS, "--norms", "rms", "--out", str(out)]) == 0
    after = pd.read_csv(out / "results.csv")
    pd.testing.assert_frame_equal(after[after.norm != "rms"].reset_index(drop=True), before)
    assert set(after.norm) == {"none", "layer", "rms"}
    pd.testing.assert_frame_equal(pd.read_parquet(out / "results.parquet"), after)
    text = capsys.readouterr().out
    assert all(f"128  {norm} " in text.split("Report")[-2] for norm in ("none", "layer", "rms"))
    config = json.loads((out / "config.json").read_text())
    assert (config["norms"], config["batch_sizes"], config["seeds"]) == (["none", "layer", "rms"], [128], [0])
    # Another batch size, for which there is no baseline; one more seed; all in the order of the first.
    other = list(SETTINGS)
    other[3], other[-1] = "64", "2"
    assert main([*other, "--norms", "layer", "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["norms"], config["batch_sizes"], config["seeds"]) == (
        ["none", "layer", "rms"],
        [128, 64],
        [0, 1],
    )
    assert config["command"] == (
        "layernorm compare digits --preset small --epochs 1 --batch-sizes 128,64 "
        "--norms none,layer,rms --seeds 2 --learning-rates 0.001"
    )
    table = pd.read_csv(out / "results.csv")
    runs = list(table.groupby(["norm", "batch_size", "seed"], sort=False).groups)
    assert runs == [("none", 128, 0), ("layer", 128, 0), ("rms", 128, 0), ("layer", 64, 0), ("layer", 64, 1)]
    summary = capsys.readouterr().out.split("ms an update\n")[-1].splitlines()[3].split()
    assert summary[:2] == ["64", "layer"]
    assert summary.count("–") == 3
    page = (out / "report.html").read_text()
    assert all(f'"name": "{norm}"' in page for norm in ("none", "layer", "rms"))


FILES = (
    "config.json", "results.csv", "results.parquet", "runs/none-batch128-rate0.001-seed0.csv",
    "runs/none-batch128-rate0.001-seed0.csv.sha256", "runs/layer-batch128-rate0.001-seed0.csv",
    "runs/rms-batch128-rate0.001-seed0.checkpoint",
)  # fmt: skip
DAMAGES = {
    "empty": lambda content, chance: b"",
    "zeros": lambda content, chance: bytes(len(content)),
    "torn": lambda content, chance: content[: chance.randrange(1, len(content))],
    "torn page": lambda content, chance: content[: len(content) // 2].ljust(len(content), b"\0"),
    "cut at a line's end": lambda content, chance: content[: content.rindex(b"\n", 0, -1) + 1],
    "a bit": lambda content, chance: _flipped(content, chance.randrange(len(content))),
}


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


# Every file with half of the damages, in turn.
@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, kind) for i, name in enumerate(FILES) for j, kind in enumerate(DAMAGES) if (i + j) % 2 == 0],
)
def test_a_damaged_file_is_named_or_made_again(name, damage, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / name
    if damage.startswith("cut") and b"\n" not in path.read_bytes()[:-1]:
        pytest.skip("has no lines")
    path.write_bytes(DAMAGES[damage](path.read_bytes(), random.Random(f"{name} {damage}")))
    others = {p: p.read_bytes() for p in (out / "runs").iterdir() if not str(p).startswith(str(path)[:-7])}
    code = main(["report", str(out)])
    told = capsys.readouterr()
    if code:
        assert told.err.startswith("layernorm: ")
        assert told.err.count("\n") == 1
        assert str(path).removesuffix(".sha256") in told.err
    else:
        pd.testing.assert_frame_equal(records(out), records(whole))
    code = main([*ARGUMENTS[:-1], "none,layer,rms", "--out", str(out)])
    told = capsys.readouterr()
    if code:
        assert code == 2
        assert told.err.count("\n") == 1
        assert str(path).removesuffix(".sha256") in told.err
        assert "delete" in told.err
    else:
        table = records(out)
        before = table[table.norm != "rms"].reset_index(drop=True)
        pd.testing.assert_frame_equal(before, records(whole))
    for other, content in others.items():
        if other.suffix != ".checkpoint":
            assert other.read_bytes() == content


@pytest.mark.usefixtures("without_report")
def test_what_is_torn_is_made_again_without_a_word_from_the_user(whole, tmp_path, capsys):
    """Damage one file after another, as a power cut does on a disk that lies."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "runs/none-batch128-rate0.001-seed0.csv").write_bytes(b"")
    (out / "runs/rms-batch128-rate0.001-seed0.checkpoint").write_bytes(b"PK\x03\x04half")
    (out / "config.json").write_bytes(b"")
    (out / "results.csv").write_bytes(b"")
    for left in (
        "layer-batch128-rate0.001-seed0.checkpoint",
        "layer-batch128-rate0.001-seed0.claim",
        "a.csv.new",
    ):
        (out / "runs" / left).write_bytes(b"left by a kill")
    assert main([*ARGUMENTS[:-1], "none,layer,rms", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "config.json is damaged: Expecting value: line 1 column 1 (char 0); it is written anew" in text
    assert (
        "none-batch128-rate0.001-seed0.csv is damaged (its content does not have its SHA-256); this run is"
        in text
    )
    assert (
        "rms-batch128-rate0.001-seed0.checkpoint cannot be used (it is empty or cut off); this run begins "
        "again" in text
    )
    assert "layer, batch 128, rate 0.001, seed 0: finished before" in text
    table = records(out)
    pd.testing.assert_frame_equal(table[table.norm != "rms"].reset_index(drop=True), records(whole))
    runs = {f"{norm}-batch128-rate0.001-seed0.csv" for norm in ("none", "layer", "rms")}
    assert {path.name for path in (out / "runs").iterdir()} == runs | {f"{name}.sha256" for name in runs}


@pytest.mark.usefixtures("without_report")
def test_a_damaged_run_that_is_not_asked_for_is_left_out_with_a_word(whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "runs/none-batch128-rate0.001-seed0.csv").write_bytes(b"")
    assert main([*SETTINGS, "--norms", "layer", "--out", str(out)]) == 0
    assert "this run is left out until a command names it" in capsys.readouterr().out
    assert set(records(out).norm) == {"layer"}
    assert main([*SETTINGS, "--norms", "none", "--out", str(out)]) == 0
    pd.testing.assert_frame_equal(records(out), records(whole))


@pytest.mark.usefixtures("without_report")
def test_runs_of_other_settings_are_refused_where_config_json_is_lost(whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "config.json").unlink()
    arguments = list(ARGUMENTS)
    arguments[5] = "2"
    assert main([*arguments, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "cannot be used (it is of task=digits epochs=1 optimizer=adam" in message
    assert message.count("\n") == 1


@pytest.mark.usefixtures("without_report")
def test_a_second_command_is_told_who_is_there(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    with locks.held(out):
        for command in (ARGUMENTS, ("theory",), ("reproduce", "digits")):
            assert main([*command, "--out", str(out)]) == 2
            captured = capsys.readouterr()
            assert captured.err.startswith(f"layernorm: {out} is in use by process {os.getpid()} on ")
            assert captured.err.count("\n") == 1
            assert captured.out == ""
        assert main(["report", str(out)]) == 0  # which only reads
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("without_report")
def test_a_worker_that_was_only_thought_lost_stops_before_it_writes(tmp_path):
    comparison = Comparison("digits", dataclasses.replace(_preset(), norms=("layer",)), tmp_path)
    (run,) = comparison.runs
    (tmp_path / "runs").mkdir()
    problem = registry.find("digits").problem()
    updates = itertools.count()

    def taken_over() -> bool:
        if next(updates) == 3:
            train(comparison, run, registry.find("digits").problem(), None)
        return False

    with pytest.raises(
        ExperimentError, match=r"trains layer-batch128-rate0.001-seed0 now; this process stops"
    ):
        train(comparison, run, problem, None, taken_over)
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {f"{run.name}.csv", f"{run.name}.csv.sha256"}
    compare(comparison, silent())
    assert len(records(tmp_path)) == 5


@pytest.mark.usefixtures("without_report")
def test_a_full_disk_is_said_in_one_line_wherever_it_fills_up(tmp_path, monkeypatch, capsys):
    """Each flush of a command fails once, the first, the second, ...; the same command goes on from there."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    arguments = [*SETTINGS[:3], "512", *SETTINGS[4:], "--norms", "none", "--save-weights", "--out"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    fsync, failed = os.fsync, 0
    for deadline in itertools.count():
        out, calls = tmp_path / str(deadline), itertools.count()

        def full(descriptor: int, deadline=deadline, calls=calls) -> None:
            if next(calls) == deadline:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            code = main([*arguments, str(out)])
        if not code:
            break
        failed += 1
        message = capsys.readouterr().err
        assert code == 2
        assert "No space left on device" in message
        assert message.count("\n") == 1
        assert not [path for path in out.rglob("*") if path.suffix == ".new" or path.name == ".lock"]
        assert main([*arguments, str(out)]) == 0
        pd.testing.assert_frame_equal(records(out), records(tmp_path / "whole"))
    assert failed > 15


def test_a_tensorboard_log_on_a_full_disk_raises_where_it_writes(tmp_path):
    pytest.importorskip("tensorboard")
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from layernorm.experiments.run.events import Log

    with Log(tmp_path / "log") as log:
        log._file.close()
        log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - closed with the log
        with pytest.raises(OSError, match="No space left on device"):
            log.add("loss", 1.0, 1)


def _compare_until_killed(out: Path, calls: int = 0) -> None:
    """Compare; if ``calls`` is given, be killed in place of that one of the calls that change the folder."""
    torch.set_num_threads(1)
    training.CHECKPOINT_SECONDS = 0.0
    drawing.save = lambda *_: None
    count = itertools.count(1)

    def counted(real):
        def call(*arguments, **options):
            if next(count) == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in ("fsync", "replace", "unlink") if calls else ():
        setattr(os, name, counted(getattr(os, name)))
    preset = dataclasses.replace(_preset(), epochs=2, batch_sizes=(16,))
    compare(Comparison("digits", preset, out), silent())


def test_a_comparison_killed_twenty_times_ends_with_the_table_of_an_undisturbed_one(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "layernorm.experiments.tasks.digits", "layernorm.experiments.commands.compare"]
    )
    out, chance, left, killed = tmp_path / "killed", random.Random(0), [], 0

    def exit_code(*arguments):
        process = context.Process(target=_compare_until_killed, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    for _ in range(20):
        killed += exit_code(out, chance.randint(1, 40)) == -signal.SIGKILL
        left.append({path.name.partition("-seed0")[2] or path.name for path in out.rglob("*")})
    # Kills have met it at work.
    assert killed > 10
    assert any(".checkpoint" in names for names in left)
    assert any(".lock" in names for names in left)
    assert exit_code(out) == exit_code(tmp_path / "undisturbed") == 0
    pd.testing.assert_frame_equal(records(out), records(tmp_path / "undisturbed"))
    names = {path.relative_to(out) for path in out.rglob("*")}
    assert names == {
        path.relative_to(tmp_path / "undisturbed") for path in (tmp_path / "undisturbed").rglob("*")
    }


def test_names_are_printed_as_they_are(tmp_path, monkeypatch, capsys):
    out = tmp_path / "x[/b]y [red]q :cat:\nz\udcff"
    monkeypatch.setattr("sys.argv", ["layernorm", *ARGUMENTS, "--out", str(out)])
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    shown = str(tmp_path) + r"/x[/b]y [red]q :cat:\nz\udcff/report.html"
    assert f"Report: {shown}\n" in capsys.readouterr().out
    assert "y [red]q :cat:" in re.sub(r"<[^>]+>", "", (out / "report.html").read_text("utf-8"))
    assert json.loads((out / "config.json").read_text())["command"].count("\udcff") == 1
    assert main(["report", str(out), "--out", str(out / "[b].html")]) == 0
    assert "/[b].html\n" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "no[/b]\n\x1b[31m\udcff")]) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith(r"no[/b]\n\x1b[31m\udcff" + "\n")
    assert captured.err.count("\n") == 1
