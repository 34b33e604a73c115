"""What the benchmark of the norm operators found: its pictures and its part of the page."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.core import pages, plots
from benchmarks.core.benchmark import OURS, Outputs, plural
from benchmarks.core.measuring import BASE
from benchmarks.core.table import MEASURES
from benchmarks.core.timing import geometric_mean
from benchmarks.norms import measure as norms
from benchmarks.norms.peers import PEERS
from layernorm import backends

_NUMBERS: Final = ("rows", "width", "threads", *MEASURES, *norms.LIMITS)
_POINT: Final = ["threads", "dtype", "rows", "width", "mode"]

_METHOD: Final = """\
### How the norms are measured

- `layernorm` is `layernorm.functional`'s operator, served by the kernel in the column "kernel"; `torch`
  is PyTorch's own, called eagerly, and `torch.compile` the same compiled by Inductor for the one shape.
  `jax` is the formula under `jax.jit` with float32 statistics and the variance as E[x²] − E[x]², as in
  Flax; `onnxruntime` is the ONNX operator with bound inputs, forward only. Operators that add a residual
  are an addition and a norm where the peer has no operator for both.
- Forward runs without gradients and returns a fresh output. Training is forward and backward with a given
  gradient; gradients of the input, the weight and the bias are fresh tensors too. Weight and bias have
  the input's dtype.
- All peers of a point run in one process: a sample is as many calls as take 3 ms (at least one), and each
  round samples every peer once, in an order that changes from round to round. One call that is not timed
  comes before each sample where calls take less than 30 ms. ONNX Runtime's session is made anew for each of
  its samples, not timed, because its threads would go on spinning during the next peer's.
- {rounds}
- Times are medians over the rounds. A ratio is `torch`'s time divided by the peer's in the same round, as
  the median over the rounds with its quartiles in brackets: above 1 is faster than PyTorch.
- The limit is the time that copying takes for as many bytes as must be read and written at least: for
  `layer_norm` and `rms_norm` those of two tensors of the input's size forward and five in training, with
  a residual four and nine. The copy is `x.clone()`, which reads one and writes one, allocates its result
  as the operators do and is sampled in the same rounds. The last column is the limit divided by
  `layernorm`'s time. With small inputs the overhead of a call decides both; it can be above 1 where an
  operator's result lies in larger pages than a copy's.
- There is a process for each number of threads. With one thread it may run on one CPU only, so that no
  library has more.
- Before a peer is measured, its results are compared with PyTorch's in float32. One that is off is listed
  as failed.
"""


def load(path: Path) -> pd.DataFrame:
    """The table, with a column ``label`` that names a point's dtype and size.

    Raises:
        TableError: it is missing or damaged, or has no rows.
    """
    # Small first; everything that has a name in its own order.
    orders = {"operator": backends.NORMS, "dtype": norms.DTYPES, "mode": norms.MODES, "peer": tuple(PEERS)}
    data = pages.load(path, norms.COLUMNS, _NUMBERS, orders)
    data["label"] = data.dtype + " " + _size(data.rows, data.width)
    data = data.assign(elements=data.rows * data.width)
    keys = ["operator_place", "threads", "dtype_place", "elements", "rows", "mode_place", "peer_place"]
    return data.sort_values(keys, kind="stable", ignore_index=True)


def pictures(data: pd.DataFrame, outputs: Outputs) -> Iterator[tuple[Path, Figure]]:
    """A picture for each operator, and where it goes."""
    for operator, rows in data.groupby("operator", sort=False):
        yield _image(outputs, str(operator)), plots.ratios(rows, BASE)


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """The geometric means of the ratios to PyTorch.

    Args:
        rows: of one operator.

    Returns:
        One row for each number of threads and mode, then for each number of threads, then for all; the
        columns ``threads`` and ``mode``, which are "all" where they are not told apart, and for each peer
        one with the mean and one with the suffix ``_points``.
    """
    groups = [((threads, mode), part) for (threads, mode), part in rows.groupby(["threads", "mode"])]
    groups += [((threads, "all"), part) for threads, part in rows.groupby("threads")]
    if rows.threads.nunique() > 1:
        groups.append((("all", "all"), rows))
    table = []
    for (threads, mode), part in groups:
        row: dict[Hashable, Any] = {"threads": threads, "mode": mode}
        for peer, ratios in part.groupby("peer").ratio_to_torch:
            found = ratios.dropna()
            row[str(peer)], row[f"{peer}_points"] = geometric_mean(found), len(found)
        table.append(row)
    return pd.DataFrame(table)


def section(data: pd.DataFrame, outputs: Outputs) -> Iterator[str]:
    """The part of the page, in Markdown."""
    yield "## Norm operators\n"
    for operator, rows in data.groupby("operator", sort=False):
        yield from _section(str(operator), rows, outputs)
    yield _METHOD.format(rounds=pages.rounds(data))


def summary(data: pd.DataFrame) -> list[str]:
    """The means of this package's ratios in a line for each operator, number of threads and mode."""
    ours = data[data.peer == OURS].groupby(["operator", "threads", "mode"], sort=False)
    return [
        f"{operator}, {plural(threads, 'thread')}, {mode}: "
        f"{pages.mean_and_worst(part.ratio_to_torch)} times PyTorch's speed: the geometric mean (the least)"
        for (operator, threads, mode), part in ours
    ]


def _image(outputs: Outputs, operator: str) -> Path:
    return outputs.image("norms", *(() if operator == "layer_norm" else (operator,)))


def _section(operator: str, rows: pd.DataFrame, outputs: Outputs) -> Iterator[str]:
    peers = [peer for peer in PEERS if peer in set(rows.peer)]
    image = Path(os.path.relpath(_image(outputs, operator), outputs.page.parent)).as_posix()
    yield f"### {operator}\n"
    yield from (f"{line}\n" for line in pages.environments(rows))
    yield "Speed relative to PyTorch's eager operator, geometric means (above 1 is faster):\n"
    yield _means_table(rows, peers)
    yield from _slower(rows)
    yield from _overtaken(rows, peers)
    yield f"![Speed of {operator} relative to PyTorch's eager operator at every point]({image})\n"
    for threads in sorted(rows.threads.unique()):
        yield f"#### {operator}, {plural(threads, 'thread')}\n"
        yield "Times in µs; ratio and fraction of the limit are `layernorm`'s.\n"
        yield _points_table(rows[rows.threads == threads], peers)


def _means_table(rows: pd.DataFrame, peers: Sequence[str]) -> str:
    others = [peer for peer in peers if peer != BASE]
    table = means(rows)
    body = []
    for row in table.to_dict("records"):
        cells = []
        for peer in others:
            count = row[f"{peer}_points"]
            fewer = f" ({count} points)" if count < row[f"{OURS}_points"] else ""
            cells.append(f"{row[peer]:.2f}{fewer}" if count else _status(rows, peer, row))
        body.append([str(row["threads"]), str(row["mode"]), str(row[f"{OURS}_points"]), *cells])
    return pages.markdown(["threads", "mode", "points", *others], "rlr" + "r" * len(others), body)


def _status(rows: pd.DataFrame, peer: str, row: Mapping[Hashable, Any]) -> str:
    """Why a peer has no figure in a row of the means."""
    part = rows[rows.peer == peer]
    for name in ("threads", "mode"):
        if row[name] != "all":
            part = part[part[name] == row[name]]
    return ", ".join(dict.fromkeys(part.status))


def _slower(rows: pd.DataFrame) -> Iterator[str]:
    """Names the points at which PyTorch is faster."""
    ours = rows[(rows.peer == OURS) & rows.ratio_to_torch.notna()]
    slow = ours[ours.ratio_to_torch < 1].sort_values("ratio_to_torch", kind="stable")
    if slow.empty:
        yield f"`{OURS}` is at no point of {len(ours)} slower than PyTorch's eager operator.\n"
        return
    yield (
        f"`{OURS}` is slower than PyTorch's eager operator at {len(slow)} of {len(ours)} points, here from "
        "the slowest on; where the quartiles reach 1 the two may be equal:\n"
    )
    body = [
        [str(row["threads"]), row["dtype"], _size(row["rows"], row["width"]), row["mode"], pages.ratio(row)]
        for row in slow.to_dict("records")
    ]
    yield pages.markdown(["threads", "dtype", "rows × width", "mode", "ratio"], "rlrlr", body)


def _overtaken(rows: pd.DataFrame, peers: Sequence[str]) -> Iterator[str]:
    """Counts the points at which other peers are faster than this package."""
    times = rows.pivot_table(index=_POINT, columns="peer", values="median_us")
    counts = []
    for peer in peers:
        if peer not in (OURS, BASE) and {peer, OURS} <= set(times.columns):
            both = times[[OURS, peer]].dropna()
            counts.append(f"`{peer}` at {(both[peer] < both[OURS]).sum()} of {len(both)}")
    if counts:
        yield f"Points at which another peer is faster than `{OURS}`: {', '.join(counts)}.\n"


def _points_table(rows: pd.DataFrame, peers: Sequence[str]) -> str:
    body = []
    for _, part in rows.groupby(_POINT, sort=False):
        by_peer = {row["peer"]: row for row in part.to_dict("records")}
        ours = by_peer[OURS]
        times = [pages.time(by_peer[peer]) if peer in by_peer else "–" for peer in peers]
        known = not pd.isna(ours["ratio_to_torch"])
        body.append(
            [
                ours["dtype"],
                _size(ours["rows"], ours["width"]),
                ours["mode"],
                ours["kernel"],
                *times,
                pages.ratio(ours),
                f"{ours['fraction_of_limit']:.2f}" if known else "–",
            ]
        )
    heads = ["dtype", "rows × width", "mode", "kernel", *peers, "ratio", "of the limit"]
    return pages.markdown(heads, "lrll" + "r" * (len(peers) + 2), body)


def options(data: pd.DataFrame) -> list[str]:
    """The options that measure these points again, where they are not the defaults."""
    sizes = dict.fromkeys(zip(data.rows, data.width, strict=True))
    found = pages.options(
        data, {"operator": ("operator", ("layer_norm",)), "dtype": ("dtypes", norms.DEFAULT_DTYPES)}
    )
    if set(sizes) != set(norms.DEFAULTS.sizes):
        found.append("--sizes " + ",".join(f"{rows}x{width}" for rows, width in sizes))
    found += pages.options(data, {"mode": ("modes", norms.MODES)})
    found += pages.options(data, {"peer": ("peers", tuple(PEERS))})
    return found + pages.asked_for(data, norms.DEFAULTS.rounds)


def _size(rows: Any, width: Any) -> Any:
    if isinstance(rows, pd.Series):
        return rows.astype(str) + "×" + width.astype(str)
    return f"{rows}×{width}"


__all__ = ["load", "means", "options", "pictures", "section", "summary"]
