"""The formulas of ``layernorm.variants``, literally, one row and one step at a time, in NumPy.

The reference judges the layers; these formulas judge the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from layernorm import Variant

Array = NDArray[np.float64]


def sequence(
    cell: str,
    x: Array,
    state: tuple[Array, ...],
    weights: Mapping[str, Array],
    variant: Variant,
    relu: bool = False,
) -> tuple[Array, tuple[Array, ...]]:
    """Return the outputs (T, P) and the last state of one sequence (T, F); the state is h, or h and c."""
    step = {"lstm": lstm, "gru": gru, "rnn": partial(rnn, relu=relu)}[cell]
    outputs = []
    for row in x:
        state = step(row, state, weights, variant)
        outputs.append(state[0])
    return np.stack(outputs), state


def sigmoid(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


def n(a: Array, variant: Variant) -> Array:
    """Return N(a) of one group."""
    if variant.kind == "none":
        return a
    if variant.kind == "layer":
        return (a - a.mean()) / np.sqrt(((a - a.mean()) ** 2).mean() + variant.eps)
    return a / np.sqrt((a**2).mean() + variant.eps)


def by_groups(a: Array, cell: str, variant: Variant) -> Array:
    """Return N of all gates, each group by itself."""
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[cell]
    size = len(a) // gates
    ends = [len(a)]
    if variant.scope == "gate":
        ends = [size * (i + 1) for i in range(gates)]
    elif variant.scope == "matrix" and cell == "gru":
        ends = [2 * size, 3 * size]
    return np.concatenate([n(part, variant) for part in np.split(a, ends[:-1])])


def products(row: Array, h: Array, weights: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return W_ih x and W_hh h with the biases inside the norm."""
    a = weights["weight_ih"] @ row + weights.get("bias_ih", 0)
    return a, weights["weight_hh"] @ h + weights.get("bias_hh", 0)


def gates_of(cell: str, a: Array, b: Array, weights: Mapping[str, Array], variant: Variant) -> Array:
    """Return all gates where all are computed in the same way."""
    bias = weights.get("bias", 0)
    if variant.inputs == "separate":
        of_x = by_groups(a, cell, variant) * weights.get("gain_ih", 1)
        return of_x + by_groups(b, cell, variant) * weights.get("gain_hh", 1) + bias
    return by_groups(a + b, cell, variant) * weights.get("gain", 1) + bias


def lstm(
    row: Array, state: tuple[Array, ...], weights: Mapping[str, Array], variant: Variant
) -> tuple[Array, ...]:
    h, c = state
    i, f, g, o = np.split(gates_of("lstm", *products(row, h, weights), weights, variant), 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    seen = c
    if variant.cell != "none":
        seen = n(c, variant) * weights["gain_cell"] + weights.get("bias_cell", 0)
    if variant.cell == "carried":
        c = seen
    h = sigmoid(o) * np.tanh(seen)
    return (weights["weight_hr"] @ h if "weight_hr" in weights else h), c


def gru(
    row: Array, state: tuple[Array, ...], weights: Mapping[str, Array], variant: Variant
) -> tuple[Array, ...]:
    (h,) = state
    size = len(h)
    a, b = products(row, h, weights)
    bias, last = weights.get("bias", np.zeros(3 * size)), slice(2 * size, None)
    if variant.inputs == "separate":
        of_x = by_groups(a, "gru", variant) * weights.get("gain_ih", 1)
        of_h = by_groups(b, "gru", variant) * weights.get("gain_hh", 1)
        r, z, _ = np.split(sigmoid(of_x + of_h + bias), 3)
        candidate = np.tanh(of_x[last] + bias[last] + r * (of_h[last] + weights.get("bias_hn", 0)))
    elif variant.scope == "all":
        gates = gates_of("gru", a, b, weights, variant)
        r, z, _ = np.split(sigmoid(gates), 3)
        candidate = np.tanh(r * gates[last])
    else:
        # r and z share statistics only with each other, so whatever the candidate is.
        r, z, _ = np.split(sigmoid(gates_of("gru", a, b, weights, variant)), 3)
        candidate = np.tanh(n(a[last] + r * b[last], variant) * weights["gain"][last] + bias[last])
    return ((1 - z) * candidate + z * h,)


def rnn(
    row: Array, state: tuple[Array, ...], weights: Mapping[str, Array], variant: Variant, relu: bool
) -> tuple[Array, ...]:
    gates = gates_of("rnn", *products(row, state[0], weights), weights, variant)
    return (np.maximum(gates, 0) if relu else np.tanh(gates),)
