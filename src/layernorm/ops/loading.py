"""The compiled module, or why there is none."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Final

import torch

#: The variable that chooses the instruction set of the compiled kernels.
CAPABILITY_VARIABLE: Final = "LAYERNORM_CPU_CAPABILITY"


def _load() -> ModuleType | str:
    """Return the compiled module, or in one line why it cannot be used."""
    try:
        built_for = importlib.import_module("layernorm._built_for").TORCH
    except ModuleNotFoundError:
        return "this installation was made without them"
    if torch.__version__.split("+")[0] != built_for:
        return (
            f"they were built for PyTorch {built_for} and this is {torch.__version__}; install layernorm "
            "again with pip's --force-reinstall --no-cache-dir --no-deps"
        )
    try:
        native = importlib.import_module("layernorm._native")
    except ImportError as error:
        return f"they cannot be loaded: {error}"
    capability = os.environ.get(CAPABILITY_VARIABLE)
    if capability and not native.use_capability(capability):
        return (
            f"{CAPABILITY_VARIABLE} must be one of {', '.join(native.capabilities())} on this machine; got "
            f"{capability!r}"
        )
    return native


_loaded = _load()
#: The compiled module, or None.
native: Final = _loaded if isinstance(_loaded, ModuleType) else None
#: None when the compiled kernels are loaded, else why they are not, in one line.
NATIVE_PROBLEM: Final = _loaded if isinstance(_loaded, str) else None
