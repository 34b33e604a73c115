"""One step of a normalized LSTM, GRU or RNN: drop-in for ``torch.nn``'s cells."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from layernorm import checks, functional, recurrent_checks
from layernorm.initialization import StartOptions
from layernorm.parameters import RecurrentParameters, State
from layernorm.variants import Variant


class LayerNormRNNCellBase(RecurrentParameters, torch.nn.RNNCellBase):
    """One step of one layer: the base of the cells below."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        variant: str | Variant = "paper",
        nonlinearity: str = "tanh",
        gain: bool = True,
        learn_initial_state: bool = False,
        **start: Unpack[StartOptions],
    ) -> None:
        # torch.nn's cells take any truth value for bias.
        checks.cell_sizes(input_size, hidden_size)
        RecurrentParameters.__init__(
            self,
            input_size,
            hidden_size,
            bool(bias),
            variant,
            checks.nonlinearity(nonlinearity),
            start,
            learn_initial_state,
            gain,
        )
        self._register("", input_size, device, dtype)
        self._register_initial_state((), device, dtype)
        if "bias" not in self._parameters:
            # torch.nn's cells have the flag under this name, torch.nn.Linear None for no parameter.
            self.bias = self._has_bias if not self.variant.normalizes_gates else None  # type: ignore[assignment]
        self.reset_parameters()

    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        resets: Tensor | None = None,
        reset_state: State | None = None,
    ) -> State:
        """Take one step; shapes as in the class docstring."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
        name = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        count = 2 if self._cell == "lstm" else 1
        state = None if hx is None else self.as_tuple(hx)
        for index, tensor in enumerate(state or ()):
            if tensor.dim() not in (1, 2):
                which = f"hx[{index}]" if count > 1 else "hidden"
                raise ValueError(f"{name}: Expected {which} to be 1D or 2D, got {tensor.dim()}D instead")
        batched = input.dim() == 2
        rows = input if batched else input.unsqueeze(0)
        if state is None:
            learned = self.learned_initial_state()
            if learned is None:
                state = (rows.new_zeros(rows.size(0), self.hidden_size),) * count
            else:
                state = tuple(s.expand(rows.size(0), -1) for s in learned)
        elif not batched:
            state = tuple(s.unsqueeze(0) for s in state)
        weights = self.layer_weights()
        self._check_step(rows, state)
        self._check_dtype(rows, weights[0]["weight_ih"].dtype, RuntimeError)
        if resets is not None:
            resets = recurrent_checks.reset_mask(name, resets, input.shape[:-1], input).reshape(
                1, -1
            )  # (T, N) of one step
        starts = None
        if reset_state is None and resets is not None and self.learn_initial_state:
            reset_state = self.as_state(self.learned_initial_state() or ())
        if reset_state is not None:
            shapes = [tuple(s.shape) for s in state]
            starts = recurrent_checks.reset_state(name, reset_state, resets, shapes, input)
        self._check_weights(weights)
        data = rows.unsqueeze(0)
        _, state = functional.recurrent_layer(
            self.spec, data, state, weights[0], resets=resets, reset_state=starts
        )
        return self.as_state(state if batched else tuple(s.squeeze(0) for s in state))

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
        """Show the sizes, what differs from the defaults, and the variant."""
        parts = [f"{self.input_size}, {self.hidden_size}", *([] if self._has_bias else ["bias=False"])]
        if not self._has_gain:
            parts.append("gain=False")
        parts.append(f"variant={self._variant_as_given!r}")
        if self.learn_initial_state:
            parts.append("learn_initial_state=True")
        parts.append(str(self.start))
        if self.spec.nonlinearity != "tanh":
            parts.append(f"nonlinearity={self.spec.nonlinearity!r}")
        return ", ".join(part for part in parts if part)


class LayerNormLSTMCell(LayerNormRNNCellBase, torch.nn.LSTMCell):  # type: ignore[misc]  # forward takes more
    """One step of ``LayerNormLSTM``, drop-in for ``torch.nn.LSTMCell``.

    Args:
        input_size: features of the input, F.
        hidden_size: features of the state, H.
        bias: whether there are biases.
        device: where the parameters are made.
        dtype: of the parameters.
        variant: a name of ``layernorm.variants.PRESETS``, or a ``layernorm.Variant``.
        gain: whether norms have gains.
        nonlinearity: of the candidate and of the cell, ``"tanh"`` or ``"relu"``.
        learn_initial_state: whether there are ``initial_h`` and ``initial_c`` (H), as of ``LayerNormLSTM``.
        gain_init, recurrent_init, forget_bias, t_max: how parameters start, as of ``LayerNormLSTM``.

    Shape:
        - input: (N, F), or (F) for one row;
        - ``(h, c)``: each (N, H), or (H); zeros when left out;
        - resets: bool, or numbers that are 0 or 1, (N) or (N, 1), or () for one row; the rows where it is
          true start from a state of zeros, whatever ``(h, c)`` holds;
        - reset_state: like ``(h, c)``, or of any shapes that broadcast to theirs: what they start from in
          place of zeros;
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


class LayerNormGRUCell(LayerNormRNNCellBase, torch.nn.GRUCell):  # type: ignore[misc]  # forward takes more
    """One step of ``LayerNormGRU``, drop-in for ``torch.nn.GRUCell``.

    Arguments and errors are those of ``LayerNormLSTMCell``, with ``update_bias`` in ``forget_bias``'s place;
    ``nonlinearity`` is the candidate's, and the state is one tensor h (N, H).

    Examples:
        >>> import torch, layernorm
        >>> cell = layernorm.LayerNormGRUCell(10, 20)
        >>> cell(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    _cell = "gru"


class LayerNormRNNCell(LayerNormRNNCellBase, torch.nn.RNNCell):  # type: ignore[misc]  # forward takes more
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
        gain: bool = True,
        learn_initial_state: bool = False,
        **start: Unpack[StartOptions],
    ) -> None:
        LayerNormRNNCellBase.__init__(
            self,
            input_size,
            hidden_size,
            bias,
            device,
            dtype,
            variant=variant,
            nonlinearity=nonlinearity,
            gain=gain,
            learn_initial_state=learn_initial_state,
            **start,
        )
