"""Measure what the start of a recurrent network does: ``python -m tools.starts``, five minutes on two cores.

Writes ``docs/images/training.png`` and prints the tables of ``docs/training.md``: the gradient of W_hh of a
fresh network by the length of the sequence, and how well networks train from several starts.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor

import layernorm

PICTURE = Path(__file__).parents[1] / "docs/images/training.png"
CLASSES = {"LSTM": layernorm.LayerNormLSTM, "GRU": layernorm.LayerNormGRU, "RNN": layernorm.LayerNormRNN}
STEPS = (5, 10, 20, 50, 100, 200, 500)
SEEDS = 3


class Start(NamedTuple):
    """A way to begin, and to go on."""

    variant: str = "paper"
    gain: float = 1.0
    forget: float = 0.0
    clip: float | None = None

    def module(self, cell: str, inputs: int, hidden: int) -> torch.nn.Module:
        """Return a fresh layer."""
        options = {"forget_bias": self.forget} if cell == "LSTM" else {}
        return CLASSES[cell](inputs, hidden, variant=self.variant, gain_init=self.gain, **options)

    def __str__(self) -> str:
        norm = "no norm" if self.variant == "none" else f"{self.variant}, gain {self.gain:g}"
        return norm + (f", forget bias {self.forget:g}" if self.forget else "")


def gradient(cell: str, start: Start, steps: int, hidden: int = 64) -> float:
    """Return the norm of W_hh's gradient of a random sum of the last output, for random inputs.

    The geometric mean over seeds; 8 sequences of 16 features.
    """
    logarithms = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        module = start.module(cell, 16, hidden)
        output, _ = module(torch.randn(steps, 8, 16))
        (output[-1] * torch.randn(8, hidden)).sum().div(8).backward()
        logarithms.append(math.log(module.weight_hh_l0.grad.norm().item()))
    return math.exp(sum(logarithms) / SEEDS)


def digits(repeats: int) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits by pixels, each so many times (steps, cases, 1), and what they are."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.data, dtype=torch.float32)[order] / 8 - 1
    return images.T.repeat_interleave(repeats, 0).unsqueeze(-1), torch.tensor(found.target)[order]


def error(cell: str, start: Start, seed: int, repeats: int, epochs: int) -> tuple[float, float]:
    """Return the test error in percent after training on pixels, and the greatest norm of a gradient."""
    torch.manual_seed(seed)
    pixels, labels = digits(repeats)
    test = 360
    body, head = start.module(cell, 1, 64), torch.nn.Linear(64, 10)
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 2e-3)
    greatest = 0.0
    for _ in range(epochs):
        for batch in torch.randperm(len(labels) - test).split(32):
            optimizer.zero_grad()
            output, _ = body(pixels[:, test + batch])
            torch.nn.functional.cross_entropy(head(output[-1]), labels[test + batch]).backward()
            limit = math.inf if start.clip is None else start.clip
            greatest = max(greatest, float(torch.nn.utils.clip_grad_norm_(parameters, limit)))
            optimizer.step()
    with torch.no_grad():
        wrong = head(body(pixels[:, :test])[0][-1]).argmax(-1) != labels[:test]
    return 100 * wrong.float().mean().item(), greatest


def draw(curves: Sequence[Sequence[tuple[str, str, Start]]], titles: Sequence[str]) -> None:
    """Draw the gradient by the length of the sequence, a panel for each list of curves."""
    figure, panels = plt.subplots(1, len(curves), figsize=(10, 4), sharey=True, layout="constrained")
    for panel, lines, title in zip(panels, curves, titles, strict=True):
        for (label, cell, start), marker in zip(lines, itertools.cycle("osv^D"), strict=False):
            values = [gradient(cell, start, steps) for steps in STEPS]
            style = "--" if start.variant == "none" else "-"
            panel.loglog(STEPS, values, style, marker=marker, markersize=4, label=label)
            print(f"| {label} | {' | '.join(f'{value:.2g}' for value in values)} |", flush=True)
        panel.set(title=title, xlabel="steps")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("norm of the gradient of W_hh")
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Measure, draw, print."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print(f"| fresh network | {' | '.join(map(str, STEPS))} |")
    none, paper = Start("none"), Start()
    cells = [
        (f"{cell}{name}", cell, start)
        for cell in CLASSES
        for name, start in ((", no norm", none), (", paper", paper))
    ]
    gains = [(f"LSTM, gain {gain:g}", "LSTM", Start(gain=gain)) for gain in (1.0, 0.7, 0.5, 0.3)]
    gains.append(("LSTM, gain 0.5, forget bias 1", "LSTM", Start(gain=0.5, forget=1)))
    draw([cells, gains], ["Cells", "Starts of an LSTM"])
    starts = [
        Start(variant, gain, forget, clip)
        for variant, gain in (("none", 1.0), ("paper", 1.0), ("paper", 0.5), ("paper", 0.3))
        for forget in (0.0, 1.0)
        for clip in (None, 1.0)
    ]
    of_gru = [Start("none"), Start(), Start(gain=0.5)]
    long = [Start("none"), Start(), Start(clip=1.0), Start(forget=1, clip=1.0), Start(gain=0.5, clip=1.0)]
    for cell, some, repeats, epochs in (
        ("LSTM", starts, 1, 20),
        ("GRU", of_gru, 1, 20),
        ("LSTM", [*long, Start(gain=0.5, forget=1, clip=1.0)], 8, 10),
    ):
        print(
            f"\n{64 * repeats} steps, {epochs} epochs\n"
            "| start | clipped at | test error (%) | greatest gradient |"
        )
        for start in some:
            found = [error(cell, start, seed, repeats, epochs) for seed in range(SEEDS)]
            errors, gradients = zip(*found, strict=True)
            print(
                f"| {cell}, {start} | {start.clip or '–'} | {sum(errors) / SEEDS:.1f} "
                f"({min(errors):.1f} to {max(errors):.1f}) | {max(gradients):.2g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
