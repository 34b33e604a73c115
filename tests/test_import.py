"""Importing the package is quiet, whatever is missing, and loads nothing that only some users need."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(script, *options):
    return subprocess.run(
        [sys.executable, *options, "-c", script], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("first", ["", "import torch; "], ids=["alone", "after torch"])
def test_there_is_no_warning_without_numpy(first):
    done = run(f"import sys, warnings; sys.modules['numpy'] = None; {first}warnings.simplefilter('error')\n"
               "import layernorm")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert first or not done.stderr  # PyTorch by itself may warn


def test_nothing_is_loaded_that_only_some_users_need():
    script = (
        "import torch, sys; before = set(sys.modules); import layernorm; print(*set(sys.modules) - before)"
    )
    loaded = run(script, "-W", "error").stdout.split()
    assert loaded
    roots = {name.partition(".")[0] for name in loaded}
    assert not roots & {"triton", "pandas", "matplotlib", "rich", "sklearn", "jinja2", "cuda", "onnx", "jax"}
    unwanted = (
        "layernorm.experiments",
        "layernorm.gpu.norm",
        "layernorm.gpu.recurrent",
        "layernorm.gpu.persistent",
    )
    assert not [name for name in loaded if name.startswith(unwanted)]
