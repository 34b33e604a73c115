"""Skip-thought vectors: the paper's §6.3, figure 3 and table 3.

The model of Kiros et al. (2015, arXiv 1506.06726): a sentence's vector is the last state of a GRU over its
words; two more GRUs begin with that vector and say the sentences before and after it, word by word. The
vectors are judged by what linear models can read from them (``sentence_tests``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Final

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from layernorm.experiments.data.words import Vocabulary
from layernorm.experiments.networks.sentence_encoder import NORMS, SentenceEncoder, Sentences, gru
from layernorm.experiments.results import judging
from layernorm.experiments.results.statistics import interval
from layernorm.experiments.section import Card, Table
from layernorm.experiments.task import Batch, ExperimentError, Loss, Metric, Preset, Problem, Task
from layernorm.experiments.tasks.skip_thoughts import running_text
from layernorm.experiments.tasks.skip_thoughts.sentence_tests import SETS, SentenceTests

_SECTION: Final = "§6.3, figure 3, table 3"
_TRIPLES_AT_ONCE: Final = 128
_REMARK: Final = (
    "After a short training on a small text the classifiers are near the share of the greater class, where a "
    "difference is chance"
)

#: Kiros et al.'s limit of the gradient of a batch's sum.
_CLIP: Final = 5.0

VALIDATION_LOSS: Final = Metric("validation_loss", "validation loss (nats a word)", form="{:.3f}")
#: The columns of the paper's table 3.
TRANSFER: Final = (
    Metric("sick_pearson", "SICK (r)", higher=True, form="{:.3f}"),
    Metric("sick_spearman", "SICK (ρ)", higher=True, form="{:.3f}"),
    Metric("sick_mse", "SICK (MSE)", form="{:.3f}"),
    *(Metric(name.lower(), f"{name} (%)", higher=True, form="{:.1f}") for name in SETS),
)
#: Table 3 of the paper: BookCorpus, 2400 units, a million updates, the last 1.7 million.
PAPER: Final = {
    "skip-thoughts (Kiros et al. 2015)": ("0.848", "0.778", "0.287", "75.5", "79.3", "92.1", "86.9"),
    "skip-thoughts (the paper's)": ("0.842", "0.767", "0.298", "77.3", "81.8", "92.6", "87.9"),
    "skip-thoughts + LN (the paper's)": ("0.854", "0.785", "0.277", "79.5", "82.6", "93.4", "89.0"),
    "skip-thoughts + LN, a month": ("0.858", "0.788", "0.270", "79.4", "83.1", "93.7", "89.3"),
}


class SkipThoughts(nn.Module):
    """An encoder of sentences, and decoders of the sentences before and after.

    Args:
        norm: of all three GRUs, one of ``NORMS``.
        words: the number of indices of words.
        embedding: features of a word.
        units: of each GRU, and of a sentence's vector.
    """

    def __init__(self, norm: str, words: int, embedding: int, units: int) -> None:
        super().__init__()
        self.encoder = SentenceEncoder(norm, words, embedding, units)
        self.previous = gru(norm, embedding, units)
        self.next = gru(norm, embedding, units)
        self.logits = nn.Linear(units, words)
        nn.init.uniform_(self.logits.weight, -0.1, 0.1)
        nn.init.zeros_(self.logits.bias)

    def forward(
        self, sentences: PackedSequence, previous: PackedSequence, next: PackedSequence
    ) -> tuple[Tensor, Tensor]:
        """Return the logits (words said, indices of words) of the sentences before and after, packed.

        Args:
            sentences: packed indices of words.
            previous: of the sentences before, each with ``PAD`` before its words.
            next: of the sentences after, in the same form.
        """
        vectors = self.encoder(sentences).unsqueeze(0)
        return self._said(self.previous, vectors, previous), self._said(self.next, vectors, next)

    def _said(self, decoder: nn.Module, vectors: Tensor, said: PackedSequence) -> Tensor:
        states, _ = decoder(said._replace(data=self.encoder.words(said.data)), vectors)
        logits: Tensor = self.logits(states.data)
        return logits


class SkipThoughtProblem(Problem):
    """Running text in triples of consecutive sentences, and the tests of sentence vectors.

    Args:
        text: "shakespeare", or "books" for the user's own ``books/*.txt``.
        held_out: the number of sentences at the end of the text, kept for the validation loss.
        longest: words of a sentence; what goes beyond is cut off.
        vocabulary: the greatest number of indices of words.
        embedding: features of a word.
        units: of each GRU.
        tested: the greatest number of cases of each part of the tests.
        folds: of the tests' cross-validation.

    Raises:
        ExperimentError: there is no such text, or not enough of it.
        MissingData: the text or a test's data is not here.
    """

    def __init__(
        self,
        text: str,
        held_out: int,
        longest: int,
        vocabulary: int,
        embedding: int,
        units: int,
        tested: int,
        folds: int,
    ) -> None:
        documents = [[words[:longest] for words in document] for document in running_text.load(text)]
        middles, count = _middles(documents), sum(map(len, documents))
        cut = count - held_out
        train = middles[middles + 1 < cut]
        if held_out < 3 or not len(train) or not (middles > cut).any():
            raise ExperimentError(
                f"held_out must be at least 3 and leave three sentences of the text's {count}, got {held_out}"
            )
        sentences = list(chain.from_iterable(documents))
        words = Vocabulary(sentences[:cut], vocabulary)
        self._sentences = Sentences([words.indices(sentence) for sentence in sentences])
        self._train, self._held_out = train, middles[middles > cut]
        self._tests = SentenceTests(words, tested, folds)
        self._sizes = (len(words), embedding, units)
        self.cases = len(train)

    def to(self, device: torch.device) -> None:
        """Move the text and the tests to a device."""
        self._sentences.to(device)
        self._tests.to(device)
        self._train, self._held_out = self._train.to(device), self._held_out.to(device)

    def network(self, norm: str) -> SkipThoughts:
        """Make the model with this norm in its three GRUs."""
        return SkipThoughts(norm, *self._sizes)

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """Compute the cross-entropy of the sentences before and after, a word; their ends count as words."""
        return self._cross_entropy(network, self._train[batch.cases])

    def evaluate(self, network: nn.Module) -> Mapping[str, float]:
        """Compute the loss on the text held out, and the tests of the vectors."""
        if not isinstance(network, SkipThoughts):
            raise TypeError(f"network must be SkipThoughts, got {type(network).__name__}")
        losses = [self._cross_entropy(network, part) for part in self._held_out.split(_TRIPLES_AT_ONCE)]
        loss = sum(loss.total.item() for loss in losses) / sum(loss.count for loss in losses)
        return {VALIDATION_LOSS.name: loss} | self._tests.scores(network.encoder.encode)

    def _cross_entropy(self, network: nn.Module, middles: Tensor) -> Loss:
        around = (middles - 1, middles + 1)
        logits = network(
            self._sentences.packed(middles), *(self._sentences.packed(cases, before=True) for cases in around)
        )
        targets = [self._sentences.packed(cases, after=True).data for cases in around]
        losses = [F.cross_entropy(*both, reduction="sum") for both in zip(logits, targets, strict=True)]
        return Loss(losses[0] + losses[1], sum(map(len, targets)), is_summed=True)


def _middles(documents: Sequence[Sequence[Sequence[str]]]) -> Tensor:
    """Return the places of the sentences that have one before and one after them in the same document."""
    places: list[int] = []
    start = 0
    for document in documents:
        places += range(start + 1, start + len(document) - 1)
        start += len(document)
    return torch.tensor(places, dtype=torch.int64)


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Judge layer norm against none: its updates in training, and the use of its vectors in other tasks."""
    return (
        judging.fewer_updates(
            results,
            VALIDATION_LOSS,
            claim="Layer norm speeds up the training of skip-thoughts.",
            section=_SECTION,
        ),
        _transfer(results),
    )


def _transfer(results: pd.DataFrame) -> Card:
    """Judge in each column of table 3 whether layer norm ends better than no norm, seed by seed."""
    claim = "Layer norm's vectors are better than the baseline's in every column of table 3."
    at_best = {str(norm): _at_best(runs) for norm, runs in results.groupby("norm")}
    if not {"none", "layer"} <= set(at_best):
        return Card(claim, _SECTION, "the runs that would tell are not there", "not run")
    layer, none = at_best["layer"], at_best["none"]
    seeds = layer.index.intersection(none.index)
    texts, verdicts, ahead = [], [], 0
    for metric in TRANSFER:
        ours, theirs = layer.loc[seeds, metric.name], none.loc[seeds, metric.name]
        difference = interval((ours - theirs).tolist())
        verdicts.append(judging.verdict_of(difference, 0.0, lower_agrees=not metric.higher))
        ahead += difference.mean > 0 if metric.higher else difference.mean < 0
        texts.append(
            f"{metric.label} {metric.form.format(ours.mean())} against {metric.form.format(theirs.mean())}"
        )
    sure = f", beyond chance in {verdicts.count('agrees')}" if len(seeds) > 1 else ", from one seed"
    figure = f"Better in {ahead} of {len(TRANSFER)}{sure}: {'; '.join(texts)}"
    verdict = judging.together(verdicts)
    return Card(claim, _SECTION, figure, verdict, "" if verdict == "agrees" else _REMARK)


def _at_best(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the transfer metrics of each run at its evaluation with the least validation loss."""
    best = runs.groupby(["batch_size", "seed"])[VALIDATION_LOSS.name].idxmin()
    return runs.loc[best].set_index(["batch_size", "seed"])[[metric.name for metric in TRANSFER]]


def tables(results: pd.DataFrame) -> Sequence[Table]:
    """Return the paper's table 3 and, below, each run where its validation loss is least."""
    rows: list[tuple[str, ...]] = [(name, *values) for name, values in PAPER.items()]
    for (norm, size), runs in results.groupby(["norm", "batch_size"], sort=False):
        values = _at_best(runs).mean()
        cells = (metric.form.format(values[metric.name]) for metric in TRANSFER)
        rows.append((f"here: {norm}, batch {size}", *cells))
    return (
        Table(
            "Linear models on sentence vectors: the paper's table 3, and here",
            ("model", *(metric.label for metric in TRANSFER)),
            rows,
            note=(
                "The paper's read BookCorpus with 2400 units for a million updates and more. A small text "
                "knows few words of the tests: compare norms, not texts."
            ),
        ),
    )


TASK = Task(
    name="skip-thoughts",
    title="Skip-thought vectors",
    section=_SECTION,
    summary=(
        "a GRU reads a sentence, two say the ones before and after it, all with or without layer norm, Adam "
        "(small: Shakespeare; paper: the user's books, such as BookCorpus); the vectors are tested by "
        "linear models on SICK, MR, CR, SUBJ and MPQA"
    ),
    problem=SkipThoughtProblem,
    metrics=(VALIDATION_LOSS, *TRANSFER),
    norms=NORMS,
    presets={
        "small": Preset(
            epochs=3,
            batch_sizes=(128,),
            norms=("none", "layer"),
            seeds=tuple(range(3)),
            clip=_CLIP,
            evaluate_every=60,
            sizes={
                "text": "shakespeare",
                "held_out": 600,
                "longest": 30,
                "vocabulary": 2000,
                "embedding": 64,
                "units": 128,
                "tested": 1000,
                "folds": 3,
            },
        ),
        # BookCorpus has 74 million sentences: two passes are the paper's million updates.
        "paper": Preset(
            epochs=2,
            batch_sizes=(128,),
            norms=("none", "layer"),
            learning_rates=(2e-4,),
            optimizer="adam-uncorrected",
            clip=_CLIP,
            evaluate_every=50_000,
            sizes={
                "text": "books",
                "held_out": 5000,
                "longest": 30,
                "vocabulary": 20_000,
                "embedding": 620,
                "units": 2400,
                "tested": 20_000,
                "folds": 10,
            },
        ),
    },
    judge=judge,
    tables=tables,
)
