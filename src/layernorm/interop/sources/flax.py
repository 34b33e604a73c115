"""Cells of Flax, for JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from layernorm.interop.source import Layout, Part, Source
from layernorm.variants import PRESETS, Cell

_LAYOUTS = (
    Layout(is_cell=True),
    Layout("cell/{key}"),
    Layout("{direction}/cell/{key}", ("forward_rnn", "backward_rnn")),
)


def _kernels(gates: str) -> dict[str, Part]:
    return {
        f"{side}{gate}/kernel": Part(to, gates=gate, transposed=True)
        for side, to in (("i", "weight_ih"), ("h", "weight_hh"))
        for gate in gates
    }


def _biases(to: str, side: str, gates: str) -> dict[str, Part]:
    return {f"{side}{gate}/bias": Part(to, gates=gate, optional=True) for gate in gates}


SOURCES: Final[Mapping[str, Mapping[Cell, Source]]] = {
    "flax": {
        "lstm": Source(
            cell="lstm",
            origin="google/flax, flax/linen/recurrent.py, LSTMCell and OptimizedLSTMCell",
            formula="i, f, g, o = W_i x + W_h h + b; c' = σ(f)·c + σ(i)·tanh(g); h' = σ(o)·tanh(c')\n"
            "Its carry is (c, h).",
            variant=PRESETS["none"]["lstm"],
            order="ifgo",
            keys={**_kernels("ifgo"), **_biases("bias_ih", "h", "ifgo")},
            layouts=_LAYOUTS,
        ),
        "gru": Source(
            cell="gru",
            origin="google/flax, flax/linen/recurrent.py, GRUCell",
            formula="r, z = σ(W_i x + b + W_h h); n = tanh(W_in x + b_in + r·(W_hn h + b_hn)); "
            "h' = (1 - z)·n + z·h",
            variant=PRESETS["none"]["gru"],
            order="rzn",
            keys={
                **_kernels("rzn"),
                **_biases("bias_ih", "i", "rzn"),
                **_biases("bias_hh", "h", "n"),
            },
            layouts=_LAYOUTS,
        ),
        "rnn": Source(
            cell="rnn",
            origin="google/flax, flax/linen/recurrent.py, SimpleCell",
            formula="h' = tanh(W_i x + b + W_h h)",
            variant=PRESETS["none"]["rnn"],
            order="h",
            keys={
                "i/kernel": Part("weight_ih", transposed=True),
                "h/kernel": Part("weight_hh", transposed=True),
                "i/bias": Part("bias_ih", optional=True),
            },
            layouts=_LAYOUTS,
        ),
    }
}

__all__ = ["SOURCES"]
