"""The parameters of recurrent modules, which sequences, single steps and streams share."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, TypeAlias, cast

import torch
from torch import Tensor

from layernorm import checks, recurrent_checks
from layernorm.pytorch_internals import EXTRA_STATE, is_any_autocast_enabled
from layernorm.spec import LayerSpec, Nonlinearity, layer_spec
from layernorm.variants import Cell, Variant

#: h, or for an LSTM (h, c).
State: TypeAlias = Tensor | tuple[Tensor, Tensor]


class RecurrentParameters(torch.nn.Module):
    """A recurrent module's sizes, its spec, and the parameters that the spec defines.

    Attributes:
        spec: what every layer of the module computes.
        variant: the spec's variant.
    """

    _cell: ClassVar[Cell]

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    recompute: bool = False
    spec: LayerSpec

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        variant: str | Variant,
        nonlinearity: Nonlinearity = "tanh",
        gain_init: float = 1.0,
        forget_bias: float = 0.0,
    ) -> None:
        torch.nn.Module.__init__(self)  # and not torch.nn's class of the cell, which makes its own parameters
        self.input_size = input_size
        self.hidden_size = hidden_size
        self._has_bias = bias
        self.spec = layer_spec(self._cell, variant, nonlinearity)
        self._variant_as_given = variant
        self.gain_init = checks.finite("gain_init", gain_init)
        self.forget_bias = checks.finite("forget_bias", forget_bias)
        # The shapes of each layer and direction's parameters, by their suffix.
        self._shapes: dict[str, Mapping[str, tuple[int, ...]]] = {}

    @property
    def variant(self) -> Variant:
        """How the module is normalized."""
        return self.spec.variant

    def _register(self, suffix: str, input_size: int, device: Any, dtype: Any) -> None:
        shapes = self.spec.parameter_shapes(
            input_size, self.hidden_size, proj_size=self.proj_size, bias=self._has_bias
        )
        for name, shape in shapes.items():
            parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name + suffix, parameter)
        self._shapes[suffix] = shapes

    def reset_parameters(self, gain_init: float | None = None, forget_bias: float | None = None) -> None:
        """Draw weights uniformly in ±1/√hidden_size; set gains and biases. Without a norm as PyTorch does.

        Args:
            gain_init: of every gain; None for the one that the module was made with.
            forget_bias: added to an LSTM's biases of the forget gate, which are 0 otherwise: in ``bias``, or
                without a norm in ``bias_ih``; None for the one that the module was made with.

        Raises:
            TypeError: an argument is not a number.
            ValueError: it is not finite, or there is a forget_bias and no forget gate with a bias.
        """
        gain = self.gain_init if gain_init is None else checks.finite("gain_init", gain_init)
        forget = self.forget_bias if forget_bias is None else checks.finite("forget_bias", forget_bias)
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for name, parameter in self.named_parameters():
            # A parametrized weight is called parametrizations.weight_hh_l0.original0.
            if "weight" in name or self.variant.kind == "none":
                torch.nn.init.uniform_(parameter, -bound, bound)
            elif "gain" in name:
                torch.nn.init.constant_(parameter, gain)
            else:
                torch.nn.init.zeros_(parameter)
        if forget:
            self._add_to_forget_gates(forget)

    @torch.no_grad()
    def _add_to_forget_gates(self, value: float) -> None:
        name = "bias" if self.variant.kind != "none" else "bias_ih"
        if self._cell != "lstm" or not self._has_bias:
            raise ValueError(
                f"forget_bias must be 0 where there is no forget gate with a bias, got {value}; make an LSTM "
                "with bias=True"
            )
        for suffix in self._shapes:
            bias = getattr(self, name + suffix)
            changed = bias.detach().clone()
            changed[self.hidden_size : 2 * self.hidden_size] += value
            if isinstance(bias, torch.nn.Parameter):
                bias.copy_(changed)
            else:  # a parametrized one
                setattr(self, name + suffix, changed)

    def _started(self) -> list[str]:
        """Return the arguments of the start that differ from the defaults, as they were written."""
        parts = [] if self.gain_init == 1.0 else [f"gain_init={self.gain_init:g}"]
        return parts if self.forget_bias == 0.0 else [*parts, f"forget_bias={self.forget_bias:g}"]

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__}: torch.jit.script cannot compile it; record it with torch.jit.trace, or "
            "use torch.export or torch.compile"
        )

    def layer_weights(self) -> list[dict[str, Tensor]]:
        """Return the weights of each layer and direction, by their names without suffix.

        Read as attributes, whatever they are: parameters, buffers, the plain tensors of a replica. A call
        reads each once, for a parametrized one is computed anew each time, which may have side effects.
        """
        return [
            {name: self._weight(name + suffix) for name in shapes} for suffix, shapes in self._shapes.items()
        ]

    def _weight(self, name: str) -> Tensor:
        """Return an attribute, most likely a parameter: a module looks for those last."""
        found = self._parameters.get(name)
        return getattr(self, name) if found is None else found

    def layer_shapes(self) -> list[Mapping[str, tuple[int, ...]]]:
        """Return the shapes that they have."""
        return list(self._shapes.values())

    @property
    def _is_described(self) -> bool:
        """Tell whether a state dict says what is computed: without a norm its entries are torch.nn's."""
        return self.variant.kind != "none"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_described:
            text = json.dumps(self.spec.description)
            destination[prefix + EXTRA_STATE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, found, error_msgs
        )
        key = prefix + EXTRA_STATE
        unexpected_keys += [name for name in found if name != key]
        given = state_dict.get(key)
        if given is not None:
            theirs = _spec_of(given)
            if isinstance(theirs, str):
                error_msgs.append(f"{key} must say which function the weights are of, but: {theirs}")
            elif theirs != self.spec:
                error_msgs.append(
                    f"{key} says that the weights are of {theirs}, but this module is {self.spec}; make the "
                    "module of their variant"
                )
        elif self._is_described and any(name.startswith(prefix + "weight") for name in state_dict):
            warnings.warn(
                f"layernorm: the state dict has no {key}, so it does not say which function its weights are "
                f"of; they are loaded as variant {self._variant_as_given!r}. New ones say it.",
                stacklevel=2,
            )

    def _check_weights(self, weights: list[dict[str, Tensor]]) -> None:
        """Check what stands where the parameters were: attributes may be anything."""
        for given, shapes in zip(weights, self._shapes.values(), strict=True):
            recurrent_checks.module_weights(self._cell, given, shapes)

    def _check_dtype(self, input: Tensor, weight: torch.dtype, error: type[Exception] = ValueError) -> None:
        if input.dtype != weight and not is_any_autocast_enabled():
            raise error(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight}). "
                f"Convert input: input.to({weight}), or convert model: model.to({input.dtype})"
            )

    def as_tuple(self, hx: State) -> tuple[Tensor, ...]:
        """Return the state as a tuple of as many tensors as the cell has.

        Raises:
            TypeError: it is not of the cell's kind.
        """
        if self._cell != "lstm":
            if not isinstance(hx, Tensor):
                raise TypeError(f"hx must be a Tensor h_0, got {type(hx).__name__}")
            return (hx,)
        if not isinstance(hx, (tuple, list)) or len(hx) != 2 or not all(isinstance(s, Tensor) for s in hx):
            got = type(hx).__name__ + (f" of {len(hx)}" if isinstance(hx, (tuple, list)) else "")
            raise TypeError(f"hx must be a tuple (h_0, c_0) of two Tensors, got {got}")
        return tuple(hx)

    def as_state(self, state: tuple[Tensor, ...]) -> State:
        """Return what ``as_tuple`` was given."""
        return cast(State, state if self._cell == "lstm" else state[0])


def _spec_of(entry: Any) -> LayerSpec | str:
    """Return the spec that an entry of a state dict describes, or what is wrong with it."""
    try:
        return LayerSpec.described(json.loads(bytes(entry.tolist())))
    except (AttributeError, TypeError, ValueError) as error:
        return str(error)
