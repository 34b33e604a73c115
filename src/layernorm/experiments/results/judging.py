"""Cards from a comparison's results: which norm is better, and which needs fewer updates.

A verdict rests on differences that are paired by seed: runs of one seed start from the same weights and see
the cases in the same order. It is *agrees* or *differs* where the 95 % interval of the mean difference is on
one side of the claim's boundary, *cannot tell* where it holds the boundary or there is but one seed, and *not
converged* where the norm that would have to be caught was still improving when training ended. Where there
are several learning rates or warm-ups each norm has its own best, by validation cases: ``at_best_rates``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd

from layernorm.experiments.results.statistics import Interval, geometric_interval, interval
from layernorm.experiments.section import Card, Verdict
from layernorm.experiments.task import Metric

#: The largest batch size that is a small one.
SMALL_BATCH: Final = 16
# What each norm has its best of.
_SETTINGS: Final = ["learning_rate", "warmup"]


def best(run: pd.DataFrame, metric: Metric) -> float:
    """Return the best value of a run."""
    return float(run[metric.name].max() if metric.higher else run[metric.name].min())


def final(run: pd.DataFrame, metric: Metric) -> float:
    """Return the last value of a run."""
    return float(run[metric.name].iloc[-1])


def first_at(run: pd.DataFrame, metric: Metric, value: float) -> pd.Series | None:
    """Return the first record of a run that is as good as a value; None if none is."""
    column = run[metric.name]
    there = run[column >= value if metric.higher else column <= value]
    return there.iloc[0] if len(there) else None


def small_batches(results: pd.DataFrame) -> tuple[int, ...]:
    """Return the batch sizes that are small; there may be none."""
    return tuple(size for size in results.batch_size.unique() if size <= SMALL_BATCH)


def at_rates(results: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Return the mean of a metric at the end of training, by batch size, norm, learning rate and warm-up.

    The seeds are those that all rates and warm-ups of a batch size and norm have; a run that ended in NaN is
    the worst.
    """
    worst = -math.inf if metric.higher else math.inf
    keys = ["batch_size", "norm", *_SETTINGS, "seed"]
    ends = results.groupby(keys, sort=False).tail(1).fillna({metric.name: worst})  # last() passes over NaN
    found = {}
    for (batch_size, norm), group in ends.groupby(["batch_size", "norm"], sort=False):
        table = group.pivot(index=_SETTINGS, columns="seed", values=metric.name)
        shared = table.dropna(axis="columns")
        found[batch_size, norm] = (table if shared.empty else shared).mean(axis="columns")
    means: pd.Series = pd.concat(found, names=["batch_size", "norm"])
    return means.rename(metric.name).reset_index()


def at_best_rates(results: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Return the records of each norm and batch size at the learning rate and warm-up best for them.

    Args:
        results: the records of a comparison.
        metric: of the validation cases, at the end of training.
    """
    if len(results[_SETTINGS].drop_duplicates()) < 2:
        return results
    ranked = at_rates(results, metric)
    ends = -ranked[metric.name] if metric.higher else ranked[metric.name]
    chosen = ranked.loc[ends.groupby([ranked.batch_size, ranked.norm]).idxmin()]
    keys = ["batch_size", "norm", *_SETTINGS]
    kept = pd.MultiIndex.from_frame(results[keys]).isin(pd.MultiIndex.from_frame(chosen[keys]))
    return results[kept].reset_index(drop=True)


def is_converged(runs: pd.DataFrame, metric: Metric) -> bool:
    """Return whether the mean over the seeds is best before the last of several evaluations."""
    curve = runs.groupby("update")[metric.name].mean().to_numpy()
    if len(curve) < 2 or np.isnan(curve).all():
        return True
    place = np.nanargmax(curve) if metric.higher else np.nanargmin(curve)
    return bool(place < len(curve) - 1)


def fewer_updates(
    results: pd.DataFrame,
    metric: Metric,
    *,
    claim: str,
    section: str,
    norm: str = "layer",
    than: str = "none",
    at_most: float = 1.0,
    batch_sizes: Sequence[int] | None = None,
    remark: str = "",
) -> Card:
    """Return the card that says whether a norm reaches the best of another one in fewer updates.

    Batch sizes are judged one by one, each by the geometric mean over its seeds of the share of the other's
    updates that the norm needs. A run that never gets there needs as many updates as it has, at least.

    Args:
        results: the records of a comparison, each norm at one learning rate.
        metric: what is compared.
        claim: the paper's.
        section: of the paper.
        norm: the one that should need fewer updates.
        than: the one whose best is to be reached.
        at_most: the claimed share of the other's updates.
        batch_sizes: those to look at; None for all.
        remark: why it is not as the paper has it, shown only then.
    """
    verdicts: dict[int, Verdict] = {}
    texts = []
    for batch_size, runs in _by_batch_size(results, (norm, than), batch_sizes):
        own, others, missing = [], [], 0
        for _, seed in runs.groupby("seed"):
            goal = best(seed[seed.norm == than], metric)
            reached = first_at(seed[seed.norm == norm], metric, goal)
            other = first_at(seed[seed.norm == than], metric, goal)
            missing += reached is None
            own.append(int(seed[seed.norm == norm]["update"].max() if reached is None else reached["update"]))
            others.append(0 if other is None else int(other["update"]))
        ratio = geometric_interval([max(1, a) / max(1, b) for a, b in zip(own, others, strict=True)])
        verdict = verdict_of(ratio, at_most, lower_agrees=True)
        if missing and verdict == "agrees":
            verdict = "cannot tell"
        if missing == len(own):
            verdict = "differs"
        if not is_converged(runs[runs.norm == than], metric) and verdict != "cannot tell":
            verdict = "not converged"
        verdicts[batch_size] = verdict
        ours, theirs = sum(own) / len(own), sum(others) / len(others)
        if missing:
            texts.append(
                f"batch {batch_size}: {_words(norm)} never is as good as {_words(than)} at its best, at "
                f"update {theirs:.0f}" + (f", with {missing} of {len(own)} seeds" if len(own) > 1 else "")
            )
            continue
        texts.append(
            f"batch {batch_size}: {_words(norm)} is as good as {_words(than)} at its best after {ours:.0f} "
            f"updates, {_words(than)} itself after {theirs:.0f} (a share of {_shown(ratio, '{:.2f}')}"
            + (")" if at_most == 1 else f"; the claim's is at most {at_most:g})")
        )
    return _card(claim, section, verdicts, texts, remark)


def better(
    results: pd.DataFrame,
    metric: Metric,
    *,
    curve: Metric | None = None,
    claim: str,
    section: str,
    norm: str = "layer",
    than: str = "none",
    within: float = 0.0,
    is_of_budget: bool = False,
    batch_sizes: Sequence[int] | None = None,
    remark: str = "",
) -> Card:
    """Return the card that says whether a norm's value at the end is better than another one's.

    The arguments are those of ``fewer_updates``; ``curve`` is the metric by which training has converged, if
    it is not ``metric``, and ``within`` how much worse the norm may be. Where the claim is of a number of
    updates, at whose end the learning rate is 0 (``is_of_budget``), training need not have converged.
    """
    verdicts: dict[int, Verdict] = {}
    texts = []
    for batch_size, runs in _by_batch_size(results, (norm, than), batch_sizes):
        values = {
            name: [final(seed, metric) for _, seed in runs[runs.norm == name].groupby("seed")]
            for name in (norm, than)
        }
        difference = interval([a - b for a, b in zip(values[norm], values[than], strict=True)])
        boundary = -within if metric.higher else within
        verdict = verdict_of(difference, boundary, lower_agrees=not metric.higher)
        behind = {"agrees": than, "differs": norm}.get(verdict)
        is_open = behind is not None and not is_of_budget
        if is_open and not is_converged(runs[runs.norm == behind], curve or metric):
            verdict = "not converged"
        verdicts[batch_size] = verdict
        means = " against ".join(
            f"{metric.form.format(np.mean(values[name]))} ({_words(name)})" for name in (norm, than)
        )
        texts.append(
            f"batch {batch_size}: {metric.label} {means}, a difference of {_shown(difference, metric.form)}"
        )
    return _card(claim, section, verdicts, texts, remark)


def ranking(results: pd.DataFrame, *, metric: Metric, curve: Metric) -> Sequence[Card]:
    """Return a card for each batch size that says which norm is best, and whether that is more than chance.

    The arguments are those of ``better``; the verdict is on the best norm against the second.
    """
    cards = []
    for batch_size, runs in _by_batch_size(results, (), None):
        ends = (
            runs.groupby(["norm", "seed"])
            .tail(1)
            .groupby("norm")[metric.name]
            .agg(lambda end: end.mean(skipna=False))
        )
        order = ends.sort_values(ascending=not metric.higher).index  # NaN, of what diverged, comes last
        if len(order) > 1:
            first, second = order[:2]
            cards.append(
                better(
                    runs,
                    metric,
                    curve=curve,
                    claim=f"At batch size {batch_size} {_words(first)} is best of {len(order)}.",
                    section=f"{_words(second)} is second",
                    norm=first,
                    than=second,
                )
            )
    return cards


def verdict_of(estimate: Interval, boundary: float, *, lower_agrees: bool) -> Verdict:
    """Return on which side of the boundary an interval is."""
    if not (estimate.high < boundary or estimate.low > boundary):  # NaN among them: one seed
        return "cannot tell"
    return "agrees" if (estimate.high < boundary) == lower_agrees else "differs"


def _shown(estimate: Interval, form: str) -> str:
    """Return a mean with its interval, or that one seed has none."""
    mean = form.format(estimate.mean)
    if math.isnan(estimate.low):
        return f"{mean}, from one seed"
    return f"{mean}, 95 % from {form.format(estimate.low)} to {form.format(estimate.high)}"


def _words(norm: str) -> str:
    """Return a norm as a sentence has it."""
    known = {"none": "no norm", "rms": "RMS norm"}
    return known.get(norm, f"{norm} norm" if norm in ("layer", "batch", "weight") else norm)


def _by_batch_size(
    results: pd.DataFrame, norms: Sequence[str], batch_sizes: Sequence[int] | None
) -> list[tuple[int, pd.DataFrame]]:
    """Return the records of the seeds that have all these norms, the greatest batch size first."""
    groups = []
    for batch_size, runs in results.groupby("batch_size"):
        if batch_sizes is not None and batch_size not in batch_sizes:
            continue
        complete = runs.groupby("seed").norm.agg(lambda found: set(norms) <= set(found))
        chosen = runs[runs.seed.isin(complete[complete].index)]
        if len(chosen):
            groups.append((int(str(batch_size)), chosen))
    return groups[::-1]


def _card(
    claim: str, section: str, verdicts: Mapping[int, Verdict], texts: Sequence[str], remark: str
) -> Card:
    if not verdicts:
        return Card(claim, section, "The runs that would tell are not there.", "not run")
    verdict = together(list(verdicts.values()))
    text = "; ".join(texts)
    return Card(
        claim, section, f"{text[0].upper()}{text[1:]}.", verdict, "" if verdict == "agrees" else remark
    )


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Return one verdict for several: theirs where they are alike, and *partly* where some agree.

    Examples:
        >>> from layernorm.experiments.results.judging import together
        >>> together(["agrees", "cannot tell"]), together(["differs", "not converged"])
        ('partly', 'cannot tell')
    """
    found = set(verdicts)
    if len(found) == 1:
        return verdicts[0]
    return "partly" if "agrees" in found else "cannot tell"
