"""Finding which source, cell and layout some tensors are of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layernorm.interop.layout import Sizes, sizes_of
from layernorm.interop.reading import Weights, as_tensor, tensors_by_name
from layernorm.interop.source import Layout, Source
from layernorm.interop.sources import SOURCES, UNSUPPORTED
from layernorm.variants import Cell


class Found(NamedTuple):
    """Tensors that fit a source: by layer and direction, each by the source's keys."""

    source: Source
    layout: Layout
    directions: int
    layers: list[dict[str, Tensor]]
    sizes: list[Sizes]


def candidates(source: str, cell: Cell | None) -> list[Source]:
    """Return the cells that a source has, or the one.

    Raises:
        ValueError: the source is unknown, its function is none of this package's, or it has no such cell.
    """
    if source in UNSUPPORTED:
        raise ValueError(f"{source}: its function cannot be said here: {UNSUPPORTED[source]}")
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {source!r}")
    cells = SOURCES[source]
    if cell is None:
        return list(cells.values())
    if cell not in cells:
        raise ValueError(f"{source} has no {cell!r}; its cells: {', '.join(cells)}")
    return [cells[cell]]


def matching(weights: Weights, sources: Iterable[Source], name: str, prefix: str) -> Found:
    """Return the cell and layout whose tensors these are.

    Raises:
        RuntimeError: they are those of none; it says what is missing, left over or of the wrong shape at the
            one that comes nearest.
    """
    is_list = isinstance(weights, Sequence) and not isinstance(weights, (str, bytes))
    given = {} if is_list else tensors_by_name(weights)
    if not isinstance(weights, torch.nn.Module):
        given = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
    elif prefix:
        given = tensors_by_name(weights.get_submodule(prefix.rstrip(".")))
    nearest: list[str] | None = None
    for source in sources:
        for layout in source.layouts:
            tensors = _listed(source, layout, weights) if is_list else given  # type: ignore[arg-type]
            found, problems = _fit(source, layout, tensors)
            if found is not None:
                return found
            if nearest is None or len(problems) < len(nearest):
                nearest = problems
    raise RuntimeError(f"weights are not those of {name}:\n\t" + "\n\t".join(nearest or ["there are none"]))


def _listed(source: Source, layout: Layout, arrays: Sequence[Any]) -> dict[str, Tensor]:
    """Return a list's arrays by the names that they have in order."""
    keys = list(source.keys)
    if layout.directions[1:] and len(arrays) > len(keys):
        names = [layout.name(key, 0, direction) for direction in layout.directions for key in keys]
    else:
        names = [layout.name(key, 0, layout.directions[0]) for key in keys]
    more = [f"array {index}" for index in range(len(names), len(arrays))]
    return {name: as_tensor(name, array) for name, array in zip([*names, *more], arrays, strict=False)}


def _fit(source: Source, layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[Found | None, list[str]]:
    def names(layer: int, direction: str) -> dict[str, str]:
        found = {key: layout.name(key, layer, direction) for key in source.keys}
        return {key: name for key, name in found.items() if name in tensors}

    def there(layer: int, direction: str) -> dict[str, Tensor]:
        return {
            key: _of_layer(tensors[name], layer) if key in source.across_layers else tensors[name]
            for key, name in names(layer, direction).items()
        }

    directions = [direction for direction in layout.directions if names(0, direction)]
    directions = directions or [layout.directions[0]]
    layers = 1
    if source.has_layers(layout):
        while names(layers, directions[0]).keys() - {*source.across_layers}:
            layers += 1
    problems: list[str] = []
    known: set[str] = set()
    parts: list[dict[str, Tensor]] = []
    all_sizes: list[Sizes] = []
    for layer in range(layers):
        for direction in directions:
            part = there(layer, direction)
            required = [key for key in source.keys if not source.parts(key)[0].optional]
            problems += [
                f"missing {layout.name(key, layer, direction)}" for key in required if key not in part
            ]
            known |= {layout.name(key, layer, direction) for key in part}
            sizes = sizes_of(source, part)
            if all_sizes:
                output = all_sizes[0].output
                input = sizes.input if layer == 0 else output * len(directions)
                sizes = Sizes(input, all_sizes[0].hidden, output)
            for key, tensor in part.items():
                expected = sizes.shape(source, source.parts(key)[0])
                if tuple(tensor.shape) != expected:
                    problems.append(
                        f"{layout.name(key, layer, direction)} must have the shape {expected} for "
                        f"{sizes.input} inputs and a hidden size of {sizes.hidden}, got {tuple(tensor.shape)}"
                    )
            parts.append(part)
            all_sizes.append(sizes)
    problems += [f"unexpected {name}" for name in tensors if name not in known]
    if problems:
        return None, problems
    return Found(source, layout, len(directions), parts, all_sizes), []


def _of_layer(tensor: Tensor, layer: int) -> Tensor:
    return tensor[layer] if tensor.dim() and layer < tensor.size(0) else tensor.new_empty(())


__all__ = ["Found", "candidates", "matching"]
