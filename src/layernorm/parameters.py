"""The parameters of recurrent modules, which sequences, single steps and streams share."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, TypeAlias, Unpack, cast

import torch
from torch import Tensor

from layernorm import checks, recurrent_checks
from layernorm.initialization import Start, StartOptions
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
        start: how its parameters start.
    """

    _cell: ClassVar[Cell]

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    recompute: bool = False
    spec: LayerSpec
    start: Start

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        variant: str | Variant,
        nonlinearity: Nonlinearity = "tanh",
        start: StartOptions | None = None,
        learn_initial_state: bool = False,
        gain: bool = True,
    ) -> None:
        torch.nn.Module.__init__(self)  # and not torch.nn's class of the cell, which makes its own parameters
        self.input_size = input_size
        self.hidden_size = hidden_size
        self._has_bias = bias
        self._has_gain = checks.flag("gain", gain)
        self.spec = layer_spec(self._cell, variant, nonlinearity)
        self._variant_as_given = variant
        self.start = Start().replaced(start or {})
        self.learn_initial_state = checks.flag("learn_initial_state", learn_initial_state)
        # The shapes of each layer and direction's parameters, by their suffix.
        self._shapes: dict[str, Mapping[str, tuple[int, ...]]] = {}

    @property
    def variant(self) -> Variant:
        """How the module is normalized."""
        return self.spec.variant

    @property
    def nonlinearity(self) -> Nonlinearity:
        """``"tanh"`` or ``"relu"``."""
        return self.spec.nonlinearity

    def _register(self, suffix: str, input_size: int, device: Any, dtype: Any) -> None:
        shapes = self.spec.parameter_shapes(
            input_size,
            self.hidden_size,
            proj_size=self.proj_size,
            bias=self._has_bias,
            gain=self._has_gain,
        )
        for name, shape in shapes.items():
            parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name + suffix, parameter)
        self._shapes[suffix] = shapes

    def _register_initial_state(self, layers: tuple[int, ...], device: Any, dtype: Any) -> None:
        """Register the learned initial state: of shape (*layers, size) for h, and likewise for c."""
        sizes = {"initial_h": self.proj_size or self.hidden_size, "initial_c": self.hidden_size}
        for name in list(sizes)[: 2 if self._cell == "lstm" else 1] if self.learn_initial_state else ():
            parameter = torch.nn.Parameter(torch.empty(*layers, sizes[name], device=device, dtype=dtype))
            self.register_parameter(name, parameter)

    def learned_initial_state(self) -> tuple[Tensor, ...] | None:
        """Return the learned initial h (and c), without a batch; None where the state starts from zeros."""
        if not self.learn_initial_state:
            return None
        h = self._weight("initial_h")
        return (h, self._weight("initial_c")) if self._cell == "lstm" else (h,)

    @property
    def has_bias(self) -> bool:
        """Tell whether there are biases."""
        return self._has_bias

    @property
    def suffixes(self) -> list[str]:
        """List what the names of each layer and direction's parameters end with."""
        return list(self._shapes)

    def reset_parameters(self, **start: Unpack[StartOptions]) -> None:
        """Draw weights uniformly in ±1/√hidden_size; set gains and biases. Without a norm as PyTorch does.

        Args:
            start: ``gain_init``, ``recurrent_init``, ``forget_bias``, ``update_bias`` and ``t_max``, where
                they are to be others than those that the module was made with.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: a number is not finite, or the module has no gate with a bias that it is of.
        """
        self.start.replaced(start).apply(self)

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
