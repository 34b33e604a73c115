"""The benchmark of training updates: the same batches for both, missing data, the page, the command."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.core import workers
from benchmarks.updates import measure as updates
from benchmarks.updates.measure import BENCHMARK
from layernorm.experiments import registry
from layernorm.experiments import task as tasks
from layernorm.experiments.run.training import Run, Trainer
from tests.benchmarks.cases import (
    failure,
    in_this_process,
    measured,
    rows_of_point,
    table_of,
    write_table,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SMALLEST = updates.Point("digits-rows", "small", 32)
measured_here = partial(measured, updates.measure, [SMALLEST], list(updates.PEERS))


@pytest.fixture(autouse=True)
def _fresh_problems():
    updates._problem.cache_clear()


@pytest.fixture
def without_data(monkeypatch):
    """Take away DRAW's data."""

    def problem(**sizes):
        raise tasks.MissingData("the digits are not here: get them elsewhere")

    find = registry.find
    without = dataclasses.replace(find("draw"), problem=problem)
    monkeypatch.setattr(registry, "find", lambda name: without if name == "draw" else find(name))


def test_the_tasks_are_all_that_are_recurrent():
    others = {"convnet", "digits", "mnist", "permuted-mnist", "transformer"}
    assert set(updates.TASKS) == set(registry.TASKS) - others
    for name in updates.TASKS:
        assert set(updates.PEERS.values()) <= set(registry.find(name).norms)
        assert set(updates.PRESETS) <= set(registry.find(name).presets)


def test_the_points_are_the_presets_batch_sizes():
    points = BENCHMARK.grid(tasks=["sequential-mnist", "digits-rows"], presets=["small", "paper"])
    assert [point.name for point in points] == [
        "sequential-mnist small batch 64",
        "sequential-mnist paper batch 100",
        "digits-rows small batch 128",
        "digits-rows small batch 32",
    ]  # the sizes of "digits-rows" are the same


def test_both_make_updates_on_the_same_cases_in_each_round(monkeypatch):
    seen = {}
    step = Trainer.step

    def recorded(self, cases, stop=False):
        seen.setdefault(self.run.norm, []).append(tuple(cases.tolist()))
        return step(self, cases, stop)

    monkeypatch.setattr(Trainer, "step", recorded)
    rows, notes = measured_here(rounds=4, least_rounds=4)
    assert notes == []
    assert [(row["peer"], row["status"], row["rounds"]) for row in rows] == [
        ("layernorm", "measured", 4),
        ("torch", "measured", 4),
    ]
    assert rows[0]["median_us"] > 0 < rows[0]["ratio_to_torch"]
    assert rows[1]["ratio_to_torch"] == 1.0
    # How many updates a sample takes is each one's own; the check, the calibration and the rounds are not.
    batches = {norm: list(dict.fromkeys(cases)) for norm, cases in seen.items()}
    assert batches["layer"] == batches["none"]
    assert [len(batch) for batch in batches["layer"]] == [32] * 6
    assert len({case for batch in batches["layer"] for case in batch}) == 192


def test_batches_begin_again_after_an_epoch():
    trainer = SimpleNamespace(run=Run("none", 3, 1e-3, 0), per_epoch=2, order=lambda epoch: torch.arange(8))
    batches = updates._batches(trainer)
    assert [next(batches).tolist() for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


@pytest.mark.parametrize("scale", [0.0, float("nan")])
def test_updates_that_do_not_train_have_failed(scale, monkeypatch):
    step = Trainer.step

    def wrong(self, cases, stop=False):
        before = [parameter.detach().clone() for parameter in self.network.parameters()]
        result = step(self, cases, stop)
        if self.run.norm == "layer":
            with torch.no_grad():
                for parameter, start in zip(self.network.parameters(), before, strict=True):
                    parameter.copy_(start + scale)
        return result

    monkeypatch.setattr(Trainer, "step", wrong)
    rows, notes = measured_here()
    assert [row["status"] for row in rows] == ["failed", "measured"]
    assert notes == [f"{SMALLEST.name}: layernorm failed: an update changes its parameters by {scale:g}"]


def test_a_task_without_data_is_listed_and_the_others_are_measured(
    without_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(workers, "events", in_this_process(updates.measure))
    arguments = ["--tasks", "digits-rows,draw", "--threads", "1", "--rounds", "1"]
    assert main(["updates", *arguments, "--out", str(tmp_path)]) == 0
    assert table_of(BENCHMARK, tmp_path, "task", "batch", "peer", "status") == [
        (task, batch, peer, status)
        for task, batch, status in (
            ("digits-rows", "128", "measured"),
            ("digits-rows", "32", "measured"),
            ("draw", "128", "no data"),
        )
        for peer in updates.PEERS
    ]
    text = capsys.readouterr().out
    assert "draw small batch 128: the digits are not here: get them elsewhere" in text
    assert "draw small batch 128, 1 thread: layernorm no data; torch no data" in text
    page = (tmp_path / "benchmarks.md").read_text()
    assert "python -m benchmarks updates --tasks draw,digits-rows --threads 1 --rounds 1\n" in page
    assert "| 1 | small | draw | 128 | no data | no data | – |" in page
    assert "](bench-updates.png)" in page
    assert (tmp_path / "bench-updates.png").read_bytes().startswith(b"\x89PNG")


def test_no_data_at_all_gives_a_page_too(without_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "events", in_this_process(updates.measure))
    assert main(["updates", "--tasks", "draw", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "1 thread, small: – times the speed" in capsys.readouterr().out


def test_data_that_cannot_be_used_does_not_end_the_run(monkeypatch):
    def problem(name, preset):
        raise tasks.ExperimentError("the file is damaged")

    monkeypatch.setattr(updates, "_problem", problem)
    rows, notes = measured_here()
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert notes == [f"{SMALLEST.name}: the file is damaged"]


def test_the_page_sums_up(tmp_path, capsys):
    rows = []
    for preset, batch, ratio in (("paper", 128, 0.8), ("small", 128, 2.0), ("small", 4, 0.95)):
        rows += rows_of_point({"layernorm": 1e4 / ratio, "torch": 1e4}, preset=preset, batch=batch)
    write_table(BENCHMARK, tmp_path / "updates.csv", rows, task="draw", threads=2)
    assert main(["updates", "--report-only", "--out", str(tmp_path)]) == 0
    slow = (
        "An update takes more than 1.1 times as long as that of torch.nn without norm at 1 of 3 points "
        "(draw, batch 128, paper, 2 threads: 1.25 times)."
    )
    assert capsys.readouterr().out.startswith(
        "2 threads, small: 1.38 (0.95) times the speed of torch.nn without norm: the geometric mean (the "
        f"least)\n2 threads, paper: 0.80 (0.80) times the speed of torch.nn without norm: the geometric mean "
        f"(the least)\n{slow}\n"
    )
    page = (tmp_path / "benchmarks.md").read_text()
    assert f"{slow}\n" in page
    assert "python -m benchmarks updates --tasks draw --presets small,paper --threads 2\n" in page
    lines = page.splitlines()
    assert "| 2 | small | 2 | 1.38 (0.95) |" in lines
    table = [line for line in lines if line.startswith("| 2 ") and "| draw |" in line]
    assert table == [
        "| 2 | small | draw | 4 | 10,526 | 10,000 | 0.95 (0.95–0.95) |",
        "| 2 | small | draw | 128 | 5,000 | 10,000 | 2.00 (2.00–2.00) |",
        "| 2 | paper | draw | 128 | 12,500 | 10,000 | 0.80 (0.80–0.80) |",
    ]


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(updates, "find_spec", lambda name: None if name == "sklearn" else name)
    assert failure(capsys, "updates", "--out", str(tmp_path)) == (
        "python -m benchmarks: this benchmark needs sklearn: pip install --group bench '.[experiments]' "
        "(pip 25.1 or later)\n"
    )
