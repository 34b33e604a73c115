"""The attentive reader of Hermann et al. 2015 (arXiv 1506.03340), the paper's §6.2 and figure 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from layernorm.baselines import BatchNorm
from layernorm.experiments import data
from layernorm.experiments.networks import recurrent
from layernorm.experiments.results import judging
from layernorm.experiments.section import Card, Table
from layernorm.experiments.task import Batch, ExperimentError, Loss, Metric, Preset, Problem, Task
from layernorm.experiments.tasks.attentive_reader import cloze

#: What the reader can be normalized with: in its LSTMs, and with "batch-everywhere" in the attention too;
#: "layer-0.1" starts the gains at 0.1 in place of 1.
NORMS: Final = ("none", "batch", "batch-everywhere", "layer", "layer-0.1", "rms", "weight")

VALIDATION_ERROR: Final = Metric("validation_error", "validation error (%)")
VALIDATION_LOSS: Final = Metric("validation_loss", "validation loss", form="{:.3f}")

_AT_ONCE: Final = 256
_REMARK: Final = (
    "on the plays both learn little more than whose turn it is, and there are few questions; what it does "
    "at other learning rates is in the documentation"
)
#: Of batch norm's gains, in the attention as in the LSTM.
_BATCH_GAIN: Final = 0.1
#: The singular values of square matrices at the start.
_ORTHOGONAL: Final = 0.05


class AttentiveReader(nn.Module):
    """Two LSTMs read passage and query; the query's last state attends to the passage's states.

    With y the passage's states, u the query's last state: m_t = tanh(W_ym y_t + W_um u + B y_t·B u),
    s = softmax_t(w·m_t), r = Σ s_t y_t, g = tanh(W_rg r + W_ug u + W_mg mean_t y_t), and the logits are
    linear in g. That is Hermann et al. 2015, §3.2, with the bilinear term of y_t and u, the same for all
    units, and the passage's mean of the code that the paper's authors used; theirs are the initial states
    too, which are learned from 0, and how the weights start. Batch norm everywhere normalizes each of the
    five linear terms (Cooijmans et al. 2016, §5.4).

    Args:
        norm: one of ``NORMS``.
        indices: of words and markers.
        markers: the classes.
        embedding: features of a word.
        hidden: units of each LSTM in each direction.
        bidirectional: whether the LSTMs read from both ends.
        longest: the longest passage or query.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.attentive_reader.task import AttentiveReader
        >>> reader = AttentiveReader("layer", indices=100, markers=9, embedding=12, hidden=16)
        >>> passages, queries = torch.randint(100, (2, 30)), torch.randint(100, (2, 7))
        >>> reader(passages, torch.tensor([30, 11]), queries, torch.tensor([5, 7])).shape
        torch.Size([2, 9])
    """

    def __init__(
        self,
        norm: str,
        indices: int,
        markers: int,
        embedding: int,
        hidden: int,
        bidirectional: bool = False,
        longest: int = 512,
    ) -> None:
        super().__init__()
        directions = 2 if bidirectional else 1
        width = hidden * directions
        self.embedding = nn.Embedding(indices, embedding)
        kind = norm.partition("-")[0]
        self.passage, self.query = (
            recurrent.lstm(
                kind, embedding, hidden, batch_first=True, bidirectional=bidirectional, max_length=longest
            )
            for _ in range(2)
        )
        if norm == "layer-0.1":
            for name, parameter in self.named_parameters():
                if ".gain_" in name:
                    nn.init.constant_(parameter, 0.1)
        self.passage_start, self.query_start = (
            nn.Parameter(torch.zeros(directions, hidden)) for _ in range(2)
        )
        self.attend_passage = _Term(width, norm, bias=True)
        self.attend_query = _Term(width, norm)
        self.likeness = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)
        self.join_passage = _Term(width, norm)
        self.join_mean = _Term(width, norm)
        self.join_query = _Term(width, norm, bias=True)
        self.logits = nn.Linear(width, markers)
        _start(self)

    def forward(
        self, passages: Tensor, passage_lengths: Tensor, queries: Tensor, query_lengths: Tensor
    ) -> Tensor:
        """Map indices (N, T) and (N, Q) with their lengths (N,) to logits (N, markers)."""
        _, u = self._read(self.query, self.query_start, queries, query_lengths)
        packed, _ = self._read(self.passage, self.passage_start, passages, passage_lengths)
        # Only where there are words, which is what batch norm's statistics are of.
        terms = PackedSequence(self.attend_passage(packed.data), *packed[1:])
        y, _ = pad_packed_sequence(packed, batch_first=True)
        projected, _ = pad_packed_sequence(terms, batch_first=True)
        likeness = self.likeness(y) @ self.likeness(u)[:, :, None]
        scores = self.score(torch.tanh(projected + self.attend_query(u)[:, None] + likeness)).squeeze(-1)
        there = torch.arange(y.size(1), device=y.device) < passage_lengths[:, None]
        weights = scores.masked_fill(~there, -torch.inf).softmax(-1)
        r = (weights[:, None] @ y).squeeze(1)
        mean = y.sum(1) / passage_lengths.to(y)[:, None]  # y is 0 behind a passage's end
        logits: Tensor = self.logits(
            torch.tanh(self.join_passage(r) + self.join_query(u) + self.join_mean(mean))
        )
        return logits

    def _read(
        self, lstm: nn.Module, start: Tensor, indices: Tensor, lengths: Tensor
    ) -> tuple[PackedSequence, Tensor]:
        """Return the states of all words, and the last state of all directions (N, width)."""
        embedded = self.embedding(indices)
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        h0 = start[:, None].expand(-1, len(indices), -1).contiguous()
        states, (h, _) = lstm(packed, (h0, torch.zeros_like(h0)))
        return states, h.transpose(0, 1).flatten(1)


class _Term(nn.Sequential):
    """One of the terms in a tanh: linear, and batch-normalized where batch norm is everywhere."""

    def __init__(self, width: int, norm: str, bias: bool = False) -> None:
        super().__init__(nn.Linear(width, width, bias=bias))
        if norm == "batch-everywhere":
            batch_norm = BatchNorm(width)
            nn.init.constant_(batch_norm.weight, _BATCH_GAIN)
            self.append(batch_norm)


@torch.no_grad()
def _start(reader: AttentiveReader) -> None:
    """Give the weights the values that they start from in the authors' code.

    The matrices of the LSTMs' gates, of the attention's passage term and of the bilinear term are 0.05 times
    orthogonal where they are square; the others are uniform with the bound sqrt(6 / (inputs + outputs + 1)),
    the vector of the scores with 1 / sqrt(width). Biases are 0.
    """
    for name, parameter in reader.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind.startswith("bias"):
            nn.init.zeros_(parameter)
        elif module == "score":
            bound = parameter.size(1) ** -0.5
            nn.init.uniform_(parameter, -bound, bound)
        elif kind == "weight" and parameter.dim() == 2:
            is_orthogonal = module in ("attend_passage.0", "likeness")
            parameter.copy_(_matrix(parameter.size(0), parameter.size(1), is_orthogonal))
    directions, hidden = reader.passage_start.shape
    for lstm in (reader.passage, reader.query):
        values = {}
        for end in ("", "_reverse")[:directions]:
            for name, inputs in (("weight_ih", reader.embedding.embedding_dim), ("weight_hh", hidden)):
                values[f"{name}_l0{end}"] = torch.cat([_matrix(hidden, inputs) for _ in range(4)])
        recurrent.start(lstm, values)


def _matrix(outputs: int, inputs: int, is_orthogonal: bool = True) -> Tensor:
    matrix = torch.empty(outputs, inputs)
    if is_orthogonal and outputs == inputs:
        return nn.init.orthogonal_(matrix, _ORTHOGONAL)
    bound = (6.0 / (outputs + inputs + 1)) ** 0.5
    return nn.init.uniform_(matrix, -bound, bound)


class Reading(Problem):
    """Questions with one name left out; the classes are markers that stand for names.

    In every training update the markers of each question are numbered anew at random, so that only reading
    can tell which is which; the validation cases have one fixed random numbering.

    Args:
        corpus: "plays" asks who speaks next in tiny Shakespeare (``cloze.who_speaks``), the last tenth of the
            questions being the validation cases; "cnn" are the questions of Hermann et al. on CNN's news,
            where the user has them.
        embedding: features of a word.
        hidden: units of each LSTM in each direction.
        bidirectional: whether the LSTMs read from both ends.
        vocabulary: the most indices for words that are no markers.
        sentences: of a passage that are kept, the nearest to the query; None for the whole passage.
        cases: the most training cases, the first ones.
        held_out: the most validation cases, the first ones.

    Raises:
        ExperimentError: a size is not possible, or the data is missing.
    """

    def __init__(
        self,
        corpus: str = "plays",
        embedding: int = 240,
        hidden: int = 240,
        bidirectional: bool = False,
        vocabulary: int = 70_000,
        sentences: int | None = None,
        cases: int = 400_000,
        held_out: int = 4_000,
    ) -> None:
        for name, value in (("cases", cases), ("held_out", held_out), ("sentences", sentences)):
            if value is not None and value < 1:
                raise ExperimentError(f"{name} must be at least 1, got {value}")
        train, validation = _questions(corpus)
        train, validation = train[:cases], validation[:held_out]
        index = cloze.Indexer(cloze.vocabulary(train, vocabulary, sentences), sentences)
        self._train, unnumbered = index(train), index(validation)
        self.cases = len(self._train)
        self.embedding, self.hidden, self.bidirectional = embedding, hidden, bidirectional
        self.words = len(index.vocabulary)
        self.markers = int(max(self._train.markers.max(), unnumbered.markers.max()))
        self.longest = max(self._train.passages.size(1), self._train.queries.size(1))
        order = torch.rand(len(unnumbered), self.markers, generator=torch.Generator().manual_seed(0))
        self._validation = unnumbered.renumbered(order.argsort(1), self.words)

    def to(self, device: torch.device) -> None:
        """Move the data to a device."""
        self._train, self._validation = self._train.to(device), self._validation.to(device)

    def network(self, norm: str) -> nn.Module:
        """Make an ``AttentiveReader``."""
        return AttentiveReader(
            norm,
            self.words + self.markers,
            self.markers,
            self.embedding,
            self.hidden,
            self.bidirectional,
            self.longest,
        )

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """Compute the cross-entropy in nats over all markers, by question."""
        numbers = batch.uniform(self.markers).argsort(1)
        part = self._train.part(batch.cases).renumbered(numbers, self.words)
        return Loss(F.cross_entropy(_logits(network, part), part.answers, reduction="sum"), len(part))

    def evaluate(self, network: nn.Module) -> Mapping[str, float]:
        """Return mean cross-entropy and percentage of wrong answers."""
        loss, errors = 0.0, 0
        for start in range(0, len(self._validation), _AT_ONCE):
            part = self._validation.part(slice(start, start + _AT_ONCE))
            logits = _logits(network, part)
            loss += F.cross_entropy(logits, part.answers, reduction="sum").item()
            errors += int((logits.argmax(-1) != part.answers).sum())
        count = len(self._validation)
        return {VALIDATION_ERROR.name: 100.0 * errors / count, VALIDATION_LOSS.name: loss / count}


def _questions(corpus: str) -> tuple[list[data.Question], list[data.Question]]:
    """Return the training and the validation questions."""
    if corpus == "cnn":
        return data.cnn_questions("train"), data.cnn_questions("valid")
    if corpus != "plays":
        raise ExperimentError(f'corpus must be "plays" or "cnn", got {corpus!r}')
    questions = cloze.who_speaks(data.tiny_shakespeare())
    start = len(questions) * 9 // 10
    return questions[:start], questions[start:]


def _logits(network: nn.Module, part: cloze.Cloze) -> Tensor:
    logits: Tensor = network(part.passages, part.passage_lengths, part.queries, part.query_lengths)
    return logits


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Judge layer norm against no norm and both batch norms, and the values its gains start from."""
    section = "§6.2, figure 2"
    return (
        judging.fewer_updates(
            results,
            VALIDATION_ERROR,
            claim="An attentive reader with layer norm in its LSTMs trains faster than the baseline.",
            section=section,
            remark=_REMARK,
        ),
        judging.better(
            results,
            VALIDATION_ERROR,
            claim="It converges to a better validation result than the baseline.",
            section=section,
            remark=_REMARK,
        ),
        judging.better(
            results,
            VALIDATION_ERROR,
            claim="It converges to a better validation result than recurrent batch norm.",
            section=section,
            than="batch",
        ),
        judging.better(
            results,
            VALIDATION_ERROR,
            claim="Gains that start at 1 serve layer norm better than the 0.1 that batch norm needs.",
            section="§6.2",
            than="layer-0.1",
        ),
    )


def tables(results: pd.DataFrame) -> Sequence[Table]:
    """Return what Cooijmans et al. published of the baselines."""
    return (
        Table(
            "Least validation error (%) on CNN's questions, as published by Cooijmans et al. 2016, §5.4",
            ("network", "norm here", "validation error (%)"),
            (
                ("LSTM", "none", "50.3"),
                ("BN-LSTM", "batch", "49.5"),
                ("BN-everywhere", "batch-everywhere", "50.0"),
            ),
            note=(
                "Passages of four sentences, of which only 57 % hold the answer. The paper on layer norm "
                "gives its own result only as a curve below these (figure 2)."
            ),
        ),
    )


TASK = Task(
    name="attentive-reader",
    title="Attentive reader: question answering",
    section="§6.2, figure 2",
    summary=(
        "which name fills a gap, by reading; LSTMs over passage and query with attention (paper §6.2; small: "
        "who speaks next in Shakespeare's plays, paper: CNN's questions), norms in the LSTMs, Adam"
    ),
    problem=Reading,
    metrics=(VALIDATION_ERROR, VALIDATION_LOSS),
    norms=NORMS,
    presets={
        "small": Preset(
            epochs=5,
            batch_sizes=(64,),
            norms=("none", "batch", "layer", "layer-0.1"),
            seeds=tuple(range(5)),
            learning_rates=(3e-3,),
            clip=10.0,
            evaluate_every=38,
            sizes={"embedding": 64, "hidden": 64, "bidirectional": True, "vocabulary": 2000, "cases": 5000},
        ),
        "paper": Preset(
            epochs=135,
            batch_sizes=(64,),
            norms=("none", "batch", "batch-everywhere", "layer", "layer-0.1"),
            learning_rates=(8e-5,),
            clip=10.0,
            evaluate_every=1000,
            sizes={
                "corpus": "cnn",
                "embedding": 240,
                "hidden": 240,
                "bidirectional": False,
                "vocabulary": 70_000,
                "sentences": 4,
                "cases": 400_000,
                "held_out": 4_000,
            },
        ),
    },
    judge=judge,
    tables=tables,
)
