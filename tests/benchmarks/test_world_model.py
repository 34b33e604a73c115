"""The benchmark of a world model's updates: the same updates by both, the tasks of the command, the page."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.core import workers
from benchmarks.core.subjects import difference
from benchmarks.updates.measure import BENCHMARK as EXPERIMENTS
from benchmarks.world_model import measure, peers
from benchmarks.world_model.measure import BENCHMARK, TASK
from layernorm import LayerNormGRUCell
from tests.benchmarks.cases import in_this_process, measured, options_of, rows_of_point, table_of, write_table

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = measure.Point(TASK, 2, 8, 3)
measured_here = partial(measured, measure.measure, [TINY], list(peers.PEERS))


def test_both_make_the_same_updates():
    rows, notes = measured_here()
    assert notes == []
    assert [(row["peer"], row["status"]) for row in rows] == [
        ("layernorm", "measured"),
        ("torch", "measured"),
    ]
    # Some units in the last place, 1.2e-7; Adam's first update divides each gradient by its size.
    assert max(row["difference"] for row in rows) < 1e-5
    ours, other = (peers.updates(make, 8, 2, 3) for make in peers.PEERS.values())
    first = ours.results()
    for _ in range(3):
        ours.call()
        other.call()
    assert difference(ours.results()[:1], first[:1]) > 1e-4  # it learns


def test_the_model_is_its_recurrence():
    torch.manual_seed(0)
    cell = LayerNormGRUCell(4, 4, variant="sheeprl")
    model = peers.WorldModel(cell, 4)
    actions = torch.randn(2, 3, peers.ACTIONS)
    h = z = torch.zeros(3, 4)
    for a, found in zip(actions, model(actions), strict=True):
        h = cell(torch.nn.functional.elu(model.before(torch.cat([z, a], 1))), h)
        z = model.after(h)
        torch.testing.assert_close(found, z)


def test_a_cell_that_computes_something_else_has_failed(monkeypatch):
    monkeypatch.setitem(
        peers.PEERS, "layernorm", lambda hidden: LayerNormGRUCell(hidden, hidden, variant="haste")
    )
    rows, notes = measured_here()
    assert [row["status"] for row in rows] == ["failed", "measured"]
    assert notes[0].startswith(f"{TASK} batch 2 hidden 8: layernorm failed: ")


def test_tasks_choose_the_table():
    def points(*arguments):
        options = options_of("updates", "--threads", "1", *arguments)
        return [len(each.works(options)[0].points) for each in (EXPERIMENTS, BENCHMARK)]

    assert points("--tasks", TASK) == [0, 2]
    assert points("--tasks", "draw") == [1, 0]
    assert points() == [8, 2]


def test_the_command_writes_a_table_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "events", in_this_process(measure.measure))
    tiny = ["--tasks", TASK, "--hidden", "8", "--steps", "2", "--threads", "1", "--rounds", "1"]
    assert main(["updates", *tiny, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"world_model.csv", "benchmarks.md"}
    assert table_of(BENCHMARK, tmp_path, "peer", "status") == [
        ("layernorm", "measured"),
        ("torch", "measured"),
    ]
    page = (tmp_path / "benchmarks.md").read_text()
    command = f"python -m benchmarks updates --tasks {TASK} --hidden 8 --steps 2 --threads 1 --rounds 1\n"
    assert command in page
    assert "world model, 1 thread: speed over the cell by hand " in capsys.readouterr().out


def test_the_page_sums_up(tmp_path):
    rows = []
    for hidden, ratio in ((1024, 1.0), (512, 4.0)):
        times = {"layernorm": 1e4, "torch": 1e4 * ratio}
        rows += rows_of_point(times, {"kernel": "native"}, hidden=hidden)
    write_table(BENCHMARK, tmp_path / "world_model.csv", rows, task=TASK, batch=16, steps=16)
    assert main(["updates", "--report-only", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "benchmarks.md").read_text().splitlines()
    assert "| 1 | 2 | 2.00 (1.00) |" in lines
    start = lines.index("| 1 | 16 | 512 | 16 | native | 10,000 | 40,000 | 4.00 (4.00–4.00) |")
    assert lines[start + 1] == "| 1 | 16 | 1024 | 16 | native | 10,000 | 10,000 | 1.00 (1.00–1.00) |"
