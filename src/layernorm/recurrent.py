"""Layer-normalized LSTM, GRU and RNN: drop-in for ``torch.nn``'s, and their cells.

Arguments, shapes, initial states, ``PackedSequence``, layers, directions and dropout are those of
``torch.nn.LSTM``, ``torch.nn.GRU`` and ``torch.nn.RNN``. ``variant`` says which
normalized function is meant; the parameters of each are listed in
``layernorm.variants.parameter_shapes`` and carry PyTorch's suffixes, ``weight_ih_l0``,
``gain_ih_l0_reverse``. Weights start as PyTorch's do, gains at 1 and biases at 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from layernorm import checks, functional
from layernorm.variants import Cell, Variant, parameter_shapes, resolve

State: TypeAlias = Tensor | tuple[Tensor, Tensor]


class _Parametrized(torch.nn.Module):
    """What sequences and cells share: sizes, variant, and parameters that the variant defines."""

    _cell: ClassVar[Cell]

    input_size: int
    hidden_size: int
    variant: Variant

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

    def reset_parameters(self) -> None:
        """Weights uniform in ±1/√hidden_size, gains 1, biases 0; without a norm PyTorch's own."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith("weight") or self.variant.kind == "none":
                torch.nn.init.uniform_(parameter, -bound, bound)
            elif name.startswith("gain"):
                torch.nn.init.ones_(parameter)
            else:
                torch.nn.init.zeros_(parameter)

    def _weights(self, suffix: str = "") -> dict[str, Tensor]:
        """The parameters with this suffix, by their names without it, as attributes give them now."""
        names = parameter_shapes(
            self._cell,
            self.variant,
            1,
            self.hidden_size,
            proj_size=getattr(self, "proj_size", 0),
            bias=self._has_bias,
        )
        return {name: getattr(self, name + suffix) for name in names}

    def _sequence(
        self,
        input: Tensor,
        state: tuple[Tensor, ...],
        suffix: str,
        reverse: bool = False,
        batch_sizes: Sequence[int] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer and direction over time-major input; the state as a tuple."""
        weights = self._weights(suffix)
        options: dict[str, Any] = {
            "variant": self.variant,
            "reverse": reverse,
            "batch_sizes": batch_sizes,
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

    def _check_dtype(self, input: Tensor) -> None:
        weight = next(self.parameters()).dtype
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
            got = f"{type(hx).__name__} of {len(hx)}" if hasattr(hx, "__len__") else type(hx).__name__
            raise TypeError(f"hx must be a tuple (h_0, c_0) of two Tensors, got {got}")
        return tuple(hx)

    def _as_state(self, state: tuple[Tensor, ...]) -> State:
        return cast(State, state if self._cell == "lstm" else state[0])


class _Sequence(_Parametrized):
    """Layers and directions of one cell over whole sequences."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        variant: str | Variant = "paper",
    ) -> None:
        checks.recurrent_sizes(input_size, hidden_size, num_layers, bias, batch_first, dropout, proj_size)
        super().__init__(input_size, hidden_size, bias, variant)
        self.bias = bias
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bool(bidirectional)
        self.proj_size = proj_size
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout "
                f"expects num_layers greater than 1, but got dropout={dropout} and "
                f"num_layers={num_layers}",
                stacklevel=3,
            )
        output_size = (proj_size or hidden_size) * len(self._directions)
        for layer in range(num_layers):
            for direction in self._directions:
                size = input_size if layer == 0 else output_size
                self._register(f"_l{layer}{direction}", size, proj_size, device, dtype)
        self.reset_parameters()

    @property
    def _directions(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, in the order of their registration."""
        return [
            list(self._weights(f"_l{layer}{direction}").values())
            for layer in range(self.num_layers)
            for direction in self._directions
        ]

    def flatten_parameters(self) -> None:
        """Does nothing, as in ``torch.nn`` where cuDNN does not serve: no copy is kept."""

    def forward(
        self, input: Tensor | PackedSequence, hx: State | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Runs the sequence; shapes as in the class docstring."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a Tensor or PackedSequence, got {type(input).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{self._cell.upper()}: Expected input to be 2D or 3D, got {input.dim()}D tensor instead"
            )
        batched = input.dim() == 3
        state = None if hx is None else self._as_tuple(hx)
        if state is not None:
            if any(s.dim() != input.dim() for s in state):
                dims = ", ".join(f"{s.dim()}-D" for s in state)
                names = "hx should" if len(state) == 1 else "hx and cx should"
                raise RuntimeError(
                    f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, {names} also be "
                    f"{input.dim()}-D but got {dims if len(state) == 1 else f'({dims})'} tensors"
                )
            if not batched:
                state = tuple(s.unsqueeze(1) for s in state)
        data = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            data = data.transpose(0, 1)
        self._check_input(data)
        data, state = self._layers(data, self._checked_state(state, data, data.size(1)), None)
        if not batched:
            return data.squeeze(1), self._as_state(tuple(s.squeeze(1) for s in state))
        return data.transpose(0, 1) if self.batch_first else data, self._as_state(state)

    def _forward_packed(self, input: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        state = None if hx is None else self._as_tuple(hx)
        if state is not None and sorted_indices is not None:
            state = tuple(s.index_select(1, sorted_indices) for s in state)
        sizes = batch_sizes.tolist()
        self._check_input(data)
        data, state = self._layers(data, self._checked_state(state, data, sizes[0]), sizes)
        if unsorted_indices is not None:
            state = tuple(s.index_select(1, unsorted_indices) for s in state)
        packed = PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self._as_state(state)

    def _layers(
        self, data: Tensor, state: tuple[Tensor, ...], batch_sizes: Sequence[int] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs all layers over time-major or packed data; every state is (L·D, N, size)."""
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in self._directions:
                initial = tuple(s[len(finals)] for s in state)
                suffix = f"_l{layer}{direction}"
                output, final = self._sequence(data, initial, suffix, direction == "_reverse", batch_sizes)
                outputs.append(output)
                finals.append(final)
            data = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            if self.dropout and layer < self.num_layers - 1:
                data = F.dropout(data, self.dropout, self.training)
        return data, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _check_input(self, data: Tensor) -> None:
        self._check_dtype(data)
        if data.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {data.size(-1)}"
            )
        if data.dim() == 3 and data.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def _checked_state(self, state: tuple[Tensor, ...] | None, data: Tensor, rows: int) -> tuple[Tensor, ...]:
        """The initial state, zeros where none is given; each tensor (L·D, N, size)."""
        sizes = [self.proj_size or self.hidden_size]
        if self._cell == "lstm":
            sizes.append(self.hidden_size)
        count = self.num_layers * len(self._directions)
        expected = [(count, rows, size) for size in sizes]
        if state is None:
            return tuple(data.new_zeros(shape) for shape in expected)
        for index, (tensor, shape) in enumerate(zip(state, expected, strict=True)):
            if tuple(tensor.shape) != shape:
                which = f"hidden[{index}]" if len(state) > 1 else "hidden"
                raise RuntimeError(f"Expected {which} size {shape}, got {list(tensor.shape)}")
            if tensor.dtype != data.dtype and not torch._C._is_any_autocast_enabled():
                raise RuntimeError(
                    f"hx must have the input's dtype {data.dtype}, got {tensor.dtype}; convert it, "
                    "for example with hx.to(input.dtype)"
                )
            if tensor.device != data.device:
                raise RuntimeError(
                    f"Input and hidden tensors are not at the same device, found input tensor at "
                    f"{data.device} and hidden tensor at {tensor.device}"
                )
        return state

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, and the variant."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        if self.proj_size:
            parts.append(f"proj_size={self.proj_size}")
        if self.num_layers != 1:
            parts.append(f"num_layers={self.num_layers}")
        if not self.bias:
            parts.append("bias=False")
        if self.batch_first:
            parts.append("batch_first=True")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.bidirectional:
            parts.append("bidirectional=True")
        parts.append(f"variant={self._variant_as_given!r}")
        return ", ".join(parts)


class LayerNormLSTM(_Sequence):
    """A layer-normalized LSTM, drop-in for ``torch.nn.LSTM`` (paper eq. 20-22).

    (i, f, g, o) = LN(W_hh h) + LN(W_ih x) + bias, each LN over all 4·hidden_size features;
    c' = σ(f)·c + σ(i)·tanh(g) is carried on; h' = σ(o)·tanh(LN(c')). Other ``variant`` values give the
    functions of other implementations; ``"none"`` is ``torch.nn.LSTM`` with its parameter names.

    Args:
        input_size: features of the input, F.
        hidden_size: features of the cell, H.
        num_layers: layers, each reading the one before.
        bias: whether there are biases; without, gains remain.
        batch_first: whether input and output are (N, T, ·) in place of (T, N, ·).
        dropout: probability of dropout on the output of every layer but the last, in training.
        bidirectional: whether each layer also reads the sequence from its end, D = 2.
        proj_size: when positive, h is projected to this size, P; otherwise P = H.
        device: where the parameters are made.
        dtype: of the parameters.
        variant: a name of ``layernorm.variants.PRESETS``, or a ``layernorm.Variant``.

    Shape:
        - input: (T, N, F), (N, T, F) with ``batch_first``, (T, F) for one sequence, or a
          ``PackedSequence``;
        - ``(h_0, c_0)``: (num_layers·D, N, P) and (num_layers·D, N, H), without N for one sequence;
          zeros when left out;
        - output: like the input with D·P features, and ``(h_n, c_n)`` like ``(h_0, c_0)``.

    Raises:
        ValueError: a size or the variant is not one there is; the input's rank or dtype is wrong.
        TypeError: an argument is of the wrong type.
        RuntimeError: input or state has the wrong shape.

    Examples:
        >>> import torch, layernorm
        >>> lstm = layernorm.LayerNormLSTM(10, 20, num_layers=2)
        >>> output, (h, c) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, h.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    _cell = "lstm"


class LayerNormGRU(_Sequence):
    """A layer-normalized GRU, drop-in for ``torch.nn.GRU`` (paper eq. 26-28).

    (r, z) = LN(W_hh h) + LN(W_ih x) + bias over 2·hidden_size features,
    n = tanh(LN(W_ih x) + bias_n + σ(r)·(LN(W_hh h) + bias_hn)) over hidden_size features, and
    h' = (1 - z)·n + z·h: PyTorch's convention, where the paper's z is 1 - z. Other ``variant`` values
    give the functions of other implementations; ``"none"`` is ``torch.nn.GRU``.

    Arguments, shapes and errors are those of ``LayerNormLSTM`` without ``proj_size``; the state is
    one tensor h (num_layers·D, N, hidden_size).

    Examples:
        >>> import torch, layernorm
        >>> gru = layernorm.LayerNormGRU(10, 20, batch_first=True)
        >>> output, h = gru(torch.randn(3, 5, 10))
        >>> output.shape, h.shape
        (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
    """

    _cell = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        variant: str | Variant = "paper",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            variant=variant,
        )


class LayerNormRNN(_Sequence):
    """A layer-normalized RNN, drop-in for ``torch.nn.RNN`` (paper eq. 4).

    h' = f(LN(W_hh h + W_ih x) + bias), f tanh or relu. ``variant="none"`` is ``torch.nn.RNN``.

    Arguments, shapes and errors are those of ``LayerNormLSTM`` without ``proj_size`` and with
    ``nonlinearity``, ``"tanh"`` or ``"relu"``, in ``torch.nn.RNN``'s place; the state is one
    tensor h (num_layers·D, N, hidden_size).

    Examples:
        >>> import torch, layernorm
        >>> rnn = layernorm.LayerNormRNN(10, 20, nonlinearity="relu")
        >>> output, h = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    _cell = "rnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        variant: str | Variant = "paper",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            variant=variant,
        )
        self.nonlinearity = checks.nonlinearity(nonlinearity)

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, and the variant."""
        extra = "" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity!r}"
        return super().extra_repr() + extra


class _SingleStep(_Parametrized):
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

    def forward(self, input: Tensor, hx: State | None = None) -> State:
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
        self._check_step(rows, state)
        _, state = self._sequence(rows.unsqueeze(0), state, "")
        return self._as_state(state if batched else tuple(s.squeeze(0) for s in state))

    def _check_step(self, rows: Tensor, state: tuple[Tensor, ...]) -> None:
        self._check_dtype(rows)
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
        - result: the next ``(h, c)``.

    The parameters are those of the sequence without suffix; so ``bias`` is the parameter after the norms, or
    None without biases.

    Raises:
        ValueError: a size or the variant is not one there is; a wrong rank or dtype.
        RuntimeError: input or state has the wrong shape.

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
