"""The pictures of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, pairwise
from typing import Any, Final

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart in every kind of colour vision; marks repeat the distinction.
_LOOKS: Final = {
    "layernorm": ("#0072B2", "o"),
    "torch.compile": ("#D55E00", "s"),
    "jax": ("#009E73", "^"),
    "onnxruntime": ("#CC79A7", "D"),
}
_OTHERS: Final = (("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"))
#: Colours and marks of curves, in the order of what they stand for.
_CURVES: Final = (
    ("#0072B2", "o"),
    ("#56B4E9", "P"),
    ("#000000", "s"),
    ("#999999", "v"),
    ("#E69F00", "X"),
    ("#D55E00", "<"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
)
#: Ticks of a logarithmic axis, times the powers of ten, by the least ratio of its ends.
_STEPS: Final = {
    300: (1.0,),
    5: (1.0, 2.0, 5.0),
    2: (1.0, 1.4, 2.0, 3.0, 5.0, 7.0),
    0: (1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0),
}
_DISTANCE: Final = 0.17  # between the marks of one point, whose line is 1 high


def ratios(
    data: pd.DataFrame, base: str, *, by_threads: bool = True, of: str = "PyTorch's eager operator"
) -> Figure:
    """Draw dots with whiskers on a logarithmic axis; a row of panels for each number of threads.

    Args:
        data: the rows of one operator, with the columns ``label``, ``mode``, ``threads``, ``peer``,
            ``ratio_to_torch``, ``ratio_q25`` and ``ratio_q75``.
        base: the peer that is 1 everywhere.
        by_threads: whether titles tell the number of threads.
        of: what that peer is.
    """
    labels = list(dict.fromkeys(data.label))
    modes, threads = list(dict.fromkeys(data["mode"])), sorted(data.threads.unique())
    # A peer without a single figure has no place here; the tables name it.
    measured = data[data.ratio_to_torch.notna() & (data.peer != base)]
    peers = list(dict.fromkeys(measured.peer))
    size = (1.6 + 4.2 * len(modes), 1.5 + (0.55 + 0.34 * len(labels)) * len(threads))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(threads), len(modes), squeeze=False, sharex=True, sharey=True)
    for row, count in enumerate(threads):
        for column, mode in enumerate(modes):
            axis = axes[row, column]
            _panel(axis, measured[(measured.threads == count) & (measured["mode"] == mode)], labels, peers)
            threaded = f", {count} thread{'s' if count > 1 else ''}" if by_threads else ""
            axis.set_title(f"{mode}{threaded}", fontsize=10)
    _logarithmic(axes[0, 0])
    for axis in axes[-1]:
        axis.set_xlabel(f"times the speed of {of}", fontsize=9)
    handles = [
        mpl.lines.Line2D([], [], color=colour, marker=marker, linestyle="none", label=peer)
        for peer, (colour, marker) in _looks(peers).items()
    ]
    handles.append(mpl.lines.Line2D([], [], color="#000000", linewidth=1, label=of))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def _panel(axis: Axes, data: pd.DataFrame, labels: Sequence[str], peers: Sequence[str]) -> None:
    places = {label: index for index, label in enumerate(labels)}
    for index, (peer, (colour, marker)) in enumerate(_looks(peers).items()):
        rows = data[data.peer == peer]
        offset = (index - (len(peers) - 1) / 2) * _DISTANCE
        axis.errorbar(
            rows.ratio_to_torch,
            [places[label] + offset for label in rows.label],
            xerr=[rows.ratio_to_torch - rows.ratio_q25, rows.ratio_q75 - rows.ratio_to_torch],
            color=colour,
            marker=marker,
            markersize=5 if index == 0 else 3.6,
            linestyle="none",
            elinewidth=1,
            zorder=4 if index == 0 else 3,
        )
    for place in places.values():
        if place % 2:
            axis.axhspan(place - 0.5, place + 0.5, color="#000000", alpha=0.04, linewidth=0)
    axis.axvline(1, color="#000000", linewidth=1, zorder=2)
    axis.set_yticks(list(places.values()), labels, fontsize=9)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _logarithmic(axis: Axes, which: str = "x") -> None:
    """Put ticks at 1, 2 and 5 times the powers of ten, more or fewer by the range, as plain numbers."""
    axis.set(**{f"{which}scale": "log"})
    low, high = axis.get_xlim() if which == "x" else axis.get_ylim()
    line = axis.xaxis if which == "x" else axis.yaxis
    steps = next(steps for least, steps in _STEPS.items() if high / low >= least)
    line.set_major_locator(mpl.ticker.LogLocator(subs=steps, numticks=20))
    line.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    line.set_minor_locator(mpl.ticker.NullLocator())


def _looks(peers: Sequence[str]) -> dict[str, tuple[str, str]]:
    free = iter(_OTHERS)
    return {peer: _LOOKS[peer] if peer in _LOOKS else next(free, _OTHERS[-1]) for peer in peers}


def ratio_curves(data: pd.DataFrame, of: str = "torch.nn") -> Figure:
    """Draw ratios over the hidden size, a line for each batch; a panel for each cell, mode and dtype.

    Args:
        data: this package's rows of one number of threads, with the columns ``cell``, ``mode``, ``dtype``,
            ``batch``, ``hidden``, ``ratio_to_torch``, ``ratio_q25`` and ``ratio_q75``.
        of: what the ratios are to.
    """
    cells = list(dict.fromkeys(data.cell))
    kinds = list(dict.fromkeys(zip(data["mode"], data.dtype, strict=True)))
    batches = sorted(data.batch.unique())
    size = (1.4 + 2.5 * len(kinds), 1.0 + 2.1 * len(cells))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(cells), len(kinds), squeeze=False, sharex=True, sharey=True)
    for row, cell in enumerate(cells):
        for column, (mode, dtype) in enumerate(kinds):
            axis = axes[row, column]
            part = data[(data.cell == cell) & (data["mode"] == mode) & (data.dtype == dtype)]
            for batch, (colour, marker) in zip(batches, cycle(_CURVES), strict=False):
                rows = part[part.batch == batch]
                spread = [rows.ratio_to_torch - rows.ratio_q25, rows.ratio_q75 - rows.ratio_to_torch]
                axis.errorbar(
                    rows.hidden, rows.ratio_to_torch, yerr=spread, color=colour, marker=marker, markersize=4
                )
            axis.axhline(1, color="#000000", linewidth=1, zorder=2)
            axis.set_title(f"{cell.upper()}, {mode}, {dtype}", fontsize=9)
    _over_sizes(axes, sorted(data.hidden.unique()), f"times the speed of {of}")
    handles = [
        mpl.lines.Line2D([], [], color=colour, marker=marker, label=f"batch {batch}")
        for batch, (colour, marker) in zip(batches, cycle(_CURVES), strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def time_curves(data: pd.DataFrame, peers: Sequence[str]) -> Figure:
    """Draw microseconds over the hidden size, a line for each peer and one for the limit; both logarithmic.

    Args:
        data: the rows of one number of threads and batch, with the columns ``cell``, ``dtype``, ``hidden``,
            ``peer``, ``median_us`` and ``weights_us``.
        peers: all there are, in their order.
    """
    cells, dtypes = (list(dict.fromkeys(data[name])) for name in ("cell", "dtype"))
    measured = data[data.median_us.notna()]
    shown = [peer for peer in peers if peer in set(measured.peer)]
    looks = dict(zip(peers, _CURVES, strict=False))
    figure = Figure(figsize=(1.6 + 3.0 * len(cells), 1.2 + 2.5 * len(dtypes)), layout="constrained")
    axes = figure.subplots(len(dtypes), len(cells), squeeze=False, sharex=True, sharey=True)
    for row, dtype in enumerate(dtypes):
        for column, cell in enumerate(cells):
            axis = axes[row, column]
            part = measured[(measured.cell == cell) & (measured.dtype == dtype)]
            for peer in shown:
                rows, (colour, marker) = part[part.peer == peer], looks[peer]
                axis.plot(rows.hidden, rows.median_us, color=colour, marker=marker, markersize=4)
            limit = part[part.weights_us > 0].drop_duplicates("hidden")
            axis.plot(limit.hidden, limit.weights_us, color="#000000", linestyle="--", linewidth=1)
            axis.set_title(f"{cell.upper()}, {dtype}", fontsize=9)
    _over_sizes(axes, sorted(data.hidden.unique()), "µs a step")
    handles = [
        mpl.lines.Line2D([], [], color=looks[peer][0], marker=looks[peer][1], label=peer) for peer in shown
    ]
    limit_line = mpl.lines.Line2D([], [], color="#000000", linestyle="--", label="reading the weights")
    figure.legend(handles=[*handles, limit_line], loc="outside right center", frameon=False, fontsize=9)
    return figure


def _over_sizes(axes: Any, sizes: Sequence[int], text: str) -> None:
    """Make both axes logarithmic, with a tick for each size."""
    axes[0, 0].set_xscale("log")
    axes[0, 0].xaxis.set_minor_locator(mpl.ticker.NullLocator())
    near = any(b < 1.4 * a for a, b in pairwise(sizes))
    axes[0, 0].set_xticks(sizes, [str(size) for size in sizes])
    _logarithmic(axes[0, 0], "y")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="x", rotation=45 if near else 0)
    for axis in axes[-1]:
        axis.set_xlabel("hidden size", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel(text, fontsize=9)
