"""The norms and their gradients in extended precision, with bounds on what a kernel may be off by."""

from __future__ import annotations

import numpy as np
import torch

#: Whether this machine's ``long double`` has more digits than float64, which else nothing here can judge.
IS_WIDER_THAN_FLOAT64 = np.finfo(np.longdouble).nmant > 60


def array(t: torch.Tensor) -> np.ndarray:
    return t.detach().double().cpu().numpy()


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what statistics of rows of this dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact(x, gain=None, bias=None, eps=1e-5, centred=True):
    """Return the norm of rows in extended precision, independent of the package; also |mean|/std and rstd."""
    a = array(x).astype(np.longdouble)
    mean = a.mean(-1, keepdims=True) if centred else 0 * a[..., :1]
    std = np.sqrt(np.square(a - mean).mean(-1, keepdims=True) + np.longdouble(eps))
    y = (a - mean) / std
    if gain is not None:
        y = y * array(gain)
    if bias is not None:
        y = y + array(bias)
    return y, np.abs(mean) / std, 1 / std


def forward_bound(y, gain, offset, dtype):
    """Return how far a result may be off.

    4 eps·(1 + |mean|/std) of the normalized value times the gain; one rounding to the dtype.
    """
    unit = torch.finfo(statistics_dtype(dtype)).eps
    size = 1 if gain is None else np.abs(array(gain))
    rounding = torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else unit
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return 4 * unit * (1 + offset) * size * 1.5 + rounding * np.abs(y) + least


def exact_gradients(x, grad, gain, eps, centred):
    """Return gradients of input, gain and bias in extended precision, and a bound on the terms of each."""
    n, offset, rstd = exact(x, eps=eps, centred=centred)
    g = array(grad).astype(np.longdouble)
    t = g if gain is None else g * array(gain)
    along_n = (t * n).mean(-1, keepdims=True)
    along_one = t.mean(-1, keepdims=True) if centred else 0
    dx = rstd * (t - along_one - n * along_n)
    size_n = np.abs(n) + offset  # what an error of n is relative to
    terms = np.abs(t) + np.abs(t).mean(-1, keepdims=True) + size_n * np.abs(along_n)
    terms = terms + np.abs(n) * (np.abs(t) * size_n).mean(-1, keepdims=True)
    return (dx, (g * n).sum(0), g.sum(0)), (
        rstd * terms,
        (np.abs(g) * size_n).sum(0),
        np.abs(g).sum(0),
    )
