"""Recurrent layers in ONNX Runtime: the un-normalized operators, and the paper's cells inside Scan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.core.onnx_session import constant, model, subject, value
from benchmarks.core.subjects import NotSupportedError, Subject, module
from benchmarks.recurrent.case import Case

_OPSET, _VERSION = 17, 8  # LayerNormalization came with 17
_EPS: Final = 1e-5
# Where ONNX wants PyTorch's gates: LSTM i, o, f, c; GRU z, r, h.
_ORDER: Final = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def unnormalized_sequence(case: Case) -> Subject:
    """ONNX's operator LSTM, GRU or RNN."""
    if case.training:
        raise NotSupportedError
    order = _ORDER[case.cell]

    def gates(name: str) -> Tensor:
        parts = case.unnormalized[name].chunk(len(order))
        return torch.cat([parts[index] for index in order])

    weights = {
        "w": gates("weight_ih")[None],
        "r": gates("weight_hh")[None],
        "b": torch.cat([gates("bias_ih"), gates("bias_hh")])[None],
    }
    steps, batch, _ = case.x.shape
    options = {"hidden_size": case.hidden} | ({"linear_before_reset": 1} if case.cell == "gru" else {})
    helper = module("onnx.helper")
    node = helper.make_node(case.cell.upper(), ["x", *weights], ["y"], **options)
    graph = helper.make_graph(
        [node],
        case.cell,
        [value("x", case.x.dtype, case.x.shape)],
        [value("y", case.x.dtype, (steps, 1, batch, case.hidden))],
        [constant(name, tensor) for name, tensor in weights.items()],
    )
    return _sequence(case, graph, (steps, 1, batch, case.hidden))


def normalized_sequence(case: Case) -> Subject:
    """Return the paper's cell as the body of ONNX's Scan."""
    if case.training:
        raise NotSupportedError
    helper = module("onnx.helper")
    dtype, (steps, batch, size) = case.x.dtype, case.x.shape
    state = ["h", "c"] if case.cell == "lstm" else ["h"]
    shape = (batch, case.hidden)
    body, outer = _Graph(), _Graph()
    projected = outer.project(case.cell, "x", case.normalized)
    following = body.step(case.cell, "x_t", case.normalized)
    body.add("Identity", [following[0]], output="y_t")
    width = case.normalized["weight_ih"].size(0)
    inner = helper.make_graph(
        body.nodes,
        "step",
        [*(value(name, dtype, shape) for name in state), value("x_t", dtype, (batch, width))],
        [*(value(name, dtype, shape) for name in following), value("y_t", dtype, shape)],
    )
    zeros = [f"{name}_0" for name in state]
    finals = [f"{name}_n" for name in state]
    outer.nodes.append(
        helper.make_node("Scan", [*zeros, projected], [*finals, "y"], body=inner, num_scan_inputs=1)
    )
    initial = dict.fromkeys(zeros, torch.zeros(shape, dtype=dtype))
    graph = helper.make_graph(
        outer.nodes,
        case.cell,
        [value("x", dtype, (steps, batch, size))],
        [value("y", dtype, (steps, *shape))],
        constants(case.normalized) + [constant(name, zero) for name, zero in initial.items()],
    )
    return _sequence(case, graph, (steps, *shape))


def step_model(cell: str, x: Tensor, weights: Mapping[str, Tensor]) -> bytes:
    """Return a model of one step of the paper's cell: "x" and the state "h", "c" to "h_next", "c_next"."""
    helper = module("onnx.helper")
    state = ["h", "c"] if cell == "lstm" else ["h"]
    shape = (x.size(0), weights["weight_hh"].size(1))
    graph = _Graph()
    following = graph.step(cell, graph.project(cell, "x", weights), weights)
    for name, found in zip(state, following, strict=True):
        graph.add("Identity", [found], output=f"{name}_next")
    made = helper.make_graph(
        graph.nodes,
        cell,
        [value("x", x.dtype, x.shape), *(value(name, x.dtype, shape) for name in state)],
        [value(f"{name}_next", x.dtype, shape) for name in state],
        constants(weights),
    )
    return model(made, _OPSET, _VERSION)


def constants(weights: Mapping[str, Tensor]) -> list[Any]:
    """Return the weights for a graph: matrices transposed, a GRU's vectors split between its norms."""
    found = {}
    for name, tensor in weights.items():
        found[name] = tensor.t() if tensor.dim() == 2 else tensor
        if "bias_hn" in weights and name in ("gain_ih", "gain_hh", "bias"):
            size = weights["bias_hn"].size(0)
            found[f"{name}_rz"], found[f"{name}_n"] = tensor[: 2 * size], tensor[2 * size :]
            del found[name]
    if "bias_hn" in weights:
        size = weights["bias_hn"].size(0)
        found["rz_n"] = torch.tensor([2 * size, size])
    return [constant(name, tensor) for name, tensor in found.items()]


def _sequence(case: Case, graph: Any, shape: Sequence[int]) -> Subject:
    output = torch.empty(tuple(shape), dtype=case.x.dtype)

    def results(call: Callable[[], None]) -> list[Tensor]:
        call()
        return [output.view(case.x.size(0), case.x.size(1), case.hidden)]

    file = model(graph, _OPSET, _VERSION)
    return subject(file, [({"x": case.x}, {"y": output})], results, fresh=True)


class _Graph:
    """Nodes in the order of their making; each method returns the names of what it computes."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []

    def add(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Add one node with one output."""
        name = output or f"{kind.lower()}_{id(self)}_{len(self.nodes)}"
        self.nodes.append(module("onnx.helper").make_node(kind, list(inputs), [name], **attributes))
        return name

    def split(self, a: str, count: int, sizes: str = "") -> list[str]:
        """Split into equal parts, or two of the sizes that a constant holds."""
        names = [f"part_{id(self)}_{len(self.nodes)}_{index}" for index in range(count)]
        inputs = [a, sizes] if sizes else [a]
        self.nodes.append(module("onnx.helper").make_node("Split", inputs, names, axis=-1))
        return names

    def norm(self, a: str, *affine: str) -> str:
        """Add layer norm over the last axis, with a gain and perhaps a bias."""
        return self.add("LayerNormalization", [a, *affine], axis=-1, epsilon=_EPS)

    def two_norms(self, a: str, side: str) -> tuple[str, str]:
        """Add a GRU's norms: over r and z together, and over n."""
        rz, n = self.split(a, 2, "rz_n")
        biases = ("bias_rz", "bias_n") if side == "ih" else (None, "bias_hn")
        found = [
            self.norm(part, f"gain_{side}_{name}", *([bias] if bias else []))
            for part, name, bias in zip((rz, n), ("rz", "n"), biases, strict=True)
        ]
        return found[0], found[1]

    def project(self, cell: str, x: str, weights: Mapping[str, Tensor]) -> str:
        """Add what the input contributes to the gates."""
        a = self.add("MatMul", [x, "weight_ih"])
        if cell == "lstm":
            return self.norm(a, "gain_ih", "bias")
        return self.add("Concat", self.two_norms(a, "ih"), axis=-1) if cell == "gru" else a

    def step(self, cell: str, x: str, weights: Mapping[str, Tensor]) -> list[str]:
        """Add the next state from "h", "c" and what the input contributes."""
        b = self.add("MatMul", ["h", "weight_hh"])
        if cell == "rnn":
            return [self.add("Tanh", [self.norm(self.add("Add", [x, b]), "gain", "bias")])]
        if cell == "lstm":
            return self._lstm(self.add("Add", [x, self.norm(b, "gain_hh")]))
        return self._gru(x, b)

    def _lstm(self, gates: str) -> list[str]:
        i, f, g, o = self.split(gates, 4)
        i, f, o = (self.add("Sigmoid", [gate]) for gate in (i, f, o))
        kept = self.add("Mul", [f, "c"])
        c = self.add("Add", [kept, self.add("Mul", [i, self.add("Tanh", [g])])])
        seen = self.add("Tanh", [self.norm(c, "gain_cell", "bias_cell")])
        return [self.add("Mul", [o, seen]), c]

    def _gru(self, x: str, b: str) -> list[str]:
        b_rz, b_n = self.two_norms(b, "hh")
        x_rz, x_n = self.split(x, 2, "rz_n")
        r, z = self.split(self.add("Sigmoid", [self.add("Add", [x_rz, b_rz])]), 2)
        n = self.add("Tanh", [self.add("Add", [x_n, self.add("Mul", [r, b_n])])])
        return [self.add("Add", [n, self.add("Mul", [z, self.add("Sub", ["h", n])])])]


__all__ = ["normalized_sequence", "step_model", "unnormalized_sequence"]
