"""Runs side by side in processes: the results of one after another, stopped and lost ones too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from layernorm.experiments.commands import jobs
from layernorm.experiments.commands.compare import Comparison, compare
from layernorm.experiments.errors import ExperimentError
from layernorm.experiments.task import Preset
from tests.experiments.commands.cases import records, silent

pytestmark = pytest.mark.usefixtures("one_thread")
PRESET = Preset(epochs=1, batch_sizes=(64,), norms=("none", "layer"), seeds=(0, 1))


def lost(*arguments) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_results_are_those_of_one_after_another(tmp_path):
    console = silent()
    compare(Comparison("digits", PRESET, tmp_path / "jobs"), console, jobs.Jobs(2))
    compare(Comparison("digits", PRESET, tmp_path / "here"), silent())
    pd.testing.assert_frame_equal(records(tmp_path / "jobs"), records(tmp_path / "here"))
    assert "[4/4]" in console.file.getvalue()


def test_a_lost_process_is_said_and_the_same_command_goes_on(tmp_path, monkeypatch):
    comparison = Comparison("digits", PRESET, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_train", lost)
        with pytest.raises(ExperimentError, match="a process that trains was lost; the same command goes on"):
            compare(comparison, silent(), jobs.Jobs(2))
    compare(comparison, silent())
    assert records(tmp_path).groupby(["norm", "seed"]).ngroups == 4


def test_ctrl_c_keeps_what_was_reached(tmp_path):
    command = [
        sys.executable,
        "-m",
        "layernorm",
        "compare",
        "digits",
        "--norms",
        "none,layer",
        "--seeds",
        "1",
    ]
    command += ["--learning-rates", "0.001", "--batch-sizes", "4", "--epochs", "400", "--jobs", "2"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/*.claim"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("layernorm: interrupted; what is finished is kept")
    assert errors.count("\n") == 1
    assert {path.suffix for path in Path(tmp_path, "runs").iterdir()} == {".checkpoint"}
