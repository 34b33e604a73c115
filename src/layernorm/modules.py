"""LayerNorm and RMSNorm: ``torch.nn``'s modules, computed by this package's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from layernorm import functional


class LayerNorm(torch.nn.LayerNorm):
    """Layer normalization over the last dimensions (Ba, Kiros, Hinton 2016, eq. 3 and 4).

    Constructor, parameters (``weight`` is the gain, ``bias``), state dict and repr are those of
    ``torch.nn.LayerNorm``, of which this is a subclass.

    Args:
        normalized_shape: the sizes of the last dimensions, or an int for one dimension.
        eps: added to the variance.
        elementwise_affine: whether there is a gain and a bias.
        bias: whether there is a bias next to the gain.
        device: the device of the parameters.
        dtype: their dtype.

    Shape:
        Input and output (*, *normalized_shape).

    Raises:
        RuntimeError: called with an input that does not fit; see
            ``layernorm.functional.layer_norm``.

    Examples:
        >>> import torch, layernorm
        >>> layernorm.LayerNorm(4)(torch.randn(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (*, *normalized_shape) to the same shape."""
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """RMS normalization over the last dimensions (Zhang and Sennrich 2019).

    Constructor, parameters (``weight`` is the gain), state dict and repr are those of
    ``torch.nn.RMSNorm``, of which this is a subclass.

    Args:
        normalized_shape: the sizes of the last dimensions, or an int for one dimension.
        eps: added to the mean square; None for the machine epsilon of the dtype of the computation.
        elementwise_affine: whether there is a gain.
        device: the device of the gain.
        dtype: its dtype.

    Shape:
        Input and output (*, *normalized_shape).

    Raises:
        RuntimeError: called with an input that does not fit; see
            ``layernorm.functional.rms_norm``.

    Examples:
        >>> import torch, layernorm
        >>> layernorm.RMSNorm(4)(torch.randn(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (*, *normalized_shape) to the same shape."""
        return functional.rms_norm(input, self.normalized_shape, self.weight, self.eps)
