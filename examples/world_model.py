"""A Dreamer-like world model whose recurrent cell comes from a sheeprl checkpoint, and goes back into one.

The recurrent state-space model goes step by step: a linear layer joins the stochastic state and the action,
the cell takes it in, and linear layers give the prior, the posterior (with what is observed) and the
prediction. It learns the motion of a swinging pendulum, and then imagines it with the prior alone.

Without `--checkpoint` the weights are drawn here, with the names and shapes that sheeprl's Dreamer V3 gives
them.

    python examples/world_model.py [--checkpoint FILE --prefix PREFIX] [--updates N] [--hidden H]
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn
from torch.distributions import OneHotCategorical

from layernorm import LayerNormGRUCell, interop

OBSERVED, ACTIONS, VARIABLES, CLASSES, FREE = 3, 1, 8, 8, 0.1
LATENT = VARIABLES * CLASSES


def sheeprl_weights(inputs: int, hidden: int) -> dict[str, Tensor]:
    """Return fresh weights of sheeprl's recurrent model, as its state dict has them."""
    linear, norm = nn.Linear(hidden + inputs, 3 * hidden, bias=False), nn.LayerNorm(3 * hidden)
    return {
        "rssm.recurrent_model.rnn.linear.weight": linear.weight.detach(),
        "rssm.recurrent_model.rnn.layer_norm.weight": norm.weight.detach(),
        "rssm.recurrent_model.rnn.layer_norm.bias": norm.bias.detach(),
    }


class WorldModel(nn.Module):
    """A recurrent state-space model around a cell: h (N, H) and categorical variables z (N, LATENT)."""

    def __init__(self, cell: LayerNormGRUCell) -> None:
        super().__init__()
        hidden = cell.hidden_size
        self.join = nn.Sequential(nn.Linear(LATENT + ACTIONS, cell.input_size), nn.SiLU())
        self.cell = cell
        self.prior = nn.Linear(hidden, LATENT)
        self.posterior = nn.Linear(hidden + OBSERVED, LATENT)
        self.predict = nn.Sequential(
            nn.Linear(hidden + LATENT, hidden), nn.SiLU(), nn.Linear(hidden, OBSERVED)
        )

    def start(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return the first state."""
        return torch.zeros(rows, self.cell.hidden_size), torch.zeros(rows, LATENT)

    def step(
        self, h: Tensor, z: Tensor, action: Tensor, observed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step; return h, a sample of z, and how far the posterior is from the prior (N)."""
        h = self.cell(self.join(torch.cat([z, action], -1)), h)
        prior = self.prior(h).unflatten(-1, (VARIABLES, CLASSES))
        logits = prior
        if observed is not None:
            logits = self.posterior(torch.cat([h, observed], -1)).unflatten(-1, (VARIABLES, CLASSES))
        probabilities = logits.softmax(-1)
        sample = OneHotCategorical(probabilities).sample()
        z = (sample + probabilities - probabilities.detach()).flatten(1)  # gradients straight through
        distance = (probabilities * (logits.log_softmax(-1) - prior.log_softmax(-1))).sum((-2, -1))
        return h, z, distance

    def loss(self, observed: Tensor, actions: Tensor) -> Tensor:
        """Return the loss of sequences (T, N, ...)."""
        h, z = self.start(observed.size(1))
        losses = []
        for seen, action in zip(observed, actions, strict=True):
            h, z, distance = self.step(h, z, action, seen)
            error = (self.predict(torch.cat([h, z], -1)) - seen).square().sum(-1)
            losses.append(error + distance.clamp(min=FREE))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def imagine(self, observed: Tensor, actions: Tensor) -> Tensor:
        """Look at the first observations, then predict for as many steps as there are more actions."""
        h, z = self.start(actions.size(1))
        predicted = []
        for t, action in enumerate(actions):
            h, z, _ = self.step(h, z, action, observed[t] if t < len(observed) else None)
            predicted.append(self.predict(torch.cat([h, z], -1)))
        return torch.stack(predicted)


def pendulum(steps: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return what is seen of swinging pendulums, (cos, sin, speed), and the pushes before it."""
    angle, speed = torch.rand(rows) * 2 * math.pi, torch.zeros(rows)
    observed, actions = [], []
    for _ in range(steps):
        push = torch.rand(rows) * 2 - 1
        speed = 0.98 * speed + 0.1 * (torch.sin(angle) + push)
        angle = angle + 0.3 * speed
        observed.append(torch.stack([angle.cos(), angle.sin(), speed], -1))
        actions.append(push.unsqueeze(-1))
    return torch.stack(observed), torch.stack(actions)


def main() -> None:
    """Load the cell, train the world model, imagine, and write the cell back."""
    parser = argparse.ArgumentParser(description="A world model around a cell of sheeprl's.")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="a .pt or .safetensors file with sheeprl's names"
    )
    parser.add_argument("--prefix", default="rssm.recurrent_model.rnn.")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--updates", type=int, default=400)
    options = parser.parse_args()
    torch.manual_seed(0)
    weights = options.checkpoint or sheeprl_weights(inputs=options.hidden, hidden=options.hidden)
    cell = interop.load(weights, "sheeprl", prefix=options.prefix)
    print(f"loaded {cell}")
    model = WorldModel(cell)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for number in range(1, options.updates + 1):
        loss = model.loss(*pendulum(steps=32, rows=32))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        if number % max(1, options.updates // 5) == 0:
            print(f"update {number}: loss {loss.item():.3f}")
    observed, actions = pendulum(steps=24, rows=256)
    error = (model.imagine(observed[:16], actions) - observed).square().mean((1, 2))
    still = (observed[15] - observed[16:]).square().mean((1, 2))  # of who thinks that nothing moves any more
    print(f"error of 8 imagined steps: {error[16:].mean():.3f}; if nothing moved: {still.mean():.3f}")
    written = interop.export(model.cell, "sheeprl", prefix=options.prefix)
    print("back in sheeprl's names:", {name: tuple(tensor.shape) for name, tensor in written.items()})


if __name__ == "__main__":
    main()
