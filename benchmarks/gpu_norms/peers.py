"""The norm operators of this package and of others on a GPU, each with inputs that no cache holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.core import cuda
from benchmarks.core.subjects import NotSupportedError, Subject, module
from benchmarks.norms.peers import WRITTEN_OUT, Case, eager
from layernorm import functional as LF

#: Bytes that the inputs of a point take together at least: several times the second-level cache.
ROTATED_BYTES: Final = 256 * 2**20


def rotation(case: Case) -> list[Case]:
    """Return enough cases like this one that no cache holds them, each with its own data."""
    rows = [*case.inputs[: len(case.grads)], *(case.grads if case.training else ())]
    size = sum(tensor.nbytes for tensor in rows)
    count = max(1, min(4096, -(-ROTATED_BYTES // size)))

    def copies(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(t.clone() if t.dim() > 1 else t for t in tensors)

    return [replace(case, inputs=copies(case.inputs), grads=copies(case.grads)) for _ in range(count)]


def rotating(peer: str, cases: Sequence[Case]) -> Subject:
    """Return the peer for these cases, which its calls take one after another.

    Raises:
        NotInstalledError: its package is missing.
        NotSupportedError: it cannot do this.
    """
    function, context = PEERS[peer](cases[0])
    subjects = [eager(function, case) for case in cases]
    calls = cycle([subject.call for subject in subjects])

    def call() -> object:
        return next(calls)()

    def results() -> list[Tensor]:
        with context():
            return subjects[0].results()

    return Subject(call, results, context)


_Function = Callable[..., Any]
_Peer = tuple[_Function, Callable[[], Any]]


def _ours(case: Case) -> _Peer:
    return getattr(LF, case.operator), cuda.kernels(case.inputs[0].device.type)


def _torch(case: Case) -> _Peer:
    return WRITTEN_OUT[case.operator], nullcontext


def _compiled(case: Case) -> _Peer:
    torch._dynamo.reset()
    function = torch.compile(WRITTEN_OUT[case.operator], dynamic=False, fullgraph=True)
    return function, nullcontext


def _liger(case: Case) -> _Peer:
    ops = module("liger_kernel.ops")

    def layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Any:
        return ops.LigerLayerNormFunction.apply(x, weight, bias, eps)

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Any:
        return ops.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    def add_rms_norm(x: Tensor, residual: Tensor, shape: Any, weight: Tensor, eps: float) -> Any:
        return ops.LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)

    return _one_of(case, layer_norm=layer_norm, rms_norm=rms_norm, add_rms_norm=add_rms_norm)


def _quack(case: Case) -> _Peer:
    quack = module("quack.rmsnorm")
    # Its layer norm takes float32 weights alone, and is given them.
    affine = [tensor.float() for tensor in case.inputs[-2:]]

    def layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Any:
        if case.training:
            return _QuackLayerNorm.apply(x, weight, bias, affine, eps, quack)  # type: ignore[no-untyped-call]
        return quack.layernorm_fwd(x, *affine, eps)

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Any:
        return quack.rmsnorm(x, weight, eps=eps)

    def add_rms_norm(x: Tensor, residual: Tensor, shape: Any, weight: Tensor, eps: float) -> Any:
        return quack.rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)

    return _one_of(case, layer_norm=layer_norm, rms_norm=rms_norm, add_rms_norm=add_rms_norm)


class _QuackLayerNorm(torch.autograd.Function):
    """quack's layer norm forward and backward as one function."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, affine: list[Tensor], eps: float, quack: Any
    ) -> Tensor:
        output: Tensor
        output, rstd, mean = quack.layernorm_fwd(x, *affine, eps, return_rstd=True, return_mean=True)
        ctx.save_for_backward(x, affine[0], rstd, mean)
        ctx.derivative, ctx.dtype = quack.layernorm_bwd, weight.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, rstd, mean = ctx.saved_tensors
        of_x, *of_affine = ctx.derivative(x, weight, grad, rstd, mean)
        return of_x, *(found.to(ctx.dtype) for found in of_affine), None, None, None


def _apex(case: Case) -> _Peer:
    fused = module("apex.normalization.fused_layer_norm")

    def layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Any:
        return fused.fused_layer_norm_affine(x, weight, bias, shape, eps)

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Any:
        return fused.fused_rms_norm_affine(x, weight, shape, eps)

    return _one_of(case, layer_norm=layer_norm, rms_norm=rms_norm)


def _flash_attention(case: Case) -> _Peer:
    norm = module("flash_attn.ops.triton.layer_norm").layer_norm_fn
    is_rms = not case.is_layer_norm

    def alone(x: Tensor, shape: Any, weight: Tensor, *rest: Any) -> Any:
        bias, eps = (None, *rest) if is_rms else rest
        return norm(x, weight, bias, eps=eps, is_rms_norm=is_rms)

    def add(x: Tensor, residual: Tensor, shape: Any, weight: Tensor, *rest: Any) -> Any:
        bias, eps = (None, *rest) if is_rms else rest
        return norm(x, weight, bias, residual=residual, eps=eps, prenorm=True, is_rms_norm=is_rms)

    return add if case.has_residual else alone, nullcontext


def _one_of(case: Case, **functions: _Function) -> _Peer:
    if case.operator not in functions:
        raise NotSupportedError
    return functions[case.operator], nullcontext


#: By name; the order is that of tables and pictures.
PEERS: Final[dict[str, Callable[[Case], _Peer]]] = {
    "layernorm": _ours,
    "torch": _torch,
    "torch.compile": _compiled,
    "liger": _liger,
    "quack": _quack,
    "apex": _apex,
    "flash-attention": _flash_attention,
}
