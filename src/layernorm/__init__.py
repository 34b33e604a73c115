"""Layer normalization for PyTorch: normalized recurrent networks and norm operators.

Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
"""

__version__ = "0.1.0"

import layernorm.pytorch_internals  # noqa: F401 - first: PyTorch is to say nothing where there is no NumPy

# isort: split
import importlib
from typing import TYPE_CHECKING, Any

from layernorm import backends, functional, interop, reference, variants
from layernorm.cells import LayerNormGRUCell, LayerNormLSTMCell, LayerNormRNNCell
from layernorm.interop import Conversion, convert
from layernorm.modules import LayerNorm, RMSNorm
from layernorm.recurrent import LayerNormGRU, LayerNormLSTM, LayerNormRNN
from layernorm.regularization import RecurrentDropout
from layernorm.replace import Replacement, replace_norms
from layernorm.streaming import Stream
from layernorm.variants import Variant

if TYPE_CHECKING:
    from layernorm.baselines import swap_norms
    from layernorm.experiments.commands.own import compare
    from layernorm.experiments.own_task import task

# What only some users want: imported when it is asked for.
_LATER = {
    "compare": "layernorm.experiments.commands.own",
    "swap_norms": "layernorm.baselines",
    "task": "layernorm.experiments.own_task",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'layernorm' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LATER[name]), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"layernorm.{name} needs {error.name}: pip install 'layernorm[experiments]'", name=error.name
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Conversion",
    "LayerNorm",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "LayerNormRNN",
    "LayerNormRNNCell",
    "RMSNorm",
    "RecurrentDropout",
    "Replacement",
    "Stream",
    "Variant",
    "__version__",
    "backends",
    "compare",
    "convert",
    "functional",
    "interop",
    "reference",
    "replace_norms",
    "swap_norms",
    "task",
    "variants",
]
