"""What layer norm is compared with, as layers of their own: batch norm, recurrent batch norm, weight norm.

Plain PyTorch on any device. RMS norm is ``layernorm.RMSNorm``, and ``variant="rms"`` of the recurrent layers;
weight norm is ``torch.nn.utils.parametrizations.weight_norm``, whose start by data is here.
"""

from layernorm.baselines.batch_norm import BatchNorm
from layernorm.baselines.batch_norm_lstm import BatchNormLSTM
from layernorm.baselines.weight_norm import start_weight_norm

__all__ = ["BatchNorm", "BatchNormLSTM", "start_weight_norm"]
