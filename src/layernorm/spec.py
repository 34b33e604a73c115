"""The whole description of one recurrent layer, made once and read by everything that computes it.

``LayerSpec`` holds what a layer is (its cell and its ``Variant``) and every fact that follows from that. The
reference, the operators, their fake kernels and the code for CPU and GPU read these facts; none derives one
again. Operators take the description as a list of small numbers, ``codes``, and ``eps``:
``csrc/recurrent/spec.cpp`` decodes it in C++.

The last two codes are the bits of float64 numbers, ``cell_eps`` and ``cell_clip``; 0 where they are None, and
the bits of -0.0 for 0.

A new field goes into ``Variant`` and ``codes`` here, into the decoder in C++, and into the reference and the
kernels that compute it.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self, get_args

from torch import Tensor
from torch.compiler import is_compiling

from layernorm.variants import (
    GATES,
    PRESETS,
    Cell,
    CellNorm,
    Inputs,
    Kind,
    Scope,
    Variant,
    parameter_shapes,
    resolve,
)

#: The nonlinearity of an RNN, of a GRU's candidate, and of an LSTM's candidate and cell.
Nonlinearity = Literal["tanh", "relu"]
#: How W_ih x and W_hh h meet: each normalized by itself; added first; or added first but for a GRU's
#: candidate, whose part of W_hh h is multiplied with the reset gate before it is added.
Products = Literal["separate", "summed", "late"]

#: The parameters of a layer in the order in which the operators list them. Where the inputs are summed, the
#: one ``gain`` takes the place of ``gain_ih``.
PARAMETERS: Final = (
    "weight_ih",
    "weight_hh",
    "weight_hr",
    "bias_ih",
    "bias_hh",
    "gain_ih",
    "gain_hh",
    "bias",
    "bias_hn",
    "gain_cell",
    "bias_cell",
)
#: Those among them that the part of a step after its products takes, in their order: all but the matrices.
GATES_PARAMETERS: Final = PARAMETERS[3:]

# What each of ``codes`` stands for, in order.
_CODES: Final[Mapping[str, tuple[Any, ...]]] = {
    "cell": ("lstm", "gru", "rnn_tanh", "rnn_relu", "gru_relu", "lstm_relu"),
    "kind": get_args(Kind),
    "inputs": get_args(Inputs),
    "scope": get_args(Scope),
    "cell_norm": get_args(CellNorm),
    "projection_bias": (False, True),
}
# Those that follow are the bits of numbers.
_NUMBERS: Final = ("cell_eps", "cell_clip")
# What descriptions have too, where it is not the usual.
_OTHERS: Final = (*_NUMBERS, "reset_after")


@dataclass(frozen=True)
class LayerSpec:
    """What one recurrent layer computes, apart from its sizes.

    Args:
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"``.
        variant: how it is normalized.
        nonlinearity: of an RNN, of a candidate and of an LSTM's cell, ``"tanh"`` or ``"relu"``.

    Attributes:
        gates: G, the gates of the cell.
        groups: how many neighboring gates share statistics, group by group; none without a norm.
        products: how W_ih x and W_hh h meet: ``"separate"``, ``"summed"`` or ``"late"``.
        normalizes_cell: whether an LSTM's cell is normalized.
        names: the name of each of ``PARAMETERS`` in this variant, whether or not a layer has it.
        codes: the numbers by which the operators know this description, without eps; empty where they do
            not compute it and the reference does: ``reset_after=False``.

    Examples:
        >>> from layernorm.spec import LayerSpec
        >>> from layernorm.variants import resolve
        >>> spec = LayerSpec("gru", resolve("paper", "gru"))
        >>> spec.gates, spec.groups, spec.products
        (3, (2, 1), 'separate')
    """

    cell: Cell
    variant: Variant
    nonlinearity: Nonlinearity = "tanh"

    gates: int = field(init=False, compare=False, repr=False)
    groups: tuple[int, ...] = field(init=False, compare=False, repr=False)
    products: Products = field(init=False, compare=False, repr=False)
    normalizes_cell: bool = field(init=False, compare=False, repr=False)
    names: tuple[str, ...] = field(init=False, compare=False, repr=False)
    codes: tuple[int, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        facts: dict[str, Any] = {
            "gates": GATES[self.cell],
            "groups": _groups(self.cell, self.variant),
            "products": _products(self.cell, self.variant),
            "normalizes_cell": self.cell == "lstm" and self.variant.cell != "none",
            "names": _names(self.variant),
            "codes": _encode(self.cell, self.variant, self.nonlinearity),
        }
        for name, fact in facts.items():
            object.__setattr__(self, name, fact)
        if self.cell != "gru" and not self.variant.reset_after:
            raise ValueError(
                "Variant: reset_after is of a GRU, which has a reset gate; this is of "
                f"{self.cell.upper()}: {self.variant}"
            )
        if self.cell != "lstm" and not self._is_for_any_cell:
            raise ValueError(
                "Variant: inputs='plain' and cell_clip are of an LSTM, which has a cell; this is of "
                f"{self.cell.upper()}: {self.variant}"
            )

    @property
    def _is_for_any_cell(self) -> bool:
        return self.variant.cell_clip is None and (
            self.variant.kind == "none" or self.variant.inputs != "plain"
        )

    @property
    def operation(self) -> str:
        """The cell with its nonlinearity: lstm, lstm_relu, gru, gru_relu, rnn_tanh or rnn_relu."""
        return _operation(self.cell, self.nonlinearity)

    @property
    def description(self) -> dict[str, Any]:
        """Describe what the layer computes in plain values, as checkpoints keep it."""
        given = {
            name: value
            for name in _OTHERS
            if (value := getattr(self.variant, name)) != getattr(Variant, name)
        }
        return {**_values(self.cell, self.variant, self.nonlinearity), "eps": self.eps, **given}

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> Self:
        """Return the spec of a description.

        Raises:
            ValueError: a field is unknown, or its value.
            TypeError: a value is of another type.

        Examples:
            >>> from layernorm.spec import LayerSpec, layer_spec
            >>> spec = layer_spec("gru", "haste")
            >>> LayerSpec.described(spec.description) == spec
            True
        """
        fields = dict(description)
        unknown = sorted(fields.keys() - {*_CODES, *_OTHERS, "eps"})
        operation = fields.pop("cell", None)
        if unknown or operation not in _CODES["cell"]:
            raise ValueError(
                f"unknown fields {', '.join(unknown)}" if unknown else f"unknown cell {operation!r}"
            )
        if "cell_norm" in fields:
            fields["cell"] = fields.pop("cell_norm")
        cell, _, nonlinearity = operation.partition("_")
        return cls(cell, Variant(**fields), nonlinearity or "tanh")

    def __str__(self) -> str:
        """Return the names of the presets that are this variant, else its fields."""
        names = [repr(name) for name, cells in PRESETS.items() if cells.get(self.cell) == self.variant]
        return f"{self.operation.upper()} {' or '.join(names) or self.variant}"

    @property
    def eps(self) -> float:
        """What is added to the variance, or to the mean square."""
        return self.variant.eps

    @property
    def cell_eps(self) -> float:
        """The same for the norm of the cell."""
        return self.eps if self.variant.cell_eps is None else self.variant.cell_eps

    @property
    def saved_h_gates(self) -> int:
        """How many gates of W_hh h are kept for backward: (rows, saved_h_gates·H)."""
        return {"separate": self.gates, "summed": 0, "late": 1}[self.products]

    @property
    def statistics(self) -> int:
        """How many statistics of a row are kept for backward."""
        return len(self.groups) * (2 if self.products == "separate" else 1)

    def parameter_shapes(
        self,
        input_size: int,
        hidden_size: int,
        *,
        proj_size: int = 0,
        bias: bool = True,
        gain: bool = True,
    ) -> dict[str, tuple[int, ...]]:
        """Return the parameters of a layer of these sizes; see ``layernorm.variants.parameter_shapes``."""
        return parameter_shapes(
            self.cell, self.variant, input_size, hidden_size, proj_size=proj_size, bias=bias, gain=gain
        )

    def listed(self, weights: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Return the parameters in the order of ``PARAMETERS``, with None for those that are not there."""
        return [weights.get(name) for name in self.names]

    def listed_for_gates(self, weights: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Return the parameters in the order of ``GATES_PARAMETERS``."""
        return [weights.get(name) for name in self.names[-len(GATES_PARAMETERS) :]]

    @functools.cached_property
    def gates_names(self) -> tuple[str | None, ...]:
        """The name of each of ``GATES_PARAMETERS`` in this variant, None for those it does not have."""
        shapes = self.parameter_shapes(1, 1)
        return tuple(name if name in shapes else None for name in self.names[-len(GATES_PARAMETERS) :])

    def named(
        self, tensors: Sequence[Tensor | None], parameters: Sequence[str] = PARAMETERS
    ) -> dict[str, Tensor]:
        """Return by name what ``parameters`` lists, without those that are None."""
        names = dict(zip(PARAMETERS, self.names, strict=True))
        return {
            names[parameter]: tensor
            for parameter, tensor in zip(parameters, tensors, strict=True)
            if tensor is not None
        }

    @classmethod
    def decode(cls, codes: Sequence[int], eps: float) -> Self:
        """Return the spec that an operator was given.

        Raises:
            RuntimeError: these are no codes of a spec.
        """
        return cls._decode(tuple(codes), eps)

    @classmethod
    @functools.cache
    def _decode(cls, codes: tuple[int, ...], eps: float) -> Self:
        if len(codes) != len(_CODES) + len(_NUMBERS):
            raise RuntimeError(
                f"layernorm: spec must have {len(_CODES) + len(_NUMBERS)} codes, "
                f"{', '.join((*_CODES, *_NUMBERS))}; got {list(codes)}"
            )
        fields = {}
        numbers: dict[str, Any] = {
            name: _number(code) if code else None
            for name, code in zip(_NUMBERS, codes[len(_CODES) :], strict=True)
        }
        for (name, choices), code in zip(_CODES.items(), codes, strict=False):
            if not 0 <= code < len(choices):
                raise RuntimeError(
                    f"layernorm: the code of {name} in spec must be in [0, {len(choices)}), got {code}"
                )
            fields[name] = choices[code]
        cell, _, nonlinearity = fields.pop("cell").partition("_")
        variant = Variant(cell=fields.pop("cell_norm"), eps=eps, **fields, **numbers)
        return cls(cell, variant, nonlinearity or "tanh")


def layer_spec(cell: Cell, variant: str | Variant, nonlinearity: Nonlinearity = "tanh") -> LayerSpec:
    """Return the spec that a preset's name or a variant means for a cell.

    Raises:
        ValueError: see ``layernorm.variants.resolve``.
        TypeError: ``variant`` is neither a name nor a ``Variant``.

    Examples:
        >>> from layernorm.spec import layer_spec
        >>> layer_spec("rnn", "paper", "relu").operation
        'rnn_relu'
    """
    if is_compiling() or not isinstance(variant, (str, Variant)):  # Dynamo knows no caches
        return LayerSpec(cell, resolve(variant, cell), nonlinearity)
    return _cached(cell, variant, nonlinearity)


@functools.lru_cache(maxsize=256)
def _cached(cell: Cell, variant: str | Variant, nonlinearity: Nonlinearity) -> LayerSpec:
    return LayerSpec(cell, resolve(variant, cell), nonlinearity)


def _groups(cell: Cell, variant: Variant) -> tuple[int, ...]:
    gates = GATES[cell]
    if not variant.normalizes_gates:
        return ()
    if variant.scope == "gate":
        return (1,) * gates
    return (2, 1) if variant.scope == "matrix" and cell == "gru" else (gates,)


def _products(cell: Cell, variant: Variant) -> Products:
    if not variant.normalizes_gates:  # nothing tells the products apart but a GRU's candidate
        return "separate" if cell == "gru" and variant.reset_after else "summed"
    if cell == "gru" and variant.reset_after and variant.inputs == "summed" and variant.scope != "all":
        return "late"
    return "summed" if variant.inputs == "summed" else "separate"


def _names(variant: Variant) -> tuple[str, ...]:
    summed = variant.kind != "none" and variant.inputs == "summed"
    return tuple("gain" if summed and name == "gain_ih" else name for name in PARAMETERS)


def _operation(cell: Cell, nonlinearity: Nonlinearity) -> str:
    return f"{cell}_{nonlinearity}" if cell == "rnn" or nonlinearity == "relu" else cell


def _encode(cell: Cell, variant: Variant, nonlinearity: Nonlinearity) -> tuple[int, ...]:
    if not variant.reset_after:
        return ()
    values = _values(cell, variant, nonlinearity)
    numbers = (getattr(variant, name) for name in _NUMBERS)
    return (
        *(choices.index(values[name]) for name, choices in _CODES.items()),
        *(0 if number is None else _bits(number or -0.0) for number in numbers),  # whose bits are not 0
    )


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _number(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _values(cell: Cell, variant: Variant, nonlinearity: Nonlinearity) -> dict[str, Any]:
    """Return the fields of ``_CODES``."""
    return {
        "cell": _operation(cell, nonlinearity),
        "kind": variant.kind,
        "inputs": variant.inputs,
        "scope": variant.scope,
        "cell_norm": variant.cell,
        "projection_bias": variant.projection_bias,
    }


__all__ = ["GATES_PARAMETERS", "PARAMETERS", "LayerSpec", "Nonlinearity", "Products", "layer_spec"]
