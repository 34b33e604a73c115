"""Recurrent batch normalization of an LSTM, with separate statistics for each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from layernorm.baselines.batch_norm_recurrence import BatchNormRecurrence, Recurrence
from layernorm.baselines.statistics import BatchStandardized, Steps
from layernorm.initialization import StartOptions
from layernorm.parameters import State
from layernorm.recurrent import LayerNormRNNBase
from layernorm.reference import Masks
from layernorm.spec import LayerSpec

#: The normalized quantities: the products with the input and with h, and the cell.
_NORMALIZED: Final = ("ih", "hh", "cell")


class BatchNormLSTM(LayerNormRNNBase):
    """A batch-normalized LSTM, called like ``torch.nn.LSTM`` (Cooijmans et al. 2016, arXiv 1603.09025).

    (i, f, g, o) = BN(W_ih x) + BN(W_hh h) + bias; c' = σ(f)·c + σ(i)·tanh(g);
    h' = σ(o)·tanh(BN(c')) (eq. 6-8). The norms of the two products have a gain and no bias, that of the cell
    has both; the gains start at 0.1, "as otherwise tanh saturates and gradients vanish" (§4).

    Each step, counted from the start of a sequence, has its own mean and variance over the cases of the batch
    that are still running there, and its own running statistics for evaluation, kept for ``max_length``
    steps. Later steps, and those beyond the longest sequence seen in training, are evaluated with the
    statistics of the last step that has any. A running statistic is the mean over the first batches that
    had this step, until ``momentum`` is the larger share, so that steps which few sequences reach are not
    pulled towards the initial values of the buffers. The running variance takes the unbiased variance,
    n/(n - 1) times the biased one. A step with only one case left uses its running statistics in training
    too.

    Where ``torch.distributed`` is initialized, the batch is that of all processes together.

    Args:
        input_size: F, the number of features of the input.
        hidden_size: H, the number of features of the state.
        num_layers: the number of layers, each reading the output of the one before.
        bias: whether there are biases; there are gains either way.
        batch_first: whether input and output are (N, T, ·) instead of (T, N, ·).
        dropout: the probability of dropout on the output of every layer but the last, in training.
        bidirectional: whether each layer also reads the sequence backwards; then D = 2.
        device: the device of the parameters.
        dtype: their dtype, float32 or float64; autocast does not change the dtype of the computation.
        gain: the initial value of the gains.
        max_length: the number of steps whose statistics are kept.
        momentum: the share of each batch in the running statistics of its steps.
        eps: added to the variance.
        process_group: the processes that share a batch; None for all.

    Shape:
        As for ``torch.nn.LSTM``: input (T, N, F), (N, T, F) with ``batch_first``, (T, F) for one sequence
        in evaluation, or a ``PackedSequence``; ``(h_0, c_0)`` each (num_layers·D, N, H), zeros by default.

    Raises:
        ValueError: training with a single sequence; an argument is out of range; ``resets`` are given.
        TypeError: an argument is of the wrong type.
        RuntimeError: the input or the state has the wrong shape.

    Examples:
        >>> import torch
        >>> from layernorm.baselines import BatchNormLSTM
        >>> lstm = BatchNormLSTM(10, 20)
        >>> output, (h, c) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, h.shape, lstm.steps_seen()
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]), 5)
    """

    _cell = "lstm"

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
        gain: float = 0.1,
        max_length: int = 1024,
        momentum: float = 0.1,
        eps: float = 1e-5,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_statistics_dtype(dtype or torch.get_default_dtype())
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"BatchNormLSTM: max_length must be a positive int, got {max_length!r}")
        if not 0 < momentum <= 1:
            raise ValueError(f"BatchNormLSTM: momentum must be in (0, 1], got {momentum}")
        if not eps > 0:
            raise ValueError(f"BatchNormLSTM: eps must be positive, got {eps}")
        self.gain, self.max_length, self.momentum, self.eps = gain, max_length, momentum, eps
        self.process_group = process_group
        sizes = (input_size, hidden_size, num_layers)
        options: tuple[Any, ...] = (bias, batch_first, dropout, bidirectional, 0, device, dtype)
        super().__init__(*sizes, *options, gain_init=gain)

    def _register(self, suffix: str, input_size: int, device: Any, dtype: Any) -> None:
        # The variant "paper" has its norms in the same places, so the parameters have the same names.
        super()._register(suffix, input_size, device, dtype)
        widths = (4 * self.hidden_size, 4 * self.hidden_size, self.hidden_size)
        buffers = {}
        for name, width in zip(_NORMALIZED, widths, strict=True):
            shape = (self.max_length, width)
            buffers[f"running_mean_{name}"] = torch.zeros(shape, device=device, dtype=dtype)
            buffers[f"running_var_{name}"] = torch.ones(shape, device=device, dtype=dtype)
        buffers["num_batches_tracked"] = torch.zeros(self.max_length, device=device, dtype=torch.long)
        for name, buffer in buffers.items():
            self.register_buffer(f"{name}{suffix}", buffer)
        shapes = {name: tuple(buffer.shape) for name, buffer in buffers.items()}
        self._shapes[suffix] = {**self._shapes[suffix], **shapes}

    @property
    def all_weights(self) -> list[list[Tensor]]:  # type: ignore[override]  # of parameters in torch.nn
        """The parameters of each layer and direction, in the order of their registration."""
        return [
            [w for name, w in weights.items() if not name.startswith(("running", "num_batches"))]
            for weights in self.layer_weights()
        ]

    def reset_parameters(self, **start: Unpack[StartOptions]) -> None:
        """Draw weights in ±1/√hidden_size, set gains to ``gain`` and biases to 0, and forget all steps."""
        super().reset_parameters(**start)
        for name, buffer in self.named_buffers():
            buffer.fill_(1 if name.startswith("running_var") else 0)

    @property
    def _is_described(self) -> bool:
        return False  # what the spec says is layer norm

    def steps_seen(self) -> int:
        """Return how many steps have running statistics: the longest sequence seen, up to ``max_length``."""
        return int(self.get_buffer("num_batches_tracked_l0").count_nonzero())

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        resets: Tensor | PackedSequence | None = None,
        reset_state: State | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run the sequence; shapes as in the class docstring."""
        if resets is not None or reset_state is not None:
            raise ValueError(
                "BatchNormLSTM: resets must be None, as statistics are those of a step from the start of a "
                "sequence; give each episode as a sequence of its own"
            )
        return super().forward(input, hx)

    def _compute(
        self,
        spec: LayerSpec,
        input: Tensor,
        state: Sequence[Tensor],
        weights: Mapping[str, Tensor],
        reverse: bool = False,
        batch_sizes: Sequence[int] | None = None,
        resets: Tensor | None = None,
        recompute: bool = False,
        reset_state: Sequence[Tensor] | None = None,
        masks: Masks | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if masks is not None:
            raise ValueError("BatchNormLSTM: recurrent_dropout must be None; it has none in the recurrence")
        sizes = list(batch_sizes) if batch_sizes is not None else [input.size(1)] * input.size(0)
        dtype = weights["weight_ih"].dtype
        _check_statistics_dtype(dtype)
        with torch.autocast(input.device.type, enabled=False):
            rows = input.reshape(-1, input.size(-1)).to(dtype)
            h, c = (s.to(dtype) for s in state)
            # The steps of the reverse direction are counted from the end of each sequence.
            order = _reversed(sizes, rows.device) if reverse else None
            output, h, c = self._steps(rows if order is None else rows[order], sizes, h, c, weights)
            output = output if order is None else output[order]
        return output.view(*input.shape[:-1], self.hidden_size), (h, c)

    def _steps(
        self,
        rows: Tensor,
        sizes: Sequence[int],
        h: Tensor,
        c: Tensor,
        weights: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute one layer and direction over rows as in a ``PackedSequence``, from their first step."""
        # Evaluation needs no other process, so that one may do it alone.
        steps = Steps.of(sizes, self.process_group, rows) if self.training else Steps.alone(sizes)
        if self.training and steps.total[0] < 2:
            raise ValueError(
                "Expected more than 1 value per channel when training, got a batch of "
                f"{steps.total[0]} sequence(s); batch norm needs two, or evaluation mode: eval()"
            )
        running = _running(weights, len(steps.own))
        product = rows @ weights["weight_ih"].t()
        if self.training:
            standard, *used = BatchStandardized.apply(product, *running["ih"], steps, self.eps)  # type: ignore[no-untyped-call]
        else:
            mean, var = running["ih"]
            standard = steps.standardized(product, mean, torch.rsqrt(var + self.eps))
            used = []
        bias = weights.get("bias", torch.zeros_like(weights["gain_ih"]))
        bias_cell = weights.get("bias_cell", torch.zeros_like(weights["gain_cell"]))
        gates = torch.addcmul(bias, standard, weights["gain_ih"])
        output, h, c, *others = BatchNormRecurrence.apply(  # type: ignore[no-untyped-call]
            gates,
            h,
            c,
            weights["weight_hh"],
            weights["gain_hh"],
            weights["gain_cell"],
            bias_cell,
            (*running["hh"], *running["cell"]),
            Recurrence(steps, self.eps, self.training),
        )
        if self.training:
            self._track(weights, steps, [*used, *others])
        return output, h, c

    @torch.no_grad()
    def _track(self, weights: Mapping[str, Tensor], steps: Steps, used: Sequence[Tensor]) -> None:
        """Add the statistics of a batch to the running ones, for the steps where it had any."""
        with_statistics = [total for total in steps.total[: self.max_length] if total > 1]
        kept = slice(len(with_statistics))
        counts = weights["num_batches_tracked"]
        counts[kept] += 1
        share = (1 / counts[kept].to(used[0].dtype)).clamp_min(self.momentum).unsqueeze(1)
        unbiased = steps.column(used[0], [total / (total - 1) for total in with_statistics])
        for name, mean, var in zip(_NORMALIZED, used[::2], used[1::2], strict=True):
            weights[f"running_mean_{name}"][kept].lerp_(mean[kept], share)
            weights[f"running_var_{name}"][kept].lerp_(var[kept] * unbiased, share)

    def stream(self, batch_size: int = 1, state: State | None = None, weights: str | None = None) -> NoReturn:
        """Raise TypeError: only layer-normalized layers are streamed."""
        raise TypeError(
            "BatchNormLSTM has no stream, as its statistics depend on the step; call it on whole sequences, "
            "or stream a layernorm.LayerNormLSTM"
        )

    def extra_repr(self) -> str:
        """Show the arguments that differ from the defaults."""
        layout = super().extra_repr().partition(", variant=")[0]
        return f"{layout}, max_length={self.max_length}, momentum={self.momentum}, eps={self.eps}"


def _running(weights: Mapping[str, Tensor], length: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and variance of each step (length, ·); later steps have those of the last step seen."""
    counts = weights["num_batches_tracked"]
    last = max(int(counts.count_nonzero()) - 1, 0)
    steps = torch.arange(length, device=counts.device).clamp_max(last)
    return {
        name: (weights[f"running_mean_{name}"][steps], weights[f"running_var_{name}"][steps])
        for name in _NORMALIZED
    }


def _check_statistics_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"BatchNormLSTM: statistics need dtype float32 or float64, got {dtype}; keep the layer in "
            "float32, under autocast too"
        )


def _reversed(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Return the order (R) of packed rows that reverses each sequence; it is its own inverse."""
    rows = torch.tensor(sizes, device=device)
    begins = rows.cumsum(0) - rows
    steps = torch.arange(len(sizes), device=device).repeat_interleave(rows)
    sequences = torch.arange(len(steps), device=device) - begins[steps]
    lengths = (rows.unsqueeze(1) > torch.arange(sizes[0], device=device)).sum(0)
    return begins[lengths[sequences] - 1 - steps] + sequences


__all__ = ["BatchNormLSTM"]
