"""The compiled module, or why there is none."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Final

from layernorm.pytorch_internals import used_by_the_kernels

#: The variable that chooses the instruction set of the compiled kernels.
CAPABILITY_VARIABLE: Final = "LAYERNORM_CPU_CAPABILITY"


def _load() -> ModuleType | str:
    """Return the compiled module, or in one line why it cannot be used."""
    try:
        native = importlib.import_module("layernorm._native")
    except ModuleNotFoundError:
        return "this installation was made without them"
    except ImportError as error:
        return f"they cannot be loaded: {error}"
    version = importlib.import_module("layernorm").__version__
    if native.version() != version:
        return (
            f"they are of layernorm {native.version()} and this is {version}; install layernorm again with "
            "pip's --force-reinstall --no-cache-dir --no-deps"
        )
    native.connect(used_by_the_kernels())
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
