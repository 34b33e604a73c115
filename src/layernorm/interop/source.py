"""How other code lays out the weights of a recurrent cell: what a table of ``layernorm.interop`` is made of.

A ``Source`` lists the tensors of another implementation by their names there, and for each the parameters of
this package that it holds: ``Part``. What else differs from this package's function (the order of gates, who
is multiplied with the update gate, constants that are added at run time) is a field of the source. So a table
is all there is to a source; ``layernorm.interop.layout`` reads and writes every one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from layernorm.variants import Cell, Variant

#: The gates of each cell by letter, in the order of this package, which is PyTorch's.
LETTERS: Final[Mapping[Cell, str]] = MappingProxyType({"lstm": "ifgo", "gru": "rzn", "rnn": "h"})

_NO_GATES: Final = ("gain_cell", "bias_cell", "weight_hr")


@dataclass(frozen=True)
class Part:
    """What one tensor of a source holds.

    Args:
        to: this package's parameter, or several: matrices side by side along their inputs, vectors one after
            another, either of them stacked along a first axis. Where two tensors go to one parameter it is
            their sum. Gates that ``bias_hn`` does not have go to ``bias``, which is the same for them.
        gates: the letters of the gates that the tensor has, in its order; None for all, in the source's.
        transposed: whether a matrix is (inputs, G·H), as in TensorFlow, and not (G·H, inputs).
        stacked: whether ``to`` are stacked along a first axis.
        offset: what the source adds to a gain, which it keeps without.
        optional: whether the tensor may be absent: a bias is 0 then and a gain 1.
    """

    to: str | tuple[str, ...]
    gates: str | None = None
    transposed: bool = False
    stacked: bool = False
    offset: float = 0.0
    optional: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, as a tuple."""
        return (self.to,) if isinstance(self.to, str) else self.to

    @property
    def has_gates(self) -> bool:
        """Tell whether the tensor has a block for each gate."""
        return self.names[0] not in _NO_GATES

    @property
    def is_matrix(self) -> bool:
        """Tell whether the parameters are matrices."""
        return self.names[0].startswith("weight")


@dataclass(frozen=True)
class Layout:
    """How the names of a source's tensors depend on layer and direction.

    Args:
        template: of a name, with ``{key}`` and, there or within the key, ``{layer}`` and ``{direction}``
            where the source has them; ``{even}`` and ``{odd}`` are twice the layer, and one more.
        directions: what ``{direction}`` is, forward and in reverse.
        is_cell: whether the source is a single step, so that ``load`` makes a cell.
        renamed: the keys that have another name in this layout.
    """

    template: str = "{key}"
    directions: tuple[str, ...] = ("",)
    is_cell: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    def name(self, key: str, layer: int, direction: str) -> str:
        """Return the name of a tensor."""
        name = self.template.replace("{key}", self.renamed.get(key, key))
        return name.format(layer=layer, direction=direction, even=2 * layer, odd=2 * layer + 1)


@dataclass(frozen=True)
class Constant:
    """A number that a source adds to a gate before its nonlinearity, at run time.

    Args:
        gate: the gate's letter.
        value: the number where the source does not say otherwise.
        attributes: where a module of the source keeps it, if it does.
    """

    gate: str
    value: float
    attributes: tuple[str, ...] = ()


#: The tensors of a source by name; one that enters in two places has two parts.
Keys = Mapping[str, Part | tuple[Part, ...]]


@dataclass(frozen=True)
class Source:
    """Another implementation of a recurrent cell, and how its weights are this package's.

    Args:
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"``.
        origin: the code base and the class, with its file.
        formula: one step in words, in the source's names.
        variant: the function, with the eps that the source starts from; biases inside the norms follow from
            the tensors that there are.
        order: the letters of the gates as they lie in the source's memory.
        keys: its tensors.
        layouts: how names depend on layer and direction: the first whose tensors there are.
        across_layers: those that hold all layers, along a first axis.
        update: what a GRU's update gate is multiplied with: the old ``"state"``, or the ``"candidate"``.
        is_unbiased: whether variances are with n - 1: gains and eps make up for it.
        constants: by the name of the argument of ``load`` that replaces each.
        classes: the names of the source's classes, by which ``layernorm.convert`` knows its modules.
    """

    cell: Cell
    origin: str
    formula: str
    variant: Variant
    order: str
    keys: Keys
    layouts: tuple[Layout, ...] = (Layout(is_cell=True),)
    across_layers: tuple[str, ...] = ()
    is_unbiased: bool = False
    update: Literal["state", "candidate"] = "state"
    constants: Mapping[str, Constant] = field(default_factory=dict)
    classes: tuple[str, ...] = ()

    def has_layers(self, layout: Layout) -> bool:
        """Tell whether there may be several layers."""
        return any(layout.name(key, 0, "") != layout.name(key, 1, "") for key in self.keys)

    def parts(self, key: str) -> tuple[Part, ...]:
        """Return what the tensor of that name holds."""
        found = self.keys[key]
        return found if isinstance(found, tuple) else (found,)

    def gates(self, part: Part) -> str:
        """Return the letters of the gates that a part has, in its order."""
        if not part.has_gates:
            return ""
        return self.order if part.gates is None else part.gates


__all__ = ["LETTERS", "Constant", "Keys", "Layout", "Part", "Source"]
