"""PyTorch's private names, which one file alone may use, so that a new PyTorch means looking in one place."""

from __future__ import annotations

import re
from pathlib import Path

import layernorm

SOURCES = Path(layernorm.__file__).parent
PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._[a-zA-Z]"  # torch._C, torch.autograd.forward_ad._current_level
    r"|\bfrom torch[\w.]* import .*\b_[a-zA-Z]"
)


def test_one_file_uses_private_names_of_pytorch():
    found = {
        str(path.relative_to(SOURCES)): [line.strip() for line in lines if PRIVATE.search(line)]
        for path in SOURCES.rglob("*.py")
        for lines in [path.read_text(encoding="utf-8").splitlines()]
    }
    assert found.pop("pytorch_internals.py")
    assert {name: lines for name, lines in found.items() if lines} == {}
