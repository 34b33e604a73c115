"""Every example runs; documented code blocks and docstrings are collected by the root conftest.py."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
SHORT = {
    "adding_problem": ["--updates", "20", "--length", "10"],
    "characters": ["--core", "torch", "--updates", "2", "--hidden", "16", "--length", "20"],
    "mnist": ["--epochs", "1", "--seeds", "2", "--rates", "0.01"],
    "recognition": ["--epochs", "1", "--hidden", "16"],
    "recurrent_ppo": ["--core", "both", "--iterations", "1"],
    "streaming": ["--steps", "100", "--channels", "3"],
    "world_model": ["--updates", "2", "--hidden", "16"],
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a file as a program in this process, where PyTorch has been imported; return what it prints."""

    def run_path(path: Path, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        state = torch.get_rng_state()
        runpy.run_path(str(path), run_name="__main__")
        torch.set_rng_state(state)
        return capsys.readouterr().out

    return run_path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_runs(path, run):
    assert "LayerNorm" in run(path, *SHORT[path.stem])


def test_recognition_reads_ts_files(tmp_path, run):
    series = ["0.5,1,2:3,4,5:1", "1,2:3,4:2", "0,0,0,1:1,1,1,2:1", "2,2:0,1:2"]
    for part in ("TRAIN", "TEST"):
        text = "#A note\n@problemName JapaneseVowels\n@data\n" + "\n".join(series)
        (tmp_path / f"JapaneseVowels_{part}.ts").write_text(text, "utf-8")
    path = next(path for path in EXAMPLES if path.stem == "recognition")
    printed = run(path, "--data", str(tmp_path), "--epochs", "2", "--hidden", "8")
    assert "4 training and 4 test sequences" in printed
    assert "the answers of the whole sequences are the same: True" in printed


def test_the_notebook_runs_and_is_kept_without_what_it_printed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES[0].parent / "norms.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, object] = {"__name__": "notebook"}
    for cell in cells:
        source = "".join(cell["source"]).replace("EPOCHS, SEEDS = 10, 3", "EPOCHS, SEEDS = 1, 2")
        exec(compile(source, "norms.ipynb", "exec"), names)
    assert names["result"].table.seeds.tolist() == [2] * 8
    assert names["own"].table.norm.tolist() == ["none", "layer", "Centred"]
    assert "layer norm: True\nbatch norm: False\n" in capsys.readouterr().out
