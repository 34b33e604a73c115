"""A character model from training to text: train, save, load, convert, generate by a stream.

It reads the documentation of Python that every Python brings, or a text file of yours. `--core torch` trains
a `torch.nn.LSTM`, which `layernorm.convert` turns into this package's for the stream.

    python examples/characters.py [--text FILE] [--core layernorm|torch] [--updates N] [--save FILE] [--length
    N]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layernorm
from layernorm import LayerNormLSTM


class CharacterModel(nn.Module):
    """Two layers over characters: gives the logits of each next one, (T, N) to (T, N, characters)."""

    def __init__(self, characters: str, hidden: int, core: str) -> None:
        super().__init__()
        self.characters, self.hidden = characters, hidden
        self.embed = nn.Embedding(len(characters), 64)
        lstm = LayerNormLSTM if core == "layernorm" else nn.LSTM
        self.lstm: nn.LSTM = lstm(64, hidden, num_layers=2)
        self.logits = nn.Linear(hidden, len(characters))

    def forward(self, text: Tensor) -> Tensor:
        """Return the logits of the characters after each of `text`."""
        return self.logits(self.lstm(self.embed(text))[0])


def encode(text: str, characters: str) -> Tensor:
    """Return the number of each character."""
    numbers = {character: number for number, character in enumerate(characters)}
    return torch.tensor([numbers[character] for character in text])


def train(model: CharacterModel, text: Tensor, updates: int) -> None:
    """Train on windows of the text, and print the loss in bits a character."""
    steps, rows = 64, 32
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for number in range(1, updates + 1):
        starts = torch.randint(len(text) - steps - 1, (rows,))
        window = torch.stack([text[start : start + steps + 1] for start in starts], 1)
        loss = F.cross_entropy(model(window[:-1]).flatten(0, 1), window[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if number % max(1, updates // 5) == 0:
            print(
                f"update {number}: {loss.item() / torch.log(torch.tensor(2.0)).item():.2f} bits a character"
            )


@torch.no_grad()
def generate(model: CharacterModel, prompt: str, length: int, temperature: float = 0.7) -> tuple[str, float]:
    """Return text that goes on from the prompt, drawn a character at a time, and the seconds of a step."""
    assert isinstance(model.lstm, LayerNormLSTM)
    stream = model.lstm.stream()
    written, seconds = list(encode(prompt, model.characters)), 0.0
    for position in range(len(prompt) + length - 1):
        x = model.embed(written[position].view(1))
        begin = time.perf_counter()
        output = stream.step(x)
        seconds += time.perf_counter() - begin
        if position + 1 == len(written):
            logits = model.logits(output[0]) / temperature
            written.append(torch.multinomial(logits.softmax(-1), 1)[0])
    return "".join(model.characters[number] for number in written), seconds / (len(prompt) + length - 1)


def save(model: CharacterModel, path: Path) -> None:
    """Save the weights with what is needed to make the model again."""
    torch.save({"characters": model.characters, "hidden": model.hidden, "weights": model.state_dict()}, path)


def load(path: Path, core: str) -> CharacterModel:
    """Load a model that was saved."""
    saved = torch.load(path, weights_only=True)
    model = CharacterModel(saved["characters"], saved["hidden"], core)
    model.load_state_dict(saved["weights"])
    return model


def main() -> None:
    """Train, save, load, convert, and generate."""
    parser = argparse.ArgumentParser(
        description="A character model that trains, saves, converts and generates."
    )
    parser.add_argument(
        "--text", type=Path, help="a text file; default: the documentation that Python brings"
    )
    parser.add_argument("--core", choices=["layernorm", "torch"], default="layernorm")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--save", type=Path, metavar="FILE", help="where to save the model")
    parser.add_argument("--length", type=int, default=300, help="characters to generate")
    options = parser.parse_args()
    torch.manual_seed(0)
    text = options.text.read_text("utf-8") if options.text else "".join(topics.values())
    model = CharacterModel("".join(sorted(set(text))), options.hidden, options.core)
    print(f"{len(text):,} characters, {len(model.characters)} kinds; {type(model.lstm).__name__}")
    train(model, encode(text, model.characters), options.updates)
    with tempfile.TemporaryDirectory() as folder:
        path = options.save or Path(folder) / "characters.pt"
        save(model, path)
        model = load(path, options.core).eval()
    example = torch.randint(len(model.characters), (50, 4))
    expected = model(example)
    if options.core == "torch":
        print(layernorm.convert(model, example=(example,)))
        print(f"largest change of a logit: {(model(example) - expected).abs().max().item():.1e}")
    written, seconds = generate(model, prompt=text[:20], length=options.length)
    print(f"{type(model.lstm).__name__}, {seconds * 1e6:.0f} us a character:\n{written}")


if __name__ == "__main__":
    main()
