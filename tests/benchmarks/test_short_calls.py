"""The benchmark of recurrent layers over a few steps: the grid, the table, the page."""

from __future__ import annotations

from benchmarks.__main__ import main
from benchmarks.core import workers
from benchmarks.recurrent.measure import MODES
from benchmarks.short_calls import measure
from benchmarks.short_calls.measure import BENCHMARK
from tests.benchmarks.cases import in_this_process, options_of, rows_of_point, table_of, write_table


def test_the_default_grid_is_whole():
    (work,) = BENCHMARK.works(options_of("short-calls", "--threads", "1"))
    assert len(work.points) == 3 * 3 * 4 * 3 * 2
    assert {point.steps for point in work.points} == {1, 4, 16}
    assert (work.job["large"], work.job["memory"]) == (float("inf"), False)


def test_the_command_writes_table_picture_and_page(one_thread, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "events", in_this_process(measure.measure))
    tiny = "--cells gru --batches 1 --hidden 8 --steps 1,3 --threads 1 --rounds 1"
    assert main(["short-calls", *tiny.split(), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "short_calls.csv",
        "bench-short-calls-1-thread.png",
        "benchmarks.md",
    }
    rows = table_of(BENCHMARK, tmp_path)
    assert [(row["steps"], row["mode"], row["peer"]) for row in rows] == [
        (steps, mode, peer) for steps in ("1", "3") for mode in MODES for peer in ("layernorm", "torch")
    ]
    for row in rows:
        assert row["status"] == "measured"
        assert float(row["difference"]) < 1e-5  # some units in the last place, 1.2e-7
        assert row["weights_us"]  # with a batch of 1
    assert f"python -m benchmarks short-calls {tiny}\n" in (tmp_path / "benchmarks.md").read_text()
    text = capsys.readouterr().out
    assert "[4/4] gru float32 batch 1 hidden 8 steps 3 training, 1 thread: " in text
    assert "\n1 thread, training, 3 steps: speed over torch.nn, un-normalized " in text


def test_the_page_sums_up(tmp_path):
    """Ours is twice as fast as PyTorch's over one step and half as fast over four."""
    rows = []
    for steps, ratio in ((4, 0.5), (1, 2.0)):
        times = {"layernorm": 100.0, "torch": 100.0 * ratio}
        rows += rows_of_point(times, {"products_us": 50.0, "over_products": 2.0}, steps=steps)
    common = {"cell": "gru", "dtype": "float32", "batch": 16, "hidden": 64, "mode": "inference"}
    write_table(BENCHMARK, tmp_path / "short_calls.csv", rows, **common)
    assert main(["short-calls", "--report-only", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "benchmarks.md").read_text().splitlines()
    start = lines.index("| 1 | inference | 1 | 1 | 2.00 (2.00) | 0.50 (0.50) |")
    assert lines[start + 1 : start + 3] == [
        "| 1 | inference | 4 | 1 | 0.50 (0.50) | 0.50 (0.50) |",
        "| all | all | gru | 2 | 1.00 (0.50) | 0.50 (0.50) |",
    ]
    assert "| 1 | gru | float32 | inference | 4 | 16 | 64 | 0.50 (0.50–0.50) |" in lines
