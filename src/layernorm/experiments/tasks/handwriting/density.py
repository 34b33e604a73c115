"""The density of the pen's next step: a mixture of bivariate Gaussians, and whether a stroke ends.

Graves 2013 (arXiv 1308.0850), equations 15 to 26. The parameters (..., 6 M + 1) of M Gaussians are, in this
order, M weights before their softmax, M means in x and M in y, M logarithms of the standard deviation in x
and M in y, M correlations before their tanh, and the logit of the end of the stroke.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def negative_log_likelihood(parameters: Tensor, pen: Tensor) -> Tensor:
    """Return the negative log-likelihood of steps of the pen under a density, in nats.

    Args:
        parameters: as above, (..., 6 M + 1).
        pen: offset in x, offset in y, and 1 where the stroke ends, otherwise 0: (..., 3).

    Returns:
        A tensor (...).

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.handwriting.density import negative_log_likelihood
        >>> standard = torch.zeros(7)  # one Gaussian; the stroke ends as often as not
        >>> round(negative_log_likelihood(standard, torch.zeros(3)).item(), 3)  # log 2π + log 2
        2.531
    """
    weight, mean_x, mean_y, log_x, log_y, slant = parameters[..., :-1].chunk(6, -1)
    x, y, end = pen.split(1, -1)
    z_x = (x - mean_x) * torch.exp(-log_x)
    z_y = (y - mean_y) * torch.exp(-log_y)
    # 1 - tanh² = 1/cosh² without the difference of two numbers near 1.
    log_free = 2.0 * (math.log(2.0) - slant.abs() - F.softplus(-2.0 * slant.abs()))
    distance = z_x.square() + z_y.square() - 2.0 * torch.tanh(slant) * z_x * z_y
    log_normal = -math.log(2.0 * math.pi) - log_x - log_y - 0.5 * (log_free + distance * torch.exp(-log_free))
    log_offset = torch.logsumexp(torch.log_softmax(weight, -1) + log_normal, -1)
    ends = F.binary_cross_entropy_with_logits(parameters[..., -1], end.squeeze(-1), reduction="none")
    return ends - log_offset


def sample(parameters: Tensor, generator: torch.Generator, bias: float = 0.0) -> Tensor:
    """Draw a step of the pen for each density.

    Args:
        parameters: as above, (N, 6 M + 1).
        generator: of the random numbers, on the parameters' device.
        bias: 0 or more: the greater, the likelier the steps (Graves' equations 61 and 62).

    Returns:
        Steps (N, 3).

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.handwriting.density import sample
        >>> sample(torch.zeros(4, 7), torch.Generator().manual_seed(0)).shape
        torch.Size([4, 3])
    """
    weight, *rest = parameters[:, :-1].chunk(6, 1)
    chosen = torch.multinomial(torch.softmax(weight * (1.0 + bias), 1), 1, generator=generator)
    mean_x, mean_y, log_x, log_y, slant = (parameter.gather(1, chosen) for parameter in rest)
    normal = torch.randn(len(parameters), 2, generator=generator, device=parameters.device)
    uniform = torch.rand(len(parameters), 1, generator=generator, device=parameters.device)
    first, second = normal.to(parameters.dtype).split(1, 1)
    correlation = torch.tanh(slant)
    x = mean_x + torch.exp(log_x - bias) * first
    standard = correlation * first + torch.sqrt(1.0 - correlation.square()) * second
    y = mean_y + torch.exp(log_y - bias) * standard
    end = uniform < torch.sigmoid(parameters[:, -1:])
    return torch.cat((x, y, end.to(x.dtype)), 1)
