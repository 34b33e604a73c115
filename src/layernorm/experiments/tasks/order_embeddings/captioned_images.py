"""Captions, and what is known of their images: features in COCO, the words of another caption in Flickr8k."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Final, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from layernorm.experiments import data
from layernorm.experiments.data.words import UNKNOWN, Vocabulary, tokens
from layernorm.experiments.networks.sentence_encoder import Sentences
from layernorm.experiments.task import ExperimentError

#: Where captions can come from.
SOURCES: Final = ("coco", "flickr8k")

#: The captions of each image, as lists of words.
Captions: TypeAlias = Sequence[Sequence[Sequence[str]]]


class Bags:
    """Sentences as features: which words each has, scaled to length 1; rows are made when they are asked for.

    Unknown words do not count.

    Args:
        sentences: the sentences.
        words: the number of indices of words, and of features.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.order_embeddings.captioned_images import Bags
        >>> from layernorm.experiments.networks.sentence_encoder import Sentences
        >>> Bags(Sentences([[2, 3, 2], [1, 4]]), words=5)[torch.tensor([1, 0])]
        tensor([[0.0000, 0.0000, 0.0000, 0.0000, 1.0000],
                [0.0000, 0.0000, 0.7071, 0.7071, 0.0000]])
    """

    def __init__(self, sentences: Sentences, words: int) -> None:
        self.shape = (len(sentences), words)
        self._sentences = sentences

    def __getitem__(self, rows: Tensor) -> Tensor:
        indices = self._sentences.indices[rows]
        features = torch.zeros(len(indices), self.shape[1], device=indices.device)
        features.scatter_(1, indices, 1.0)[:, : UNKNOWN + 1] = 0
        return F.normalize(features, dim=-1)

    def to(self, device: torch.device) -> Bags:
        """Move the sentences to a device."""
        self._sentences.to(device)
        return self


class Pairs:
    """Captions with their images.

    Args:
        captions: all captions.
        features: of images: (rows, F) when indexed with rows.
        caption: of each pair, a place in ``captions``, (pairs,).
        row: of each pair, of ``features``, (pairs,).
        owner: of each pair, the number of its image, (pairs,).
    """

    def __init__(
        self, captions: Sentences, features: Tensor | Bags, caption: Tensor, row: Tensor, owner: Tensor
    ) -> None:
        self.captions, self.features = captions, features
        self.caption, self.row, self.owner = caption, row, owner

    def __len__(self) -> int:
        return len(self.owner)

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        self.captions.to(device)
        self.features = self.features.to(device)
        self.caption, self.row, self.owner = (t.to(device) for t in (self.caption, self.row, self.owner))


def load(source: str, part: str, images: int) -> tuple[Tensor | None, Captions]:
    """Return the first images of a part: their features, if there are any, and captions.

    Args:
        source: one of ``SOURCES``.
        part: "train", "dev" or "test".
        images: their greatest number, at least 2.

    Raises:
        ExperimentError: there is no such source, or fewer than 2 images are asked for.
        MissingData: the source is not here.
    """
    if source not in SOURCES:
        raise ExperimentError(f"unknown source {source!r}; expected one of {', '.join(SOURCES)}")
    if images < 2:
        raise ExperimentError(f"expected at least 2 images of {source}'s part {part}, got {images}")
    features, texts = data.coco_features(part) if source == "coco" else (None, data.flickr8k(part))
    captions = [[tokens(text) for text in of] for of in texts[:images]]
    return None if features is None else features[:images], captions


def featured(features: Tensor, captions: Captions, vocabulary: Vocabulary) -> Pairs:
    """Return every caption with the features (images, F) of its image, scaled to length 1."""
    owner = torch.tensor([image for image, of in enumerate(captions) for _ in of])
    sentences = _sentences(captions, vocabulary)
    return Pairs(sentences, F.normalize(features, dim=-1), torch.arange(len(owner)), owner, owner)


def described(captions: Captions, vocabulary: Vocabulary) -> Pairs:
    """Return every two captions of an image, in both orders: one as the caption, one for the image."""
    sentences = _sentences(captions, vocabulary)
    places, owner, start = [], [], 0
    for image, of in enumerate(captions):
        orders = list(permutations(range(start, start + len(of)), 2))
        places += orders
        owner += [image] * len(orders)
        start += len(of)
    caption, row = torch.tensor(places).T
    return Pairs(sentences, Bags(sentences, len(vocabulary)), caption, row, torch.tensor(owner))


def described_once(captions: Captions, vocabulary: Vocabulary) -> Pairs:
    """Let the first caption of each image stand for it; row i of the others is image i."""
    first = _sentences([of[:1] for of in captions], vocabulary)
    others = [of[1:] for of in captions]
    owner = torch.tensor([image for image, of in enumerate(others) for _ in of])
    bags = Bags(first, len(vocabulary))
    return Pairs(_sentences(others, vocabulary), bags, torch.arange(len(owner)), owner, owner)


def _sentences(captions: Captions, vocabulary: Vocabulary) -> Sentences:
    return Sentences([vocabulary.indices(words) for of in captions for words in of])
