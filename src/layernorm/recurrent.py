"""Layer-normalized LSTM, GRU and RNN over sequences: drop-in for ``torch.nn``'s.

Arguments, shapes, initial states, ``PackedSequence``, layers, directions and dropout are those of
``torch.nn.LSTM``, ``torch.nn.GRU`` and ``torch.nn.RNN``. ``variant`` says which
normalized function is meant; the parameters of each are listed in
``layernorm.variants.parameter_shapes`` and carry PyTorch's suffixes, ``weight_ih_l0``,
``gain_ih_l0_reverse``. Weights start as PyTorch's do, gains at 1 and biases at 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from layernorm import checks, functional, recurrent_checks
from layernorm.initialization import StartOptions
from layernorm.parameters import RecurrentParameters, State
from layernorm.pytorch_internals import is_any_autocast_enabled, module_apply, replicate_module
from layernorm.regularization import RecurrentDropout
from layernorm.streaming import Stream
from layernorm.variants import Variant


class LayerNormRNNBase(RecurrentParameters, torch.nn.RNNBase):
    """Layers and directions of one cell over whole sequences: the base of the modules below."""

    # Computes one layer and direction.
    _compute = staticmethod(functional.recurrent_layer)

    # torch.nn.RNNBase keeps a list of its parameters, which these keep up to date. Here the list is made
    # when it is asked for.
    __setattr__ = torch.nn.Module.__setattr__  # type: ignore[assignment]  # whose names differ
    __getstate__ = object.__getstate__
    __setstate__ = torch.nn.Module.__setstate__
    _apply = module_apply
    _replicate_for_data_parallel = replicate_module

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
        recompute: bool = False,
        nonlinearity: str = "tanh",
        gain: bool = True,
        learn_initial_state: bool = False,
        recurrent_dropout: RecurrentDropout | None = None,
        **start: Unpack[StartOptions],
    ) -> None:
        checks.recurrent_sizes(input_size, hidden_size, num_layers, bias, batch_first, dropout, proj_size)
        RecurrentParameters.__init__(
            self,
            input_size,
            hidden_size,
            bias,
            variant,
            checks.nonlinearity(nonlinearity),
            start,
            learn_initial_state,
            gain,
        )
        self.bias = bias
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bool(bidirectional)
        self.proj_size = proj_size
        self.recompute = checks.flag("recompute", recompute)
        if recurrent_dropout is not None:
            if not isinstance(recurrent_dropout, RecurrentDropout):
                raise TypeError(
                    "recurrent_dropout must be a layernorm.RecurrentDropout or None, got "
                    f"{type(recurrent_dropout).__name__}"
                )
            recurrent_dropout.check(self._cell)
        self.recurrent_dropout = recurrent_dropout
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
                self._register(f"_l{layer}{direction}", size, device, dtype)
        self._register_initial_state((num_layers * len(self._directions),), device, dtype)
        self.reset_parameters()

    @property
    def _directions(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    @property
    def mode(self) -> str:  # type: ignore[override]  # which is an attribute there
        """The name in ``torch.nn``: ``"LSTM"``, ``"GRU"``, ``"RNN_TANH"`` or ``"RNN_RELU"``."""
        return (self.spec.operation if self._cell == "rnn" else self._cell).upper()

    @property
    def all_weights(self) -> list[list[Tensor]]:  # type: ignore[override]  # of parameters there
        """The parameters of each layer and direction, in the order of their registration."""
        return [list(weights.values()) for weights in self.layer_weights()]

    @property
    def _all_weights(self) -> list[list[str]]:  # type: ignore[override]
        return [[name + suffix for name in shapes] for suffix, shapes in self._shapes.items()]

    @property
    def _flat_weights_names(self) -> list[str]:  # type: ignore[override]
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Tensor | None]:  # type: ignore[override]
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def _update_flat_weights(self) -> None:
        """Do nothing: the list is never kept."""

    _init_flat_weights = _update_flat_weights

    def flatten_parameters(self) -> None:
        """Do nothing, as in ``torch.nn`` where cuDNN is not used: no copy is kept."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        resets: Tensor | PackedSequence | None = None,
        reset_state: State | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run the sequence; shapes as in the class docstring."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, resets, reset_state)
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a Tensor or PackedSequence, got {type(input).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{self._cell.upper()}: Expected input to be 2D or 3D, got {input.dim()}D tensor instead"
            )
        batched = input.dim() == 3
        state = None if hx is None else self.as_tuple(hx)
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
        data = self._time_major(input, batched)
        weights = self.layer_weights()
        self._check_input(data, weights[0]["weight_ih"].dtype)
        state = self._checked_state(state, data, data.size(1))
        mask = None
        if resets is not None:
            mask = recurrent_checks.reset_mask(self._cell.upper(), resets, input.shape[:-1], input)
            mask = self._time_major(mask, batched)
        starts = self._starts(reset_state, mask, data, state, batched)
        data, state = self._layers(data, state, weights, None, mask, starts)
        if not batched:
            return data.squeeze(1), self.as_state(tuple(s.squeeze(1) for s in state))
        return data.transpose(0, 1) if self.batch_first else data, self.as_state(state)

    def _time_major(self, tensor: Tensor, batched: bool) -> Tensor:
        """Return the input, or a mask of its layout, as (T, N, ...)."""
        if not batched:
            return tensor.unsqueeze(1)
        return tensor.transpose(0, 1) if self.batch_first else tensor

    def _starts(
        self,
        reset_state: State | None,
        mask: Tensor | None,
        data: Tensor,
        state: tuple[Tensor, ...],
        batched: bool = True,
    ) -> tuple[Tensor, ...] | None:
        """Return the states that resets begin from, each (L·D, N, size); None for zeros."""
        if reset_state is None and mask is not None and self.learn_initial_state:
            learned = self.learned_initial_state() or ()
            reset_state = self.as_state(tuple(s.unsqueeze(1) for s in learned))
        if reset_state is None:
            return None
        if not batched:  # the layers' come without a batch then
            parts = tuple(s.unsqueeze(1) if s.dim() == 2 else s for s in self.as_tuple(reset_state))
            reset_state = self.as_state(parts)
        shapes = [tuple(s.shape) for s in state]
        return recurrent_checks.reset_state(self._cell.upper(), reset_state, mask, shapes, data)

    def _forward_packed(
        self,
        input: PackedSequence,
        hx: State | None,
        resets: Tensor | PackedSequence | None,
        reset_state: State | None,
    ) -> tuple[PackedSequence, State]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        state = None if hx is None else self.as_tuple(hx)
        if state is not None and sorted_indices is not None:
            state = tuple(s.index_select(1, sorted_indices) for s in state)
        sizes = batch_sizes.tolist()
        weights = self.layer_weights()
        self._check_input(data, weights[0]["weight_ih"].dtype)
        state = self._checked_state(state, data, sizes[0])
        mask = None
        if resets is not None:
            mask = recurrent_checks.packed_reset_mask(self._cell.upper(), resets, input)
        starts = self._starts(reset_state, mask, data, state)
        if starts is not None and sorted_indices is not None:
            starts = tuple(s.index_select(1, sorted_indices) for s in starts)
        data, state = self._layers(data, state, weights, sizes, mask, starts)
        if unsorted_indices is not None:
            state = tuple(s.index_select(1, unsorted_indices) for s in state)
        packed = PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.as_state(state)

    def _layers(
        self,
        data: Tensor,
        state: tuple[Tensor, ...],
        weights: list[dict[str, Tensor]],
        batch_sizes: Sequence[int] | None,
        resets: Tensor | None,
        starts: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all layers over time-major or packed data; every state is (L·D, N, size)."""
        self._check_weights(weights)
        recompute = checks.flag("recompute", self.recompute)
        inner = self.recurrent_dropout if self.training else None
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            outputs = []
            for reverse in (False, True) if self.bidirectional else (False,):
                at = len(finals)
                initial = tuple(s[at] for s in state)
                begun = None if starts is None else tuple(s[at] for s in starts)
                x, parameters, masks = data, weights[at], None
                if inner is not None:
                    x, parameters = inner.of_input(data, batch_sizes), inner.of_weights(parameters)
                    steps = data.size(0) if batch_sizes is None else len(batch_sizes)
                    masks = inner.masks(steps, initial, self.hidden_size)
                output, final = self._compute(
                    self.spec, x, initial, parameters, reverse, batch_sizes, resets, recompute, begun, masks
                )
                outputs.append(output)
                finals.append(final)
            data = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            if self.dropout and layer < self.num_layers - 1:
                data = F.dropout(data, self.dropout, self.training)
        return data, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def stream(self, batch_size: int = 1, state: State | None = None, weights: str | None = None) -> Stream:
        """Return the module one time step at a time, for online inference: see ``layernorm.Stream``.

        Args:
            batch_size: N, the sequences that step together.
            state: h (num_layers, N, P), for an LSTM (h, c) with c (num_layers, N, H); None for zeros.
            weights: what the matrices of a float32 module are kept as, ``"bfloat16"`` or ``"int8"``: rounded,
                and faster from hidden sizes of some hundreds on; None for as they are.

        Returns:
            A ``Stream``, whose ``step(x_t)`` takes (N, F) and gives (N, P).

        Raises:
            ValueError: the module is bidirectional, batch_size not positive, or weights not a kind that there
                is for the module.
            TypeError: batch_size is not an int, or state not of the module's kind.
            RuntimeError: the state has the wrong shape or device, a forward pre-hook may compute a weight, or
                a weight is sharded.

        Examples:
            >>> import torch, layernorm
            >>> stream = layernorm.LayerNormLSTM(10, 20).stream()
            >>> stream.step(torch.randn(1, 10)).shape
            torch.Size([1, 20])
        """
        return Stream(self, batch_size, state, weights)

    def _check_input(self, data: Tensor, weight: torch.dtype) -> None:
        self._check_dtype(data, weight)
        if data.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {data.size(-1)}"
            )
        if data.dim() == 3 and data.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def _checked_state(self, state: tuple[Tensor, ...] | None, data: Tensor, rows: int) -> tuple[Tensor, ...]:
        """Return the initial state, zeros where none is given; each tensor (L·D, N, size)."""
        sizes = [self.proj_size or self.hidden_size]
        if self._cell == "lstm":
            sizes.append(self.hidden_size)
        count = self.num_layers * len(self._directions)
        expected = [(count, rows, size) for size in sizes]
        if state is None:
            learned = self.learned_initial_state()
            if learned is None:
                return tuple(data.new_zeros(shape) for shape in expected)
            state = tuple(s.unsqueeze(1).expand(shape) for s, shape in zip(learned, expected, strict=True))
        for index, (tensor, shape) in enumerate(zip(state, expected, strict=True)):
            if tuple(tensor.shape) != shape:
                which = f"hidden[{index}]" if len(state) > 1 else "hidden"
                raise RuntimeError(f"Expected {which} size {shape}, got {list(tensor.shape)}")
            if tensor.dtype != data.dtype and not is_any_autocast_enabled():
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
        """Show the arguments that differ from the defaults, and the variant."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        if self.proj_size:
            parts.append(f"proj_size={self.proj_size}")
        if self.num_layers != 1:
            parts.append(f"num_layers={self.num_layers}")
        if not self.bias:
            parts.append("bias=False")
        if not self._has_gain:
            parts.append("gain=False")
        if self.batch_first:
            parts.append("batch_first=True")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.bidirectional:
            parts.append("bidirectional=True")
        parts.append(f"variant={self._variant_as_given!r}")
        if self.recompute:
            parts.append("recompute=True")
        if self.learn_initial_state:
            parts.append("learn_initial_state=True")
        if self.recurrent_dropout is not None:
            parts.append(f"recurrent_dropout={self.recurrent_dropout}")
        parts.append(str(self.start))
        if self.spec.nonlinearity != "tanh":
            parts.append(f"nonlinearity={self.spec.nonlinearity!r}")
        return ", ".join(part for part in parts if part)


class LayerNormLSTM(LayerNormRNNBase, torch.nn.LSTM):  # type: ignore[misc]  # forward takes more
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
        recompute: keep less for backward and compute it again: for the compiled kernels; the
            reference ignores it, as autograd decides there.
        gain_init: what every gain starts at; less than 1 keeps gradients small in long sequences, see the
            page on training. ``"uniform"`` draws them in ±1/√H.
        recurrent_init: how the matrices start that meet h: ``"uniform"``, or each gate's ``"orthogonal"``.
        forget_bias: added to the bias of the forget gate, which starts at 0 otherwise.
        t_max: the longest time, in steps, over which the gates remember at first, in place of
            ``forget_bias``: see ``layernorm.initialization.Start``.
        gain: whether norms have gains.
        nonlinearity: of the candidate and of the cell, ``"tanh"`` or ``"relu"``, in both places as in Keras.
        learn_initial_state: whether the state that a sequence starts from where none is given, and where
            ``resets`` say without a ``reset_state``, is learned: the parameters ``initial_h`` and
            ``initial_c``, (num_layers·D, P) and (num_layers·D, H), which are zeros at first.
        recurrent_dropout: dropout and zoneout inside of the recurrence, in training.

    Shape:
        - input: (T, N, F), (N, T, F) with ``batch_first``, (T, F) for one sequence, or a
          ``PackedSequence``;
        - ``(h_0, c_0)``: (num_layers·D, N, P) and (num_layers·D, N, H), without N for one sequence;
          zeros when left out;
        - resets: bool, or numbers that are 0 or 1, like the input without its features, with or without a
          last dimension of 1: (T, N), (N, T) with ``batch_first``, (T), or a
          ``PackedSequence`` packed like the input. True where an episode begins: in every layer and
          direction nothing passes between this step and the one before, neither state nor gradient.
          A forward direction starts the step from zeros, so at the first step ``(h_0, c_0)`` is set
          aside; a reverse one starts the step before from zeros;
        - reset_state: like ``(h_0, c_0)``, or of any shapes that broadcast to theirs, such as (H): what
          resets start from in place of zeros. It gets gradients;
        - output: like the input with D·P features, and ``(h_n, c_n)`` like ``(h_0, c_0)``.

    Raises:
        ValueError: a size or the variant is not one there is; the input's rank or dtype is wrong.
        TypeError: an argument is of the wrong type.
        RuntimeError: input, state or resets has the wrong shape.

    Examples:
        >>> import torch, layernorm
        >>> lstm = layernorm.LayerNormLSTM(10, 20, num_layers=2)
        >>> output, (h, c) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, h.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    _cell = "lstm"


class LayerNormGRU(LayerNormRNNBase, torch.nn.GRU):  # type: ignore[misc]  # forward takes more
    """A layer-normalized GRU, drop-in for ``torch.nn.GRU`` (paper eq. 26-28).

    (r, z) = LN(W_hh h) + LN(W_ih x) + bias over 2·hidden_size features,
    n = tanh(LN(W_ih x) + bias_n + σ(r)·(LN(W_hh h) + bias_hn)) over hidden_size features, and
    h' = (1 - z)·n + z·h: PyTorch's convention, where the paper's z is 1 - z. Other ``variant`` values
    give the functions of other implementations; ``"none"`` is ``torch.nn.GRU``. ``nonlinearity`` is that of
    n, ``"tanh"`` or ``"relu"``.

    Arguments, shapes and errors are those of ``LayerNormLSTM`` without ``proj_size``, and with
    ``update_bias``, of the gate that keeps the old state, in ``forget_bias``'s place; the state is one
    tensor h (num_layers·D, N, hidden_size).

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
        recompute: bool = False,
        proj_size: None = None,
        gain: bool = True,
        nonlinearity: str = "tanh",
        learn_initial_state: bool = False,
        recurrent_dropout: RecurrentDropout | None = None,
        **start: Unpack[StartOptions],
    ) -> None:
        checks.no_projection(proj_size)
        sizes = (input_size, hidden_size, num_layers)
        options: tuple[Any, ...] = (bias, batch_first, dropout, bidirectional, 0, device, dtype)
        LayerNormRNNBase.__init__(
            self,
            *sizes,
            *options,
            variant=variant,
            recompute=recompute,
            nonlinearity=nonlinearity,
            gain=gain,
            learn_initial_state=learn_initial_state,
            recurrent_dropout=recurrent_dropout,
            **start,
        )


class LayerNormRNN(LayerNormRNNBase, torch.nn.RNN):  # type: ignore[misc]  # forward takes more
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
        recompute: bool = False,
        proj_size: None = None,
        gain: bool = True,
        learn_initial_state: bool = False,
        recurrent_dropout: RecurrentDropout | None = None,
        **start: Unpack[StartOptions],
    ) -> None:
        checks.no_projection(proj_size)
        sizes = (input_size, hidden_size, num_layers)
        options: tuple[Any, ...] = (bias, batch_first, dropout, bidirectional, 0, device, dtype)
        LayerNormRNNBase.__init__(
            self,
            *sizes,
            *options,
            variant=variant,
            recompute=recompute,
            nonlinearity=nonlinearity,
            gain=gain,
            learn_initial_state=learn_initial_state,
            recurrent_dropout=recurrent_dropout,
            **start,
        )
