"""Streaming recognition: trained on whole sequences, then fed frame by frame, with an answer at each.

With `--data FOLDER` it is Japanese Vowels: who of nine speakers says "ae", in 7 to 29 frames of 12 numbers.
The folder holds JapaneseVowels_TRAIN.ts and JapaneseVowels_TEST.ts, of timeseriesclassification.com. Without
it, handwritten digits that scikit-learn brings are read row by row, 8 frames of 8 numbers.

The network is trained to know the answer at every frame. Then the test sequences arrive one after another on
one line: a stream that is reset where the next begins. Its answers are those of the whole sequences, and each
comes a few microseconds after its frame.

    python examples/recognition.py [--data FOLDER] [--epochs N] [--hidden H]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from layernorm import LayerNormLSTM

Examples = tuple[list[Tensor], Tensor]  # sequences (T, F), and the class of each


def read_ts(path: Path) -> Examples:
    """Return the sequences of a .ts file and their classes: channels apart by colons, the class last."""
    _, _, data = path.read_text("utf-8").partition("@data\n")
    sequences, classes = [], []
    for line in data.splitlines():
        *channels, label = line.split(":")
        values = [[float(value) for value in channel.split(",")] for channel in channels]
        sequences.append(torch.tensor(values).T)
        classes.append(int(label) - 1)
    return sequences, torch.tensor(classes)


def read_digits() -> tuple[Examples, Examples]:
    """Return scikit-learn's digits as sequences of rows, for training and for tests."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, classes = torch.tensor(digits.images).float() / 16, torch.tensor(digits.target)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    parts = order[:1200], order[1200:]
    train, test = ((list(images[part].unbind(0)), classes[part]) for part in parts)
    return train, test


class Recognizer(nn.Module):
    """Gives the logits of the classes at each frame."""

    def __init__(self, features: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.lstm = LayerNormLSTM(features, hidden, forget_bias=1)
        self.logits = nn.Linear(hidden, classes)

    def forward(self, sequences: PackedSequence) -> PackedSequence:
        """Return the logits of every frame."""
        output, _ = self.lstm(sequences)
        return output._replace(data=self.logits(output.data))


def train(model: Recognizer, examples: Examples, epochs: int) -> None:
    """Train on all frames of the sequences."""
    sequences, classes = examples
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in torch.randperm(len(classes)).split(32):
            packed = pack_sequence([sequences[i] for i in batch], enforce_sorted=False)
            wanted = pack_sequence(
                [classes[i].repeat(len(sequences[i])) for i in batch], enforce_sorted=False
            )
            loss = F.cross_entropy(model(packed).data, wanted.data)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if epoch % max(1, epochs // 5) == 0:
            print(f"epoch {epoch}: loss {statistics.mean(losses):.3f}")


@torch.inference_mode()
def listen(model: Recognizer, examples: Examples) -> tuple[list[Tensor], list[float]]:
    """Return the answers to each frame, heard one by one on one line, and the microseconds that each took."""
    stream, answers, times = model.lstm.stream(), [], []
    for sequence in examples[0]:
        stream.reset()
        heard = []
        for frame in sequence:
            begin = time.perf_counter()
            heard.append(model.logits(stream.step(frame)).argmax())
            times.append((time.perf_counter() - begin) * 1e6)
        answers.append(torch.stack(heard))
    return answers, times


def main() -> None:
    """Train, then listen to the test sequences frame by frame."""
    parser = argparse.ArgumentParser(description="Streaming recognition with a layer-normalized LSTM.")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with the .ts files of Japanese Vowels")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=96)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.data:
        files = (options.data / f"JapaneseVowels_{part}.ts" for part in ("TRAIN", "TEST"))
        training, test = map(read_ts, files)
    else:
        training, test = read_digits()
    features, classes = training[0][0].size(1), int(training[1].max()) + 1
    model = Recognizer(features, classes, options.hidden)
    print(f"LayerNormLSTM of {options.hidden}; {len(training[1])} training and {len(test[1])} test sequences")
    train(model, training, options.epochs)
    answers, times = listen(model, test)
    right = [heard == wanted for heard, wanted in zip(answers, test[1], strict=True)]
    print(f"right at the last frame: {statistics.mean(bool(r[-1]) for r in right):.1%}")
    for share in (0.25, 0.5, 0.75):
        so_far = statistics.mean(bool(r[int(share * (len(r) - 1))]) for r in right)
        print(f"right after {share:.0%} of the frames: {so_far:.1%}")
    print(f"an answer takes {statistics.median(times):.0f} us (median of {len(times):,})")
    with torch.inference_mode():
        whole, _ = pad_packed_sequence(model(pack_sequence(test[0], enforce_sorted=False)))
    same = all(torch.equal(heard, whole[: len(heard), n].argmax(-1)) for n, heard in enumerate(answers))
    print(f"the answers of the whole sequences are the same: {same}")


if __name__ == "__main__":
    main()
