"""Programs that run in two processes at once, for tests of torch.distributed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

# At the exit of a process PyTorch's threads for gloo sometimes end it with "terminate called without an
# active exception".
_LEAVE = "\nimport os\nos._exit(0)\n"

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
)


def run_two(program: str, folder: Path) -> None:
    """Run a program with arguments rank and store in two processes, and check that both succeed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program + _LEAVE, str(rank), str(folder / "store")],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
