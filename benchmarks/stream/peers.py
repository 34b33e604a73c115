"""One recurrent step at a time, of this package and of others, each prepared for one point."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

import layernorm
from benchmarks.core import jax_arrays, onnx_session
from benchmarks.core.subjects import Subject, module
from benchmarks.recurrent import jax_peers, onnx_peers
from benchmarks.recurrent.case import CLASSES, Case, load
from benchmarks.recurrent.loops import CELLS, scripted

#: Steps that are compared before a peer is measured.
CHECKED: Final = 4
_State = tuple[Tensor, ...]


def _zeros(case: Case) -> _State:
    count = 2 if case.cell == "lstm" else 1
    return tuple(case.x.new_zeros(case.x.size(1), case.hidden) for _ in range(count))


def _stepping(step: Callable[[Tensor, _State], _State], case: Case) -> Subject:
    """Return a step as a peer; each call takes the state that the one before has left."""
    x = case.x[0]
    held = [_zeros(case)]

    def call() -> None:
        held[0] = step(x, held[0])

    def results() -> list[Tensor]:
        held[0] = _zeros(case)
        found = []
        for _ in range(CHECKED):
            call()
            found.append(held[0][0].clone())
        return found

    return Subject(call, results)


def _stream(case: Case) -> Subject:
    make = getattr(layernorm, f"LayerNorm{CLASSES[case.cell]}")
    made = make(case.hidden, case.hidden, dtype=case.x.dtype)
    load(made, case.normalized)
    x = case.x[0]
    step = made.stream(batch_size=x.size(0)).step

    def results() -> list[Tensor]:
        fresh = made.stream(batch_size=x.size(0))
        return [fresh.step(x).clone() for _ in range(CHECKED)]

    return Subject(partial(step, x), results)


def _cell_of(make: Any, weights: dict[str, Tensor], case: Case) -> Subject:
    """Return a module of one step as a peer; its state is (h, c) or h."""
    cell = make(case.hidden, case.hidden, dtype=case.x.dtype)
    load(cell, weights, suffix="")
    if case.cell == "lstm":
        return _stepping(cell, case)
    return _stepping(lambda x, state: (cell(x, state[0]),), case)


def _layernorm_cell(case: Case) -> Subject:
    return _cell_of(getattr(layernorm, f"LayerNorm{CLASSES[case.cell]}Cell"), case.normalized, case)


def _torch(case: Case) -> Subject:
    return _cell_of(getattr(torch.nn, f"{CLASSES[case.cell]}Cell"), case.unnormalized, case)


def _torch_sequence(case: Case) -> Subject:
    make = getattr(torch.nn, CLASSES[case.cell])
    whole = make(case.hidden, case.hidden, dtype=case.x.dtype)
    load(whole, case.unnormalized)
    x = case.x[:1]
    first = tuple(s[None] for s in _zeros(case))
    held: list[Any] = [first if case.cell == "lstm" else first[0]]

    def call() -> Tensor:
        output: Tensor
        output, held[0] = whole(x, held[0])
        return output

    def results() -> list[Tensor]:
        held[0] = first if case.cell == "lstm" else first[0]
        return [call()[0] for _ in range(CHECKED)]

    return Subject(call, results)


def _function(function: Callable[..., _State], case: Case) -> Subject:
    weights = tuple(case.normalized.values())
    return _stepping(lambda x, state: function(x, *state, *weights), case)


def _eager(case: Case) -> Subject:
    return _function(CELLS[case.cell], case)


def _script(case: Case) -> Subject:
    return _function(scripted(CELLS[case.cell]), case)


def _jax(case: Case) -> Subject:
    jax = module("jax")
    project, step = jax_peers.functions(case.cell)
    weights = {name: jax_arrays.array(value) for name, value in case.normalized.items()}
    x = jax_arrays.array(case.x[0])
    zeros = tuple(jax_arrays.array(s) for s in _zeros(case))

    # The weights are constants to the compiler, which is faster than handing them over.
    following = jax.jit(lambda state, x: step(state, project(x, weights), weights))
    held = [zeros]

    def call() -> None:
        held[0] = jax.block_until_ready(following(held[0], x))

    def results() -> list[Tensor]:
        held[0] = zeros
        found = []
        for _ in range(CHECKED):
            call()
            found += jax_arrays.tensors(held[0][0])
        return found

    return Subject(call, results)


def _onnxruntime(case: Case) -> Subject:
    file = onnx_peers.step_model(case.cell, case.x[0], case.normalized)
    names = ["h", "c"] if case.cell == "lstm" else ["h"]
    x, here, there = case.x[0].clone(), _zeros(case), _zeros(case)
    # A step there and one back, so that no call binds anything.
    bindings: list[onnx_session.Binding] = [
        (
            {"x": x} | dict(zip(names, old, strict=True)),
            {f"{name}_next": s for name, s in zip(names, new, strict=True)},
        )
        for old, new in ((here, there), (there, here))
    ]

    def results(call: Callable[[], None]) -> list[Tensor]:
        for s in (*here, *there):
            s.zero_()
        found = []
        for index in range(CHECKED):
            call()
            found.append((there, here)[index % 2][0].clone())
        return found

    return onnx_session.subject(file, bindings, results, fresh=False)


#: By name; the order is that of tables and pictures.
PEERS: Final[dict[str, Callable[[Case], Subject]]] = {
    "layernorm": _stream,
    "layernorm-cell": _layernorm_cell,
    "torch": _torch,
    "torch-sequence": _torch_sequence,
    "eager": _eager,
    "script": _script,
    "jax": _jax,
    "onnxruntime": _onnxruntime,
}
#: Those that compute PyTorch's un-normalized cell.
UNNORMALIZED: Final = ("torch", "torch-sequence")
#: The layer-normalized cell written by hand.
BY_HAND: Final = ("eager", "script")
