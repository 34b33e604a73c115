"""Layer normalization for PyTorch: normalized recurrent networks and norm operators.

Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
"""

__version__ = "0.1.0"

import layernorm.pytorch_internals  # noqa: F401 - first: PyTorch is to say nothing where there is no NumPy

# isort: split
from layernorm import backends, functional, interop, reference, variants
from layernorm.cells import LayerNormGRUCell, LayerNormLSTMCell, LayerNormRNNCell
from layernorm.interop import Conversion, convert
from layernorm.modules import LayerNorm, RMSNorm
from layernorm.recurrent import LayerNormGRU, LayerNormLSTM, LayerNormRNN
from layernorm.regularization import RecurrentDropout
from layernorm.replace import Replacement, replace_norms
from layernorm.streaming import Stream
from layernorm.variants import Variant

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
    "convert",
    "functional",
    "interop",
    "reference",
    "replace_norms",
    "variants",
]
