"""Layers that layer norm is compared with: batch norm, recurrent batch norm, weight norm, dynamic tanh.

They are plain PyTorch and run on any device. RMS norm is ``layernorm.RMSNorm``, and ``variant="rms"`` of the
recurrent layers. Weight norm is ``torch.nn.utils.parametrizations.weight_norm``; its data-dependent
initialization is here. ``Norm`` makes norms by name, and ``swap_norms`` puts one in the place of batch norm.
"""

from layernorm.baselines.batch_norm import BatchNorm
from layernorm.baselines.batch_norm_lstm import BatchNormLSTM
from layernorm.baselines.dynamic_tanh import DynamicTanh
from layernorm.baselines.named import Norm, swap_norms
from layernorm.baselines.weight_norm import start_weight_norm

__all__ = ["BatchNorm", "BatchNormLSTM", "DynamicTanh", "Norm", "start_weight_norm", "swap_norms"]
