"""A sentence as the last state of a GRU over its words, as in the paper's §6.1 and §6.3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from layernorm.experiments.data.words import PAD, padded
from layernorm.experiments.networks import recurrent

#: What the GRUs of sentences can be normalized with.
NORMS: Final = ("none", "layer", "rms", "weight")

_SENTENCES_AT_ONCE: Final = 512


class Sentences:
    """Sentences of different lengths as indices of words, ready to be packed for a GRU.

    Args:
        rows: the indices of each sentence's words, at least one.

    Raises:
        ValueError: a sentence has no word.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.networks.sentence_encoder import Sentences
        >>> sentences = Sentences([[5, 6, 7], [8], [9, 10]])
        >>> sentences.packed(torch.tensor([1, 0])).data
        tensor([5, 8, 6, 7])
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.indices, self.lengths = padded(rows)
        if len(rows) and not self.lengths.all():
            where = int((self.lengths == 0).nonzero()[0])
            raise ValueError(f"rows must have at least one word each, got none in row {where}; leave it out")

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> None:
        """Move the words to a device; the lengths stay on the CPU, where packing wants them."""
        self.indices = self.indices.to(device)

    def packed(self, cases: Tensor, before: bool = False, after: bool = False) -> PackedSequence:
        """Return the words of these sentences, step by step; no step is spent on padding.

        Args:
            cases: which sentences, (N,).
            before: whether ``PAD`` comes before the words, as a decoder's first input.
            after: whether ``PAD`` comes after the words, as a decoder's last target.
        """
        lengths = self.lengths[cases.cpu()]
        rows = self.indices[cases.to(self.indices.device), : int(lengths.max())]
        rows = F.pad(rows, (int(before), int(after)), value=PAD)
        return pack_padded_sequence(
            rows, lengths + int(before) + int(after), batch_first=True, enforce_sorted=False
        )


class SentenceEncoder(nn.Module):
    """Embeddings of words, at first uniform in ±0.1, and a GRU over them.

    Args:
        norm: of the GRU, one of ``NORMS``.
        words: the number of indices.
        embedding: features of a word.
        units: of the GRU, H.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.networks.sentence_encoder import SentenceEncoder, Sentences
        >>> encoder = SentenceEncoder("layer", words=11, embedding=4, units=8)
        >>> encoder(Sentences([[5, 6, 7], [8]]).packed(torch.arange(2))).shape
        torch.Size([2, 8])
    """

    def __init__(self, norm: str, words: int, embedding: int, units: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, embedding, padding_idx=PAD)
        nn.init.uniform_(self.words.weight, -0.1, 0.1)
        nn.init.zeros_(self.words.weight[PAD])
        self.gru = gru(norm, embedding, units)

    def forward(self, sentences: PackedSequence) -> Tensor:
        """Map packed indices of words of N sentences to their last states (N, H)."""
        embedded = sentences._replace(data=self.words(sentences.data))
        _, state = self.gru(embedded)
        return cast(Tensor, state[0])

    def encode(self, sentences: Sentences, after: bool = False) -> Tensor:
        """Encode all sentences as vectors (N, H), some at a time; ``after`` as of ``Sentences.packed``."""
        parts = torch.arange(len(sentences)).split(_SENTENCES_AT_ONCE)
        return torch.cat([self(sentences.packed(part, after=after)) for part in parts])


def gru(norm: str, input_size: int, units: int) -> nn.Module:
    """Return a GRU with the initial weights of Kiros et al. (2015), the same whatever the norm.

    Weights from the input are uniform in ±0.1, those from the state orthogonal, biases zero.
    """
    # What torch.nn.GRU and others draw when they are made differs in number.
    with torch.random.fork_rng(devices=[]):
        layer = recurrent.gru(norm, input_size, units)
    values = {"weight_ih_l0": nn.init.uniform_(torch.empty(3 * units, input_size), -0.1, 0.1)}
    values["weight_hh_l0"] = torch.cat([nn.init.orthogonal_(torch.empty(units, units)) for _ in range(3)])
    values |= {n: torch.zeros_like(p) for n, p in layer.named_parameters() if n.startswith("bias")}
    recurrent.start(layer, values)
    return layer
