"""Cards from a comparison's results: which norm is better, and which needs fewer updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from layernorm.experiments.section import Card, Verdict
from layernorm.experiments.task import Metric


def best(run: pd.DataFrame, metric: Metric) -> float:
    """Return the best value of a run."""
    return float(run[metric.name].max() if metric.higher else run[metric.name].min())


def first_at(run: pd.DataFrame, metric: Metric, value: float) -> pd.Series | None:
    """Return the first record of a run that is as good as a value; None if none is."""
    column = run[metric.name]
    there = run[column >= value if metric.higher else column <= value]
    return there.iloc[0] if len(there) else None


def fewer_updates(
    results: pd.DataFrame,
    metric: Metric,
    *,
    claim: str,
    section: str,
    norm: str = "layer",
    than: str = "none",
    batch_sizes: Sequence[int] | None = None,
    remark: str = "",
) -> Card:
    """Return the card that says whether a norm reaches the best of another one in fewer updates.

    Batch sizes are judged one by one, each by the mean over its seeds; a run that never gets there makes its
    batch size a no.

    Args:
        results: the records of a comparison.
        metric: what is compared.
        claim: the paper's.
        section: of the paper.
        norm: the one that should need fewer updates.
        than: the one whose best is to be reached.
        batch_sizes: those to look at; None for all.
        remark: why it is not as the paper has it, shown only then.
    """
    verdicts, texts = {}, []
    for batch_size, runs in _by_batch_size(results, (norm, than), batch_sizes):
        own, others = [], []
        for _, seed in runs.groupby("seed"):
            goal = best(seed[seed.norm == than], metric)
            reached = first_at(seed[seed.norm == norm], metric, goal)
            other = first_at(seed[seed.norm == than], metric, goal)
            own.append(None if reached is None else int(reached["update"]))
            others.append(0 if other is None else int(other["update"]))
        theirs = sum(others) / len(others)
        missing = own.count(None)
        if missing:
            verdicts[batch_size] = False
            texts.append(
                f"batch {batch_size}: {_words(norm)} never is as good as {_words(than)} at its best, at "
                f"update {theirs:.0f}" + (f", with {missing} of {len(own)} seeds" if len(own) > 1 else "")
            )
            continue
        ours = sum(update for update in own if update is not None) / len(own)
        verdicts[batch_size] = ours < theirs
        ratio = f" ({theirs / ours:.1f} times fewer)" if 0 < ours < theirs else ""
        texts.append(
            f"batch {batch_size}: {_words(norm)} is as good as {_words(than)} at its best after {ours:.0f} "
            f"updates, {_words(than)} itself after {theirs:.0f}{ratio}"
        )
    return _card(claim, section, verdicts, texts, remark)


def better(
    results: pd.DataFrame,
    metric: Metric,
    *,
    claim: str,
    section: str,
    norm: str = "layer",
    than: str = "none",
    batch_sizes: Sequence[int] | None = None,
    remark: str = "",
) -> Card:
    """Return the card that says whether a norm's best value is better than another one's.

    The arguments are those of ``fewer_updates``; the values are means over the seeds.
    """
    verdicts, texts = {}, []
    for batch_size, runs in _by_batch_size(results, (norm, than), batch_sizes):
        means = {}
        for name in (norm, than):
            of_seeds = [best(seed, metric) for _, seed in runs[runs.norm == name].groupby("seed")]
            means[name] = sum(of_seeds) / len(of_seeds)
        verdicts[batch_size] = means[norm] > means[than] if metric.higher else means[norm] < means[than]
        values = " against ".join(
            f"{metric.form.format(means[name])} ({_words(name)})" for name in (norm, than)
        )
        texts.append(f"batch {batch_size}: best {metric.label} {values}")
    return _card(claim, section, verdicts, texts, remark)


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


def _card(claim: str, section: str, verdicts: Mapping[int, bool], texts: Sequence[str], remark: str) -> Card:
    verdict: Verdict = "partly"
    if not verdicts:
        return Card(claim, section, "The runs that would tell are not there.", "not run")
    if all(verdicts.values()):
        verdict, remark = "agrees", ""
    elif not any(verdicts.values()):
        verdict = "differs"
    text = "; ".join(texts)
    return Card(claim, section, f"{text[0].upper()}{text[1:]}.", verdict, remark)
