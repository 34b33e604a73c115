"""Filling tables: workers that die, budgets that end, and a machine that has nothing but PyTorch."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import pytest

from benchmarks.core import command, filling, progress, workers
from benchmarks.core.outputs import in_folder
from benchmarks.gpu_norms.measure import BENCHMARK as NORMS
from benchmarks.gpu_norms.measure import COMMAND
from benchmarks.gpu_recurrent.measure import BENCHMARK
from tests.benchmarks.cases import options_of, table_of

POINTS = ("gpu", "--operator", "lstm", "--batches", "16", "--modes", "inference", "--dtypes", "bfloat16")
POINTS += ("--hidden", "8,16,32", "--peers", "layernorm-persistent")
PERSISTENT = "layernorm-persistent"


class Workers:
    """Stand in for workers: remember what they were to do, and do what is asked for at a point."""

    def __init__(self, at, happen):
        self.jobs, self._at, self._happen = [], at, happen

    def events(self, module, job, threads, limit):
        peers = job["peers"]
        sizes = [point.get("hidden", module) for point in job["points"]]
        self.jobs.append((PERSISTENT in peers, sizes))
        for index, point in enumerate(job["points"]):
            yield {"point": index}
            if (PERSISTENT in peers, sizes[index]) == self._at:
                self._happen(limit)
            yield {"rows": [{**point, "threads": threads, "peer": peer, "status": "ok"} for peer in peers]}


@pytest.fixture
def fill(tmp_path, monkeypatch):
    """Return what fills a table by such workers, and returns its rows."""
    monkeypatch.setattr(filling, "latest", lambda point, rows, threads: point)

    def run(stand_in, *more):
        monkeypatch.setattr(workers, "events", stand_in.events)
        filling.fill([BENCHMARK], options_of(*POINTS, *more), in_folder(tmp_path), None)
        return table_of(BENCHMARK, tmp_path, "hidden", "peer", "status")

    return run


def dies(limit):
    raise workers.WorkerError("the worker was killed")


def is_ended(limit):
    raise workers.TimedOutError("the worker took too long")


def ok(hidden, *names):
    return [(str(hidden), name, "ok") for name in names]


def test_a_worker_that_dies_loses_its_own_rows(fill, capsys):
    found = Workers((True, 16), dies)
    shared = [row for hidden in (8, 16, 32) for row in ok(hidden, "layernorm", "torch")]
    assert fill(found) == [*shared, *ok(8, PERSISTENT), ("16", PERSISTENT, "failed"), *ok(32, PERSISTENT)]
    assert found.jobs == [(False, [8, 16, 32]), (True, [8, 16, 32]), (True, [32])]
    assert "at lstm bfloat16 batch 16 hidden 16 inference, layernorm-persistent: " in capsys.readouterr().out


def test_a_point_at_which_all_peers_end_is_listed(fill):
    found = Workers((False, 32), dies)
    rows = fill(found)
    assert rows[4:6] == [("32", name, "failed") for name in ("layernorm", "torch")]
    assert found.jobs[-1] == (True, [8, 16, 32])  # the other worker is run all the same


def test_a_worker_that_cannot_start_ends_the_run(fill, monkeypatch):
    class Broken(Workers):
        def events(self, *arguments):
            raise workers.WorkerError("no module")
            yield

    with pytest.raises(workers.WorkerError, match="before the first point, no module"):
        fill(Broken(None, None))


def test_a_run_that_its_budget_ended_goes_on(fill, capsys):
    assert fill(Workers((False, 16), is_ended), "--budget", "60") == ok(8, "layernorm", "torch")
    text = "The budget of 60 s is over; go on with the same command and --resume.\n"
    assert capsys.readouterr().out.endswith(text)
    found = Workers(None, None)
    rows = fill(found, "--resume")
    assert found.jobs == [(False, [16, 32]), (True, [8, 16, 32])]
    assert len(rows) == len(set(rows)) == 9


def test_a_point_that_hangs_is_not_tried_again(fill, monkeypatch):
    monkeypatch.setattr(filling, "_HANGS", 0.0)
    rows = fill(Workers((False, 16), is_ended), "--budget", "60")
    assert rows[2:] == [("16", name, "timed out") for name in ("layernorm", "torch")]
    found = Workers(None, None)
    fill(found, "--resume")
    assert found.jobs[0] == (False, [32])


def test_nothing_is_begun_that_no_time_is_left_for(fill, capsys):
    found = Workers(None, None)
    fill(found, "--budget", "5")
    assert found.jobs == []


def test_the_limit_of_a_worker_is_what_is_left(fill):
    class Slow(Workers):
        def events(self, module, job, threads, limit):
            self.jobs.append(limit)
            time.sleep(0.3)
            yield from ()

    found = Slow(None, None)
    fill(found, "--budget", "20")
    first, second = found.jobs
    assert 19.0 < first <= 20.0
    assert second <= first - 0.3


def test_the_works_of_all_tables_are_run_by_their_rank(tmp_path, monkeypatch):
    found = Workers(None, None)
    monkeypatch.setattr(workers, "events", found.events)
    monkeypatch.setattr(filling, "latest", lambda point, rows, threads: point)
    arguments = (
        "gpu",
        "--operator",
        "layer_norm,lstm",
        "--batches",
        "1,16",
        "--hidden",
        "8",
        "--sizes",
        "8x8",
    )
    options = options_of(
        *arguments, "--dtypes", "bfloat16", "--peers", "torch", "--modes", "forward,inference"
    )
    filling.fill(COMMAND.benchmarks, options, in_folder(tmp_path), None)
    # The LSTM at batch 16, the norm, and the rest.
    assert found.jobs == [(False, [8]), (False, ["benchmarks.gpu_norms.measure"]), (False, [8])]
    assert [row[0] for row in table_of(BENCHMARK, tmp_path, "batch", "peer")] == ["16", "16", "1", "1"]
    assert len(table_of(NORMS, tmp_path)) == 2


def test_a_machine_with_pytorch_alone_gets_tables_and_no_page(tmp_path, monkeypatch, capsys):
    for name in ("pandas", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "benchmarks.core.report", raising=False)
    monkeypatch.delattr(sys.modules["benchmarks.core"], "report", raising=False)
    assert progress.console() is None
    monkeypatch.setattr(workers, "events", Workers(None, None).events)
    monkeypatch.setattr(filling, "latest", lambda point, rows, threads: point)
    gpu = replace(COMMAND, benchmarks=tuple(replace(b, problem=lambda: None) for b in COMMAND.benchmarks))
    assert command.main([gpu], [*POINTS, "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_recurrent.csv"]
    out = capsys.readouterr().out
    assert "[6/6] lstm bfloat16 batch 16 hidden 32 inference\n" in out
    assert out.endswith(
        "There is no page: this command needs pandas: pip install --group bench (pip 25.1 or later)\n"
    )
