"""The benchmarks of recurrent layers and of single steps: peers that agree, the limits, the commands."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from benchmarks.core import limits, workers
from benchmarks.core.benchmark import Work
from benchmarks.core.command import BENCHMARKS, latest
from benchmarks.core.memory import bytes_of, kept_for_backward
from benchmarks.core.subjects import Subject, difference
from benchmarks.core.table import Table, read
from benchmarks.core.timing import Samples
from benchmarks.recurrent import loops as recurrent_loops
from benchmarks.recurrent import measure as recurrent
from benchmarks.recurrent import peers as recurrent_peers
from benchmarks.stream import measure as stream
from benchmarks.stream import peers as stream_peers
from layernorm.cli import _parser, main
from layernorm.variants import GATES

pytestmark = pytest.mark.usefixtures("one_thread")
CELLS = recurrent.CELLS
SMALL = ["--cells", "lstm", "--hidden", "8", "--threads", "1"]
TINY = ["bench", "recurrent", *SMALL, "--batches", "2", "--steps", "4", "--rounds", "2", "--time", "0.01"]
FEW = ["--peers", "loop"]
#: Peers and the package that each needs.
PACKAGES = {"jax": "jax", "onnxruntime": "onnxruntime", "onnxruntime-none": "onnxruntime"}


def job(points, peers):
    """What a worker is told: one round."""
    settings = {"peers": list(peers), "rounds": 1, "each": 0.01, "budget": 1.0, "large": 30.0}
    return {"points": [asdict(point) for point in points], "threads": 1, "memory": True, **settings}


def installed(peers):
    """Those whose packages are here; ONNX Runtime needs ONNX to be given a model."""
    missing = {peer for peer, package in PACKAGES.items() if find_spec(package) is None}
    if find_spec("onnx") is None:
        missing |= {"onnxruntime", "onnxruntime-none"}
    return [peer for peer in peers if peer not in missing]


@pytest.mark.parametrize("cell", CELLS)
def test_all_peers_compute_the_same_function(cell):
    peers = installed(p for p in recurrent_peers.PEERS if p != "compile")
    points = recurrent.grid([cell], ["float32", "bfloat16"], [3], [16], 5, recurrent.MODES)
    events = list(workers.events("benchmarks.recurrent.measure", job(points, peers), 1))
    rows = [row for event in events for row in event.get("rows", ())]
    assert [event["note"] for event in events if "note" in event and "failed" in event["note"]] == []
    for row in rows:
        if row["status"] == "measured":
            # Some units in the last place, 1.2e-7 and 7.8e-3, over five steps.
            assert row["difference"] < {"float32": 1e-5, "bfloat16": 8e-2}[row["dtype"]], row
        else:
            assert row["peer"].startswith("onnxruntime")
            assert (row["status"], row["dtype"]) == ("not supported", "bfloat16")
    expected = {
        mode: [peer for peer in peers if recurrent_peers.ONLY_IN.get(peer, mode) == mode]
        for mode in recurrent.MODES
    }
    for mode in recurrent.MODES:
        shown = [r["peer"] for r in rows if (r["mode"], r["dtype"]) == (mode, "float32")]
        assert shown == expected[mode]


@pytest.mark.parametrize("cell", CELLS)
def test_all_peers_take_the_same_steps(cell):
    peers = installed(stream_peers.PEERS)
    points = stream.grid([cell], ["float32", "bfloat16"], [1, 3], [16])
    events = list(workers.events("benchmarks.stream.measure", job(points, peers), 1))
    assert [event["note"] for event in events if "note" in event and "failed" in event["note"]] == []
    for row in (row for event in events for row in event.get("rows", ())):
        if row["status"] == "measured":
            assert row["difference"] < {"float32": 1e-5, "bfloat16": 3e-2}[row["dtype"]], row
        else:
            assert row["peer"] == "layernorm" or (row["peer"], row["dtype"]) == ("onnxruntime", "bfloat16")


def test_torch_compile_computes_the_same_function_and_tells_how_long_it_compiled(monkeypatch):
    case = recurrent_peers.make_case("lstm", 2, 8, 3, training=True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # no compiler needed
    found = recurrent_peers.PEERS["compile"](case)
    assert difference(found.results(), recurrent_peers.PEERS["loop"](case).results()) < 1e-6
    assert found.compile_s > 0


@pytest.mark.parametrize("mode", recurrent.MODES)
def test_a_peer_that_computes_something_else_has_failed(mode, monkeypatch):
    def other_eps(case):
        options = {"variant": layernorm_with(eps=1e-2)}
        return recurrent_peers._layernorm(case, **options)

    def carried(case):
        return recurrent_peers._layernorm(case, variant=layernorm_with(cell="carried"))

    def no_gradient_of_x(case):
        made = recurrent_peers.PEERS["torch"](case)
        return replace(made, results=lambda: made.results()[:1])

    monkeypatch.setitem(recurrent_peers.PEERS, "layernorm", other_eps)
    monkeypatch.setitem(recurrent_peers.PEERS, "script", carried)
    monkeypatch.setitem(recurrent_peers.PEERS, "layernorm-none", no_gradient_of_x)
    events = []
    points = recurrent.grid(["lstm"], ["float32", "bfloat16"], [3], [16], 5, [mode])
    peers = ["layernorm", "layernorm-none", "torch", "script"]
    recurrent.measure(job(points, peers), events.append)
    full, half = (event["rows"] for event in events if "rows" in event)
    none = "measured" if mode == "inference" else "failed"
    assert [row["status"] for row in full] == ["failed", none, "measured", "failed"]
    assert [row["status"] for row in half][3] == "failed"
    notes = [event["note"] for event in events if "note" in event]
    assert notes[0].startswith(
        f"lstm float32 batch 3 hidden 16 {mode}: layernorm failed: its results are off"
    )


def layernorm_with(**fields):
    from layernorm import Variant

    return Variant(**fields)


@pytest.mark.parametrize("mode", recurrent.MODES)
def test_the_limit_has_the_work_that_the_point_says(mode):
    from torch.utils.flop_counter import FlopCounterMode

    point = recurrent.Point("gru", "float32", 4, 16, 5, mode)
    case = recurrent_peers.make_case("gru", 4, 16, 5, mode == "training")
    call = limits.products(case.x, case.normalized["weight_ih"], case.normalized["weight_hh"], case.training)
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == pytest.approx(1e9 * point.gflop)
    assert GATES["gru"] == 3


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
        options = _parser().parse_args(["bench", "recurrent", *arguments])
        options.threads = (1, 2)
        return recurrent.RECURRENT.works(options)

    one, two = works()
    assert max(point.gflop for point in one.points) <= recurrent.LARGE
    assert recurrent.LARGE < max(point.gflop for point in two.points) <= recurrent.LARGEST
    batches = {cell: {point.batch for point in two.points if point.cell == cell} for cell in CELLS}
    assert batches == {"lstm": {1, 8, 32, 128}, "gru": {1, 32}, "rnn": {1, 32}}
    assert {point.hidden for point in two.points if point.cell != "lstm"} == {128, 512}
    assert (one.job["memory"], two.job["memory"]) == (False, True)
    assert one.job["large"] == recurrent.LARGE
    assert [len(work.points) for work in works("--full")] == [192, 192]
    named = works("--cells", "gru", "--hidden", "1024", "--batches", "128", "--peers", "jax")
    assert [len(work.points) for work in named] == [4, 4]
    assert named[0].job["large"] == float("inf")
    assert named[0].job["peers"] == ["layernorm", "torch", "jax"]
    *_, last = works("--quick", "--peers", "compile", "--compile-limit", "7")
    assert (len(last.points), last.only, last.limit, last.threads) == (1, "compile", 7.0, 2)
    assert last.job["peers"] == ["layernorm", "torch", "compile"]


def test_at_large_points_a_few_peers_are_measured():
    events = []
    points = recurrent.grid(["rnn"], ["float32"], [2], [8], 3, ["inference"])
    recurrent.measure(job(points, ["layernorm", "torch", "loop"]) | {"large": 0.0}, events.append)
    assert [row["peer"] for row in events[-1]["rows"]] == list(recurrent.LARGE_PEERS)


def test_the_command_writes_table_pictures_and_page(tmp_path, capsys):
    assert main([*TINY, *FEW, "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "recurrent.csv",
        "bench-recurrent-1-thread.png",
        "benchmarks.md",
    }
    rows = read(tmp_path / "recurrent.csv", recurrent.COLUMNS)
    assert [(row["mode"], row["dtype"], row["peer"]) for row in rows] == [
        (mode, dtype, peer)
        for mode in recurrent.MODES
        for dtype in recurrent.DTYPES
        for peer in ("layernorm", "torch", "loop")
    ]
    for row in rows:
        assert row["status"] == "measured"
        # Figures have five digits; with two rounds the median of ratios is near the ratio of medians.
        over = float(row["median_us"]) / float(row["products_us"])
        assert float(row["over_products"]) == pytest.approx(over, rel=0.9)
        assert bool(row["saved_bytes"]) == (row["mode"] == "training")
        assert row["weights_us"] == ""  # with a batch of 1 only
    assert main(["bench", "stream", *SMALL, "--rounds", "1", "--peers", "eager", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "stream.csv", stream.COLUMNS)
    assert [row["peer"] for row in rows] == ["layernorm", "torch", "eager"] * 2
    assert (tmp_path / "bench-stream-1-thread.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.index("## Recurrent networks") < page.index("## One step at a time")
    start = "layernorm bench recurrent --cells lstm --batches 2 --hidden 8 --steps 4 "
    assert f"{start}--peers layernorm,torch,loop --threads 1 --rounds 2\n" in page
    assert (
        "layernorm bench stream --cells lstm --hidden 8 --peers layernorm,torch,eager --threads 1 --rounds 1"
        in page
    )
    text = capsys.readouterr().out
    assert "[4/4] lstm bfloat16 batch 2 hidden 8 training, 1 thread: " in text
    assert "\n1 thread, training, bfloat16: speed over torch.nn, un-normalized " in text


def fixed(path):
    """A table of two points: ours twice and half as fast as PyTorch's; by hand 3 and 4 times as slow."""
    common = dict.fromkeys(recurrent.COLUMNS, "") | {
        "cell": "lstm",
        "dtype": "float32",
        "batch": 8,
        "steps": 100,
        "mode": "training",
        "threads": 1,
        "status": "measured",
        "kernel": "native",
        "rounds": 15,
        "machine": "A processor",
        "date": "2026-01-02T03:04:05Z",
    }
    rows = []
    for hidden, ratio in ((128, 2.0), (256, 0.5)):
        times = {"layernorm": 100.0, "torch": 100.0 * ratio, "loop": 400.0, "script": 300.0}
        for peer, time_us in times.items():
            own = 100.0 * ratio / time_us
            figures = {"median_us": time_us, "ratio_to_torch": own, "ratio_q25": own, "ratio_q75": own}
            figures |= {"products_us": 50.0, "over_products": time_us / 50.0, "saved_bytes": 2.5e6}
            rows.append(common | figures | {"hidden": hidden, "peer": peer})
        rows.append(common | {"hidden": hidden, "peer": "jax", "status": "not installed", "rounds": ""})
    with Table(path, recurrent.COLUMNS, keep=lambda row: False) as table:
        table.add(rows)


def test_the_page_sums_up(tmp_path, capsys):
    fixed(tmp_path / "recurrent.csv")
    assert main(["bench", "recurrent", "--report-only", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "1 thread, training, float32: speed over torch.nn, un-normalized 1.00 (0.50), best by hand 3.00 "
        "(3.00), JAX –, share of the products' limit 0.50 (0.50); slowest beside torch.nn: lstm batch 8 "
        "hidden 256\n"
    )
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| 1 | training | float32 | 2 | 1.00 (0.50) | 3.00 (3.00) | – | 0.50 (0.50) |" in page
    assert "slower than `torch.nn`'s un-normalized layer at 1 of 2 points, at this most:" in page
    assert "| 1 | lstm | float32 | training | 8 | 256 | 0.50 (0.50–0.50) |" in page
    assert "| lstm | float32 | 8 | 128 | 2.5 | 2.5 | 2.5 | 2.5 |" in page
    row = (
        "| float32 | training | 8 | 256 | native | 100 | 50.0 | 400 | 300 | not installed | 50.0 | – | 0.50 "
    )
    assert row in page
    assert "](bench-recurrent-1-thread.png)" in page


def test_a_run_that_was_stopped_goes_on(tmp_path):
    arguments = [*TINY, *FEW, "--out", str(tmp_path), "--hidden", ",".join(map(str, range(8, 128)))]
    process = subprocess.Popen(
        [sys.executable, "-m", "layernorm.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    table = tmp_path / "recurrent.csv"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (table.is_file() and table.read_text().count("\n") >= 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == f"layernorm: interrupted; what was measured is in {table}; go on with --resume\n"
    before = table.read_text().splitlines()
    assert (len(before) - 1) % 3 == 0  # whole points
    # The four points of the smallest size, one of which at least is there.
    assert main([*TINY, *FEW, "--out", str(tmp_path), "--resume"]) == 0
    after = table.read_text().splitlines()
    assert after[: len(before)] == before
    keys = [(row["hidden"], row["mode"], row["dtype"], row["peer"]) for row in csv.DictReader(after)]
    assert len(keys) == len(set(keys))
    assert sum(key[0] == "8" for key in keys) == 12
    # Without --resume only the points of the run are replaced.
    assert main([*TINY, *FEW, "--out", str(tmp_path), "--modes", "training"]) == 0
    fresh = list(csv.DictReader(table.read_text().splitlines()))
    assert sorted((r["hidden"], r["mode"], r["dtype"], r["peer"]) for r in fresh) == sorted(keys)


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
    (row,) = read(tmp_path / "recurrent.csv", recurrent.COLUMNS)
    assert (row["peer"], row["status"], row["hidden"]) == ("compile", status, "8")


def test_the_limit_of_a_worker_ends_it(tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(workers.TimedOutError, match=r"took longer than 0\.5 seconds"):
        list(workers.events("endless", {}, 1, limit=0.5))


def test_a_peer_that_is_missing_is_listed(monkeypatch):
    for name in ("jax", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    events = []
    points = recurrent.grid(["rnn"], ["float32"], [1], [8], 3, ["inference"])
    recurrent.measure(job(points, ["layernorm", "torch", "jax", "onnxruntime"]), events.append)
    rows = events[-1]["rows"]
    assert [row["status"] for row in rows] == ["measured", "measured", "not installed", "not installed"]
    assert float(rows[0]["weights_us"]) >= 0
    work = Work([*recurrent.grid(["rnn"], ["float32"], [1], [8], 3, ["inference"])], {}, 1)
    assert latest(work.points[0].name, rows[2:], 1) == (
        "rnn float32 batch 1 hidden 8 inference, 1 thread: jax not installed; onnxruntime not installed"
    )


def test_torchscript_takes_every_cell():
    for functions in (recurrent_loops.SEQUENCES, recurrent_loops.CELLS):
        for function in functions.values():
            assert isinstance(recurrent_loops.scripted(function), torch.jit.ScriptFunction)
            assert recurrent_loops.scripted(function) is recurrent_loops.scripted(function)


def test_a_difference_sees_nan_and_shapes():
    ones = torch.ones(3)
    assert not difference([ones * float("nan")], [ones]) <= 1e9
    assert not difference([ones, ones * float("nan"), ones], [ones] * 3) <= 1e9
    with pytest.raises(RuntimeError, match=r"a result of shape \(1,\), expected \(3,\)"):
        difference([ones[:1]], [ones])
    with pytest.raises(RuntimeError, match="1 results, expected 2"):
        difference([ones], [ones, ones])
    assert Subject(list, list).compile_s is None


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_help_is_there(name, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", name, "--help"])
    assert end.value.code == 0
    assert "--resume" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["recurrent", "--cells", "lstm,mgu"],
            "--cells: expected some of lstm, gru, rnn, separated by commas",
        ),
        (["recurrent", "--batches", "1,0"], "--batches: expected a whole number of at least 1, got '0'"),
        (["recurrent", "--hidden", "big"], "--hidden: expected a whole number of at least 1, got 'big'"),
        (["recurrent", "--dtypes", "float64"], "--dtypes: expected some of float32, bfloat16"),
        (["recurrent", "--modes", "forward"], "--modes: expected some of inference, training"),
        (["recurrent", "--time", "0"], "--time: expected a number of seconds greater than 0, got '0'"),
        (["recurrent", "--peers", "keras"], "got 'keras'"),
        (["recurrent", "--compile-limit", "inf"], "--compile-limit: expected a number of seconds"),
        (["stream", "--batches", "-1"], "--batches: expected a whole number of at least 1, got '-1'"),
        (["stream", "--peers", "compile"], "got 'compile'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"layernorm bench {arguments[0]}: error: argument --")
    assert text in errors
    assert errors.count("\n") == 1
