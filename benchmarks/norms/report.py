"""What the benchmark of the norm operators found: its part of the page."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import pandas as pd

from benchmarks.core import pages, plots, sections
from benchmarks.core.benchmark import BASE, OURS
from benchmarks.core.outputs import Outputs
from benchmarks.core.timing import geometric_mean
from benchmarks.norms.measure import BENCHMARK

_METHOD: Final = """\
### How the norms are measured

- `layernorm` is `layernorm.functional`'s operator, computed by the kernel in the column "kernel"; `torch`
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
  its samples, not timed, because its threads would continue spinning during the next peer's.
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


def size(data: pd.DataFrame) -> pd.Series[str]:
    """Return the sizes of the points, as tables show them."""
    return data.rows.astype(str) + "×" + data.width.astype(str)


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the geometric means of the ratios to PyTorch.

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


class Means(sections.Part):
    """The means of all peers, and the points at which others are faster than this package."""

    def markdown(self, data: pd.DataFrame, report: sections.Report, outputs: Outputs) -> Iterator[str]:
        """Yield the table and a sentence."""
        others = [peer for peer in sections.present(data, report.benchmark) if peer != BASE]
        body = []
        for row in means(data).to_dict("records"):
            cells = []
            for peer in others:
                count = row[f"{peer}_points"]
                fewer = f" ({count} points)" if count < row[f"{OURS}_points"] else ""
                cells.append(f"{row[peer]:.2f}{fewer}" if count else _status(data, peer, row))
            body.append([str(row["threads"]), str(row["mode"]), str(row[f"{OURS}_points"]), *cells])
        yield "Speed relative to PyTorch's eager operator, geometric means (above 1 is faster):\n"
        yield pages.markdown(["threads", "mode", "points", *others], "rlr" + "r" * len(others), body)
        times = pages.by_peer(data, report.benchmark.keys, "median_us")
        counts = []
        for peer in others:
            if peer != OURS and {peer, OURS} <= set(times.columns):
                both = times[[OURS, peer]].dropna()
                counts.append(f"`{peer}` at {(both[peer] < both[OURS]).sum()} of {len(both)}")
        if counts:
            yield f"Points at which another peer is faster than `{OURS}`: {', '.join(counts)}.\n"


def _status(rows: pd.DataFrame, peer: str, row: Mapping[Hashable, Any]) -> str:
    """Return why a peer has no figure in a row of the means."""
    part = rows[rows.peer == peer]
    for name in ("threads", "mode"):
        if row[name] != "all":
            part = part[part[name] == row[name]]
    return ", ".join(dict.fromkeys(part.status))


REPORT: Final = sections.Report(
    benchmark=BENCHMARK,
    title="Norm operators",
    group="operator",
    heading="### {operator}",
    # Small first; everything that has a name in its own order.
    order=("operator", "threads", "dtype", "elements", "rows", "mode"),
    derived={
        "elements": lambda data: data.rows * data.width,
        "size": size,
        "label": lambda data: data.dtype + " " + size(data),
    },
    parts=(
        sections.Environments(),
        sections.Summary(
            sections.as_given("operator", "threads", "mode"),
            (sections.Against("torch", value=sections.in_rounds),),
            "{keys}: {0} times PyTorch's speed: the geometric mean (the least)",
            text=None,
        ),
        Means(),
        sections.Slower(
            {"threads": "threads", "dtype": "dtype", "size": "rows × width", "mode": "mode"},
            "PyTorch's eager operator",
        ),
        sections.Picture(
            partial(plots.ratios, base=BASE),
            lambda row: ("norms", *(() if row["operator"] == "layer_norm" else (row["operator"],))),
            "Speed of {operator} relative to PyTorch's eager operator at every point",
        ),
        sections.Points(
            {"dtype": "dtype", "size": "rows × width", "mode": "mode", "kernel": "kernel"},
            (sections.RATIO, sections.own("of the limit", lambda ours: ours["fraction_of_limit"], "{:.2f}")),
            "Times in µs; ratio and fraction of the limit are `layernorm`'s.",
            by=("threads",),
            heading="#### {operator}, {threads}",
        ),
    ),
    method=_METHOD,
)
