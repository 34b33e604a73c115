"""Layer-normalized cells as people write them: linear layers, layer norms and pointwise functions.

They are called as ``torch.nn``'s cells are, always with a state. Written apart from ``layernorm.reference``,
so that the two can judge each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

#: Tensors by the names of this package's weights.
Weights = Mapping[str, Tensor]


class Cell(nn.Module):
    """Take the weights of this package's cells, as all of these do."""

    #: Those that are its parameters, in the order of these.
    names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def arranged(cls, weights: Weights, one: float = 1.0) -> list[Tensor]:
        """Return the parameters that these weights make, in their order.

        Args:
            weights: of this package's cell; or their gradients, which make those of the parameters.
            one: what stands for the constant 1 of the formulas; for gradients 0.
        """
        return [weights[name] for name in cls.names]

    def load(self, weights: Weights) -> list[Tensor]:
        """Take the weights of this package's cell; return the parameters."""
        parameters = list(self.parameters())
        with torch.no_grad():
            for parameter, value in zip(parameters, self.arranged(weights), strict=True):
                parameter.copy_(value)
        return list(parameters)


class LSTMCell(Cell):
    """The paper's LSTM: two products, a norm of each, and one of the cell."""

    names = ("weight_ih", "weight_hh", "gain_ih", "bias", "gain_hh", "gain_cell", "bias_cell")

    def __init__(self, inputs: int, hidden: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.from_input = nn.Linear(inputs, 4 * hidden, bias=False, dtype=dtype)
        self.from_state = nn.Linear(hidden, 4 * hidden, bias=False, dtype=dtype)
        self.input_norm = nn.LayerNorm(4 * hidden, dtype=dtype)
        self.state_norm = nn.LayerNorm(4 * hidden, bias=False, dtype=dtype)
        self.cell_norm = nn.LayerNorm(hidden, dtype=dtype)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the next (h, c)."""
        h, c = state
        gates = self.input_norm(self.from_input(x)) + self.state_norm(self.from_state(h))
        i, f, g, o = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(self.cell_norm(c))
        return h, c


class GRUCell(Cell):
    """Dreamer V3's GRU as in sheeprl: one product of state and input, one norm of all gates.

    Its gates are reset, candidate and update, which is 1 - z of PyTorch's GRU: σ(a - 1) = 1 - σ(1 - a).
    """

    def __init__(self, inputs: int, hidden: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.product = nn.Linear(hidden + inputs, 3 * hidden, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(3 * hidden, eps=1e-3, dtype=dtype)

    @classmethod
    def arranged(cls, weights: Weights, one: float = 1.0) -> list[Tensor]:
        """Return the parameters that these weights make, in their order; see ``Cell``."""
        matrix = torch.cat([weights["weight_hh"], weights["weight_ih"]], 1)
        (r, z, n), (gain_r, gain_z, gain_n), (bias_r, bias_z, bias_n) = (
            gates.chunk(3) for gates in (matrix, weights["gain"], weights["bias"])
        )
        parts = (r, n, z), (gain_r, gain_n, -gain_z), (bias_r, bias_n, one - bias_z)
        return [torch.cat(part) for part in parts]

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Return the next h."""
        gates = self.norm(self.product(torch.cat([h, x], -1)))
        reset, candidate, update = gates.chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)
        return update * candidate + (1 - update) * h


class RNNCell(Cell):
    """The paper's RNN: two products, a norm of their sum."""

    names = ("weight_ih", "weight_hh", "gain", "bias")

    def __init__(self, inputs: int, hidden: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.from_input = nn.Linear(inputs, hidden, bias=False, dtype=dtype)
        self.from_state = nn.Linear(hidden, hidden, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(hidden, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Return the next h."""
        return torch.tanh(self.norm(self.from_input(x) + self.from_state(h)))


#: By the cell's name.
CELLS: Final[dict[str, type[LSTMCell] | type[GRUCell] | type[RNNCell]]] = {
    "lstm": LSTMCell,
    "gru": GRUCell,
    "rnn": RNNCell,
}
#: This package's variants that compute the same.
VARIANTS: Final = {"lstm": "paper", "gru": "sheeprl", "rnn": "paper"}
