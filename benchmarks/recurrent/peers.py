"""Recurrent layers over a whole sequence, of this package and of others, each prepared for one point.

Two families of peers compute two functions: the paper's layer-normalized cell, and PyTorch's
un-normalized one. Those of a family are given the same weights and must give the same results.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

import layernorm
from benchmarks.core.subjects import NotSupportedError, Subject
from benchmarks.recurrent import jax_peers, onnx_peers
from benchmarks.recurrent.case import CLASSES, Case, load, of_function, subject
from benchmarks.recurrent.loops import SEQUENCES, scripted


def _module(case: Case, module: torch.nn.Module, weights: dict[str, Tensor]) -> Subject:
    leaves = load(module, weights)
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
    make = getattr(layernorm, f"LayerNorm{CLASSES[case.cell]}")
    module = make(case.hidden, case.hidden, device=case.x.device, dtype=case.x.dtype, **options)
    return _module(case, module, case.unnormalized if options.get("variant") == "none" else case.normalized)


def _recompute(case: Case) -> Subject:
    if not case.training:
        raise NotSupportedError
    return _layernorm(case, recompute=True)


def _torch(case: Case) -> Subject:
    make = getattr(torch.nn, CLASSES[case.cell])
    module = make(case.hidden, case.hidden, device=case.x.device, dtype=case.x.dtype)
    return _module(case, module, case.unnormalized)


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
    """Return a peer after its first call, which compiles."""
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
    "jax": jax_peers.sequence,
    "onnxruntime": onnx_peers.normalized_sequence,
    "onnxruntime-none": onnx_peers.unnormalized_sequence,
}
#: Those that compute PyTorch's un-normalized cell.
UNNORMALIZED: Final = ("layernorm-none", "torch", "onnxruntime-none")
#: The layer-normalized cell written by hand.
BY_HAND: Final = ("loop", "script", "compile")
#: Those that only train, and those that do not.
ONLY_IN: Final = {
    "layernorm-recompute": "training",
    "onnxruntime": "inference",
    "onnxruntime-none": "inference",
}
