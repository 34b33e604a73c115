"""Loading others' weights into this package's recurrent modules, and writing them back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from layernorm.cells import LayerNormGRUCell, LayerNormLSTMCell, LayerNormRNNCell, LayerNormRNNCellBase
from layernorm.interop.layout import Sizes, features_of_norm, read, write
from layernorm.interop.matching import Found, candidates, matching
from layernorm.interop.reading import Weights
from layernorm.interop.source import Layout, Source
from layernorm.parameters import RecurrentParameters
from layernorm.recurrent import LayerNormGRU, LayerNormLSTM, LayerNormRNN, LayerNormRNNBase
from layernorm.variants import Cell, Variant, name_of

#: What ``load`` makes.
Recurrent: TypeAlias = LayerNormRNNBase | LayerNormRNNCellBase

_SEQUENCES: Final[Mapping[Cell, type[LayerNormRNNBase]]] = {
    "lstm": LayerNormLSTM,
    "gru": LayerNormGRU,
    "rnn": LayerNormRNN,
}
_CELLS: Final[Mapping[Cell, type[LayerNormRNNCellBase]]] = {
    "lstm": LayerNormLSTMCell,
    "gru": LayerNormGRUCell,
    "rnn": LayerNormRNNCell,
}


def load(
    weights: Weights,
    source: str,
    *,
    cell: Cell | None = None,
    prefix: str = "",
    sequence: bool | None = None,
    eps: float | None = None,
    cell_clip: float | None = None,
    nonlinearity: str | None = None,
    batch_first: bool | None = None,
    **constants: float,
) -> Recurrent:
    """Return one of this package's recurrent modules with the weights of another implementation.

    The module computes the source's function: with the same weights and inputs it gives the same numbers up
    to rounding. Nothing is guessed: a tensor that is missing, left over or of the wrong shape is an error,
    and so is a function that this package does not have.

    Args:
        weights: a module of the source; its state dict; a mapping of NumPy arrays or tensors by name, which
            may be nested; a list of arrays in the order of ``describe(source)``; or the path of a
            ``.safetensors``, ``.npz`` or ``.pt`` file.
        source: a name of ``SOURCES``, such as ``"torch.nn"``, ``"haste"`` or ``"sheeprl"``.
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"``, where the source has several and the names do not tell.
        prefix: what the names of the tensors begin with, such as ``"rnn."``; all others are passed over.
        sequence: whether to make a module for whole sequences, and not a cell; None for what the source is.
        eps: the source's eps, where it is not the one of ``describe(source)``. A module tells it by itself.
        cell_clip: the largest magnitude of an LSTM's cell, where it is not the one of ``describe(source)``;
            infinity for none.
        nonlinearity: ``"tanh"`` or ``"relu"``, Keras's ``activation``; a module tells it by itself.
        batch_first: whether the sequence module takes (N, T, F); None for what the given module does.
        constants: numbers that the source adds to a gate at run time, such as ``forget_bias=1.0``, where they
            are not those of ``describe(source)``. A module tells them by itself.

    Returns:
        ``LayerNormLSTM``, ``LayerNormGRU``, ``LayerNormRNN`` or a cell of theirs, in the dtype and on the
        device of the weights.

    Raises:
        ValueError: the source is unknown, cannot be said by this package, or has no such cell; an eps differs
            between norms.
        TypeError: the weights are no arrays, or the source adds no such constant.
        RuntimeError: a tensor is missing, left over, or of the wrong shape.

    Examples:
        >>> import torch, layernorm
        >>> theirs = torch.nn.LSTM(3, 5, num_layers=2)
        >>> ours = layernorm.interop.load(theirs, "torch.nn")
        >>> x = torch.randn(7, 2, 3)
        >>> torch.allclose(ours(x)[0], theirs(x)[0], atol=1e-6)
        True
    """
    found = matching(weights, candidates(source, cell), source, prefix)
    module = weights if isinstance(weights, torch.nn.Module) else None
    if module is not None and prefix:
        module = module.get_submodule(prefix.rstrip("."))
    added = _constants(found.source, source, constants, module)
    variant = _variant(found, eps, cell_clip, module)
    read_out = [
        read(found.source, variant, tensors, sizes, added)
        for tensors, sizes in zip(found.layers, found.sizes, strict=True)
    ]
    bias = any(name.startswith("bias") for ours in read_out for name in ours)
    options: dict[str, Any] = {
        "bias": bias,
        "variant": name_of(found.source.cell, variant),
        "nonlinearity": nonlinearity or getattr(module, "nonlinearity", "tanh"),
    }
    sizes = found.sizes[0]
    is_projected = sizes.output != sizes.hidden  # which no cell is
    is_sequence = (not found.layout.is_cell or is_projected) if sequence is None else sequence
    if not is_sequence and (len(found.layers) > 1 or is_projected):
        what = "with a projection" if is_projected else f"of {len(found.layers)} layers or directions"
        raise ValueError(f"sequence must be True for weights {what}")
    first = next(iter(found.layers[0].values()))
    options |= {"device": first.device, "dtype": first.dtype}
    if is_sequence:
        options |= {
            "num_layers": len(found.layers) // found.directions,
            "bidirectional": found.directions == 2,
            "batch_first": bool(getattr(module, "batch_first", False))
            if batch_first is None
            else batch_first,
        }
        if is_projected:
            options["proj_size"] = sizes.output
        made: Recurrent = _SEQUENCES[found.source.cell](sizes.input, sizes.hidden, **options)
        made.dropout = float(getattr(module, "dropout", 0.0)) if isinstance(module, torch.nn.RNNBase) else 0.0
    else:
        made = _CELLS[found.source.cell](sizes.input, sizes.hidden, **options)
    with torch.no_grad():
        for theirs, ours in zip(read_out, made.layer_weights(), strict=True):
            for name, parameter in ours.items():
                parameter.copy_(theirs[name] if name in theirs else torch.zeros(()))
    return made.train(module.training) if module is not None else made


def export(module: Recurrent, source: str, *, prefix: str = "", **constants: float) -> dict[str, Tensor]:
    """Return a module's weights as another implementation names and lays them out: the inverse of ``load``.

    Args:
        module: one of this package's recurrent modules, of the source's function.
        source: a name of ``SOURCES``.
        prefix: what the names shall begin with.
        constants: as for ``load``.

    Returns:
        Tensors by name, in the module's dtype. Where a source has several tensors whose sum is one of this
        package's, the first has all of it. Eps and clipping are not among them: the source's must be
        those of ``module.variant``.

    Raises:
        ValueError: the source is unknown, or it cannot hold these weights; it says what stands in the way.
        TypeError: ``module`` is not one of this package's, or the source adds no such constant.

    Examples:
        >>> import layernorm
        >>> cell = layernorm.LayerNormGRUCell(3, 5, variant="sheeprl")
        >>> {name: tuple(tensor.shape) for name, tensor in layernorm.interop.export(cell, "sheeprl").items()}
        {'linear.weight': (15, 8), 'layer_norm.weight': (15,), 'layer_norm.bias': (15,)}
    """
    if not isinstance(module, RecurrentParameters):
        raise TypeError(f"module must be one of layernorm's recurrent modules, got {type(module).__name__}")
    (found,) = candidates(source, module.spec.cell)
    _check_function(module, found, source)
    added = _constants(found, source, constants, None)
    directions = 2 if module.bidirectional else 1
    layout = _layout_for(module, found, source, directions)
    collected: dict[str, list[Tensor]] = {}
    for at, (weights, shapes) in enumerate(zip(module.layer_weights(), module.layer_shapes(), strict=True)):
        sizes = Sizes(shapes["weight_ih"][1], module.hidden_size, shapes["weight_hh"][1])
        theirs, left = write(found, module.variant, weights, sizes, added)
        if left:
            raise ValueError(f"{source} has no place for {', '.join(left)} of the module, which is not 0")
        for key, tensor in theirs.items():
            name = prefix + layout.name(key, at // directions, layout.directions[at % directions])
            collected.setdefault(name, []).append(tensor.to(weights["weight_ih"]))
    across = {prefix + layout.name(key, 0, layout.directions[0]) for key in found.across_layers}
    return {
        name: torch.stack(found_there) if name in across else found_there[0].contiguous()
        for name, found_there in collected.items()
    }


def _constants(
    source: Source, name: str, given: Mapping[str, float], module: torch.nn.Module | None
) -> dict[str, float]:
    """Return what the source adds to gates, by their letter."""
    unknown = given.keys() - source.constants.keys()
    if unknown:
        has = ", ".join(source.constants) or "no constants"
        raise TypeError(f"{name} has {has}, and not {', '.join(sorted(unknown))}")
    added: dict[str, float] = {}
    for argument, constant in source.constants.items():
        values = [constant.value]
        for attribute in constant.attributes:
            try:
                values.append(float(attrgetter(attribute)(module)))
            except (AttributeError, TypeError):
                continue
        value = given.get(argument, values[-1])
        added[constant.gate] = added.get(constant.gate, 0.0) + value
    return added


def _variant(
    found: Found, eps: float | None, cell_clip: float | None, module: torch.nn.Module | None
) -> Variant:
    """Return the function of these tensors, with their eps and the biases that they have inside norms."""
    variant = found.source.variant
    if cell_clip is not None:
        variant = dataclasses.replace(variant, cell_clip=None if math.isinf(cell_clip) else cell_clip)
    if variant.kind == "none":
        return variant
    inside = any(
        name in ("bias_ih", "bias_hh")
        for tensors in found.layers
        for key in tensors
        for part in found.source.parts(key)
        for name in part.names
    )
    if eps is None and module is not None:
        everywhere = [getattr(m, name, None) for m in module.modules() for name in ("eps", "epsilon")]
        told = {value for value in everywhere if isinstance(value, float)}
        if len(told) > 1:
            listed = ", ".join(f"{value:g}" for value in sorted(told))
            raise ValueError(f"the module's norms have different eps, {listed}, and a layer here has one")
        eps = next(iter(told), None)
    eps = variant.eps if eps is None else eps
    if not found.source.is_unbiased:
        return dataclasses.replace(variant, projection_bias=inside, eps=eps)
    shares = [
        (count - 1) / count
        for count in (features_of_norm(found.source, gain, found.sizes[0]) for gain in ("gain", "gain_cell"))
    ]
    return dataclasses.replace(variant, projection_bias=inside, eps=eps * shares[0], cell_eps=eps * shares[1])


def _check_function(module: RecurrentParameters, found: Source, name: str) -> None:
    ours, theirs = module.variant, found.variant
    if module.learn_initial_state:
        raise ValueError(f"{name} has no place for the module's learned initial state; give it as hx")
    inside = any(
        part in ("bias_ih", "bias_hh")
        for key in found.keys
        for each in found.parts(key)
        for part in each.names
    )
    free = ("eps", "cell_eps", "cell_clip", "projection_bias")
    same = dataclasses.replace(ours, **{field: getattr(theirs, field) for field in free}) == theirs
    if not same or (ours.projection_bias and not inside):
        raise ValueError(f"{name} computes {theirs}, and the module {ours}; the functions differ")


def _layout_for(module: RecurrentParameters, found: Source, name: str, directions: int) -> Layout:
    is_cell = isinstance(module, LayerNormRNNCellBase)
    fitting = [
        layout
        for layout in found.layouts
        if len(layout.directions) >= directions and (module.num_layers == 1 or found.has_layers(layout))
    ]
    if not fitting:
        raise ValueError(
            f"{name} has one layer and direction to a module; this one has {module.num_layers} layers and "
            f"{directions} directions"
        )
    return next((layout for layout in fitting if layout.is_cell == is_cell), fitting[0])


__all__ = ["Recurrent", "export", "load"]
