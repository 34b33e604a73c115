"""Cells that are called step by step, of this package and written by hand, each prepared for one point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

import layernorm
from benchmarks.cells.by_hand import CELLS, VARIANTS
from benchmarks.core.benchmark import BASE, OURS
from benchmarks.core.subjects import Subject
from benchmarks.recurrent.case import CLASSES, Case, load

#: Turns the gradients of a cell's parameters into those of the one written by hand.
Arrange = Callable[[list[Tensor]], list[Tensor]]


def _stepping(cell: Callable[..., Any], leaves: list[Tensor], case: Case, arrange: Arrange) -> Subject:
    """Return the steps of a cell as a peer, in training with backward through all of them."""
    inputs = [x.clone().requires_grad_(case.training) for x in case.x]
    grads = list(case.grad)
    zeros = case.x.new_zeros(case.x.size(1), case.hidden)
    start = (zeros, zeros) if case.cell == "lstm" else zeros

    def forward() -> list[Tensor]:
        state, outputs = start, []
        for x in inputs:
            state = cell(x, state)
            outputs.append(state if isinstance(state, Tensor) else state[0])
        return outputs

    def train() -> list[Tensor]:
        for leaf in (*inputs, *leaves):
            leaf.grad = None
        outputs = forward()
        torch.autograd.backward(outputs, grads)
        return outputs

    def results() -> list[Tensor]:
        if not case.training:
            return forward()
        outputs = [output.detach() for output in train()]
        return [*outputs, *map(_grad, inputs), *arrange([_grad(leaf) for leaf in leaves])]

    return Subject(train if case.training else forward, results)


def _grad(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise RuntimeError("an input or a parameter has no gradient")
    return leaf.grad


def _layernorm(case: Case) -> Subject:
    make = getattr(layernorm, f"LayerNorm{CLASSES[case.cell]}Cell")
    cell = make(case.hidden, case.hidden, dtype=case.x.dtype, variant=VARIANTS[case.cell])

    def arrange(grads: list[Tensor]) -> list[Tensor]:
        return CELLS[case.cell].arranged(dict(zip(case.normalized, grads, strict=True)), one=0.0)

    return _stepping(cell, load(cell, case.normalized, suffix=""), case, arrange)


def _by_hand(case: Case) -> Subject:
    cell = CELLS[case.cell](case.hidden, case.hidden, case.x.dtype)
    return _stepping(cell, cell.load(case.normalized), case, arrange=list)


#: By name; the order is that of tables and pictures.
PEERS: Final[dict[str, Callable[[Case], Subject]]] = {OURS: _layernorm, BASE: _by_hand}
