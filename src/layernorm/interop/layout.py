"""Reading and writing one layer and direction in the layout of a source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from layernorm.interop.source import LETTERS, Part, Source
from layernorm.spec import LayerSpec
from layernorm.variants import Variant

Constants = Mapping[str, float]


class Sizes(NamedTuple):
    """The features of a layer: of its input, of its hidden or cell state, of its output."""

    input: int
    hidden: int
    output: int

    def shape(self, source: Source, part: Part) -> tuple[int, ...]:
        """Return the shape that a tensor of the source must have."""
        if not part.has_gates:
            if part.is_matrix:
                return (self.hidden, self.output) if part.transposed else (self.output, self.hidden)
            return (1, self.hidden) if part.stacked else (self.hidden,)
        rows = len(source.gates(part)) * self.hidden
        if not part.is_matrix:
            return (len(part.names), rows) if part.stacked else (len(part.names) * rows,)
        columns = sum(self._columns(name) for name in part.names)
        return (columns, rows) if part.transposed else (rows, columns)

    def blocks(self, source: Source, part: Part, tensor: Tensor) -> Iterator[tuple[str, slice, Tensor]]:
        """Yield views of a source's tensor: the parameter that each goes to, its rows there, and itself."""
        pieces = [tensor]
        if part.stacked:
            pieces = list(tensor.unbind(0))
        elif not part.is_matrix:
            pieces = list(tensor.chunk(len(part.names)))
        elif len(part.names) > 1:
            pieces = list(tensor.split([*map(self._columns, part.names)], 0 if part.transposed else 1))
        for name, piece in zip(part.names, pieces, strict=True):
            rows = piece.T if part.transposed else piece
            if not part.has_gates:
                yield name, slice(None), rows
                continue
            gates = source.gates(part)
            for letter, view in zip(gates, rows.chunk(len(gates)), strict=True):
                target, index = _place(source, name, letter)
                yield target, slice(index * self.hidden, (index + 1) * self.hidden), view

    def _columns(self, name: str) -> int:
        return self.input if name == "weight_ih" else self.output


def _place(source: Source, name: str, letter: str) -> tuple[str, int]:
    if name == "bias_hn":
        if source.cell == "gru" and letter == "n" and source.variant.inputs == "separate":
            return name, 0
        name = "bias"
    return name, LETTERS[source.cell].index(letter)


def _blocks_in_a_row(source: Source, part: Part) -> int:
    one_after_another = not part.is_matrix and not part.stacked
    return len(source.gates(part)) * (len(part.names) if one_after_another else 1)


def sizes_of(source: Source, tensors: Mapping[str, Tensor]) -> Sizes:
    """Return the sizes that the first tensors speak of; ``Sizes.shape`` tells whether the others agree."""
    shaped = [
        (part, tuple(tensor.shape))
        for key, tensor in tensors.items()
        for part in source.parts(key)
        if tensor.dim() == (2 if part.is_matrix or part.stacked else 1)
    ]
    hidden = next(
        (
            shape[0 if part.is_matrix and not part.transposed else -1] // _blocks_in_a_row(source, part)
            for part, shape in shaped
            if part.has_gates
        ),
        0,
    )
    output = next(
        (shape[-1 if part.transposed else 0] for part, shape in shaped if part.names == ("weight_hr",)),
        hidden,
    )
    input = next(
        (
            shape[0 if part.transposed else -1] - output * (len(part.names) - 1)
            for part, shape in shaped
            if "weight_ih" in part.names
        ),
        0,
    )
    return Sizes(input, hidden, output)


def read(
    source: Source, variant: Variant, tensors: Mapping[str, Tensor], sizes: Sizes, constants: Constants
) -> dict[str, Tensor]:
    """Return this package's parameters of a layer, in float64, by their names without suffix.

    ``tensors`` are the source's, of the right shapes; ``constants`` what it adds to gates, by their letter.
    """
    ours = _zeros(source, variant, sizes)
    covered = set()
    for key, tensor in tensors.items():
        for part in source.parts(key):
            for name, rows, view in sizes.blocks(source, part, tensor.double()):
                ours[name][rows] += view + _offset(part, name)
                covered.add(name)
    for name, parameter in ours.items():
        if name.startswith("gain") and name not in covered:
            parameter.fill_(1)
    _scale_unbiased(source, ours, sizes, -1)
    _add_constants(source, variant, ours, sizes, constants, 1)
    _turn_update_gate(source, variant, ours, sizes)
    if not any(name.startswith("bias") for name in covered) and not any(constants.values()):
        ours = {name: parameter for name, parameter in ours.items() if not name.startswith("bias")}
    return ours


def write(
    source: Source, variant: Variant, weights: Mapping[str, Tensor], sizes: Sizes, constants: Constants
) -> tuple[dict[str, Tensor], list[str]]:
    """Return a layer's tensors as the source has them, in float64, and the parameters that it cannot hold.

    Where several tensors go to one parameter, the first holds it and the others are 0.
    """
    left = _zeros(source, dataclasses.replace(variant, projection_bias=True), sizes)
    for name, parameter in left.items():
        if name in weights:
            parameter.copy_(weights[name].detach())
        elif name.startswith("gain"):
            parameter.fill_(1)
    places = _places(source, sizes)
    _join_biases(source, variant, left, sizes, places)
    _turn_update_gate(source, variant, left, sizes)
    _add_constants(source, variant, left, sizes, constants, -1)
    _scale_unbiased(source, left, sizes, 1)
    tensors = {}
    for key in source.keys:
        parts = source.parts(key)
        if parts[0].optional and not any(
            name in weights or _is_needed(left, name) for name in parts[0].names
        ):
            continue
        tensor = left["weight_ih"].new_zeros(sizes.shape(source, parts[0]))
        for name, rows, view in sizes.blocks(source, parts[0], tensor):
            view.copy_(left[name][rows] - _offset(parts[0], name))
        for part in parts:
            for name, rows, view in sizes.blocks(source, part, tensor):
                left[name][rows] -= view + _offset(part, name)
        tensors[key] = tensor
    for name, parameter in left.items():
        if name.startswith("gain") and all(target != name for target, _ in places):
            parameter -= 1
    return tensors, [name for name, parameter in left.items() if parameter.any()]


def _offset(part: Part, name: str) -> float:
    return part.offset if name.startswith("gain") else 0.0


def _zeros(source: Source, variant: Variant, sizes: Sizes) -> dict[str, Tensor]:
    spec = LayerSpec(source.cell, variant)
    shapes = spec.parameter_shapes(
        sizes.input, sizes.hidden, proj_size=sizes.output if sizes.output != sizes.hidden else 0
    )
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}


def _is_needed(left: Mapping[str, Tensor], name: str) -> bool:
    return name in left and bool(left[name].any())


def _places(source: Source, sizes: Sizes) -> set[tuple[str, int]]:
    """Return the blocks of rows that the source's tensors hold: parameter and first row."""
    found = set()
    for key in source.keys:
        for part in source.parts(key):
            empty = torch.empty(sizes.shape(source, part), device="meta")
            found |= {(name, rows.start or 0) for name, rows, _ in sizes.blocks(source, part, empty)}
    return found


def _rows(source: Source, letter: str, sizes: Sizes) -> slice:
    index = LETTERS[source.cell].index(letter)
    return slice(index * sizes.hidden, (index + 1) * sizes.hidden)


def _add_constants(
    source: Source,
    variant: Variant,
    weights: Mapping[str, Tensor],
    sizes: Sizes,
    constants: Constants,
    sign: int,
) -> None:
    bias = "bias" if variant.normalizes_gates else "bias_ih"
    for letter, value in constants.items():
        weights[bias][_rows(source, letter, sizes)] += sign * value


def _scale_unbiased(source: Source, weights: Mapping[str, Tensor], sizes: Sizes, power: int) -> None:
    """Put into gains by what an unbiased variance is larger: n/(n - 1), over n features."""
    for name, weight in weights.items():
        if source.is_unbiased and name.startswith("gain"):
            count = features_of_norm(source, name, sizes)
            weight *= math.sqrt(count / (count - 1)) ** power


def features_of_norm(source: Source, gain: str, sizes: Sizes) -> int:
    """Return how many features share the statistics that a gain follows; alike for all gates."""
    if gain == "gain_cell":
        return sizes.hidden
    return LayerSpec(source.cell, source.variant).groups[0] * sizes.hidden


def _turn_update_gate(source: Source, variant: Variant, weights: Mapping[str, Tensor], sizes: Sizes) -> None:
    """Turn z into 1 - z, σ(-a) = 1 - σ(a), where the source multiplies the candidate with it."""
    if source.update == "state":
        return
    turned = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    if variant.normalizes_gates:
        turned = ("gain_ih", "gain_hh", "gain", "bias")
    for name in turned:
        if name in weights:
            weights[name][_rows(source, "z", sizes)] *= -1


def _join_biases(
    source: Source,
    variant: Variant,
    weights: Mapping[str, Tensor],
    sizes: Sizes,
    places: set[tuple[str, int]],
) -> None:
    """Put what the source has no second bias for into the first, where the two meet only in a sum."""
    if "bias_hh" not in weights:
        return
    spec = LayerSpec(source.cell, variant)
    for letter in LETTERS[source.cell]:
        rows = _rows(source, letter, sizes)
        in_candidate = source.cell == "gru" and letter == "n" and spec.products != "summed"
        apart = in_candidate or (variant.normalizes_gates and spec.products == "separate")
        if not apart and ("bias_hh", rows.start) not in places:
            weights["bias_ih"][rows] += weights["bias_hh"][rows]
            weights["bias_hh"][rows] = 0


__all__ = ["Constants", "Sizes", "features_of_norm", "read", "sizes_of", "write"]
