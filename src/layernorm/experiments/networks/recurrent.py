"""LSTM and GRU with each norm of a comparison, all with ``torch.nn``'s arguments and call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

import layernorm
from layernorm.baselines import BatchNormLSTM
from layernorm.experiments.task import ExperimentError
from layernorm.variants import PRESETS

_Module = TypeVar("_Module", bound=nn.Module)

#: What an LSTM can be normalized with.
LSTM_NORMS: Final = ("none", "batch", "layer", "rms", "weight")
#: What a GRU can be normalized with.
GRU_NORMS: Final = ("none", "layer", "rms", "weight")


def lstm(
    norm: str, input_size: int, hidden_size: int, *, max_length: int = 1024, **options: Any
) -> nn.Module:
    """Return an LSTM with this norm, with the call of ``torch.nn.LSTM``.

    ==========  ==========================================================================================
    none        ``torch.nn.LSTM``
    batch       ``layernorm.baselines.BatchNormLSTM`` (Cooijmans et al. 2016), statistics for each step
    layer       ``layernorm.LayerNormLSTM`` (paper eq. 20-22)
    rms         the same with the root mean square in place of mean and variance
    weight      ``torch.nn.LSTM``'s function, each row of a weight g·v/‖v‖ (Salimans and Kingma 2016)
    a variant   ``layernorm.LayerNormLSTM`` with that name of ``layernorm.variants.PRESETS``
    ==========  ==========================================================================================

    Args:
        norm: one of ``LSTM_NORMS`` or the name of a variant.
        input_size: features of the input.
        hidden_size: features of the cell.
        max_length: steps that batch norm keeps statistics of; the other norms have none to keep.
        options: further arguments of ``torch.nn.LSTM`` by name.

    Raises:
        ExperimentError: there is no such norm.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.networks import recurrent
        >>> network = recurrent.lstm("layer", 10, 20, batch_first=True)
        >>> output, (h, c) = network(torch.randn(3, 5, 10))
        >>> output.shape, h.shape
        (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
    """
    if norm == "none":
        return nn.LSTM(input_size, hidden_size, **options)
    if norm == "batch":
        return BatchNormLSTM(input_size, hidden_size, **options, max_length=max_length)
    variant = _variant(norm, "lstm", LSTM_NORMS)
    network = layernorm.LayerNormLSTM(input_size, hidden_size, **options, variant=variant)
    return _weight_normalized(network) if norm == "weight" else network


def lstm_cell(norm: str, input_size: int, hidden_size: int) -> nn.LSTMCell | layernorm.LayerNormLSTMCell:
    """Return one step of ``lstm`` with this norm, with the call of ``torch.nn.LSTMCell``; but for batch norm.

    Raises:
        ExperimentError: there is no such norm of a step.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.networks import recurrent
        >>> h, c = recurrent.lstm_cell("weight", 10, 20)(torch.randn(3, 10))
        >>> h.shape
        torch.Size([3, 20])
    """
    if norm in ("none", "weight"):
        cell = nn.LSTMCell(input_size, hidden_size)
        return _weight_normalized(cell) if norm == "weight" else cell
    norms = tuple(name for name in LSTM_NORMS if name != "batch")
    return layernorm.LayerNormLSTMCell(input_size, hidden_size, variant=_variant(norm, "lstm", norms))


def gru(norm: str, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
    """Return a GRU with this norm, with the call of ``torch.nn.GRU``.

    The norms are those of ``lstm``: layer norm is ``layernorm.LayerNormGRU`` (paper eq. 26-28).

    Args:
        norm: one of ``GRU_NORMS`` or the name of a variant.
        input_size: features of the input.
        hidden_size: features of the state.
        options: further arguments of ``torch.nn.GRU`` by name.

    Raises:
        ExperimentError: there is no such norm.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.networks import recurrent
        >>> output, h = recurrent.gru("weight", 10, 20)(torch.randn(5, 3, 10))
        >>> output.shape, h.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """
    if norm == "none":
        return nn.GRU(input_size, hidden_size, **options)
    variant = _variant(norm, "gru", GRU_NORMS)
    network = layernorm.LayerNormGRU(input_size, hidden_size, **options, variant=variant)
    return _weight_normalized(network) if norm == "weight" else network


@torch.no_grad()
def start(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters of an LSTM or GRU in this module these values, whatever its norm.

    Args:
        network: the LSTM or GRU.
        values: by the names of ``torch.nn``; of a weight-normalized matrix the product g·v/‖v‖.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.networks import recurrent
        >>> lstm = recurrent.lstm("weight", 2, 3)
        >>> recurrent.start(lstm, {"weight_hh_l0": torch.eye(3).repeat(4, 1)})
        >>> torch.equal(lstm.weight_hh_l0, torch.eye(3).repeat(4, 1))
        True
    """
    for name, value in values.items():
        if is_parametrized(network, name):
            setattr(network, name, value)
        else:
            getattr(network, name).copy_(value)


def _variant(norm: str, cell: str, norms: tuple[str, ...]) -> str:
    """Return the variant of ``LayerNormLSTM`` or ``LayerNormGRU`` that a norm is made of."""
    named = tuple(name for name, cells in PRESETS.items() if cell in cells and name not in norms)
    if norm not in norms + named:
        raise ExperimentError(
            f"unknown norm {norm!r} of the {cell.upper()}; expected one of {', '.join(norms + named)}"
        )
    return {"layer": "paper", "weight": "none"}.get(norm, norm)


def _weight_normalized(network: _Module) -> _Module:
    """Make the weight matrices g·v/‖v‖ with one g for each row, starting as they were.

    Not for ``torch.nn.LSTM``, which keeps a list of its weights as they were when it was made.
    """
    for name in [name for name, _ in network.named_parameters() if name.startswith("weight_")]:
        weight_norm(network, name)
    return network
