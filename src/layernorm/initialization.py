"""How the parameters of recurrent modules start."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, Self, TypedDict, get_args

import torch
from torch import Tensor

from layernorm import checks
from layernorm.spec import LayerSpec

RecurrentInit = Literal["uniform", "orthogonal"]


class RecurrentModule(Protocol):
    """What is known of a module whose parameters are set."""

    spec: LayerSpec
    hidden_size: int

    @property
    def has_bias(self) -> bool: ...

    @property
    def suffixes(self) -> list[str]: ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...


class StartOptions(TypedDict, total=False):
    """The keyword arguments of recurrent modules and ``reset_parameters`` that say how parameters start."""

    gain_init: float | Literal["uniform"]
    recurrent_init: RecurrentInit
    forget_bias: float
    update_bias: float
    t_max: int | None


@dataclass(frozen=True)
class Start:
    """How the parameters of a recurrent module start.

    Args:
        gain_init: what every gain is, or ``"uniform"`` for ±1/√hidden_size, as NeMo's are.
        recurrent_init: the matrices that meet h: ``"uniform"`` in ±1/√hidden_size, as PyTorch's are, or each
            gate's ``"orthogonal"`` (Saxe et al. 2014).
        forget_bias: added to the biases of an LSTM's forget gate, which are 0 otherwise.
        update_bias: added to those of a GRU's update gate, which keeps the old state.
        t_max: the longest time in steps over which to remember at first, in place of these two: the
            forget gate's bias is the logarithm of a number that is uniform in [1, t_max - 1], and the input
            gate's is its negative; likewise a GRU's update gate (Tallec and Ollivier 2018, "chrono").
    """

    gain_init: float | Literal["uniform"] = 1.0
    recurrent_init: RecurrentInit = "uniform"
    forget_bias: float = 0.0
    update_bias: float = 0.0
    t_max: int | None = None

    def __post_init__(self) -> None:
        for name in ("gain_init", "forget_bias", "update_bias"):
            value = getattr(self, name)
            if name != "gain_init" or not isinstance(value, str):
                object.__setattr__(self, name, checks.finite(name, value))
            elif value != "uniform":
                raise ValueError(f"{name} must be a number or 'uniform', got {value!r}")
        if self.recurrent_init not in get_args(RecurrentInit):
            expected = " or ".join(map(repr, get_args(RecurrentInit)))
            raise ValueError(f"recurrent_init must be {expected}, got {self.recurrent_init!r}")
        if self.t_max is None:
            return
        if isinstance(self.t_max, bool) or not isinstance(self.t_max, int):
            raise TypeError(f"t_max must be an int or None, got {type(self.t_max).__name__}")
        if self.t_max < 3:
            raise ValueError(f"t_max must be at least 3 steps, got {self.t_max}")
        if self.forget_bias or self.update_bias:
            raise ValueError("t_max takes the place of forget_bias and update_bias; give one of them")

    def replaced(self, options: Mapping[str, Any]) -> Self:
        """Return this with other values; those that are None stay.

        Raises:
            TypeError: an option is unknown.
        """
        unknown = options.keys() - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise TypeError(f"unexpected keyword argument {', '.join(map(repr, sorted(unknown)))}")
        return dataclasses.replace(
            self, **{name: value for name, value in options.items() if value is not None}
        )

    def check(self, module: RecurrentModule) -> None:
        """Check that the module has the gates that are spoken of, and biases for them."""
        for name, cell, gate in _GATE_BIASES:
            value = getattr(self, name)
            if value and (module.spec.cell != cell or not module.has_bias):
                raise ValueError(
                    f"{name} must be {'None' if name == 't_max' else 0} where there is no {gate} gate with a "
                    f"bias, got {value}; make {'an LSTM' if cell == 'lstm' else 'a GRU'} with bias=True"
                )
        if self.t_max is not None and (module.spec.cell == "rnn" or not module.has_bias):
            raise ValueError(
                f"t_max must be None where there is no forget or update gate with a bias, got {self.t_max}; "
                "make an LSTM or a GRU with bias=True"
            )

    @torch.no_grad()
    def apply(self, module: RecurrentModule) -> None:
        """Set the parameters of a module."""
        self.check(module)
        bound = 1.0 / math.sqrt(module.hidden_size) if module.hidden_size > 0 else 0.0
        for name, parameter in module.named_parameters():
            # A parametrized weight is called parametrizations.weight_hh_l0.original0.
            if "initial" in name:
                torch.nn.init.zeros_(parameter)
            elif "weight" in name or module.spec.variant.kind == "none":
                torch.nn.init.uniform_(parameter, -bound, bound)
            elif "gain" not in name:
                torch.nn.init.zeros_(parameter)
            elif self.gain_init == "uniform":
                torch.nn.init.uniform_(parameter, -bound, bound)
            else:
                torch.nn.init.constant_(parameter, self.gain_init)
        for suffix in module.suffixes if module.hidden_size else ():
            if self.recurrent_init == "orthogonal":
                _change(module, f"weight_hh{suffix}", lambda weight: _orthogonal(weight, module.hidden_size))
            self._add_to_gates(module, suffix)

    def _add_to_gates(self, module: RecurrentModule, suffix: str) -> None:
        size = module.hidden_size
        added: dict[int, Tensor | float] = {}  # by the place of the gate
        if self.t_max is not None:
            times = torch.empty(size).uniform_(1, self.t_max - 1).log()
            added[1] = times
            if module.spec.cell == "lstm":
                added[0] = -times
        elif self.forget_bias or self.update_bias:
            added[1] = self.forget_bias + self.update_bias

        def add(bias: Tensor) -> Tensor:
            for gate, value in added.items():
                bias[gate * size : (gate + 1) * size] += torch.as_tensor(value).to(bias)
            return bias

        if added:
            _change(module, ("bias" if module.spec.variant.normalizes_gates else "bias_ih") + suffix, add)

    def __str__(self) -> str:
        """Return the arguments that differ from the defaults, as they were written."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(
                    f"{field.name}={value:g}" if isinstance(value, float) else f"{field.name}={value!r}"
                )
        return ", ".join(parts)


# What is added to a gate, of which cell, and the gate in words.
_GATE_BIASES: Final = (("forget_bias", "lstm", "forget"), ("update_bias", "gru", "update"))


def _orthogonal(weight: Tensor, size: int) -> Tensor:
    for gate in weight.split(size):  # half precision has no QR decomposition
        gate.copy_(torch.nn.init.orthogonal_(torch.empty_like(gate, dtype=torch.float64)))
    return weight


def _change(module: RecurrentModule, name: str, change: Any) -> None:
    value = getattr(module, name)
    changed = change(value.detach().clone())
    if isinstance(value, torch.nn.Parameter):
        value.copy_(changed)
    else:  # a parametrized one
        setattr(module, name, changed)


__all__ = ["RecurrentInit", "Start", "StartOptions"]
