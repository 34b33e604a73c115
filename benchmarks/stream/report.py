"""What the benchmark of single steps found: its pictures and its part of the page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.core import pages, plots
from benchmarks.core.benchmark import OURS, Outputs, plural
from benchmarks.core.table import MEASURES
from benchmarks.stream import measure as stream
from benchmarks.stream.peers import BY_HAND, CHECKED, PEERS

_NUMBERS: Final = ("batch", "hidden", "threads", *MEASURES, *stream.FIGURES, "other_cpus")
_POINT: Final = ["threads", "cell", "dtype", "batch", "hidden"]
#: What this package is compared with: the heads, and the peers of which the fastest counts.
_AGAINST: Final = {
    "torch.nn cell, un-normalized": ("torch",),
    "torch.nn sequence, un-normalized": ("torch-sequence",),
    "best by hand": BY_HAND,
    "JAX": ("jax",),
    "ONNX Runtime": ("onnxruntime",),
}
_LIMIT: Final = "share of the limit"

_METHOD: Final = """\
### How single steps are measured

- A call from Python takes one step, and its state goes on to the next call; the input stays the same. There
  are as many features in as out, and everything runs under `torch.inference_mode()`.
- `layernorm` is `step` of `stream()`, `layernorm-cell` is `LayerNormLSTMCell`, `LayerNormGRUCell` or
  `LayerNormRNNCell`. `torch` is `torch.nn.LSTMCell`, `GRUCell` or `RNNCell`, which normalizes nothing, and
  `torch-sequence` a whole `torch.nn.LSTM`, `GRU` or `RNN` that is called for one step.
- `eager` is the layer-normalized cell of `F.linear` and `F.layer_norm`, `script` that under TorchScript,
  `jax` that jitted with float32 statistics, `onnxruntime` an ONNX graph whose state stays in bound memory
  and which has no bfloat16.
- Before a peer is measured, {checked} of its steps are compared with those of `eager` in float32, for
  un-normalized ones with those of `torch`. One that is off is listed as failed.
- All peers of a point run in one process and are sampled in turn, in an order that changes from round to
  round. A sample is as many calls as take 3 ms. {rounds} Times are medians. A ratio in the tables is the
  median of those within a round; the summary has ratios of medians.
- The limit is the time that reading both weight matrices takes: their bytes over the rate of a dot product
  of vectors of that size in all.
- There is a process for each number of threads. With one thread it may run on one CPU only.
"""


def load(path: Path) -> pd.DataFrame:
    """The table, small points first.

    Raises:
        TableError: it is missing or damaged, or has no rows.
    """
    orders = {"cell": stream.CELLS, "dtype": stream.DTYPES, "peer": tuple(PEERS)}
    data = pages.load(path, stream.COLUMNS, _NUMBERS, orders)
    keys = ["threads", "cell_place", "dtype_place", "batch", "hidden", "peer_place"]
    return data.sort_values(keys, kind="stable", ignore_index=True)


def pictures(data: pd.DataFrame, outputs: Outputs) -> Iterator[tuple[Path, Figure]]:
    """A picture for each number of threads and batch, and where it goes."""
    for (threads, batch), rows in data.groupby(["threads", "batch"]):
        yield _image(outputs, threads, batch), plots.time_curves(rows, tuple(PEERS))


def _image(outputs: Outputs, threads: Any, batch: Any) -> Path:
    parts = [plural(threads, "thread").replace(" ", "-")]
    return outputs.image("stream", *parts, *([] if batch == 1 else [f"batch-{batch}"]))


def compared(data: pd.DataFrame) -> pd.DataFrame:
    """A row for each point: its keys, and this package's speed relative to each of the others'."""
    times = pages.by_peer(data, _POINT, "median_us")
    found = times[_POINT].copy()
    if OURS not in times:
        return found.assign(**dict.fromkeys((*_AGAINST, _LIMIT), float("nan")))
    for head, names in _AGAINST.items():
        peers = [name for name in names if name in times]
        found[head] = times[peers].min(axis=1) / times[OURS] if peers else float("nan")
    limits = pages.by_peer(data, _POINT, "weights_us")
    found[_LIMIT] = limits[OURS] / times[OURS] if OURS in limits else float("nan")  # too few bytes to time
    return found


def section(data: pd.DataFrame, outputs: Outputs) -> Iterator[str]:
    """The part of the page, in Markdown."""
    yield "## One step at a time\n"
    yield from (f"{line}\n" for line in pages.environments(data))
    table = compared(data)
    heads = [name for name in table if name not in _POINT]
    yield "Speed of `layernorm` relative to others': geometric means, the least of all points in brackets:\n"
    body = [
        [str(threads), str(dtype), str(len(part)), *(pages.mean_and_worst(part[head]) for head in heads)]
        for (threads, dtype), part in table.groupby(["threads", "dtype"], sort=False)
    ]
    yield pages.markdown(["threads", "dtype", "points", *map(str, heads)], "rlr" + "r" * len(heads), body)
    for (threads, batch), _ in data.groupby(["threads", "batch"]):
        image = Path(os.path.relpath(_image(outputs, threads, batch), outputs.page.parent)).as_posix()
        text = f"Time of one step with {plural(threads, 'thread')} and a batch of {batch}"
        yield f"![{text}]({image})\n"
    for threads, rows in data.groupby("threads", sort=False):
        yield f"### One step, {plural(threads, 'thread')}\n"
        yield "Times in µs; the ratio is `layernorm`'s speed over `torch`'s.\n"
        yield _points_table(rows)
    yield _METHOD.format(checked=CHECKED, rounds=pages.rounds(data))


def summary(data: pd.DataFrame) -> list[str]:
    """For each number of threads and dtype a line: means and worst points."""
    table = compared(data)
    heads = [name for name in table if name not in _POINT]
    return [
        f"{plural(threads, 'thread')}, {dtype}: speed over "
        + ", ".join(f"{head} {pages.mean_and_worst(part[head])}" for head in heads)
        for (threads, dtype), part in table.groupby(["threads", "dtype"], sort=False)
    ]


def options(data: pd.DataFrame) -> list[str]:
    """The options that measure these points again, where they are not the defaults."""
    found = pages.options(
        data,
        {
            "cell": ("cells", stream.CELLS),
            "batch": ("batches", stream.BATCHES),
            "hidden": ("hidden", stream.HIDDEN),
            "dtype": ("dtypes", stream.DTYPES),
        },
    )
    found += pages.options(data, {"peer": ("peers", tuple(PEERS))})
    return found + pages.asked_for(data, stream.ROUNDS)


def _points_table(rows: pd.DataFrame) -> str:
    peers = [peer for peer in PEERS if peer in set(rows.peer)]
    body = []
    for _, part in rows.groupby(_POINT, sort=False):
        found = {row["peer"]: row for row in part.to_dict("records")}
        ours = found[OURS]
        limit = part.weights_us.dropna()
        body.append(
            [
                *(str(ours[name]) for name in ("cell", "dtype", "batch", "hidden", "kernel")),
                *(pages.time(found[peer]) if peer in found else "–" for peer in peers),
                pages.microseconds(limit.iloc[0]) if len(limit) else "–",
                pages.ratio(ours),
            ]
        )
    heads = ["cell", "dtype", "batch", "hidden", "kernel", *peers, "weights", "ratio"]
    return pages.markdown(heads, "llrrl" + "r" * (len(peers) + 2), body)


__all__ = ["compared", "load", "options", "pictures", "section", "summary"]
