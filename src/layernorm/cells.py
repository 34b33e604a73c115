"""One step of a normalized LSTM, GRU or RNN: drop-in for ``torch.nn``'s cells.

``Parametrized`` is what these cells share with the sequences of ``layernorm.recurrent``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor

from layernorm import checks, functional, recurrent_checks
from layernorm.variants import Cell, Variant, parameter_shapes, resolve

State: TypeAlias = Tensor | tuple[Tensor, Tensor]


class Parametrized(torch.nn.Module):
    """What sequences and cells share: sizes, variant, and parameters that the variant defines."""

    _cell: ClassVar[Cell]

    input_size: int
    hidden_size: int
    variant: Variant
    recompute: bool = False  # of the sequences
    _names: tuple[str, ...]  # of a layer's parameters, without suffix

    def __init__(self, input_size: int, hidden_size: int, bias: bool, variant: str | Variant) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self._has_bias = bias
        self.variant = resolve(variant, self._cell)
        self._variant_as_given = variant

    def _register(self, suffix: str, input_size: int, proj_size: int, device: Any, dtype: Any) -> None:
        shapes = parameter_shapes(
            self._cell,
            self.variant,
            input_size,
            self.hidden_size,
            proj_size=proj_size,
            bias=self._has_bias,
        )
        for name, shape in shapes.items():
            parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name + suffix, parameter)
        self._names = tuple(shapes)

    def reset_parameters(self) -> None:
        """Weights uniform in ±1/√hidden_size, gains 1, biases 0; without a norm PyTorch's own."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            # A parametrized weight is called parametrizations.weight_hh_l0.original0.
            if "weight" in name or self.variant.kind == "none":
                torch.nn.init.uniform_(parameter, -bound, bound)
            elif "gain" in name:
                torch.nn.init.ones_(parameter)
            else:
                torch.nn.init.zeros_(parameter)

    def _weights(self, suffix: str = "") -> dict[str, Tensor]:
        """The weights with this suffix, by their names without it.

        Read as attributes, whatever they are: parameters, buffers, the plain tensors of a replica. A call
        reads each once, for a parametrized one is computed anew each time, which may have side effects.
        """
        return {name: getattr(self, name + suffix) for name in self._names}

    def _sequence(
        self,
        input: Tensor,
        state: tuple[Tensor, ...],
        suffix: str,
        weights: dict[str, Tensor],
        reverse: bool = False,
        batch_sizes: Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer and direction over time-major input; the state as a tuple."""
        options: dict[str, Any] = {
            "variant": self.variant,
            "reverse": reverse,
            "batch_sizes": batch_sizes,
            "resets": resets,
            "recompute": self.recompute,
        }
        if self._cell == "lstm":
            h, c = state
            return functional.lstm(input, (h, c), weights, **options)
        if self._cell == "gru":
            output, h = functional.gru(input, state[0], weights, **options)
        else:
            output, h = functional.rnn(
                input, state[0], weights, nonlinearity=cast(str, self.nonlinearity), **options
            )
        return output, (h,)

    def _check_dtype(self, input: Tensor, weight: torch.dtype) -> None:
        if input.dtype != weight and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight}). "
                f"Convert input: input.to({weight}), or convert model: model.to({input.dtype})"
            )

    def _as_tuple(self, hx: State) -> tuple[Tensor, ...]:
        """The state as a tuple of as many tensors as this cell has."""
        if self._cell != "lstm":
            if not isinstance(hx, Tensor):
                raise TypeError(f"hx must be a Tensor h_0, got {type(hx).__name__}")
            return (hx,)
        if not isinstance(hx, tuple | list) or len(hx) != 2 or not all(isinstance(s, Tensor) for s in hx):
            got = type(hx).__name__ + (f" of {len(hx)}" if isinstance(hx, tuple | list) else "")
            raise TypeError(f"hx must be a tuple (h_0, c_0) of two Tensors, got {got}")
        return tuple(hx)

    def _as_state(self, state: tuple[Tensor, ...]) -> State:
        return cast(State, state if self._cell == "lstm" else state[0])


class _SingleStep(Parametrized):
    """One step of one layer."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        variant: str | Variant = "paper",
    ) -> None:
        # torch.nn's cells take any truth value for bias.
        checks.recurrent_sizes(input_size, hidden_size, bias=bool(bias))
        super().__init__(input_size, hidden_size, bool(bias), variant)
        self._register("", input_size, 0, device, dtype)
        if "bias" not in self._parameters:
            # torch.nn's cells have the flag under this name, torch.nn.Linear None for no parameter.
            self.bias = self._has_bias if self.variant.kind == "none" else None
        self.reset_parameters()

    def forward(self, input: Tensor, hx: State | None = None, *, resets: Tensor | None = None) -> State:
        """Takes one step; shapes as in the class docstring."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
        name = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        count = 2 if self._cell == "lstm" else 1
        state = None if hx is None else self._as_tuple(hx)
        for index, tensor in enumerate(state or ()):
            if tensor.dim() not in (1, 2):
                which = f"hx[{index}]" if count > 1 else "hidden"
                raise ValueError(f"{name}: Expected {which} to be 1D or 2D, got {tensor.dim()}D instead")
        batched = input.dim() == 2
        rows = input if batched else input.unsqueeze(0)
        if state is None:
            state = (rows.new_zeros(rows.size(0), self.hidden_size),) * count
        elif not batched:
            state = tuple(s.unsqueeze(0) for s in state)
        weights = self._weights()
        self._check_dtype(rows, weights["weight_ih"].dtype)
        self._check_step(rows, state)
        if resets is not None:
            resets = recurrent_checks.reset_mask(name, resets, input).reshape(1, -1)  # (T, N) of one step
        _, state = self._sequence(rows.unsqueeze(0), state, "", weights, resets=resets)
        return self._as_state(state if batched else tuple(s.squeeze(0) for s in state))

    def _check_step(self, rows: Tensor, state: tuple[Tensor, ...]) -> None:
        if rows.size(1) != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {rows.size(1)} expected {self.input_size}"
            )
        for index, tensor in enumerate(state):
            if tensor.dim() != 2:
                raise RuntimeError(
                    f"hidden{index} must have as many dimensions as input, {rows.dim()} for a batch "
                    f"and {rows.dim() - 1} for one row"
                )
            if tensor.size(0) != rows.size(0):
                raise RuntimeError(
                    f"Input batch size {rows.size(0)} doesn't match hidden{index} batch size {tensor.size(0)}"
                )
            if tensor.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {tensor.size(1)}, expected "
                    f"{self.hidden_size}"
                )

    def extra_repr(self) -> str:
        """The sizes, what differs from the defaults, and the variant."""
        bias = "" if self._has_bias else ", bias=False"
        return f"{self.input_size}, {self.hidden_size}{bias}, variant={self._variant_as_given!r}"


class LayerNormLSTMCell(_SingleStep):
    """One step of ``LayerNormLSTM``, drop-in for ``torch.nn.LSTMCell``.

    Args:
        input_size: features of the input, F.
        hidden_size: features of the state, H.
        bias: whether there are biases.
        device: where the parameters are made.
        dtype: of the parameters.
        variant: a name of ``layernorm.variants.PRESETS``, or a ``layernorm.Variant``.

    Shape:
        - input: (N, F), or (F) for one row;
        - ``(h, c)``: each (N, H), or (H); zeros when left out;
        - resets: bool (N), or () for one row; the rows where it is true start from a state of zeros,
          whatever ``(h, c)`` holds;
        - result: the next ``(h, c)``.

    The parameters are those of the sequence without suffix; so ``bias`` is the parameter after the norms, or
    None without biases.

    Raises:
        ValueError: a size or the variant is not one there is; a wrong rank or dtype.
        TypeError: an argument is of the wrong type.
        RuntimeError: input, state or resets has the wrong shape.

    Examples:
        >>> import torch, layernorm
        >>> cell = layernorm.LayerNormLSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
        >>> h, c = cell(torch.randn(3, 10), (h, c))
        >>> h.shape
        torch.Size([3, 20])
    """

    _cell = "lstm"


class LayerNormGRUCell(_SingleStep):
    """One step of ``LayerNormGRU``, drop-in for ``torch.nn.GRUCell``.

    Arguments and errors are those of ``LayerNormLSTMCell``; the state is one tensor h (N, H).

    Examples:
        >>> import torch, layernorm
        >>> cell = layernorm.LayerNormGRUCell(10, 20)
        >>> cell(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    _cell = "gru"


class LayerNormRNNCell(_SingleStep):
    """One step of ``LayerNormRNN``, drop-in for ``torch.nn.RNNCell``.

    Arguments and errors are those of ``LayerNormLSTMCell`` with ``nonlinearity``, ``"tanh"`` or
    ``"relu"``, in ``torch.nn.RNNCell``'s place; the state is one tensor h (N, H).

    Examples:
        >>> import torch, layernorm
        >>> cell = layernorm.LayerNormRNNCell(10, 20)
        >>> cell(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    _cell = "rnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        variant: str | Variant = "paper",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, variant=variant)
        self.nonlinearity = checks.nonlinearity(nonlinearity)

    def extra_repr(self) -> str:
        """The sizes, what differs from the defaults, and the variant."""
        extra = "" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity!r}"
        return super().extra_repr() + extra
