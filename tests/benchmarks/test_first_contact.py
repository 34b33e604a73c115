"""First contact with a GPU: stages that fail, hang and run out of time, and a rehearsal on the CPU."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.core.workers import ROOT
from benchmarks.first_contact import first_contact, stages
from benchmarks.first_contact.figures import off
from tests.benchmarks.cases import ends

PROGRAM = ROOT / "benchmarks/first_contact/first_contact.py"
#: A program whose stages fail in every way that one on a GPU has.
FAILING = """
import json, os, signal, subprocess, sys, time
name = sys.argv[-1]
print(json.dumps({"stage": name, "figure": 1}), flush=True)
if name == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
elif name == "error":
    raise ValueError("illegal memory access")
elif name == "hang":
    # Deaf, and with a child that holds its output open.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(json.dumps({"stage": name, "child": child.pid}), flush=True)
    time.sleep(600)
elif name == "noise":
    print("noise\\n3\\n[1, 2", end="", flush=True)
"""


def lines(folder):
    return [json.loads(line) for line in (folder / "first_contact.jsonl").read_text().splitlines()]


def statuses(folder):
    return {line["stage"]: line["status"] for line in lines(folder) if "status" in line}


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Return what runs stages of ``FAILING``."""
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.setattr(first_contact, "GRACE", 1.0)
    return partial(first_contact.run_stages, command=[sys.executable, str(tmp_path / "failing.py")])


def test_a_stage_that_fails_leaves_the_others_alone(failing, tmp_path, capsys):
    names = ("error", "hang", "crash", "noise", "good")
    began = time.monotonic()
    failed = failing(dict.fromkeys(names, 3.0), out=tmp_path / "out", budget=60.0)
    assert time.monotonic() - began < 30
    assert failed == 3
    found = lines(tmp_path / "out")
    assert [line["stage"] for line in found if "figure" in line] == list(names)
    crash = -signal.SIGSEGV
    expected = {"error": 1, "hang": "took longer than 3 s", "crash": crash, "noise": 0, "good": 0}
    assert statuses(tmp_path / "out") == expected
    (error,) = (line["error"] for line in found if line.get("status") == 1)
    assert error.rstrip().endswith("ValueError: illegal memory access")
    assert [line["text"] for line in found if "text" in line] == ["noise", "3", "[1, 2"]
    (child,) = (line["child"] for line in found if "child" in line)
    assert ends(child)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found


def test_the_whole_ends_within_its_budget(failing, tmp_path):
    began = time.monotonic()
    failing({"hang": 60.0, "good": 60.0}, out=tmp_path / "out", budget=6.0)
    assert time.monotonic() - began < 6.0 + 1.0  # and what a busy machine takes to start a process
    expected = {"hang": "took longer than 4 s", "good": "no time was left"}
    assert statuses(tmp_path / "out") == expected


def test_a_figure_is_on_disk_before_its_stage_ends_and_a_signal_ends_both(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "failing.py").write_text(FAILING)
    code = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks.first_contact import first_contact as f\n"
        "f.STAGES = {'hang': 100.0}\n"
        f"f.command = lambda options: [sys.executable, {str(tmp_path / 'failing.py')!r}]\n"
        f"f.main(['--out', {str(out)!r}])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, text=True) as process:
        file = out / "first_contact.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (file.is_file() and file.read_text().count("\n") == 2):
            time.sleep(0.02)
        assert file.read_text().count("\n") == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    figure, child = lines(out)
    assert figure == {"stage": "hang", "figure": 1}
    assert ends(child["child"])


def test_the_program_needs_python_alone():
    tree = ast.parse(PROGRAM.read_text("utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_wrong_arguments_are_refused(capsys):
    for arguments, text in (
        (("--budget", "541"), "--budget: expected seconds, 540 at most; got '541'"),
        (("--budget", "soon"), "expected seconds, 540 at most; got 'soon'"),
        (("gpu",), "there is no stage gpu; the stages are device, exchange, triton:lstm:bfloat16"),
        ((), "the following arguments are required: --out"),
    ):
        with pytest.raises(SystemExit):
            main(["first_contact", *arguments, *(("--out", "folder") if arguments else ())])
        assert text in capsys.readouterr().err


def rehearsed(capsys, *arguments):
    """Return the lines of a stage that is rehearsed in this process."""
    assert stages.main(["--rehearse", *arguments]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(line["rehearsal"] is True and line["stage"] == arguments[-1] for line in found)
    return found


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("one_thread", "interpreted")
@pytest.mark.parametrize("stage", [name for name in first_contact.STAGES if not name.startswith("hand")])
def test_stages_run(stage, capsys):
    found = rehearsed(capsys, stage)
    assert found
    # Some units in the last place, 1.2e-7 and 7.8e-3, over three steps.
    tolerance = 1e-6 if stage.endswith("float32") else 5e-2
    for line in found:
        assert all(error < tolerance for error in line.get("off", []))
        assert line.get("same_bits", [True, True]) == [True, True]
        assert line.get("sum_is_right", True)
        assert all(us > 0 for us in line.get("us_a_step", {}).values())


@pytest.mark.usefixtures("one_thread", "no_compiler")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_cell_by_hand(cell, capsys):
    modes = [list(line["us_a_step"]) for line in rehearsed(capsys, f"hand:{cell}:float32")]
    assert modes == [["inference"], ["inference in a graph"], ["training"]]


def test_the_program_runs_from_the_checkout_alone(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'layernorm[triton]'")
    command = [sys.executable, "-W", "ignore", str(PROGRAM), "--out", str(tmp_path), "--rehearse"]
    done = subprocess.run(
        [*command, "norms:bfloat16"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(tmp_path) == {"norms:bfloat16": 0}
    assert {"rows", "off"} <= lines(tmp_path)[0].keys()


def test_an_error_that_is_not_finite_is_none():
    one = torch.tensor([3.0, 4.0])
    assert off(torch.tensor([3.0, 4.625]), one) == 0.125
    assert off(torch.tensor([3.0, float("nan")]), one) is None
