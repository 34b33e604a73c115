"""A world model's recurrence with each cell, and its training updates, prepared for one point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cells.by_hand import GRUCell
from benchmarks.core.benchmark import BASE, OURS
from benchmarks.core.subjects import Subject
from layernorm import LayerNormGRUCell

#: Features of an action.
ACTIONS: Final = 8
RATE: Final = 1e-4


class WorldModel(nn.Module):
    """The recurrence x = elu(A [z, a]), h = cell(x, h), z = B h, with as many features in each.

    Args:
        cell: called with x and h.
        hidden: features of x, h and z.
    """

    def __init__(self, cell: nn.Module, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.before = nn.Linear(hidden + ACTIONS, hidden)
        self.cell = cell
        self.after = nn.Linear(hidden, hidden)

    def forward(self, actions: Tensor) -> Tensor:
        """Return z of each step (T, N, H) for the actions (T, N, A), from zeros."""
        h = z = actions.new_zeros(actions.size(1), self.hidden)
        found = []
        for a in actions:
            x = F.elu(self.before(torch.cat([z, a], -1)))
            h = self.cell(x, h)
            z = self.after(h)
            found.append(z)
        return torch.stack(found)


def _layernorm(hidden: int) -> LayerNormGRUCell:
    return LayerNormGRUCell(hidden, hidden, variant="sheeprl")


def _by_hand(hidden: int) -> GRUCell:
    """Return the same cell with the same weights."""
    ours = _layernorm(hidden)  # draws first
    cell = GRUCell(hidden, hidden)
    cell.load(dict(ours.named_parameters()))
    return cell


def updates(make: Callable[[int], nn.Module], hidden: int, batch: int, steps: int) -> Subject:
    """Return the updates of a world model with a cell as a peer, from the same weights and data each time.

    Args:
        make: returns the cell; both cells are the same function.
        hidden: features of the state, H.
        batch: sequences, N.
        steps: of time, T.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cell = make(hidden)
        torch.manual_seed(1)  # whatever the cell has drawn
        model = WorldModel(cell, hidden)
        actions, targets = torch.randn(steps, batch, ACTIONS), torch.randn(steps, batch, hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def backward() -> Tensor:
        optimizer.zero_grad()
        output: Tensor = model(actions)
        F.mse_loss(output, targets).backward()
        return output.detach()

    def call() -> None:
        backward()
        optimizer.step()

    def results() -> list[Tensor]:
        before = backward()
        grads = gradients(model)
        optimizer.step()
        return [before, *grads, backward()]

    return Subject(call, results)


def gradients(model: WorldModel) -> list[Tensor]:
    """Return the gradients of all parameters, those of the cell as the one written by hand has them."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    of_cell = {name.removeprefix("cell."): g for name, g in grads.items() if name.startswith("cell.")}
    rest = [g for name, g in grads.items() if not name.startswith("cell.")]
    ours = isinstance(model.cell, LayerNormGRUCell)
    return [*rest, *(GRUCell.arranged(of_cell, one=0.0) if ours else of_cell.values())]


#: By name, what makes the cell; the order is that of tables.
PEERS: Final[dict[str, Callable[[int], nn.Module]]] = {OURS: _layernorm, BASE: _by_hand}
