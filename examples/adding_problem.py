"""The adding problem, a classic test of memory: `torch.nn.LSTM` and `LayerNormLSTM` side by side.

Each step of a sequence is a random number and a mark. Two steps are marked, and the answer is the sum of
their numbers. A model that always predicts 1 has a mean squared error of 1/6 = 0.167.

    python examples/adding_problem.py [--updates N] [--length T]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from layernorm import LayerNormLSTM


def batch(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Draw sequences (length, size, 2) and their answers (size)."""
    numbers, marks = torch.rand(length, size), torch.zeros(length, size)
    half = length // 2
    first, second = torch.randint(half, (1, size)), torch.randint(half, length, (1, size))
    marks.scatter_(0, first, 1.0).scatter_(0, second, 1.0)
    return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(0)


def train(lstm: nn.Module, updates: int, length: int) -> list[float]:
    """Train a network and return its mean squared error at each update."""
    readout = nn.Linear(lstm.hidden_size, 1)
    optimizer = torch.optim.Adam([*lstm.parameters(), *readout.parameters()], lr=3e-3)
    errors = []
    for _ in range(updates):
        sequences, answers = batch(length, 64)
        _, (h, _) = lstm(sequences)
        error = nn.functional.mse_loss(readout(h[-1]).squeeze(-1), answers)
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(lstm.parameters(), 1.0)
        optimizer.step()
        errors.append(error.item())
    return errors


def main() -> None:
    """Train both networks and print the mean error over each tenth of the training."""
    parser = argparse.ArgumentParser(description="The adding problem, with and without layer norm.")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--length", type=int, default=30)
    options = parser.parse_args()
    for name, module in (("torch.nn.LSTM", nn.LSTM), ("LayerNormLSTM", LayerNormLSTM)):
        torch.manual_seed(0)
        errors = train(module(2, 32), options.updates, options.length)
        tenth = max(1, len(errors) // 10)
        means = [sum(errors[k : k + tenth]) / tenth for k in range(0, len(errors) - tenth + 1, tenth)]
        print(f"{name:<14} mean squared error:", " ".join(f"{mean:.3f}" for mean in means))


if __name__ == "__main__":
    main()
