"""Runs on a Ray cluster of this machine: the results of one after another, whatever happens to a worker."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from layernorm.experiments.commands.compare import Comparison, compare
from layernorm.experiments.task import ExperimentError, Preset
from tests.experiments.commands.cases import records, silent

ray = pytest.importorskip("ray")

from layernorm.experiments.commands.sweep import RaySweep, _train  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Ray leaves sockets and files to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
PRESET = Preset(epochs=2, batch_sizes=(64,), norms=("none", "layer"))


@pytest.fixture(scope="module")
def sweep() -> Iterator[RaySweep]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield RaySweep(cpus=1)
        ray.shutdown()


def workers() -> list[int]:
    """The processes that train now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::_train"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds a worker by /proc")
def test_a_lost_worker_changes_nothing(tmp_path, sweep):
    lost: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 120
        while not lost and time.monotonic() < deadline:
            for process in workers()[:1]:
                os.kill(process, signal.SIGKILL)
                lost.append(process)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    console = silent()
    compare(Comparison("digits", PRESET, tmp_path / "ray", save_weights=True), console, sweep)
    killer.join()
    assert lost
    compare(Comparison("digits", PRESET, tmp_path / "here", save_weights=True), silent())
    pd.testing.assert_frame_equal(records(tmp_path / "ray"), records(tmp_path / "here"))
    for norm in PRESET.norms:
        here, there = (
            torch.load(tmp_path / place / f"runs/{norm}-batch64-rate0.001-seed0.pt")
            for place in ("here", "ray")
        )
        for name, tensor in here.items():
            assert torch.equal(tensor, there[name]), (norm, name)
    assert "[2/2]" in console.file.getvalue()


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path, sweep):
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    (out / "runs/none-batch64-rate0.001-seed0.checkpoint").write_bytes(b"damaged")
    console = silent(200)
    with pytest.raises(
        ExperimentError, match=r"1 of 2 runs were lost, none-batch64-rate0.001-seed0 first .*delete it"
    ):
        compare(Comparison("digits", PRESET, out), console, sweep)
    assert set(pd.read_csv(out / "results.csv").norm) == {"layer"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_that_a_worker_writes_comes_back(tmp_path):
    pytest.importorskip("tensorboard")
    preset = Preset(epochs=1, batch_sizes=(128,), norms=("none",))
    comparison = Comparison("digits", preset, tmp_path, save_weights=True, tensorboard=True)
    (run,) = comparison.runs
    files = _train(comparison, run, 1)
    assert files == {
        str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert {name.partition("/")[0] for name in files} == {"runs", "tensorboard"}
