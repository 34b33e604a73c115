"""The tables of ``layernorm.interop``: every source by name, and its cells."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from layernorm.interop.source import Source
from layernorm.interop.sources import flax, pytorch, reinforcement, tensorflow
from layernorm.variants import Cell

#: The sources by name, each with the cells that it has.
SOURCES: Final[Mapping[str, Mapping[Cell, Source]]] = MappingProxyType(
    {**pytorch.SOURCES, **tensorflow.SOURCES, **flax.SOURCES, **reinforcement.SOURCES}
)

#: Code bases whose function this package does not have, and why.
UNSUPPORTED: Final[Mapping[str, str]] = MappingProxyType({})

__all__ = ["SOURCES", "UNSUPPORTED"]
