"""The benchmark of the norms: timing, the table, the page, and the command from end to end."""

from __future__ import annotations

import csv
import errno
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.core import command, report, timing, workers
from benchmarks.core.benchmark import in_checkout
from benchmarks.core.subjects import Subject
from benchmarks.core.table import Table, TableError, measures, read
from benchmarks.core.timing import Samples, interleaved, order
from benchmarks.norms import measure as norms
from benchmarks.norms import peers as norms_peers
from benchmarks.norms import report as norms_report
from layernorm import backends, machine
from layernorm.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["bench", "norms", "--sizes", "4x8", "--threads", "1", "--peers", "layernorm,torch"]


def job(points, names):
    """What a worker of the norms is told: one round."""
    fields = [asdict(point) for point in points]
    return {"points": fields, "peers": list(names), "rounds": 1, "budget": 1.0, "threads": 1}


class Clock:
    """A clock that only the subjects move."""

    def __init__(self):
        self.now, self.called = 0.0, []

    def __call__(self):
        return self.now

    def subject(self, name, seconds):
        def call():
            self.called.append(name)
            self.now += seconds

        return call


def test_timing_samples_every_subject_once_in_each_round_in_changing_order():
    clock = Clock()
    lasting = {"a": 0.004, "b": 0.05, "c": 0.001}
    subjects = {name: clock.subject(name, seconds) for name, seconds in lasting.items()}
    samples = interleaved(subjects, 7, least=0.003, budget=1e9, clock=clock)
    # Enough calls for the least seconds, 1.2 times over where one is not enough.
    assert {name: found.calls for name, found in samples.items()} == {"a": 1, "b": 1, "c": 4}
    for name, seconds in lasting.items():
        assert samples[name].seconds == pytest.approx([seconds] * 7)
    # One call more before a sample of short calls, none before long ones.
    sampled = {"a": 2, "b": 1, "c": 5}
    expected = [n for index in range(7) for n in order("abc", index) for _ in range(sampled[n])]
    assert clock.called[-len(expected) :] == expected


def test_a_context_surrounds_each_sample_and_is_not_timed():
    clock = Clock()
    open_now, seen = [], []

    @contextmanager
    def context():
        clock.now += 5.0
        open_now.append(True)
        yield
        open_now.clear()
        clock.now += 5.0

    def call():
        clock.now += 0.004
        seen.append(("a", bool(open_now)))

    def other():
        clock.now += 0.004
        seen.append(("b", bool(open_now)))

    samples = interleaved({"a": call, "b": other}, 3, budget=1e9, contexts={"a": context}, clock=clock)
    assert samples["a"].seconds == pytest.approx([0.004] * 3)
    assert set(seen) == {("a", True), ("b", False)}


def test_every_subject_is_as_often_at_every_place_and_after_several_others():
    orders = [order("abcd", index) for index in range(8)]
    assert all(sorted(names) == list("abcd") for names in orders)
    for place in range(4):
        assert set(Counter(names[place] for names in orders).values()) == {2}
    before_b = {names[names.index("b") - 1] for names in orders if names.index("b")}
    assert before_b == {"a", "c"}


def test_timing_stops_at_its_budget_but_not_before_a_few_rounds():
    def rounds(budget):
        clock = Clock()
        samples = interleaved({"a": clock.subject("a", 1.0)}, 30, budget=budget, clock=clock)
        return len(samples["a"].seconds)

    assert rounds(1.0) == timing.LEAST_ROUNDS
    assert rounds(12.5) == 12  # 1 call to calibrate, then 12 until 13 seconds are over
    assert rounds(1e9) == 30


def test_a_subject_that_has_had_its_seconds_is_left_out_of_further_rounds():
    clock = Clock()
    subjects = {"slow": clock.subject("slow", 0.2), "fast": clock.subject("fast", 0.01)}
    samples = interleaved(subjects, 12, clock=clock, least_rounds=3, each=0.1)
    assert {name: len(found.seconds) for name, found in samples.items()} == {"slow": 3, "fast": 10}
    row = measures(samples["slow"], samples["fast"])  # of the rounds that both took part in
    assert (row["rounds"], row["ratio_to_torch"]) == (3, pytest.approx(0.05))


def test_a_pause_of_the_process_does_not_make_samples_short():
    clock = Clock()
    lasting = iter([1e-4, 5.0, 1e-4])  # the second call of the calibration is disturbed

    def call():
        clock.now += next(lasting, 1e-4)

    # A sample that is as long as the disturbed one is believed at once; one of 10 ms is not.
    assert interleaved({"a": call}, 1, clock=clock)["a"].calls == 1
    lasting = iter([1e-4, 0.01, 1e-4])
    assert interleaved({"a": call}, 1, clock=clock)["a"].calls >= 30


def test_the_ratio_is_the_median_of_the_ratios_of_each_round():
    base, other = Samples(3, (4e-6, 9e-6, 5e-6)), Samples(7, (2e-6, 1e-6, 5e-6))
    row = measures(other, base)
    assert (row["calls_per_sample"], row["rounds"]) == (7, 3)
    assert (row["q25_us"], row["median_us"], row["q75_us"]) == (1.5, 2.0, 3.5)
    # 2, 9 and 1; the medians alone would give 2.5.
    assert (row["ratio_q25"], row["ratio_to_torch"], row["ratio_q75"]) == (1.5, 2.0, 5.5)


def test_the_command_writes_table_picture_and_page(tmp_path, capsys):
    assert main([*TINY, "--rounds", "1", "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"norms.csv", "bench-norms.png", "benchmarks.md"}
    rows = read(tmp_path / "norms.csv", norms.COLUMNS)
    points = [(row["dtype"], row["mode"], row["peer"]) for row in rows]
    assert points == [
        (dtype, mode, peer)
        for dtype in ("float32", "bfloat16")
        for mode in ("forward", "training")
        for peer in ("layernorm", "torch")
    ]
    for ours, torchs in zip(rows[::2], rows[1::2], strict=True):
        assert (ours["operator"], ours["rows"], ours["width"]) == ("layer_norm", "4", "8")
        assert (ours["status"], ours["threads"]) == ("measured", "1")
        assert ours["kernel"] in backends.KERNELS
        time, base, ratio, limit, copy = (
            float(row[name])
            for row, name in (
                (ours, "median_us"),
                (torchs, "median_us"),
                (ours, "ratio_to_torch"),
                (ours, "limit_us"),
                (ours, "copy_us"),
            )
        )
        # Figures have five digits. With one round the median of the ratios is the ratio of the medians.
        assert ratio == pytest.approx(base / time, rel=1e-4)
        assert torchs["ratio_to_torch"] == torchs["ratio_q25"] == torchs["ratio_q75"] == "1.0"
        assert limit == pytest.approx({"forward": 1.0, "training": 2.5}[ours["mode"]] * copy, rel=1e-4)
        assert float(ours["fraction_of_limit"]) == pytest.approx(limit / time, rel=1e-4)
        assert float(ours["other_cpus"] or 0) >= 0
        assert ours["machine"] == machine.describe()
        assert ours["torch"] == torch.__version__
    assert (tmp_path / "bench-norms.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "benchmarks.md").read_text()
    assert "layernorm bench norms --sizes 4x8 --peers layernorm,torch --threads 1 --rounds 1\n" in page
    text = capsys.readouterr().out
    assert text.count("times torch's speed") == 4
    assert "[4/4] layer_norm bfloat16 4×8 training, 1 thread: " in text


def test_the_machine_has_no_host_name_and_no_path():
    found = machine.environment()
    assert tuple(found) == machine.COLUMNS
    assert not {os.uname().nodename, str(Path.home()), str(Path.cwd())} & set(found.values())
    assert "/" not in found["machine"]


@pytest.mark.parametrize("operator", backends.NORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_operator_is_measured_in_both_modes(operator, dtype):
    events = []
    points = list(norms.grid([operator], [dtype], [(3, 16)], norms.MODES))
    norms.measure(job(points, ["layernorm", "torch"]), events.append)
    assert [list(event) for event in events] == [["point"], ["rows"]] * 2
    for event in events[1::2]:
        assert [row["status"] for row in event["rows"]] == ["measured", "measured"]


def test_a_peer_that_is_missing_cannot_or_fails_is_listed(monkeypatch):
    def wrong(case):
        tensors = [torch.zeros_like(case.inputs[0])]
        return Subject(lambda: None, lambda: tensors)

    for name in ("jax", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(norms_peers.PEERS, "torch.compile", wrong)
    events = []
    points = list(norms.grid(["layer_norm"], ["float32"], [(3, 16)], norms.MODES))
    norms.measure(job(points, list(norms_peers.PEERS)), events.append)
    forward, training = (event["rows"] for event in events if "rows" in event)
    shared = {
        "layernorm": "measured",
        "torch": "measured",
        "torch.compile": "failed",
        "jax": "not installed",
    }
    assert {row["peer"]: row["status"] for row in forward} == {**shared, "onnxruntime": "not installed"}
    assert {row["peer"]: row["status"] for row in training} == {**shared, "onnxruntime": "not supported"}
    notes = [event["note"] for event in events if "note" in event]
    assert notes[0] == "layer_norm float32 3×16 forward: torch.compile failed: its results are off by 1.0e+00"
    assert "1 results, expected 4" in notes[1]
    rows = [{**row, "threads": 1, "other_cpus": 0.25} for row in forward]
    line = command.latest("here", rows, 1)
    assert line.endswith("; other work took 0.2 CPUs, so these times are off")
    line = command.latest("here", [{**row, "other_cpus": ""} for row in rows], 1)
    assert line.endswith("torch.compile failed; jax not installed; onnxruntime not installed")


@pytest.mark.parametrize("peer", ["jax", "onnxruntime"])
def test_the_other_peers_give_the_same_results(peer):
    if any(importlib.util.find_spec(name) is None for name in (peer, "onnx" if peer != "jax" else peer)):
        pytest.skip(f"{peer} is not installed")
    points = [
        *norms.grid(["layer_norm"], ["bfloat16"], [(5, 48)], norms.MODES),
        *norms.grid(["add_rms_norm"], ["float32"], [(5, 48)], norms.MODES),
    ]
    events = list(workers.events("benchmarks.norms.measure", job(points, ["layernorm", "torch", peer]), 1))
    assert [e["note"] for e in events if "note" in e and "is not supported" not in e["note"]] == []
    found = [e for e in events if "rows" in e]
    for point, event in zip(points, found, strict=True):
        status = event["rows"][2]["status"]
        # Whether ONNX Runtime has bfloat16 depends on its version.
        unsupported = peer == "onnxruntime" and (point.mode == "training" or point.dtype == "bfloat16")
        assert status == "measured" or (unsupported and status == "not supported"), point


def fixed(path: Path, rows: list[dict]) -> None:
    """A table with these rows; what they do not say is the same in all."""
    common = {
        "operator": "layer_norm",
        "dtype": "float32",
        "rows": 64,
        "width": 256,
        "mode": "forward",
        "threads": 1,
        "status": "measured",
        "rounds": 30,
        "machine": "A processor, 2 CPUs, AVX2",
        "python": "3.11.7",
        "torch": "2.13.0",
        "layernorm": "0.1.0",
        "jax": "not installed",
        "onnxruntime": "1.20.0",
        "other_cpus": 0.02,
        "commit": "1234e56+",  # looks like a number
        "date": "2026-01-02T03:04:05Z",
    }
    with Table(path, norms.COLUMNS, keep=lambda row: False) as table:
        table.add(common | row for row in rows)


def point(
    time: float, ratio: float, jax: str = "not installed", ort: float | None = None, **keys
) -> list[dict]:
    """The rows of a point: time and ratio of ours; times 100·ratio of torch are implied."""
    figures = {"ratio_q25": ratio - 0.01, "ratio_to_torch": ratio, "ratio_q75": ratio + 0.01}
    rows = [
        {"peer": "layernorm", "kernel": "native", "median_us": time, "fraction_of_limit": 0.5, **figures},
        {"peer": "torch", "median_us": time * ratio, "ratio_to_torch": 1, "ratio_q25": 1, "ratio_q75": 1},
        {"peer": "jax", "status": jax},
    ]
    if ort is None:
        rows.append({"peer": "onnxruntime", "status": "not supported"})
    else:
        rows.append(
            {
                "peer": "onnxruntime",
                "median_us": time * ratio / ort,
                "ratio_to_torch": ort,
                "ratio_q25": ort,
                "ratio_q75": ort,
            }
        )
    return [row | keys for row in rows]


@pytest.fixture
def outputs(tmp_path):
    found = in_checkout(tmp_path)
    rows = [
        *point(10.0, 2.0, ort=4.0),
        *point(1000.0, 0.5, ort=0.25, rows=512, width=512),
        *point(50.0, 0.995, mode="training"),
        *point(8.0, 3.0, threads=2, ort=1.0),
    ]
    fixed(found.table("norms"), rows)
    return found


def test_the_page_has_the_geometric_means(outputs):
    table = norms_report.means(norms_report.load(outputs.table("norms"))).set_index(["threads", "mode"])
    assert table.layernorm[1, "forward"] == pytest.approx(1.0)  # of 2 and 1/2
    assert table.onnxruntime[1, "forward"] == pytest.approx(1.0)
    assert table.layernorm[1, "all"] == pytest.approx(0.995 ** (1 / 3))
    assert table.layernorm["all", "all"] == pytest.approx((3 * 0.995) ** (1 / 4))
    assert table.layernorm_points["all", "all"] == 4
    assert table.onnxruntime_points["all", "all"] == 3
    report.write("norms", outputs)
    page = outputs.page.read_text()
    assert "| all | all | 4 | 1.31 | not installed | 1.00 (3 points) |" in page
    assert "| 1 | training | 1 | 0.99 | not installed | not supported |" in page


def test_the_page_names_the_slow_points_and_the_missing_peers(outputs):
    report.write("norms", outputs)
    page = outputs.page.read_text()
    assert "slower than PyTorch's eager operator at 2 of 4 points" in page
    slow = page[page.index("from the slowest on") : page.index("Points at which another")]
    assert slow.index("| 1 | float32 | 512×512 | forward | 0.50 (0.49–0.51) |") < slow.index(
        "| 1 | float32 | 64×256 | training | 0.99 (0.98–1.00) |"
    )
    assert "another peer is faster than `layernorm`: `onnxruntime` at 1 of 3." in page
    assert "| float32 | 64×256 | forward | native | 10.0 | 20.0 | not installed | 5.00 | 2.00 (1.99–2" in page
    assert "| 1,000 | 500 | not installed | 2,000 | 0.50 (0.49–0.51) |" in page
    assert "A processor, 2 CPUs, AVX2. Python 3.11.7, PyTorch 2.13.0, layernorm 0.1.0 " in page
    assert (
        "(commit 1234e56 with changes), JAX not installed, ONNX Runtime 1.20.0. Measured on 2026-01-02."
        in page
    )
    assert "There are 30 rounds. Other work on the machine took at most 0.02 CPUs during a point." in page
    assert "](images/bench-norms.png)" in page
    assert "`benchmarks/results/norms.csv`" in page
    assert str(outputs.page.parent) not in page
    assert outputs.image("norms").is_file()


def test_report_only_writes_the_page_again_without_measuring(tmp_path, capsys):
    fixed(tmp_path / "norms.csv", point(10.0, 2.0, ort=4.0))
    before = (tmp_path / "norms.csv").read_bytes()
    assert main(["bench", "norms", "--report-only", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "norms.csv").read_bytes() == before
    assert "at no point of 1 slower" in (tmp_path / "benchmarks.md").read_text()
    assert capsys.readouterr().out == (
        "layer_norm, 1 thread, forward: 2.00 (2.00) times PyTorch's speed: the geometric mean (the least)\n"
        f"Page: {tmp_path / 'benchmarks.md'}\n"
    )


def test_a_run_keeps_the_other_operators_of_an_earlier_table(tmp_path, monkeypatch):
    fixed(tmp_path / "norms.csv", point(10.0, 2.0) + point(20.0, 3.0, operator="rms_norm"))

    def events(module, job, threads, limit):
        yield {"rows": [{"operator": "layer_norm", "peer": "torch", "threads": threads, "status": "failed"}]}
        raise workers.WorkerError("the worker was killed")

    monkeypatch.setattr(workers, "events", events)
    monkeypatch.setattr(command, "latest", lambda point, rows, threads: "")
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    rows = read(tmp_path / "norms.csv", norms.COLUMNS)
    assert [(row["operator"], row["peer"]) for row in rows] == [
        *(("rms_norm", peer) for peer in ("layernorm", "torch", "jax", "onnxruntime")),
        ("layer_norm", "torch"),
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--operator", "norm"],
            "--operator: expected some of layer_norm, rms_norm, add_layer_norm, add_rms",
        ),
        (["--dtypes", "float32,int8"], "--dtypes: expected some of float32, bfloat16, float16, separated by"),
        (
            ["--sizes", "64x256,0x8"],
            "--sizes: expected ROWSxWIDTH separated by commas, as in 64x256,8x768; got '0x8'",
        ),
        (["--modes", ""], "--modes: expected names separated by commas, got ''"),
        (["--threads", "none"], "--threads: expected numbers from 1 to the "),
        (["--threads", "100000"], "here, or all; got '100000'"),
        (["--peers", "torch,apex"], "got 'apex'"),
        (["--rounds", "0"], "--rounds: expected a whole number of at least 1, got '0'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "norms", *arguments])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("layernorm bench norms: error: argument --")
    assert text in errors
    assert errors.count("\n") == 1


def test_unusable_files_are_refused_in_one_line(tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert main(["bench", "norms", *arguments]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("layernorm: ")
        assert errors.count("\n") == 1
        return errors

    assert "cannot read" in refused("--report-only", "--out", str(tmp_path))
    table = tmp_path / "norms.csv"
    table.write_text("operator,dtype\n")
    assert "has other columns than this benchmark's" in refused(*TINY[2:], "--out", str(tmp_path))
    table.write_text(",".join(norms.COLUMNS) + "\n")
    assert "has no rows" in refused("--report-only", "--out", str(tmp_path))
    fixed(table, point(10.0, 2.0, width="wide"))
    assert "is damaged" in refused("--report-only", "--out", str(tmp_path))
    assert "cannot write" in refused(*TINY[2:], "--out", str(table))


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("report", "norms_report", "recurrent_report", "stream_report", "plots"):
        monkeypatch.delitem(sys.modules, f"layernorm.bench.{name}")
        monkeypatch.delattr(f"layernorm.bench.{name}")
    assert main(TINY) == 2
    assert capsys.readouterr().err == (
        "layernorm: this command needs matplotlib: pip install 'layernorm[bench]'\n"
    )


def test_info_imports_nothing_that_only_benchmarks_need():
    code = (
        "import sys; from layernorm.cli import main; main(['info']); "
        "print(sorted({'jax', 'matplotlib', 'onnx', 'onnxruntime', 'pandas', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("sys.exit('no memory')", "failed with exit code 1: no memory"),
        ("raise ValueError('odd')", "failed with exit code 1: ValueError: odd"),
    ],
)
def test_a_worker_that_dies_is_reported(ending, text, tmp_path, monkeypatch):
    code = (
        "import os, signal, sys\nfrom benchmarks.core.workers import serve\n"
        "def measure(job, emit):\n"
        "    print('noise')\n"
        "    emit({'threads': job['threads'], 'size': job['size']})\n"
        f"    {ending}\n"
        "serve(measure)\n"
    )
    (tmp_path / "dying.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    events = workers.events("dying", {"size": 3}, 1)
    assert next(events) == {"threads": 1, "size": 3}
    with pytest.raises(workers.WorkerError, match=f"the worker with 1 thread {text}"):
        next(events)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_is_measured(tmp_path, signum):
    arguments = [*TINY, "--rounds", "1", "--out", str(tmp_path)]
    arguments[3] = "2x8," + ",".join(f"4096x{width}" for width in range(1001, 1100))
    process = subprocess.Popen(
        [sys.executable, "-m", "layernorm.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    table = tmp_path / "norms.csv"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (table.is_file() and table.read_text().count("\n") >= 3):
        time.sleep(0.02)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == f"layernorm: interrupted; what was measured is in {table}; go on with --resume\n"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["peer"] for row in rows[:2]] == ["layernorm", "torch"]
    assert not (tmp_path / "benchmarks.md").exists()


def test_the_published_program_has_the_same_options():
    root = Path(__file__).parents[2]
    run = [sys.executable, "-m", "benchmarks", "norms", "--rounds", "none"]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m benchmarks norms: error: argument --rounds: expected a whole")
    assert done.stderr.count("\n") == 1
    assert in_checkout(root).page == root / "docs/benchmarks.md"


def test_the_published_page_is_what_its_table_says():
    outputs = in_checkout(Path(__file__).parents[2])
    assert outputs.page.read_text("utf-8") == report.page(outputs)
    with pytest.raises(TableError):
        read(outputs.page, norms.COLUMNS)


def test_a_table_is_whole_whenever_its_writer_dies(tmp_path, monkeypatch):
    path = tmp_path / "norms.csv"
    fixed(path, point(10.0, 2.0) + point(20.0, 3.0, operator="rms_norm"))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TableError, match=f"cannot write {path}: No space left on device"):
            Table(path, norms.COLUMNS, keep=lambda row: False)
    assert path.read_bytes() == before
    with Table(path, norms.COLUMNS, keep=lambda row: True) as table:
        table.add(point(30.0, 4.0, operator="add_rms_norm"))
        assert path.read_bytes().startswith(before)
        with pytest.raises(TableError, match=r"is in use by process \d+ on"):
            Table(path, norms.COLUMNS, keep=lambda row: True)
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_cut_off_is_named(tmp_path, capsys):
    path = tmp_path / "norms.csv"
    fixed(path, point(10.0, 2.0))
    whole = path.read_text()
    path.write_text(whole[: whole.rindex(",")])
    for option in ("--report-only", "--resume"):
        assert main(["bench", "norms", option, "--out", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert "norms.csv is damaged: row " in message
        assert message.count("\n") == 1
    assert path.read_text() == whole[: whole.rindex(",")]
