"""What the benchmark of the recurrent layers found: its pictures and its part of the page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.core import pages, plots
from benchmarks.core.benchmark import OURS, Outputs, plural
from benchmarks.core.measuring import BASE
from benchmarks.core.table import MEASURES
from benchmarks.recurrent import measure as recurrent
from benchmarks.recurrent.peers import BY_HAND, ONLY_IN, PEERS

_NUMBERS: Final = (
    *("batch", "hidden", "steps", "threads"),
    *MEASURES,
    *recurrent.FIGURES,
    "other_cpus",
)
_POINT: Final = ["threads", "cell", "dtype", "mode", "batch", "hidden", "steps"]
#: What this package is compared with, and the heads of those columns.
_AGAINST: Final = {
    "torch": "torch.nn, un-normalized",
    "by hand": "best by hand",
    "jax": "JAX",
    "products": "share of the products' limit",
}
_GROUPS: Final = {"by hand": BY_HAND, "jax": ("jax",)}

_METHOD: Final = """\
### How the recurrent layers are measured

- One layer and direction over {steps} steps, as many features in as out, from a state of zeros. Inference
  runs under `torch.inference_mode()`; training is forward and backward with a given gradient of the output,
  to fresh gradients of the input and all parameters. Everything has the same dtype.
- `layernorm` is `LayerNormLSTM`, `LayerNormGRU` or `LayerNormRNN`, served by the kernel in the table;
  `layernorm-recompute` has `recompute=True`, and `layernorm-none` is the un-normalized variant. `torch` is
  `torch.nn.LSTM`, `GRU` or `RNN`, which normalizes nothing.
- By hand: `loop` is the layer-normalized cell of `F.linear` and `F.layer_norm` in a Python loop, the
  product with the input taken out of it; `script` is that under TorchScript and `compile` under
  `torch.compile`, which takes minutes for a point and is measured only where it is asked for. `jax` is the
  same cell in a jitted `lax.scan` with float32 statistics. `onnxruntime` is the cell inside ONNX's Scan,
  `onnxruntime-none` ONNX's un-normalized operator; both are for inference and have no bfloat16.
- Before a peer is measured, its output and gradients are compared with those of the loop in float32, for
  un-normalized ones with those of `torch.nn`. One that is off is listed as failed; column `difference` has
  by how much they differ.
- All peers of a point run in one process and are sampled in turn, in an order that changes from round to
  round. A sample is as many calls as take 3 ms. A peer is sampled in every round until its samples have
  taken {each} seconds, but at least {least} times. {rounds}
- Times are medians. A ratio is `torch`'s time divided by the peer's in the same round, as the median over
  the rounds both were sampled in, with its quartiles in brackets: above 1 is faster than un-normalized
  PyTorch. In the summary, ratios to other peers than `torch` are those of medians, and the least of all
  points is in brackets.
- The limit is the bare matrix products of the same sizes with `torch.mm`, into memory that is there: one of
  all steps' inputs and one for each step; in training those of the gradients too. The share is the limit
  divided by `layernorm`'s time; it can be above 1, because `torch.mm` is not the fastest there is for every
  size. With a batch of 1 the table has the time too that reading the recurrent weights once a step takes:
  their bytes over the rate of a dot product of vectors of that size in all.
- Memory is what a forward pass in training leaves allocated beside its results, as PyTorch's profiler
  counts it.
- Where not named otherwise, GRU and RNN are measured with batches {others} and sizes {sizes} only. Points
  whose products are more than {large:g} GFLOP have all threads and {large_peers} only, and those of more
  than {largest:g} are left out.
- There is a process for each number of threads. With one thread it may run on one CPU only, so that no
  library has more.
"""


def load(path: Path) -> pd.DataFrame:
    """The table, small points first.

    Raises:
        TableError: it is missing or damaged, or has no rows.
    """
    orders = {
        "cell": recurrent.CELLS,
        "dtype": recurrent.DTYPES,
        "mode": recurrent.MODES,
        "peer": tuple(PEERS),
    }
    data = pages.load(path, recurrent.COLUMNS, _NUMBERS, orders)
    keys = ["threads", "cell_place", "dtype_place", "mode_place", "batch", "hidden", "steps", "peer_place"]
    return data.sort_values(keys, kind="stable", ignore_index=True)


def pictures(data: pd.DataFrame, outputs: Outputs) -> Iterator[tuple[Path, Figure]]:
    """A picture for each number of threads, and where it goes."""
    ours = data[(data.peer == OURS) & data.ratio_to_torch.notna()]
    for threads, rows in ours.groupby("threads"):
        yield _image(outputs, threads), plots.ratio_curves(rows)


def _image(outputs: Outputs, threads: Any) -> Path:
    return outputs.image("recurrent", plural(threads, "thread").replace(" ", "-"))


def compared(data: pd.DataFrame, groups: Mapping[str, Sequence[str]] = _GROUPS) -> pd.DataFrame:
    """A row for each point: its keys, and what this package's speed is relative to that of each in turn.

    The columns are ``torch``, then the names of the groups, each standing for the fastest of its peers, and
    ``products``, which is the share of the limit. NaN is what was not measured.
    """
    times, ratios, over = (
        pages.by_peer(data, _POINT, name) for name in ("median_us", "ratio_to_torch", "over_products")
    )
    found = times[_POINT].copy()
    if OURS not in times:
        return found.assign(**dict.fromkeys((BASE, *groups, "products"), float("nan")))
    # Where the table has ratios of the same rounds these are taken.
    found[BASE] = ratios[OURS]
    for name, peers in groups.items():
        known = [peer for peer in peers if peer in times]
        found[name] = times[known].min(axis=1) / times[OURS] if known else float("nan")
    found["products"] = 1 / over[OURS]
    return found


def section(data: pd.DataFrame, outputs: Outputs) -> Iterator[str]:
    """The part of the page, in Markdown."""
    yield "## Recurrent networks\n"
    yield from (f"{line}\n" for line in pages.environments(data))
    table = compared(data)
    yield "Speed of `layernorm` relative to others': geometric means, the least of all points in brackets:\n"
    yield _summary_table(table)
    yield from slower(data, ["threads", "cell", "dtype", "mode", "batch", "hidden"])
    for threads in sorted(data.threads.unique()):
        if _is_drawn(data, threads):
            image = Path(os.path.relpath(_image(outputs, threads), outputs.page.parent)).as_posix()
            text = f"Speed relative to torch.nn's un-normalized layers with {plural(threads, 'thread')}"
            yield f"![{text}]({image})\n"
    heads = (
        "### Memory of a training step",
        "MB that the forward pass keeps for backward, beside its results:",
    )
    yield from memory(data, "saved_bytes", tuple(PEERS), heads)
    for (threads, cell), rows in data.groupby(["threads", "cell"], sort=False):
        yield f"### {str(cell).upper()}, {plural(threads, 'thread')}\n"
        yield "Times in µs; the ratio is `layernorm`'s speed over `torch`'s.\n"
        yield _points_table(rows)
    yield _METHOD.format(
        steps=pages.joined(data.steps),
        each=recurrent.EACH,
        least=recurrent.LEAST_ROUNDS,
        rounds=pages.rounds(data),
        others=" and ".join(map(str, recurrent.OTHER_BATCHES)),
        sizes=" and ".join(map(str, recurrent.OTHER_HIDDEN)),
        large=recurrent.LARGE,
        largest=recurrent.LARGEST,
        large_peers=" and ".join(f"`{name}`" for name in recurrent.LARGE_PEERS),
    )


def summary(data: pd.DataFrame) -> list[str]:
    """For each number of threads, mode and dtype a line: means and worst points."""
    lines = []
    for (threads, mode, dtype), part in compared(data).groupby(["threads", "mode", "dtype"], sort=False):
        found = [f"{head} {pages.mean_and_worst(part[name])}" for name, head in _AGAINST.items()]
        worst = ""
        if part[BASE].notna().any():
            row = part.sort_values(BASE).iloc[0]
            worst = f"; slowest beside torch.nn: {row.cell} batch {row.batch} hidden {row.hidden}"
        lines.append(f"{plural(threads, 'thread')}, {mode}, {dtype}: speed over {', '.join(found)}{worst}")
    return lines


def options(data: pd.DataFrame) -> list[str]:
    """The options that measure these points again, where they are not the defaults."""
    found = pages.options(
        data,
        {
            "cell": ("cells", recurrent.CELLS),
            "batch": ("batches", recurrent.BATCHES),
            "hidden": ("hidden", recurrent.HIDDEN),
            "steps": ("steps", (recurrent.STEPS,)),
            "dtype": ("dtypes", recurrent.DTYPES),
            "mode": ("modes", recurrent.MODES),
        },
    )
    # A peer of one mode may have no rows only because there is none of that mode.
    possible = [name for name in PEERS if ONLY_IN.get(name, data["mode"][0]) in set(data["mode"])]
    defaults = [name for name in possible if name in recurrent.RECURRENT.default_peers]
    found += pages.options(data, {"peer": ("peers", defaults)})
    return found + pages.asked_for(data, recurrent.ROUNDS)


def _summary_table(table: pd.DataFrame) -> str:
    groups = [(list(key), part) for key, part in table.groupby(["threads", "mode", "dtype"], sort=False)]
    groups += [(["all", "all", cell], part) for cell, part in table.groupby("cell", sort=False)]
    body = [
        [*map(str, key), str(len(part)), *(pages.mean_and_worst(part[name]) for name in _AGAINST)]
        for key, part in groups
    ]
    return pages.markdown(["threads", "mode", "points of", "points", *_AGAINST.values()], "rllrrrrr", body)


def slower(data: pd.DataFrame, columns: Sequence[str]) -> Iterator[str]:
    """Names the points at which the un-normalized layer is faster, by these columns."""
    ours = data[(data.peer == OURS) & data.ratio_to_torch.notna()]
    slow = ours[ours.ratio_to_torch < 1].sort_values("ratio_to_torch", kind="stable")
    if slow.empty:
        yield f"`{OURS}` is at no point of {len(ours)} slower than `torch.nn`'s un-normalized layer.\n"
        return
    yield (
        f"`{OURS}` is slower than `torch.nn`'s un-normalized layer at {len(slow)} of {len(ours)} points, at "
        f"{'these' if len(slow) > 1 else 'this'} most:\n"
    )
    body = [
        [*(str(row[name]) for name in columns), pages.ratio(row)] for row in slow.head(10).to_dict("records")
    ]
    numbers = ("threads", "batch", "hidden")
    align = "".join("r" if name in numbers else "l" for name in columns)
    yield pages.markdown([*columns, "ratio"], f"{align}r", body)


def memory(data: pd.DataFrame, column: str, names: Sequence[str], heads: Sequence[str]) -> Iterator[str]:
    """What training takes, in MB.

    Args:
        data: the rows of the table.
        column: the one with bytes.
        names: of peers, in their order.
        heads: the title and what stands before the table.
    """
    rows = data[data[column].notna()]
    if rows.empty:
        return
    peers = [peer for peer in names if peer in set(rows.peer)]
    keys = ["cell", "dtype", "batch", "hidden"]
    table = pages.by_peer(rows, keys, column)
    yield from (f"{head}\n" for head in heads)
    body = [
        [*(str(row[name]) for name in keys), *(_megabytes(row[peer]) for peer in peers)]
        for row in table.to_dict("records")
    ]
    yield pages.markdown([*keys, *peers], "llrr" + "r" * len(peers), body)


def _megabytes(value: float) -> str:
    return "–" if pd.isna(value) else f"{value / 1e6:,.0f}" if value >= 1e8 else f"{value / 1e6:.3g}"


def _points_table(rows: pd.DataFrame) -> str:
    peers = [peer for peer in PEERS if peer in set(rows.peer)]
    body = []
    for _, part in rows.groupby(_POINT, sort=False):
        found = {row["peer"]: row for row in part.to_dict("records")}
        ours = found.get(OURS, found[next(iter(found))])
        body.append(
            [
                *(str(ours[name]) for name in ("dtype", "mode", "batch", "hidden", "kernel")),
                *(pages.time(found[peer]) if peer in found else "–" for peer in peers),
                *(known(part[name]) for name in ("products_us", "weights_us")),
                pages.ratio(ours),
            ]
        )
    heads: Sequence[str] = ["dtype", "mode", "batch", "hidden", "kernel", *peers]
    heads = [*heads, "products", "weights", "ratio"]
    return pages.markdown(heads, "llrrl" + "r" * (len(peers) + 3), body)


def known(column: pd.Series[float]) -> str:
    """The one figure that all peers of a point share."""
    values = column.dropna()
    return pages.microseconds(values.iloc[0]) if len(values) else "–"


def _is_drawn(data: pd.DataFrame, threads: Any) -> bool:
    return bool(data[(data.peer == OURS) & (data.threads == threads)].ratio_to_torch.notna().any())


__all__ = ["compared", "known", "load", "memory", "options", "pictures", "section", "slower", "summary"]
