"""Measure what streams with fewer bytes of weights cost: ``python -m tools.narrow_weights``.

Trains networks on data that dependencies ship, and prints the table of ``docs/recurrent.md``: what a stream
with bfloat16 or int8 weights computes beside one with float32 weights. Five minutes on one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import sklearn.datasets
import torch
from torch import Tensor
from torch.nn import functional as F

import layernorm
from tools.starts import digits

TEST = 360  # digits
CLASSES = {"LSTM": layernorm.LayerNormLSTM, "GRU": layernorm.LayerNormGRU}


def streamed(body: layernorm.LayerNormLSTM, x: Tensor, kind: str | None) -> Tensor:
    """Return the outputs (steps, cases, hidden) of a stream with such weights."""
    stream = body.stream(x.size(1), weights=kind)
    return torch.stack([stream.step(x_t) for x_t in x])


def train(
    body: torch.nn.Module,
    head: torch.nn.Module,
    batches: Callable[[], list[tuple[Tensor, Tensor]]],
    epochs: int,
) -> None:
    """Train with Adam and clipped gradients; a batch is an input and what its last outputs are to name."""
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-3)
    for _ in range(epochs):
        for x, labels in batches():
            optimizer.zero_grad()
            output = head(body(x)[0])[-labels.size(0) :]
            F.cross_entropy(output.flatten(0, 1), labels.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()


def on_digits(cell: str, hidden: int, rows: bool) -> tuple[str, list[str], list[Tensor]]:
    """Return what it is called, a test error for each kind of weights, and the logits."""
    pixels, labels = digits(1)
    x = pixels.squeeze(-1).T.reshape(-1, 8, 8).transpose(0, 1) if rows else pixels
    body, head = CLASSES[cell](x.size(-1), hidden), torch.nn.Linear(hidden, 10)

    def batches() -> list[tuple[Tensor, Tensor]]:
        drawn = torch.randperm(len(labels) - TEST).split(32)
        return [(x[:, TEST + batch], labels[None, TEST + batch]) for batch in drawn]

    train(body, head, batches, 20 if rows else 10)
    with torch.no_grad():
        found = [head(streamed(body, x[:, :TEST].contiguous(), kind)[-1]) for kind in KINDS]
    errors = [f"{100 * (f.argmax(-1) != labels[:TEST]).float().mean():.2f} %" for f in found]
    return f"digits by {'rows' if rows else 'pixels'}, {cell} of {hidden}: test error", errors, found


def on_text(cell: str, hidden: int) -> tuple[str, list[str], list[Tensor]]:
    """Return the same for a model of the next character: bits for one, over 2,000 steps that go on."""
    folder = Path(sklearn.datasets.__file__).parent / "descr"
    text = "".join(file.read_text("utf-8") for file in sorted(folder.glob("*.rst")))
    known = {character: i for i, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([known[character] for character in text])
    x, steps, test = F.one_hot(codes, len(known)).float(), 64, 2000
    body, head = CLASSES[cell](len(known), hidden), torch.nn.Linear(hidden, len(known))

    def batches() -> list[tuple[Tensor, Tensor]]:
        starts = torch.randint(len(codes) - test - steps - 1, (40, 16))
        at = starts.unsqueeze(1) + torch.arange(steps + 1)[:, None]
        return [(x[some[:-1]], codes[some[1:]]) for some in at]

    train(body, head, batches, 15)
    begin = len(codes) - test - 1
    with torch.no_grad():
        found = [head(streamed(body, x[begin:-1].unsqueeze(1), kind)).squeeze(1) for kind in KINDS]
    bits = [f"{F.cross_entropy(f, codes[begin + 1 :]) / math.log(2):.4f}" for f in found]
    return f"text, {cell} of {hidden}: bits for a character", bits, found


KINDS = (None, "bfloat16", "int8")


def main() -> None:
    """Train, stream, print."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print(
        "| trained network | float32 | bfloat16 | int8 | other answers with bfloat16; int8 | logits off by |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for measure, arguments in (
        (on_digits, ("LSTM", 64, True)),
        (on_digits, ("GRU", 512, True)),
        (on_digits, ("LSTM", 512, False)),
        (on_text, ("LSTM", 512)),
        (on_text, ("GRU", 512)),
    ):
        torch.manual_seed(0)
        name, figures, (exact, *others) = measure(*arguments)  # type: ignore[operator]
        spread = exact.std()
        changed = [f"{100 * (o.argmax(-1) != exact.argmax(-1)).float().mean():.1f} %" for o in others]
        off = [f"{100 * (o - exact).square().mean().sqrt() / spread:.1f} %" for o in others]
        print(f"| {name} | {' | '.join(figures)} | {'; '.join(changed)} | {'; '.join(off)} |", flush=True)


if __name__ == "__main__":
    main()
