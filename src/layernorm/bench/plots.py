"""The picture of a benchmark: speed relative to PyTorch's for every point and peer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

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
_DISTANCE: Final = 0.17  # between the marks of one point, whose line is 1 high


def ratios(data: pd.DataFrame, base: str) -> Figure:
    """Dots with whiskers on a logarithmic axis; a row of panels for each number of threads.

    Args:
        data: the rows of one operator, with the columns ``label``, ``mode``, ``threads``, ``peer``,
            ``ratio_to_torch``, ``ratio_q25`` and ``ratio_q75``.
        base: the peer that is 1 everywhere.
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
            axis.set_title(f"{mode}, {count} thread{'s' if count > 1 else ''}", fontsize=10)
    _logarithmic(axes[0, 0])
    for axis in axes[-1]:
        axis.set_xlabel("times the speed of PyTorch's eager operator", fontsize=9)
    handles = [
        mpl.lines.Line2D([], [], color=colour, marker=marker, linestyle="none", label=peer)
        for peer, (colour, marker) in _looks(peers).items()
    ]
    handles.append(mpl.lines.Line2D([], [], color="#000000", linewidth=1, label="PyTorch, eager"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def _panel(axis: Axes, data: pd.DataFrame, labels: Sequence[str], peers: Sequence[str]) -> None:
    places = {label: index for index, label in enumerate(labels)}
    for index, (peer, (colour, marker)) in enumerate(_looks(peers).items()):
        rows = data[data.peer == peer]
        offset = (index - (len(peers) - 1) / 2) * _DISTANCE
        axis.errorbar(
            rows.ratio_to_torch,
            rows.label.map(places) + offset,
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


def _logarithmic(axis: Axes) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, as plain numbers."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    steps = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=steps, numticks=20))
    axis.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())


def _looks(peers: Sequence[str]) -> dict[str, tuple[str, str]]:
    free = iter(_OTHERS)
    return {peer: _LOOKS[peer] if peer in _LOOKS else next(free, _OTHERS[-1]) for peer in peers}
