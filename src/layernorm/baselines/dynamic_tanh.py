"""Dynamic tanh, which takes the place of a norm and has no statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DynamicTanh(nn.Module):
    r"""Compute γ tanh(αx) + β with one α, and a gain γ and a bias β for each feature.

    J. Zhu, X. Chen, K. He, Y. LeCun, Z. Liu, Transformers without normalization, 2025 (arXiv 2503.10622).

    Args:
        width: the number of features.
        alpha: where α starts.
        dim: the features' dimension: -1 or 1.

    Shape:
        Input and output: (N, \*, width), or (N, width, \*) where ``dim`` is 1.

    Examples:
        >>> import torch
        >>> from layernorm.baselines import DynamicTanh
        >>> DynamicTanh(3)(torch.tensor([[0.0, 2.0, -20.0]])).detach()
        tensor([[ 0.0000,  0.7616, -1.0000]])
    """

    def __init__(self, width: int, alpha: float = 0.5, dim: int = -1) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """Map the input to a tensor of its shape."""
        shape = [-1, *[1] * (input.dim() - 2)] if self.dim == 1 else [-1]
        return self.weight.view(shape) * torch.tanh(self.alpha * input) + self.bias.view(shape)
