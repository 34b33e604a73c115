"""The results of the study of batches and steps as cards, tables and charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import pandas as pd

from layernorm.experiments.section import Card, Chart, Line, Panel, Table

# Below this, two results in float32 are one computation rounded in two ways: logits are of the order of 10,
# and a sum's 1e-6 of that grows a little over eight steps.
_ROUNDING: Final = 1e-4
# Equal numbers are drawn here on a logarithmic axis.
_FLOOR: Final = 1e-8
# The greatest test error (%) of a network that has learned something; guessing has 90.
_LEARNED: Final = 10.0
_NETWORKS: Final = ("LSTM", "feed-forward")


def cards(results: Mapping[str, pd.DataFrame]) -> list[Card]:
    """Return the paper's claims, each with what ``training.csv`` and ``inference.csv`` hold on it."""
    inference, training = results["inference"], results["training"]
    return [
        _modes(inference),
        _batches(inference),
        _steps(inference),
        _batches_of_one(training),
    ]


def _modes(inference: pd.DataFrame) -> Card:
    trained = inference[(inference["mode"] == "training") & inference.network.isin(_NETWORKS)]
    layer, batch = trained[trained.norm == "layer"], trained[trained.norm == "batch"].dropna(subset="by_mode")
    worst = batch.nlargest(1, "by_mode").iloc[0]
    same = layer.by_mode.max(skipna=False) < _ROUNDING < worst.by_mode
    return Card(
        "Layer norm performs exactly the same computation at training and test times.",
        "abstract",
        f"The logits of the same batches of {_sizes(layer)} in training and in evaluation mode are, with "
        f"layer norm, {_same(layer.by_mode, layer.mode_bits)}; with batch norm they differ by up "
        f"to {worst.by_mode:.2g} ({worst.network}, batch {worst.batch_size}: {worst.changed:g} predictions "
        "change)",
        "agrees" if same else "differs",
    )


def _batches(inference: pd.DataFrame) -> Card:
    whole = inference[inference.steps == "whole"]
    layer = whole[(whole.norm == "layer") & (whole["mode"] == "evaluation")]
    same = {
        name: _same(rows.deviation, rows.bits)
        for name, rows in ((name, layer[layer.network == name]) for name in (*_NETWORKS, "norm alone"))
    }
    trained = whole[(whole.norm == "batch") & (whole["mode"] == "training") & whole.network.isin(_NETWORKS)]
    worst = trained.nlargest(1, "test_error").iloc[0]
    agrees = layer.deviation.max(skipna=False) < _ROUNDING < trained.deviation.max()
    return Card(
        "Layer norm does not introduce any new dependencies between training cases.",
        "§1",
        f"In batches of {_sizes(layer)} the logits of a case are {same['LSTM']} in the LSTM, and "
        f"{same['feed-forward']} in the feed-forward network, where torch.nn.Linear's products round by the "
        f"size of the batch (the outputs of its layer norm by itself: {same['norm alone']}). With batch norm "
        f"in training mode, batches of {worst.batch_size} make the test error {worst.test_error:.1f} % "
        f"({worst.network})",
        "agrees" if agrees else "differs",
    )


def _steps(inference: pd.DataFrame) -> Card:
    online = inference[(inference.network == "LSTM") & (inference.steps == "online")]
    layer, none, batch = (online[online.norm == norm] for norm in ("layer", "none", "batch"))
    told = inference[(inference.network == "LSTM") & (inference.steps == "told")]
    worst = batch.nlargest(1, "deviation").iloc[0]
    alike = layer.deviation.max(skipna=False) < _ROUNDING and told.deviation.max(skipna=False) < _ROUNDING
    return Card(
        "The normalization of a time step depends on the summed inputs of that step alone; batch norm needs "
        "statistics for each step of the sequence.",
        "§1, §3.1",
        f"Read one step at a time, in batches of {_sizes(layer)}, the logits are those of whole sequences: "
        f"{_same(layer.deviation, layer.bits)} with layer norm, {_same(none.deviation, none.bits)} without "
        f"norm. Recurrent batch norm keeps statistics for each step: a row read by itself takes those of a "
        f"first step, and the logits differ by up to {worst.deviation:.2g} ({worst.changed:g} predictions "
        f"change); told which step it is, they are {_same(told.deviation, told.bits)}",
        "agrees" if alike and worst.deviation > _ROUNDING else "differs",
    )


def _batches_of_one(training: pd.DataFrame) -> Card:
    claim = "There is no constraint on the size of a mini-batch; it can be used online, with batch size 1."
    alone = training[training.train_batch_size == 1]
    layer, batch = (alone[alone.norm == norm] for norm in ("layer", "batch"))
    if layer.empty or batch.empty:
        return Card(claim, "§1, §3", "no network was trained with batch size 1", "not run")
    errors = layer.groupby("network", sort=False).test_error.agg(lambda errors: errors.mean(skipna=False))
    listed = " and ".join(f"{error:.2f} % ({network})" for network, error in errors.items())
    cannot = bool(batch.test_error.isna().all())
    return Card(
        claim,
        "§1, §3",
        f"Trained with batch size 1, layer norm has a test error of {listed}; batch norm "
        + ("cannot be trained so" if cannot else "can be trained so too"),
        "agrees" if cannot and (errors < _LEARNED).all() else "differs",
    )


def tables(results: Mapping[str, pd.DataFrame]) -> Sequence[Table]:
    """Return the tables of both files."""
    inference, training = results["inference"], results["training"]
    everything = int(inference.batch_size.max())
    return (
        Table(
            "The same trained network in other ways: greatest difference of a logit, predictions changed",
            ("network", "norm", "way", *_headings(inference)),
            _rows(inference, _difference),
            f"Against evaluation mode with all {everything} test cases in one batch. 'same bits': no bit of "
            "an output differs. Norm alone: the first one of the feed-forward network, on the same summed "
            "inputs; differences of its outputs.",
        ),
        Table(
            "Test error of the same trained network in these ways (%)",
            ("network", "norm", "way", *_headings(inference)),
            _rows(inference[inference.network.isin(_NETWORKS)], _error),
            f"Mean over the seeds, of which there are {inference.seed.nunique()}.",
        ),
        Table(
            "Test error by the batch size of training (%)",
            ("network", "norm", *(f"batch {size}" for size in sorted(training.train_batch_size.unique()))),
            [
                [str(network), str(norm), *(_error(own) for _, own in rows.groupby("train_batch_size"))]
                for (network, norm), rows in training.groupby(["network", "norm"], sort=False)
            ],
            "The same number of epochs each, so the smallest batches have the most updates. The networks "
            "above are those of the greatest batch size.",
        ),
    )


def _headings(inference: pd.DataFrame) -> list[str]:
    return [f"batch {size}" for size in sorted(inference.batch_size.unique())]


def _rows(inference: pd.DataFrame, cell: Callable[[pd.DataFrame], str]) -> list[list[str]]:
    rows = []
    ways = ["network", "norm", "mode", "steps"]
    for (network, norm, mode, steps), own in inference.groupby(ways, sort=False):
        way = {"online": "step by step", "told": "told which step"}.get(str(steps), f"{mode} mode")
        rows.append([str(network), str(norm), way, *(cell(seeds) for _, seeds in own.groupby("batch_size"))])
    return rows


def _difference(seeds: pd.DataFrame) -> str:
    if seeds.deviation.isna().any():
        return "not possible"
    if seeds.bits.all():
        return "same bits"
    changed = seeds.changed.mean()
    return f"{seeds.deviation.max():.1e}" + (f", {changed:g} changed" if changed > 0 else "")


def _error(seeds: pd.DataFrame) -> str:
    return "not possible" if seeds.test_error.isna().any() else f"{seeds.test_error.mean():.2f}"


def charts(results: Mapping[str, pd.DataFrame]) -> Sequence[Chart]:
    """Chart deviation and test error by the batch size of inference; test error by that of training."""
    inference, training = results["inference"], results["training"]
    whole = inference[(inference.steps == "whole") & inference.norm.isin(("none", "batch", "layer"))]
    whole = whole.assign(
        line=whole.norm.where(whole["mode"] == "evaluation", whole.norm + ", training mode"),
        deviation=whole.deviation.clip(lower=_FLOOR),
    )
    # Without batch norm the mode makes no difference that could be seen.
    whole = whole[(whole["mode"] == "evaluation") | (whole.norm == "batch")]
    training = training.assign(line=training.norm)
    error = "test error (%)"
    measures = {"deviation": f"logits differ by ({_FLOOR:g}: 0)", "test_error": error}
    return (
        Chart(
            "online",
            "The same trained networks in batches of other sizes: greatest difference from all cases in one "
            "batch in evaluation mode, and test error.",
            [
                [_panel(whole, network, "batch_size", measure, label) for network in _NETWORKS]
                for measure, label in measures.items()
            ],
        ),
        Chart(
            "online-training",
            "Trained with batches of these sizes for the same number of epochs; batch norm cannot with 1.",
            [[_panel(training, network, "train_batch_size", "test_error", error) for network in _NETWORKS]],
        ),
    )


def _panel(results: pd.DataFrame, network: str, x: str, y: str, label: str) -> Panel:
    lines = []
    for name, own in results[results.network == network].groupby("line", sort=False):
        values = own.dropna(subset=[y]).groupby(x)[y].agg(["mean", "min", "max"])
        band = (values["min"].tolist(), values["max"].tolist()) if own.seed.nunique() > 1 else ((), ())
        lines.append(Line(str(name), values.index.tolist(), values["mean"].tolist(), *band))
    title = "LSTM" if network == "LSTM" else "feed-forward network"
    return Panel(title, "cases in a batch", label, lines, x_log=True, y_log=y == "deviation")


def _sizes(rows: pd.DataFrame) -> str:
    sizes = [str(size) for size in sorted(rows.batch_size.unique())]
    return f"{', '.join(sizes[:-1])} and {sizes[-1]}" if len(sizes) > 1 else sizes[0]


def _same(deviations: pd.Series, bits: pd.Series) -> str:
    return "the same to the bit" if bits.all() else f"the same up to {deviations.max(skipna=False):.1e}"
