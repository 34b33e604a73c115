"""The program that runs PyTorch's test_nn.py with layernorm's modules in torch.nn's place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = """
import unittest, torch

class TestNN(unittest.TestCase):
    def test_lstm_runs(self):
        torch.nn.LSTM(2, 3)(torch.zeros(4, 1, 2))

    def test_only_torch_passes(self):
        self.assertEqual(torch.nn.GRU.__mro__[1], torch.nn.RNNBase)

    def test_none_passes(self):
        self.assertRaises(RuntimeError, lambda: torch.nn.RNN(2, 3)(torch.zeros(4, 1, 5)))

    def test_linear(self):
        raise AssertionError
"""


def run(*arguments) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", "tests.recurrent.judge_by_test_nn", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_it_finds_what_only_torch_passes(tmp_path):
    file = tmp_path / "test_nn.py"
    file.write_text(TESTS)
    done = run(file, "--variant", "none")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split(maxsplit=1) == ["torch.nn", "3 passed of 3"]
    assert lines[1].split(maxsplit=1) == ["none", "2 passed of these 3"]
    assert len(lines) == 3
    assert "test_only_torch_passes: AssertionError" in lines[2]


def test_a_missing_file_is_refused(tmp_path):
    done = run(tmp_path / "test_nn.py")
    assert done.returncode == 2
    assert "which is no file" in done.stderr
