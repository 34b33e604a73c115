"""Norms by their names, of features in the last dimension or of channels in the second."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from layernorm import functional
from layernorm.baselines.batch_norm import BatchNorm
from layernorm.baselines.dynamic_tanh import DynamicTanh
from layernorm.modules import LayerNorm, RMSNorm
from layernorm.pytorch_internals import BatchNormBase

#: What ``Norm`` knows, apart from modules of one's own.
NAMES: Final = ("none", "batch", "layer", "rms", "instance", "group:G", "dyt")


class Norm:
    """Makes the norm of a name, of a width that a network says.

    Args:
        norm: ``"none"``, ``"batch"``, ``"layer"``, ``"rms"``, ``"instance"``, ``"group:G"`` with G groups,
            ``"dyt"`` for dynamic tanh, or what makes a module of a width, such as a class of one's own.

    Attributes:
        name: as in tables.

    Raises:
        ValueError: there is no norm of that name.
        TypeError: ``norm`` is neither a name nor can be called.

    Examples:
        >>> from layernorm.baselines import Norm
        >>> Norm("layer")(64)
        LayerNorm((64,), eps=1e-05, elementwise_affine=True, bias=True)
        >>> Norm("group:8")(64, dim=1).num_groups
        8
    """

    def __init__(self, norm: str | Callable[[int], nn.Module]) -> None:
        self.name: str
        self._make: Callable[[int, int], nn.Module]
        if isinstance(norm, Norm):
            self.name, self._make = norm.name, norm._make
        elif isinstance(norm, str):
            self.name, self._make = norm, _maker(norm)
        elif callable(norm):
            self.name = getattr(norm, "__name__", type(norm).__name__)
            self._make = partial(_of_ones_own, norm)
        else:
            raise TypeError(
                f"norm must be one of {', '.join(NAMES)} or a class of a module, got {type(norm).__name__}"
            )

    def __call__(self, width: int, dim: int = -1) -> nn.Module:
        """Return the norm.

        Args:
            width: the size of the normalized dimension.
            dim: -1 where the input is (N, *, width): layer, RMS and group norm are of each place by itself,
                batch norm of all. 1 where it is (N, width, *), as of convolutions: layer, RMS and group norm
                are of all places of a case together, as in the paper, with a gain for each channel.

        Raises:
            ValueError: ``dim`` is another one, or groups do not divide the width.
        """
        if dim not in (-1, 1):
            raise ValueError(
                f"dim must be -1, for features (N, *, width), or 1, for channels (N, width, *); got {dim}"
            )
        made: nn.Module = self._make(width, dim)
        return made

    def __repr__(self) -> str:
        return f"Norm({self.name!r})"


class RowsNorm(nn.Module):
    """Features (N, *, width) by a norm of rows (N, width)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, *, width) to the same shape."""
        result: Tensor = self.norm(input.reshape(-1, input.size(-1)))
        return result.reshape(input.shape)


class InstanceNorm(nn.GroupNorm):
    """Each feature of a case over all places of that case: (N, *, width) with one dimension more at least."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, *, width) to the same shape."""
        if input.dim() < 3:
            raise ValueError(
                "instance norm is over the places of a case, (N, *, width), and an input "
                f"{list(input.shape)} has none; use layer norm"
            )
        return super().forward(input.movedim(-1, 1)).movedim(1, -1)


class ChannelRMSNorm(nn.Module):
    """Channels (N, C, *) by the root mean square over all of a case, with one gain for each channel."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(channels)), eps

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, *) to the same shape."""
        gain = self.weight.reshape(-1, *[1] * (input.dim() - 2))
        return functional.rms_norm(input, input.shape[1:], None, self.eps) * gain


def swap_norms(model: nn.Module, to: str | Callable[[int], nn.Module] = "layer") -> nn.Module:
    """Replace every batch norm of a model by a fresh norm of its width, in place.

    Args:
        model: of any kind; it may not be a batch norm itself. ``torch.nn.BatchNorm1d`` to ``3d``,
            ``SyncBatchNorm`` and ``layernorm.baselines.BatchNorm`` are replaced.
        to: what ``layernorm.baselines.Norm`` takes; "batch" leaves the model as it is.

    Returns:
        The model, whose new norms start from gain 1 and bias 0.

    Raises:
        ValueError: there is no norm of that name, or no batch norm in the model.

    Examples:
        >>> import torch, layernorm
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8))
        >>> layernorm.swap_norms(net, to="layer")[1].num_groups
        1
    """
    norm = to if isinstance(to, Norm) else Norm(to)
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, BatchNormBase)
    ]
    if not found:
        raise ValueError(f"swap_norms: {type(model).__name__} has no batch norm to replace")
    fresh: dict[nn.Module, nn.Module] = {}
    for parent, name, child in found:
        if norm.name == "batch":
            continue
        if child not in fresh:
            one = next(child.parameters(), child.running_mean)
            fresh[child] = norm(child.num_features, dim=1).train(child.training)
            if one is not None:
                fresh[child].to(device=one.device, dtype=one.dtype)
        setattr(parent, name, fresh[child])
    return model


def _maker(name: str) -> Callable[[int, int], nn.Module]:
    found = re.fullmatch(r"group:([1-9]\d{0,8})", name, re.ASCII)
    if found:
        return partial(_groups, int(found[1]))
    if name not in _MAKERS:
        raise ValueError(f"unknown norm {name!r}; expected one of {', '.join(NAMES)}, or a class of a module")
    return _MAKERS[name]


def _groups(groups: int, width: int, dim: int) -> nn.Module:
    if width % groups:
        raise ValueError(f"group:{groups} must divide the width, got {width}")
    norm = nn.GroupNorm(groups, width)
    return norm if dim == 1 else RowsNorm(norm)


def _of_ones_own(make: Callable[[int], Any], width: int, dim: int) -> nn.Module:
    made = make(width)
    if not isinstance(made, nn.Module):
        name = getattr(make, "__name__", type(make).__name__)
        raise TypeError(f"the norm {name} must make a torch.nn.Module, got {type(made).__name__}")
    return made


_MAKERS: Final[dict[str, Callable[[int, int], nn.Module]]] = {
    "none": lambda width, dim: nn.Identity(),
    "batch": lambda width, dim: BatchNorm(width) if dim == 1 else RowsNorm(BatchNorm(width)),
    "layer": lambda width, dim: nn.GroupNorm(1, width) if dim == 1 else LayerNorm(width),
    "rms": lambda width, dim: ChannelRMSNorm(width) if dim == 1 else RMSNorm(width),
    "instance": lambda width, dim: nn.GroupNorm(width, width) if dim == 1 else InstanceNorm(width, width),
    "dyt": lambda width, dim: DynamicTanh(width, dim=dim),
}

__all__ = ["NAMES", "Norm", "swap_norms"]
