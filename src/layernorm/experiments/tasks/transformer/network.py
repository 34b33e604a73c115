"""A transformer that predicts the next character, with its norms in various places or without any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layernorm.baselines import Norm


@dataclass(frozen=True)
class Form:
    """Say what surrounds the branches of a transformer's residual blocks.

    Attributes:
        norm: of each branch, as ``layernorm.baselines.Norm`` takes it.
        is_after: whether it normalizes the sum of the stream and the branch, as in the first transformer;
            otherwise it is before the branch, and the stream is normalized once more at the end.
        of_queries: the norm of each head's queries and keys.
        start: how a network without norms starts: "fixup", "rezero" or "" for like the others.
    """

    norm: str = "none"
    is_after: bool = False
    of_queries: str = "none"
    start: str = ""


#: What is compared, by name.
FORMS: Final[dict[str, Form]] = {
    "none": Form(),
    "post-layer": Form("layer", is_after=True),
    "pre-layer": Form("layer"),
    "pre-rms": Form("rms"),
    "pre-dyt": Form("dyt"),
    "pre-layer-qk": Form("layer", of_queries="layer"),
    "fixup": Form(start="fixup"),
    "rezero": Form(start="rezero"),
}


class Shift(nn.Module):
    """Add one number, 0 at first, to all features."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        """Return the input plus the number."""
        return input + self.shift


class Attention(nn.Module):
    """Causal attention of several heads.

    Args:
        width: the number of features, a multiple of ``heads``.
        heads: the number of heads.
        of_queries: the norm of queries and keys, over the features of a head.
        shifted: whether one number is added before each product, as Fixup does.
    """

    def __init__(self, width: int, heads: int, of_queries: str = "none", shifted: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.key_norm = (Norm(of_queries)(width // heads) for _ in range(2))
        self.shift, self.shift_out = (Shift() if shifted else nn.Identity() for _ in range(2))
        self.inputs = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, stream: Tensor) -> Tensor:
        """Map (N, T, width) to the same shape; a place sees itself and those before it."""
        parts = self.inputs(self.shift(stream)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(
            self.query_norm(query), self.key_norm(key), value, is_causal=True
        )
        result: Tensor = self.out(self.shift_out(found.transpose(1, 2).flatten(2)))
        return result


class Branch(nn.Module):
    """A residual block: the stream, a branch and what surrounds it.

    Args:
        branch: attention or the feed-forward network.
        width: the number of features.
        form: the norm and its place, or the start without one.
    """

    def __init__(self, branch: nn.Module, width: int, form: Form) -> None:
        super().__init__()
        self.branch, self.is_after = branch, form.is_after
        self.norm = Norm(form.norm)(width)
        starts = {"fixup": 1.0, "rezero": 0.0}
        self.scale = nn.Parameter(torch.tensor(starts[form.start])) if form.start else None

    def forward(self, stream: Tensor) -> Tensor:
        """Map (N, T, width) to the same shape."""
        if self.is_after:
            after: Tensor = self.norm(stream + self.branch(stream))
            return after
        found: Tensor = self.branch(self.norm(stream))
        return stream + (found if self.scale is None else self.scale * found)


class Transformer(nn.Module):
    """Embeddings of characters and places, blocks of attention and feed-forward network, logits.

    The last norm is left out where a norm is after each block. Weights start as Glorot and Bengio's, uniform,
    biases at 0, embeddings standard normal. Two forms without norms start in their own way:

    - Fixup (H. Zhang, Y. Dauphin, T. Ma, 2019, arXiv 1901.09321): the last product of each branch and the
      logits start at 0, the other products of the branches divided by the root of the number of branches; a
      branch has a factor, 1 at first, and a number is added before each product and activation, 0 at first.
    - ReZero (T. Bachlechner and others, 2020, arXiv 2003.04887): a branch has a factor, 0 at first.

    Args:
        characters: the number of different characters.
        context: the greatest number of characters that are seen.
        width: the number of features.
        layers: the number of pairs of blocks.
        heads: of attention; they divide the width.
        norm: one of ``FORMS``.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.transformer.network import Transformer
        >>> Transformer(65, 16, 32, 4, 2, "pre-layer")(torch.zeros(3, 16, dtype=torch.int64)).shape
        torch.Size([3, 16, 65])
    """

    def __init__(self, characters: int, context: int, width: int, layers: int, heads: int, norm: str) -> None:
        super().__init__()
        form = FORMS[norm]
        shifted = form.start == "fixup"
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(context, width)
        blocks = []
        for _ in range(layers):
            attention = Attention(width, heads, form.of_queries, shifted)
            blocks += [Branch(attention, width, form), Branch(_feedforward(width, shifted), width, form)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if form.is_after else Norm(form.norm)(width)
        self.logits = nn.Linear(width, characters)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if shifted:
            self._start_as_fixup()

    def forward(self, characters: Tensor) -> Tensor:
        """Map characters (N, T), int64, to the logits (N, T, characters) of the next ones."""
        places = torch.arange(characters.size(1), device=characters.device)
        stream = self.characters(characters) + self.places(places)
        logits: Tensor = self.logits(self.norm(self.blocks(stream)))
        return logits

    @torch.no_grad()
    def _start_as_fixup(self) -> None:
        branches = len(self.blocks)
        for block in self.blocks:
            *first, last = (module for module in block.modules() if isinstance(module, nn.Linear))
            last.weight.zero_()
            for linear in first:
                # A branch has two products: L^(-1 / (2m - 2)) with m = 2.
                linear.weight.div_(branches**0.5)
        self.logits.weight.zero_()


def _feedforward(width: int, shifted: bool) -> nn.Sequential:
    first, second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    if not shifted:
        return nn.Sequential(first, nn.GELU(), second)
    return nn.Sequential(Shift(), first, Shift(), nn.GELU(), Shift(), second)


__all__ = ["FORMS", "Attention", "Branch", "Form", "Shift", "Transformer"]
