"""The norm operators next to a copy and to PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.first_contact.figures import Setting, off
from layernorm.gpu.norm import operators

_SHAPES: Final = (
    (16384, 4096),
    (32768, 1024),
    (8192, 8192),
    (8192, 16384),
    (4096, 32768),
    (1024, 131072),
    (128, 768),
)
_EPS: Final = 1e-5
# Rows whose values are compared with float64's.
_ROWS: Final = 512


def measure(setting: Setting, dtype_name: str) -> None:
    """Print errors and times at each size; ``of_copy`` is the part of a copy's bandwidth."""
    dtype = getattr(torch, dtype_name)
    for rows, width in ((4, 48),) if setting.rehearse else _SHAPES:
        torch.manual_seed(0)
        x, grad, residual = (torch.randn(rows, width, device=setting.device).to(dtype) for _ in range(3))
        gain, bias = (torch.randn(width, device=setting.device).to(dtype) for _ in range(2))
        _measure(x, grad, residual, gain, bias, setting)


def _measure(x: Tensor, grad: Tensor, residual: Tensor, gain: Tensor, bias: Tensor, setting: Setting) -> None:
    shape = [x.size(1)]

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        return operators.norm_forward(x, None, shape, gain, bias, _EPS, True)

    output, _, stats = forward()

    def backward() -> tuple[Tensor, ...]:
        return operators.norm_backward(grad, None, x, stats, shape, gain, bias, True, [True] * 3)

    def add_rms() -> tuple[Tensor, Tensor, Tensor]:
        return operators.norm_forward(x, residual, shape, gain, None, _EPS, False, with_stats=False)

    at = {"rows": x.size(0), "width": x.size(1)}
    errors = _errors(output, backward(), x, grad, gain, bias)
    setting.emit(**at, off=errors, sum_is_right=torch.equal(add_rms()[1], x + residual))
    leaves = [t.detach().requires_grad_() for t in (x, gain, bias)]

    def torchs() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.layer_norm(leaves[0], shape, leaves[1], leaves[2]), leaves, grad)

    calls: dict[str, Callable[[], object]] = {
        "copy": x.clone,
        "forward": forward,
        "backward": backward,
        "add_rms": add_rms,
        "torch_forward": lambda: F.layer_norm(x, shape, gain, bias),
        "torch_training": torchs,
    }
    us = {name: round(setting.microseconds(call), 2) for name, call in calls.items()}
    # Tensors that are read or written at least, relative to the two of a copy.
    least = {"forward": 1.0, "backward": 1.5, "add_rms": 2.0}
    of_copy = {name: round(part * us["copy"] / us[name], 3) for name, part in least.items()}
    setting.emit(**at, us=us, of_copy=of_copy)


def _errors(
    output: Tensor, found: tuple[Tensor, ...], x: Tensor, grad: Tensor, gain: Tensor, bias: Tensor
) -> list[float | None]:
    """Return the errors of the output and of the gradients of x, gain and bias against float64."""
    leaves = [t.double().requires_grad_() for t in (x, gain, bias)]
    exact = F.layer_norm(leaves[0], [x.size(1)], leaves[1], leaves[2])
    grads = torch.autograd.grad(exact, leaves, grad.double())
    some = slice(0, _ROWS)
    pairs = [(output[some], exact[some].detach()), (found[0][some], grads[0][some])]
    pairs += zip(found[1:], grads[1:], strict=True)
    return [off(a, b) for a, b in pairs]
