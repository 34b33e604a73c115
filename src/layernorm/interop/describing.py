"""Sources in words."""

from __future__ import annotations

from collections.abc import Mapping

from layernorm.interop.matching import candidates
from layernorm.interop.source import LETTERS, Source
from layernorm.variants import name_of


def describe(source: str) -> str:
    """Return in words what a source computes, and what its tensors are called and become here.

    Args:
        source: a name of ``SOURCES``.

    Raises:
        ValueError: the source is unknown, or its function is none that this package has: the error says why.

    Examples:
        >>> import layernorm
        >>> print(layernorm.interop.describe("sheeprl").splitlines()[0])
        sheeprl: Eclectic-Sheep/sheeprl, sheeprl/models/models.py, LayerNormGRUCell
    """
    return "\n\n".join(_description(source, found) for found in candidates(source, None))


def _description(name: str, source: Source) -> str:
    variant = source.variant
    lines = [f"{name}: {source.origin}", "", source.formula, ""]
    lines.append(f"variant: {name_of(source.cell, variant)}")
    if variant.kind != "none":
        lines[-1] += f", eps {variant.eps:g} unless it is given"
    lines.append(f"gates in memory: {', '.join(source.order)}; here {', '.join(LETTERS[source.cell])}")
    for argument, constant in source.constants.items():
        lines.append(f"{argument} = {constant.value:g} is added to gate {constant.gate}")
    if source.update == "candidate":
        lines.append("z multiplies the candidate; here the old state, so its rows change sign")
    lines += [
        f"names: {layout.template}" + (", one step" if layout.is_cell else "") for layout in source.layouts
    ]
    sizes = {"input": "F", "hidden": "H", "output": "P"}
    for key in source.keys:
        parts = source.parts(key)
        goes = " and ".join(" | ".join(part.names) for part in parts)
        shape = _shape_in_words(source, key, sizes)
        optional = ", optional" if parts[0].optional else ""
        lines.append(f"  {key} ({shape}{optional}) -> {goes}")
    return "\n".join(lines)


def _shape_in_words(source: Source, key: str, sizes: Mapping[str, str]) -> str:
    part = source.parts(key)[0]
    if not part.has_gates:
        return "P, H" if part.is_matrix else "H"
    count = len(source.gates(part))
    rows = f"{count}H" if count > 1 else "H"
    if not part.is_matrix:
        return f"{len(part.names)}, {rows}" if part.stacked else rows
    columns = " + ".join(sizes["input"] if name == "weight_ih" else sizes["output"] for name in part.names)
    return f"{columns}, {rows}" if part.transposed else f"{rows}, {columns}"


__all__ = ["describe"]
