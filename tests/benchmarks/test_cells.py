"""The benchmark of cells that are called step by step: peers that agree, the grid, the page."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cells import by_hand, measure, peers
from benchmarks.cells.measure import BENCHMARK
from benchmarks.core import workers
from benchmarks.core.subjects import difference
from benchmarks.recurrent.case import make_case
from benchmarks.recurrent.measure import CELLS, MODES
from layernorm import reference
from layernorm.spec import LayerSpec
from layernorm.variants import resolve
from tests.benchmarks.cases import (
    in_this_process,
    measured,
    options_of,
    rows_of_point,
    table_of,
    write_table,
)

pytestmark = pytest.mark.usefixtures("one_thread")
measured_here = partial(measured, measure.measure, peers=list(peers.PEERS))


def grid(cell, **chosen):
    """Return small points of a cell, in float32 unless other dtypes are chosen."""
    return list(BENCHMARK.grid(**{"cells": [cell], "batches": [3], "hidden": [16], "steps": [4]} | chosen))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_both_compute_the_same_function(cell, training):
    exact = make_case(cell, 3, 16, 4, training, variant=by_hand.VARIANTS[cell])
    with torch.set_grad_enabled(training):
        expected = peers.PEERS["torch"](exact).results()
    assert len(expected) == 4 + training * (4 + len(by_hand.CELLS[cell].arranged(exact.normalized)))
    # Some units in the last place, 1.2e-7 and 7.8e-3, over four steps.
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 8e-2)):
        for make in peers.PEERS.values():
            with torch.set_grad_enabled(training):
                found = make(exact.to(dtype)).results()
            assert difference(found, expected) < most


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_by_hand_is_the_reference(cell):
    variant = by_hand.VARIANTS[cell]
    case = make_case(cell, 3, 8, 1, training=False, variant=variant)
    by_name = {name: value.double() for name, value in case.normalized.items()}
    states = [case.grad[0].double(), case.x[0].flip(0).double()][: 2 if cell == "lstm" else 1]
    made = by_hand.CELLS[cell](8, 8, torch.float64)
    made.load(by_name)
    x = case.x.double()
    found = made(x[0], tuple(states) if cell == "lstm" else states[0])
    spec = LayerSpec(cell, resolve(variant, cell))
    _, expected = reference.recurrent_layer(spec, x, tuple(states), by_name)
    # The two round differently, by a few of float64's units in the last place, 2.2e-16.
    torch.testing.assert_close(found if cell == "lstm" else (found,), tuple(expected), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_a_cell_that_computes_something_else_has_failed(mode, monkeypatch):
    monkeypatch.setitem(peers.VARIANTS, "lstm", "fastrnns")
    (point,) = grid("lstm", modes=[mode])
    rows, notes = measured_here([point])
    assert [row["status"] for row in rows] == ["failed", "measured"]
    assert notes[0].startswith(
        f"lstm float32 batch 3 hidden 16 {mode}: layernorm failed: its results are off"
    )


def test_a_call_has_the_work_that_its_point_says():
    from torch.utils.flop_counter import FlopCounterMode

    (point,) = grid("gru", modes=["training"])
    case = make_case("gru", point.batch, point.hidden, point.steps, training=True, variant="sheeprl")
    call = peers.PEERS["torch"](case).call
    with FlopCounterMode(display=False) as counter:
        call()
    # Nothing is computed for the gradient of the first state.
    assert counter.get_total_flops() == pytest.approx(1e9 * point.gflop)


def test_the_default_grid_leaves_out_what_its_help_says():
    def points(*arguments):
        (work,) = BENCHMARK.works(options_of("cells", "--threads", "1", *arguments))
        return work.points

    assert len(points("--full")) == 3 * 6 * 5 * 2
    assert 150 < len(points()) < 180
    assert max(point.gflop for point in points()) <= measure.LARGEST
    assert {point.hidden for point in points()} == {64, 128, 256, 512, 1024, 2048}
    assert {(point.dtype, point.steps) for point in points()} == {("float32", 8)}


def test_the_command_writes_table_picture_and_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "events", in_this_process(measure.measure))
    tiny = ["--cells", "rnn", "--batches", "2", "--hidden", "8", "--threads", "1", "--rounds", "1"]
    assert main(["cells", *tiny, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "cells.csv",
        "bench-cells-1-thread.png",
        "benchmarks.md",
    }
    assert table_of(BENCHMARK, tmp_path, "mode", "peer", "status") == [
        (mode, peer, "measured") for mode in MODES for peer in peers.PEERS
    ]
    for row in table_of(BENCHMARK, tmp_path):
        # Figures have five digits, and there is one round.
        over = float(row["median_us"]) / float(row["products_us"])
        assert float(row["over_products"]) == pytest.approx(over, rel=1e-3)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "python -m benchmarks cells --cells rnn --batches 2 --hidden 8 --threads 1 --rounds 1\n" in page
    text = capsys.readouterr().out
    assert "[2/2] rnn float32 batch 2 hidden 8 training, 1 thread: " in text
    assert "\n1 thread, training, rnn: speed over the cell by hand " in text
    assert main(["cells", *tiny, "--out", str(tmp_path), "--resume", "--modes", "training"]) == 0
    assert "[1/" not in capsys.readouterr().out


def test_the_page_sums_up(tmp_path):
    """Ours is twice and half as fast as the cell by hand, and takes twice as long as the products."""
    rows = []
    for hidden, ratio in ((128, 2.0), (256, 0.5)):
        times = {"layernorm": 100.0, "torch": 100.0 * ratio}
        rows += rows_of_point(
            times, {"products_us": 50.0, "over_products": 2.0, "kernel": "native"}, hidden=hidden
        )
    common = {"cell": "lstm", "dtype": "float32", "batch": 8, "steps": 8, "mode": "training"}
    write_table(BENCHMARK, tmp_path / "cells.csv", rows, **common)
    assert main(["cells", "--report-only", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| 1 | training | lstm | 2 | 1.00 (0.50) | 0.50 (0.50) |" in page
    assert "slower than the cell by hand at 1 of 2 points, the slowest first;" in page
    assert "| 1 | lstm | float32 | training | 8 | 256 | 0.50 (0.50–0.50) |" in page
    assert "| float32 | training | 8 | 128 | native | 100 | 200 | 50.0 | 2.00 (2.00–2.00) |" in page
    assert "](bench-cells-1-thread.png)" in page
