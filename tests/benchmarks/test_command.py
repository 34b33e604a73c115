"""The command of the benchmarks: arguments, files, interruptions, workers that die, and what is published."""

from __future__ import annotations

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.core import filling, report, workers
from benchmarks.core.outputs import in_checkout
from benchmarks.core.table import Table, TableError, read
from benchmarks.norms.measure import BENCHMARK as NORMS
from benchmarks.registry import BENCHMARKS, COMMANDS
from layernorm import machine
from tests.benchmarks.cases import ends, failure, is_running, refusal, rows_of_point, table_of, write_table

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ("norms", "--sizes", "4x8", "--threads", "1", "--peers", "layernorm,torch")
RECURRENT = ("recurrent", "--cells", "lstm", "--threads", "1", "--batches", "2", "--steps", "4")
RECURRENT += ("--rounds", "2", "--time", "0.01", "--peers", "loop")
POINT = {"dtype": "float32", "rows": 64, "width": 256, "mode": "forward"}


def norms_table(path: Path, *operators: str, **fields: object) -> None:
    """Write a table of one point of each operator."""
    times = {"layernorm": 10.0, "torch": 20.0, "jax": "not installed"}
    points = (rows_of_point(times, **POINT | fields, operator=operator) for operator in operators)
    write_table(NORMS, path, chain.from_iterable(points))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            "norms --operator norm",
            "--operator: expected some of layer_norm, rms_norm, add_layer_norm, add_rms",
        ),
        (
            "norms --dtypes float32,int8",
            "--dtypes: expected some of float32, bfloat16, float16, separated by",
        ),
        (
            "norms --sizes 64x256,0x8",
            "--sizes: expected ROWSxWIDTH separated by commas, as in 64x256,8x768; got '0x8'",
        ),
        ("norms --modes ", "--modes: expected names separated by commas, got ''"),
        ("norms --threads none", "--threads: expected numbers from 1 to the "),
        ("norms --threads 100000", "here, or all; got '100000'"),
        ("norms --peers torch,apex", "got 'apex'"),
        ("norms --rounds 0", "--rounds: expected a whole number of at least 1, got '0'"),
        ("recurrent --cells lstm,mgu", "--cells: expected some of lstm, gru, rnn, separated by commas"),
        ("recurrent --batches 1,0", "--batches: expected a whole number of at least 1, got '0'"),
        ("recurrent --hidden big", "--hidden: expected a whole number of at least 1, got 'big'"),
        ("recurrent --dtypes float64", "--dtypes: expected some of float32, bfloat16"),
        ("recurrent --modes forward", "--modes: expected some of inference, training"),
        ("recurrent --time 0", "--time: expected a number of seconds greater than 0, got '0'"),
        ("recurrent --peers keras", "got 'keras'"),
        ("recurrent --compile-limit inf", "--compile-limit: expected a number of seconds"),
        ("short-calls --steps 1,0", "--steps: expected a whole number of at least 1, got '0'"),
        ("short-calls --peers torch", "unrecognized arguments: --peers torch"),
        ("cells --cells mgu", "--cells: expected some of lstm, gru, rnn, separated by commas; got 'mgu'"),
        ("cells --steps 1,2", "--steps: expected a whole number of at least 1, got '1,2'"),
        ("stream --batches -1", "--batches: expected a whole number of at least 1, got '-1'"),
        ("stream --peers compile", "got 'compile'"),
        ("updates --tasks mnist", "--tasks: expected some of order-embeddings, attentive-reader, "),
        (
            "updates --presets large",
            "--presets: expected some of small, paper, separated by commas; got 'large'",
        ),
        ("updates --rounds 0", "--rounds: expected a whole number of at least 1, got '0'"),
        ("updates --peers torch", "unrecognized arguments: --peers torch"),
        ("gpu --operator mgu", "--operator: expected some of layer_norm, rms_norm, add_layer_norm, "),
        ("gpu --modes backward", "--modes: expected some of forward, inference, training"),
        ("gpu --batches 0", "--batches: expected a whole number of at least 1, got '0'"),
        ("gpu --hidden 8x8", "--hidden: expected a whole number of at least 1, got '8x8'"),
        ("gpu --steps -1", "--steps: expected a whole number"),
        ("gpu --time 0", "--time: expected a number of seconds greater than 0"),
        ("gpu --compile-limit inf", "--compile-limit: expected a number of seconds"),
        ("gpu --peers onnxruntime", "got 'onnxruntime'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, text, capsys):
    assert text in refusal(capsys, *arguments.split(" "))


@pytest.mark.parametrize("name", [each.name for each in COMMANDS])
def test_help_is_there(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert "--resume" in capsys.readouterr().out


def test_unusable_files_are_refused_in_one_line(tmp_path, capsys):
    def refused(*arguments: str) -> str:
        return failure(capsys, *arguments, "--out", str(tmp_path))

    only = ("norms", "--report-only")
    assert "cannot read" in refused(*only)
    table = tmp_path / "norms.csv"
    table.write_text("operator,dtype\n")
    assert "has other columns than this benchmark's" in refused(*TINY)
    table.write_text(",".join(NORMS.columns) + "\n")
    assert "has no rows" in refused(*only)
    norms_table(table, "layer_norm", width="wide")
    assert "is damaged" in refused(*only)
    assert "cannot write" in failure(capsys, *TINY, "--out", str(table))
    assert "gpu.csv: No such file" in refused("gpu", "--report-only")


def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.delitem(sys.modules, "benchmarks.core.report")
    monkeypatch.delattr(sys.modules["benchmarks.core"], "report")
    text = "this command needs pandas: pip install --group bench (pip 25.1 or later)"
    assert failure(capsys, *TINY, "--out", str(tmp_path)) == f"python -m benchmarks: {text}\n"


def test_a_run_keeps_the_other_operators_of_an_earlier_table(tmp_path, monkeypatch, capsys):
    norms_table(tmp_path / "norms.csv", "layer_norm", "rms_norm")

    def events(module, job, threads, limit):
        yield {"rows": [{"operator": "layer_norm", "peer": "torch", "threads": threads, "status": "failed"}]}
        raise workers.WorkerError("the worker was killed")

    monkeypatch.setattr(workers, "events", events)
    monkeypatch.setattr(filling, "latest", lambda point, rows, threads: "")
    failure(capsys, *TINY, "--out", str(tmp_path), code=1)
    assert table_of(NORMS, tmp_path, "operator", "peer") == [
        *(("rms_norm", peer) for peer in ("layernorm", "torch", "jax")),
        ("layer_norm", "torch"),
    ]


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


def test_the_limit_of_a_worker_ends_it(tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(workers.TimedOutError, match=r"took longer than 0\.5 seconds"):
        list(workers.events("endless", {}, 1, limit=0.5))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_worker_ends_with_whoever_started_it(tmp_path):
    code = "import os, time\nfrom benchmarks.core.workers import serve\n"
    code += "def measure(job, emit):\n    emit({'pid': os.getpid()})\n    time.sleep(600)\nserve(measure)\n"
    (tmp_path / "endless.py").write_text(code)
    code = "from benchmarks.core import workers\nfor event in workers.events('endless', {}, 1):\n"
    code += "    print(event['pid'], flush=True)\n"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    ) as parent:
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.kill()
    assert ends(worker)


def stopped(arguments, signum, rows):
    """Run the program in another folder until its table has these rows, and stop it."""
    folder = Path(arguments[-1])
    table = folder / f"{arguments[0]}.csv"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=workers.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (table.is_file() and table.read_text().count("\n") > rows):
        time.sleep(0.02)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    text = f"interrupted; what was measured is in {folder}; go on with --resume"
    assert errors == f"python -m benchmarks: {text}\n"
    assert not (folder / "benchmarks.md").exists()
    return table


def test_an_interrupted_run_keeps_what_is_measured(tmp_path):
    sizes = "2x8," + ",".join(f"4096x{width}" for width in range(1001, 1100))
    arguments = ["norms", "--sizes", sizes, *TINY[3:], "--rounds", "1", "--out", str(tmp_path)]
    table = stopped(arguments, signal.SIGTERM, rows=2)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["peer"] for row in rows[:2]] == ["layernorm", "torch"]


def test_a_run_that_was_stopped_goes_on(tmp_path):
    out = ("--out", str(tmp_path))
    sizes = ",".join(map(str, range(8, 128)))
    table = stopped([*RECURRENT, "--hidden", sizes, *out], signal.SIGINT, rows=3)
    before = table.read_text().splitlines()
    assert (len(before) - 1) % 3 == 0  # whole points
    # The four points of the smallest size, one of which at least is there.
    assert main([*RECURRENT, "--hidden", "8", *out, "--resume"]) == 0
    after = table.read_text().splitlines()
    assert after[: len(before)] == before
    keys = [(row["hidden"], row["mode"], row["dtype"], row["peer"]) for row in csv.DictReader(after)]
    assert len(keys) == len(set(keys))
    assert sum(key[0] == "8" for key in keys) == 12
    # Without --resume only the points of the run are replaced.
    assert main([*RECURRENT, "--hidden", "8", *out, "--modes", "training"]) == 0
    fresh = list(csv.DictReader(table.read_text().splitlines()))
    assert sorted((r["hidden"], r["mode"], r["dtype"], r["peer"]) for r in fresh) == sorted(keys)


def test_the_published_page_is_what_its_tables_say():
    outputs = in_checkout(workers.ROOT)
    assert outputs.page == workers.ROOT / "docs/benchmarks.md"
    assert outputs.page.read_text("utf-8") == report.page(BENCHMARKS, outputs)
    with pytest.raises(TableError):
        read(outputs.page, NORMS.columns)


def test_a_table_is_whole_whenever_its_writer_dies(tmp_path, monkeypatch):
    path = tmp_path / "norms.csv"
    norms_table(path, "layer_norm", "rms_norm")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TableError, match=f"cannot write {path}: No space left on device"):
            Table(path, NORMS.columns, keep=lambda row: False)
    assert path.read_bytes() == before
    with Table(path, NORMS.columns, keep=lambda row: True) as table:
        table.add([POINT | {"operator": "add_rms_norm"}])
        assert path.read_bytes().startswith(before)
        with pytest.raises(TableError, match=r"is in use by process \d+ on"):
            Table(path, NORMS.columns, keep=lambda row: True)
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_cut_off_is_named(tmp_path, capsys):
    path = tmp_path / "norms.csv"
    norms_table(path, "layer_norm")
    whole = path.read_text()
    path.write_text(whole[: whole.rindex(",")])
    for option in ("--report-only", "--resume"):
        assert "norms.csv is damaged: row " in failure(capsys, "norms", option, "--out", str(tmp_path))
    assert path.read_text() == whole[: whole.rindex(",")]


def test_the_machine_has_no_host_name_and_no_path():
    found = machine.environment()
    assert tuple(found) == machine.COLUMNS
    assert not {os.uname().nodename, str(Path.home()), str(Path.cwd())} & set(found.values())
    assert "/" not in found["machine"]
