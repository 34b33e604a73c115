"""Recurrent layers over a whole sequence, of this package and of others, each prepared for one point.

Two families of peers compute two functions: the paper's layer-normalized cell, and PyTorch's
un-normalized one. Those of a family are given the same weights and must give the same results.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

import layernorm
from benchmarks.core.subjects import NotSupportedError, Subject
from benchmarks.recurrent import jax_peers as recurrent_jax
from benchmarks.recurrent import onnx_peers as recurrent_onnx
from benchmarks.recurrent.loops import SEQUENCES, scripted
from layernorm.variants import parameter_shapes, resolve

_CLASSES: Final = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


@dataclass(frozen=True)
class Case:
    """The tensors of a point.

    Attributes:
        cell: "lstm", "gru" or "rnn".
        training: forward and backward, or forward alone.
        x: the input (T, N, F).
        grad: the gradient of the output (T, N, H).
        normalized: the weights of the variant "paper", by name.
        plain: those of ``torch.nn``'s layer, by name.
    """

    cell: Any
    training: bool
    x: Tensor
    grad: Tensor
    normalized: dict[str, Tensor]
    plain: dict[str, Tensor]

    @property
    def hidden(self) -> int:
        """Features of the state, H."""
        return self.normalized["weight_hh"].size(1)

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype."""
        normalized, plain = (
            {name: t.to(dtype) for name, t in weights.items()} for weights in (self.normalized, self.plain)
        )
        return replace(self, x=self.x.to(dtype), grad=self.grad.to(dtype), normalized=normalized, plain=plain)


def make_case(cell: Any, batch: int, hidden: int, steps: int, training: bool, device: str = "cpu") -> Case:
    """Random float32 tensors, on a device the same ones each time, whose values bfloat16 has exactly."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    def weights(variant: str) -> dict[str, Tensor]:
        found = {}
        for name, shape in parameter_shapes(cell, resolve(variant, cell), hidden, hidden).items():
            if name.startswith("weight"):
                value = (2 * torch.rand(shape, generator=random, device=device) - 1) / hidden**0.5
            else:
                # A normalized LSTM whose gain_hh is 1 amplifies every rounding from step to step: after
                # a hundred of them bfloat16 results share nothing with float32's, in any implementation.
                mean = 0.5 if name == "gain_hh" else float("gain" in name)
                value = mean + 0.1 * normal(*shape)
            found[name] = value.bfloat16().float()
        return found

    x, grad = normal(steps, batch, hidden), normal(steps, batch, hidden)
    normalized = weights("paper")
    matrices = {name: value for name, value in normalized.items() if name.startswith("weight")}
    plain = weights("none") | matrices
    return Case(cell, training, x.bfloat16().float(), grad.bfloat16().float(), normalized, plain)


def subject(forward: Callable[[Tensor], Tensor], x: Tensor, leaves: list[Tensor], case: Case) -> Subject:
    """A function of x whose other leaves have gradients too."""
    if not case.training:
        call = partial(forward, x)
        return Subject(call, lambda: [call()])
    every = [x, *leaves]

    def release() -> None:
        for leaf in every:
            leaf.grad = None

    def step() -> Tensor:
        release()
        output = forward(x)
        output.backward(case.grad)
        return output

    def results() -> list[Tensor]:
        output = step()
        grads = [leaf.grad for leaf in every]
        if any(grad is None for grad in grads):
            raise RuntimeError("a parameter has no gradient")
        return [output.detach(), *(grad for grad in grads if grad is not None)]

    return Subject(step, results, forward=lambda: [forward(x)], release=release)


def _module(case: Case, module: torch.nn.Module, weights: dict[str, Tensor]) -> Subject:
    with torch.no_grad():
        leaves = [getattr(module, f"{name}_l0") for name in weights]
        for leaf, value in zip(leaves, weights.values(), strict=True):
            leaf.copy_(value)
    x = case.x.detach().requires_grad_(case.training)

    def forward(x: Tensor) -> Tensor:
        output: Tensor = module(x)[0]
        return output

    made = subject(forward, x, leaves, case)
    if not case.training:
        return made

    def outputs() -> list[Tensor]:
        output, state = module(x)
        return [output, *([state] if isinstance(state, Tensor) else state)]

    return replace(made, forward=outputs)


def _layernorm(case: Case, **options: Any) -> Subject:
    make = getattr(layernorm, f"LayerNorm{_CLASSES[case.cell]}")
    module = make(case.hidden, case.hidden, device=case.x.device, dtype=case.x.dtype, **options)
    return _module(case, module, case.plain if options.get("variant") == "none" else case.normalized)


def _recompute(case: Case) -> Subject:
    if not case.training:
        raise NotSupportedError
    if "recompute" not in inspect.signature(layernorm.LayerNormLSTM.__init__).parameters:
        raise NotSupportedError("this version of layernorm has no recompute=True")
    return _layernorm(case, recompute=True)


def _torch(case: Case) -> Subject:
    make = getattr(torch.nn, _CLASSES[case.cell])
    module = make(case.hidden, case.hidden, device=case.x.device, dtype=case.x.dtype)
    return _module(case, module, case.plain)


def of_function(function: Callable[..., Tensor], case: Case, weights: dict[str, Tensor]) -> Subject:
    """A function of x and the weights, in the order that these have."""
    x = case.x.detach().requires_grad_(case.training)
    leaves = [value.detach().requires_grad_(case.training) for value in weights.values()]
    return subject(lambda x: function(x, *leaves), x, leaves, case)


def _loop(case: Case) -> Subject:
    return of_function(SEQUENCES[case.cell], case, case.normalized)


def _script(case: Case) -> Subject:
    made = of_function(scripted(SEQUENCES[case.cell]), case, case.normalized)
    made.call()  # the first calls profile and specialize
    made.call()
    return made


def _compile(case: Case) -> Subject:
    torch._dynamo.reset()
    function = torch.compile(SEQUENCES[case.cell], dynamic=False, fullgraph=True)
    return compiled(of_function(function, case, case.normalized))


def compiled(made: Subject) -> Subject:
    """The same after its first call, which compiles."""
    began = time.perf_counter()
    made.call()
    return replace(made, compile_s=time.perf_counter() - began)


#: By name; the order is that of tables and pictures.
PEERS: Final[dict[str, Callable[[Case], Subject]]] = {
    "layernorm": _layernorm,
    "layernorm-recompute": _recompute,
    "layernorm-none": partial(_layernorm, variant="none"),
    "torch": _torch,
    "loop": _loop,
    "script": _script,
    "compile": _compile,
    "jax": recurrent_jax.sequence,
    "onnxruntime": recurrent_onnx.normalized_sequence,
    "onnxruntime-none": recurrent_onnx.plain_sequence,
}
#: Those that compute PyTorch's un-normalized cell.
PLAIN: Final = ("layernorm-none", "torch", "onnxruntime-none")
#: The layer-normalized cell written by hand.
BY_HAND: Final = ("loop", "script", "compile")
#: Those that only train, and those that do not.
ONLY_IN: Final = {
    "layernorm-recompute": "training",
    "onnxruntime": "inference",
    "onnxruntime-none": "inference",
}
