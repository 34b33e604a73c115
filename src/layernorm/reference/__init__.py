"""The oracle: every operator in plain PyTorch, clear before fast.

Any dtype that PyTorch computes in, float64 included; float16 and bfloat16 are computed in float32 and
rounded once. Differentiable to any order by autograd. Arguments are not checked here: the public
functions of ``layernorm.functional`` do that.
"""

from layernorm.reference.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from layernorm.reference.recurrent import Masks, gates_step, recurrent_layer

__all__ = [
    "Masks",
    "add_layer_norm",
    "add_rms_norm",
    "gates_step",
    "layer_norm",
    "recurrent_layer",
    "rms_norm",
]
