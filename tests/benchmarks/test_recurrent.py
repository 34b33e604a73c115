"""The benchmarks of recurrent layers and of single steps: peers that agree, the limits, the page."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.core import limits, workers
from benchmarks.core.filling import latest
from benchmarks.core.memory import bytes_of, kept_for_backward
from benchmarks.core.subjects import Subject, difference
from benchmarks.core.timing import Samples
from benchmarks.recurrent import loops, measure, peers
from benchmarks.recurrent.case import make_case
from benchmarks.recurrent.measure import BENCHMARK, CELLS, MODES
from benchmarks.stream.measure import BENCHMARK as STREAM
from layernorm import Variant
from layernorm.variants import GATES
from tests.benchmarks.cases import (
    installed,
    measured,
    measured_by_worker,
    options_of,
    rows_of_point,
    table_of,
    write_table,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ("--cells", "lstm", "--hidden", "8", "--threads", "1")
TINY = ("recurrent", *SMALL, "--batches", "2", "--steps", "4", "--rounds", "2", "--time", "0.01")
measured_here = partial(measured, measure.measure, large=30.0, memory=True)


def grid(cell, **chosen):
    """Return points of a cell, in float32 unless other dtypes are chosen."""
    values = {"dtypes": ["float32"], "batches": [3], "hidden": [16], "steps": [5]} | chosen
    return list(BENCHMARK.grid(cells=[cell], **values))


@pytest.mark.parametrize("cell", CELLS)
def test_all_peers_compute_the_same_function(cell):
    names = installed(name for name in peers.PEERS if name != "compile")
    points = grid(cell, dtypes=["float32", "bfloat16"] if cell == "lstm" else ["float32"])
    rows, notes = measured_by_worker("recurrent", points, names, large=30.0, memory=True)
    assert [note for note in notes if "failed" in note] == []
    for row in rows:
        if row["status"] == "measured":
            # Some units in the last place, 1.2e-7 and 7.8e-3, over five steps.
            assert row["difference"] < {"float32": 1e-5, "bfloat16": 8e-2}[row["dtype"]], row
        else:
            assert row["peer"].startswith("onnxruntime")
            assert (row["status"], row["dtype"]) == ("not supported", "bfloat16")
    for mode in MODES:
        shown = [row["peer"] for row in rows if (row["mode"], row["dtype"]) == (mode, "float32")]
        assert shown == BENCHMARK.in_mode(names, mode)


@pytest.mark.parametrize("cell", CELLS)
def test_all_peers_take_the_same_steps(cell):
    points = STREAM.grid(cells=[cell], batches=[1, 3], hidden=[16])
    rows, notes = measured_by_worker("stream", points, installed(STREAM.peers))
    assert [note for note in notes if "failed" in note] == []
    for row in rows:
        if row["status"] == "measured":
            assert row["difference"] < {"float32": 1e-5, "bfloat16": 3e-2}[row["dtype"]], row
        else:
            assert row["peer"] == "layernorm" or (row["peer"], row["dtype"]) == ("onnxruntime", "bfloat16")


def test_torch_compile_computes_the_same_function_and_tells_how_long_it_compiled(monkeypatch):
    case = make_case("lstm", 2, 8, 3, training=True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # no compiler needed
    found = peers.PEERS["compile"](case)
    assert difference(found.results(), peers.PEERS["loop"](case).results()) < 1e-6
    assert found.compile_s > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_peer_that_computes_something_else_has_failed(mode, monkeypatch):
    def other_eps(case):
        return peers._layernorm(case, variant=Variant(eps=1e-2))

    def carried(case):
        return peers._layernorm(case, variant=Variant(cell="carried"))

    def no_gradient_of_x(case):
        made = peers.PEERS["torch"](case)
        return replace(made, results=lambda: made.results()[:1])

    monkeypatch.setitem(peers.PEERS, "layernorm", other_eps)
    monkeypatch.setitem(peers.PEERS, "script", carried)
    monkeypatch.setitem(peers.PEERS, "layernorm-none", no_gradient_of_x)
    points = grid("lstm", dtypes=["float32", "bfloat16"], modes=[mode])
    rows, notes = measured_here(points, ["layernorm", "layernorm-none", "torch", "script"])
    none = "measured" if mode == "inference" else "failed"
    assert [row["status"] for row in rows[:4]] == ["failed", none, "measured", "failed"]
    assert rows[-1]["status"] == "failed"
    assert notes[0].startswith(
        f"lstm float32 batch 3 hidden 16 {mode}: layernorm failed: its results are off"
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_limit_has_the_work_that_the_point_says(mode):
    from torch.utils.flop_counter import FlopCounterMode

    point = measure.Point("gru", "float32", 4, 16, 5, mode)
    case = make_case("gru", 4, 16, 5, mode == "training")
    call = limits.products(case.x, case.normalized["weight_ih"], case.normalized["weight_hh"], case.training)
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == pytest.approx(1e9 * point.gflop)
    assert GATES["gru"] == 3


def test_the_limit_multiplies_no_zeros(monkeypatch):
    factors = []
    multiply = torch.mm

    def mm(a, b, *, out):
        factors.extend((a, b))
        return multiply(a, b, out=out)

    case = make_case("gru", 4, 16, 5, True)
    call = limits.products(case.x, case.normalized["weight_ih"], case.normalized["weight_hh"], True)
    monkeypatch.setattr(torch, "mm", mm)
    call()
    assert len(factors) == 2 * (1 + 5 + 5 + 1 + 2)
    assert all(t.count_nonzero() == t.numel() for t in factors)


def test_reading_is_timed_without_the_call():
    samples = {"read": Samples(1, (5e-6, 7e-6, 6e-6)), "read nothing": Samples(1, (2e-6,))}
    assert limits.read_us(samples) == pytest.approx(4.0)
    assert limits.read_us({"read": samples["read nothing"], "read nothing": samples["read"]}) == 0.0
    assert list(limits.reads(4096)) == list(samples)


@pytest.mark.parametrize("make", [torch.nn.LSTM, torch.nn.GRU])
def test_the_memory_is_what_hooks_on_saved_tensors_find(make):
    module, x = make(16, 16), torch.randn(20, 4, 16, requires_grad=True)

    def forward():
        output, state = module(x)
        return [output, *(state if isinstance(state, tuple) else (state,))]

    forward()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        outputs = forward()
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters(), *outputs)}
    kept = bytes_of(t for t in seen if t.untyped_storage().data_ptr() not in known)
    assert kept > 0
    assert kept_for_backward(forward) == kept


def test_the_default_grid_is_thinned_as_its_help_says():
    def works(*arguments):
        options = options_of("recurrent", *arguments)
        options.threads = (1, 2)
        return BENCHMARK.works(options)

    one, two = works()
    assert max(point.gflop for point in one.points) <= measure.LARGE
    assert measure.LARGE < max(point.gflop for point in two.points) <= measure.LARGEST
    batches = {cell: {point.batch for point in two.points if point.cell == cell} for cell in CELLS}
    assert batches == {"lstm": {1, 8, 32, 128}, "gru": {1, 32}, "rnn": {1, 32}}
    assert {point.hidden for point in two.points if point.cell != "lstm"} == {128, 512}
    assert (one.job["memory"], two.job["memory"]) == (False, True)
    assert one.job["large"] == measure.LARGE
    assert [len(work.points) for work in works("--full")] == [192, 192]
    named = works("--cells", "gru", "--hidden", "1024", "--batches", "128", "--peers", "jax")
    assert [len(work.points) for work in named] == [4, 4]
    assert named[0].job["large"] == float("inf")
    assert named[0].job["peers"] == ["layernorm", "torch", "jax"]
    *_, last = works("--quick", "--peers", "compile", "--compile-limit", "7")
    assert (len(last.points), last.only, last.limit, last.threads) == (1, "compile", 7.0, 2)
    assert last.job["peers"] == ["layernorm", "torch", "compile"]


def test_at_large_points_a_few_peers_are_measured():
    points = grid("rnn", modes=["inference"])
    rows, _ = measured_here(points, ["layernorm", "torch", "loop"], large=0.0)
    assert [row["peer"] for row in rows] == list(measure.LARGE_PEERS)


def test_the_command_writes_table_pictures_and_page(tmp_path, capsys):
    assert main([*TINY, "--peers", "loop", "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "recurrent.csv",
        "bench-recurrent-1-thread.png",
        "benchmarks.md",
    }
    rows = table_of(BENCHMARK, tmp_path)
    assert [(row["mode"], row["dtype"], row["peer"]) for row in rows] == [
        (mode, dtype, peer)
        for mode in MODES
        for dtype in measure.DTYPES
        for peer in ("layernorm", "torch", "loop")
    ]
    for row in rows:
        assert row["status"] == "measured"
        # Figures have five digits; with two rounds the median of ratios is near the ratio of medians.
        over = float(row["median_us"]) / float(row["products_us"])
        assert float(row["over_products"]) == pytest.approx(over, rel=0.9)
        assert bool(row["saved_bytes"]) == (row["mode"] == "training")
        assert row["weights_us"] == ""  # with a batch of 1 only
    assert main(["stream", *SMALL, "--rounds", "1", "--peers", "eager", "--out", str(tmp_path)]) == 0
    rows = table_of(STREAM, tmp_path)
    assert [row["peer"] for row in rows] == ["layernorm", "torch", "eager"] * 2
    assert (tmp_path / "bench-stream-1-thread.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.index("## Recurrent networks") < page.index("## One step at a time")
    start = "python -m benchmarks recurrent --cells lstm --batches 2 --hidden 8 --steps 4 "
    assert f"{start}--peers layernorm,torch,loop --threads 1 --rounds 2\n" in page
    start = "python -m benchmarks stream --cells lstm --hidden 8 --peers layernorm,torch,eager "
    assert f"{start}--threads 1 --rounds 1\n" in page
    text = capsys.readouterr().out
    assert "[4/4] lstm bfloat16 batch 2 hidden 8 training, 1 thread: " in text
    assert "\n1 thread, training, bfloat16: speed over torch.nn, un-normalized " in text


def test_the_page_sums_up(tmp_path, capsys):
    """Ours is twice and half as fast as PyTorch's; by hand 3 and 4 times as slow as ours."""
    rows = []
    for hidden, ratio in ((128, 2.0), (256, 0.5)):
        times = {"layernorm": 100.0, "torch": 100.0 * ratio, "loop": 400.0, "script": 300.0}
        times["jax"] = "not installed"
        figures = {"products_us": 50.0, "over_products": 2.0, "saved_bytes": 2.5e6, "kernel": "native"}
        rows += rows_of_point(times, figures, hidden=hidden)
    common = {"cell": "lstm", "dtype": "float32", "batch": 8, "steps": 100, "mode": "training"}
    write_table(BENCHMARK, tmp_path / "recurrent.csv", rows, **common)
    assert main(["recurrent", "--report-only", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "1 thread, training, float32: speed over torch.nn, un-normalized 1.00 (0.50), best by hand 3.00 "
        "(3.00), JAX –, share of the products' limit 0.50 (0.50); slowest relative to torch.nn: lstm batch 8 "
        "hidden 256\n"
    )
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| 1 | training | float32 | 2 | 1.00 (0.50) | 3.00 (3.00) | – | 0.50 (0.50) |" in page
    assert "slower than `torch.nn`'s un-normalized layer at 1 of 2 points, the slowest first;" in page
    assert "| 1 | lstm | float32 | training | 8 | 256 | 0.50 (0.50–0.50) |" in page
    assert "| lstm | float32 | 8 | 128 | 2.5 | 2.5 | 2.5 | 2.5 |" in page
    row = (
        "| float32 | training | 8 | 256 | native | 100 | 50.0 | 400 | 300 | not installed | 50.0 | – | 0.50 "
    )
    assert row in page
    assert "](bench-recurrent-1-thread.png)" in page


@pytest.mark.parametrize(
    ("error", "status"), [(workers.TimedOutError, "timed out"), (workers.WorkerError, "failed")]
)
def test_a_peer_whose_own_worker_ends_is_listed(error, status, tmp_path, monkeypatch):
    def late(module, job, threads, limit):
        if job["peers"] == ["layernorm", "torch", "compile"]:
            assert limit == 5.0
            yield {"point": 0}
            raise error("the worker took longer than 5 seconds")
        yield from ()

    monkeypatch.setattr(workers, "events", late)
    arguments = [*TINY, "--peers", "compile", "--compile-limit", "5", "--out", str(tmp_path)]
    arguments += ["--modes", "training", "--dtypes", "float32"]
    assert main(arguments) == 0
    (row,) = table_of(BENCHMARK, tmp_path)
    assert (row["peer"], row["status"], row["hidden"]) == ("compile", status, "8")


def test_a_peer_that_is_missing_is_listed(monkeypatch):
    for name in ("jax", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    points = grid("rnn", batches=[1], hidden=[8], modes=["inference"])
    rows, _ = measured_here(points, ["layernorm", "torch", "jax", "onnxruntime"])
    assert [row["status"] for row in rows] == ["measured", "measured", "not installed", "not installed"]
    assert float(rows[0]["weights_us"]) >= 0
    assert latest(points[0].name, rows[2:], 1) == (
        "rnn float32 batch 1 hidden 8 inference, 1 thread: jax not installed; onnxruntime not installed"
    )


def test_torchscript_takes_every_cell():
    for functions in (loops.SEQUENCES, loops.CELLS):
        for function in functions.values():
            assert isinstance(loops.scripted(function), torch.jit.ScriptFunction)
            assert loops.scripted(function) is loops.scripted(function)


def test_a_difference_sees_nan_and_shapes():
    ones = torch.ones(3)
    assert not difference([ones * float("nan")], [ones]) <= 1e9
    assert not difference([ones, ones * float("nan"), ones], [ones] * 3) <= 1e9
    with pytest.raises(RuntimeError, match=r"a result of shape \(1,\), expected \(3,\)"):
        difference([ones[:1]], [ones])
    with pytest.raises(RuntimeError, match="1 results, expected 2"):
        difference([ones], [ones, ones])
    assert Subject(list, list).compile_s is None
