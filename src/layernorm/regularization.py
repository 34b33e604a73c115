"""Dropout inside of the recurrence: what is drawn, and how often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from layernorm.reference import Masks
from layernorm.variants import Cell

Per = Literal["sequence", "step"]


@dataclass(frozen=True)
class RecurrentDropout:
    """Dropout inside of the recurrence, in training only.

    What is dropped is 0, and what is kept is divided by 1 - p; zoneout keeps the number of the step before.

    Args:
        input: probability that a feature of a layer's input is dropped (Gal and Ghahramani 2016).
        hidden: that a feature of h is dropped where it meets ``weight_hh``; a GRU's z·h has all (the same).
        candidate: that a feature of an LSTM's or a GRU's candidate, tanh(g) or tanh(n), is dropped
            (Semeniuta, Severyn and Barth 2016; sketch-rnn).
        weight: that an element of ``weight_hh`` is dropped, for a whole call (Merity, Keskar and Socher
            2018).
        zoneout: that a feature of h stays as it was, at each step (Krueger et al. 2017).
        zoneout_cell: the same of an LSTM's c.
        per: whether the first three are drawn once for a ``"sequence"``, which is variational dropout, or for
            each ``"step"``.

    Raises:
        TypeError: a probability is not a number.
        ValueError: it is not in [0, 1], or ``per`` is neither.

    Examples:
        >>> import torch, layernorm
        >>> dropout = layernorm.RecurrentDropout(hidden=0.25, zoneout=0.1)
        >>> lstm = layernorm.LayerNormLSTM(10, 20, recurrent_dropout=dropout)
        >>> x = torch.randn(5, 3, 10)
        >>> torch.equal(lstm(x)[0], lstm(x)[0]), torch.equal(lstm.eval()(x)[0], lstm(x)[0])
        (False, True)
    """

    input: float = 0.0
    hidden: float = 0.0
    candidate: float = 0.0
    weight: float = 0.0
    zoneout: float = 0.0
    zoneout_cell: float = 0.0
    per: Per = "sequence"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "per":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(
                    f"RecurrentDropout: {field.name} must be a number, got {type(value).__name__}"
                )
            if not 0 <= value <= 1:
                raise ValueError(
                    f"RecurrentDropout: {field.name} must be a probability, in [0, 1], got {value}"
                )
        if self.per not in get_args(Per):
            expected = " or ".join(map(repr, get_args(Per)))
            raise ValueError(f"RecurrentDropout: per must be {expected}, got {self.per!r}")

    def check(self, cell: Cell) -> None:
        """Check that the cell has what is to be dropped.

        Raises:
            ValueError: it has not.
        """
        if self.candidate and cell == "rnn":
            raise ValueError("RecurrentDropout: candidate is of an LSTM or a GRU; an RNN has none")
        if self.zoneout_cell and cell != "lstm":
            raise ValueError(
                f"RecurrentDropout: zoneout_cell is of an LSTM, which has a cell; this is a {cell.upper()}"
            )

    def of_input(self, data: Tensor, batch_sizes: Sequence[int] | None) -> Tensor:
        """Return a layer's input (T, N, F), or the (ΣN_t, F) data of a packed one, with features dropped."""
        if not self.input:
            return data
        if self.per == "step":
            return F.dropout(data, self.input)
        rows = data.size(1) if batch_sizes is None else batch_sizes[0]
        mask = F.dropout(data.new_ones(rows, data.size(-1)), self.input)
        if batch_sizes is None:
            return data * mask
        return data * torch.cat([mask[:count] for count in batch_sizes])

    def of_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a layer's weights with elements of ``weight_hh`` dropped."""
        if not self.weight:
            return dict(weights)
        return {**weights, "weight_hh": F.dropout(weights["weight_hh"], self.weight)}

    def masks(self, steps: int, state: Sequence[Tensor], hidden_size: int) -> Masks | None:
        """Return what the steps multiply with, from h (N, P) (and c (N, H)); None where there is nothing."""
        if not (self.hidden or self.candidate or self.zoneout or self.zoneout_cell):
            return None
        (rows, size), like = state[0].shape, state[0]
        times = steps if self.per == "step" else 1

        def kept(p: float, count: int, features: int) -> Tensor | None:
            ones = like.new_ones(count, rows, features)
            return F.dropout(ones, p) if p else None

        def stays(p: float, features: int) -> Tensor | None:
            return torch.rand(steps, rows, features, device=like.device) < p if p else None

        return Masks(
            hidden=kept(self.hidden, times, size),
            candidate=kept(self.candidate, times, hidden_size),
            stays=(stays(self.zoneout, size), stays(self.zoneout_cell, hidden_size)),
        )


__all__ = ["Per", "RecurrentDropout"]
