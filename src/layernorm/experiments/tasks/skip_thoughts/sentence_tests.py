"""Tests of sentence vectors by linear models on them: relatedness and classification (paper §6.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from layernorm.experiments import data
from layernorm.experiments.data.words import UNKNOWN, Vocabulary, tokens
from layernorm.experiments.networks.sentence_encoder import Sentences
from layernorm.experiments.task import ExperimentError

#: The sets of sentences that are classified.
SETS: Final = ("MR", "CR", "SUBJ", "MPQA")

#: Makes vectors (N, H) of sentences.
Encoder: TypeAlias = Callable[[Sentences], Tensor]

# Inverse strengths of the penalty on weights that are tried; features are standardized.
_PENALTIES: Final = (0.001, 0.01, 0.1, 1.0)
_CLASSES: Final = np.arange(1, 6)


class Related(NamedTuple):
    """Features of pairs of sentences (pairs, F) and how related they are, from 1 to 5, (pairs,)."""

    features: np.ndarray
    scores: np.ndarray


class SentenceTests:
    """SICK's relatedness, and the classes of four sets of sentences.

    Args:
        vocabulary: of the encoder.
        cases: the greatest number of pairs of each part of SICK, and of sentences of each set.
        folds: of cross-validation, as the four sets have no test part.

    Raises:
        ExperimentError: there are too few folds, or cases for them.
        MissingData: a set is not here; the message says which.
    """

    def __init__(self, vocabulary: Vocabulary, cases: int, folds: int) -> None:
        if folds < 2 or cases < 8 * folds:
            raise ExperimentError(
                "expected at least 2 folds, and at least 8 tested cases for each, got "
                f"{folds} folds and {cases} cases"
            )
        self._folds = folds
        pairs = {part: data.sick(part)[:cases] for part in ("train", "trial", "test")}
        texts = sorted({text for part in pairs.values() for pair in part for text in pair[:2]})
        place = {text: index for index, text in enumerate(texts)}
        self._sick_sentences = _sentences(texts, vocabulary)
        self._sick = {
            part: (
                torch.tensor([place[pair.first] for pair in of]),
                torch.tensor([place[pair.second] for pair in of]),
                np.array([pair.score for pair in of]),
            )
            for part, of in pairs.items()
        }
        self._sets: dict[str, tuple[Sentences, np.ndarray]] = {}
        for name in SETS:
            sentences, labels = data.sentence_set(name)
            # The sets are sorted by class: equally spaced sentences keep its share.
            count = min(cases, len(sentences))
            chosen = np.linspace(0, len(sentences) - 1, count).round().astype(int)
            self._sets[name] = (
                _sentences([sentences[case] for case in chosen], vocabulary),
                labels.numpy()[chosen],
            )

    def to(self, device: torch.device) -> None:
        """Move the sentences to a device."""
        self._sick_sentences.to(device)
        for sentences, _ in self._sets.values():
            sentences.to(device)

    def scores(self, encode: Encoder) -> dict[str, float]:
        """Return r, ρ and the mean squared error on SICK, and the sets' accuracies in percent.

        Returns:
            Values named ``sick_pearson``, ``sick_spearman``, ``sick_mse``, and as ``SETS`` in lower case.
        """
        vectors = encode(self._sick_sentences).float().cpu()
        parts = {part: related(vectors[a], vectors[b], scores) for part, (a, b, scores) in self._sick.items()}
        values = dict(zip(("sick_pearson", "sick_spearman", "sick_mse"), relatedness(**parts), strict=True))
        for name, (sentences, labels) in self._sets.items():
            features = encode(sentences).float().cpu().numpy()
            values[name.lower()] = 100.0 * accuracy(features, labels, self._folds)
        return values


def related(first: Tensor, second: Tensor, scores: np.ndarray) -> Related:
    """Return features |u - v| and u·v of pairs of vectors (pairs, H), as Tai, Socher and Manning (2015)."""
    return Related(torch.cat(((first - second).abs(), first * second), -1).numpy(), scores)


def relatedness(train: Related, trial: Related, test: Related) -> tuple[float, float, float]:
    """Return Pearson's r, Spearman's ρ and the mean squared error of predicted scores on the test pairs.

    The score is the mean of a distribution over 1 to 5, predicted by logistic regression; the penalty is the
    one with the least error on the trial pairs.
    """
    models = [_scorer(train, penalty) for penalty in _PENALTIES]
    best = min(models, key=lambda model: _error(_predicted(model, trial.features), trial.scores))
    predicted = _predicted(best, test.features)
    spearman = _pearson(pd.Series(predicted).rank().to_numpy(), pd.Series(test.scores).rank().to_numpy())
    return _pearson(predicted, test.scores), spearman, _error(predicted, test.scores)


def accuracy(features: np.ndarray, labels: np.ndarray, folds: int) -> float:
    """Return the share of cases that logistic regression classifies as they are, by cross-validation.

    In each fold the penalty is the one that does best on a part of the fold's training cases.

    Args:
        features: (cases, F).
        labels: (cases,).
        folds: their number.
    """
    right = 0
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=0).split(features, labels):
        inner, outer = next(
            StratifiedKFold(folds, shuffle=True, random_state=1).split(features[train], labels[train])
        )
        chosen = max(
            _PENALTIES,
            key=lambda penalty: (
                _classifier(penalty)
                .fit(features[train][inner], labels[train][inner])
                .score(features[train][outer], labels[train][outer])
            ),
        )
        model = _classifier(chosen).fit(features[train], labels[train])
        right += int((model.predict(features[test]) == labels[test]).sum())
    return right / len(labels)


def _classifier(penalty: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))


def _scorer(train: Related, penalty: float) -> Pipeline:
    """Turn scores into weights: 3.2 is a 3 with weight 0.8 and a 4 with weight 0.2."""
    below = np.minimum(np.floor(train.scores), _CLASSES[-2])
    share = train.scores - below
    return _classifier(penalty).fit(
        np.concatenate((train.features, train.features)),
        np.concatenate((below, below + 1)).astype(int),
        logisticregression__sample_weight=np.concatenate((1 - share, share)),
    )


def _predicted(model: Pipeline, features: np.ndarray) -> np.ndarray:
    scores: np.ndarray = model.predict_proba(features) @ model.classes_
    return scores


def _error(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.mean((first - second) ** 2))


def _pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation; 0 where one of them does not vary."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _sentences(texts: Sequence[str], vocabulary: Vocabulary) -> Sentences:
    return Sentences([vocabulary.indices(tokens(text)) or [UNKNOWN] for text in texts])
