"""The operators: schemas, fake kernels, derivatives of higher order, and the compiled module.

Importing this package defines the operators and loads the compiled module if there is one; Triton waits for
the first call that needs it. The compiled module (``csrc/binding``) computes plain calls on the CPU, which
never see PyTorch's dispatcher; where a derivative is wanted it calls the ``torch.autograd.Function`` of this
package, which serves every device. The registered operators are for all other calls: those that are traced,
compiled or exported, of subclasses, under modes, and on GPUs:

- ``layer_norm``, ``rms_norm``, ``add_layer_norm``, ``add_rms_norm``: what users call. On tensors that need
  a derivative they record a node and run
- ``norm_forward``, which also returns the statistics, and in backward
- ``norm_backward``;
- ``recurrent``: one layer and direction of a recurrent network, with ``recurrent_forward``, which also
  returns what is kept, and ``recurrent_backward``. ``recurrent_composite_backward`` is the latter by the
  reference's own derivative, for derivatives of higher order;
- ``lstm_gates`` and ``gru_gates``: the part of a step after its products, on the CPU alone, each with its
  ``…_backward`` and ``…_composite_backward``.
"""

from layernorm.ops import flops, gates, norm, recurrent
from layernorm.ops.gates import gates_step
from layernorm.ops.loading import CAPABILITY_VARIABLE, NATIVE_PROBLEM, native
from layernorm.ops.norm import NORMS
from layernorm.ops.recurrent import recurrent_layer, recurrent_layer_natively
from layernorm.ops.registration import gpu_kernel

flops.register()
if native is not None:
    native.record(norm.RECORDERS | recurrent.RECORDERS | gates.RECORDERS)

__all__ = [
    "CAPABILITY_VARIABLE",
    "NATIVE_PROBLEM",
    "NORMS",
    "gates_step",
    "gpu_kernel",
    "native",
    "recurrent_layer",
    "recurrent_layer_natively",
]
