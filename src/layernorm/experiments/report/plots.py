"""Charts as plain data that plotly.js draws: a figure for each panel, so that panels stand in any grid."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from layernorm.experiments.report import drawing
from layernorm.experiments.section import Chart, Line, Panel

_WIDTH: Final = 2  # of lines, in pixels
_CLEAR: Final = "rgba(0,0,0,0)"
#: What can be done with a plot; a double click waits 500 ms, as desktops do.
CONFIG: Final = {
    "responsive": True,
    "displaylogo": False,
    "displayModeBar": True,
    "doubleClickDelay": 500,
    "showTips": False,
    "modeBarButtons": [["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
}


def figures(chart: Chart) -> list[list[dict[str, Any]]]:
    """Return the figure of each panel, in rows, as ``Plotly.newPlot`` takes it.

    Each trace has the name of its line as ``meta``. The colours of everything else are in ``report.css``.

    Examples:
        >>> from layernorm.experiments.report import plots
        >>> from layernorm.experiments.section import Chart, Line, Panel
        >>> panel = Panel("MNIST", "epoch", "loss", [Line("layer", [0, 1], [3, 2])])
        >>> plots.figures(Chart("loss", "Loss.", [[panel]]))[0][0]["data"][0]["y"]
        [3.0, 2.0]
    """
    looks = drawing.looks(chart)
    return [[_figure(panel, row, looks) for panel in row] for row in chart.rows]


def dashes(look: drawing.Look, unit: str = "") -> list[str]:
    """Return the lengths of a line's dashes and gaps in pixels."""
    return [f"{length * _WIDTH:g}{unit}" for length in look.dashes]


def _figure(panel: Panel, row: Sequence[Panel], looks: dict[str, drawing.Look]) -> dict[str, Any]:
    # Values at one x are shown together if all lines have it.
    together = all(list(line.x) == list(panel.lines[0].x) for line in panel.lines)
    hover = "%{y:.5~g}" if together else "%{y:.5~g} at %{x:.6~g}"
    shared = len(row) > 1 and drawing.shares_y(row)
    lines = [line for each in (row if shared else [panel]) for line in each.lines]
    heights = [number for line in lines for number in _seen(panel.y_log, line.y, line.low, line.high)]
    x_axis = _axis(
        panel.x_label, panel.x_log, [x for line in panel.lines for x in _seen(panel.x_log, line.x)]
    )
    title = {"text": html.escape(f"{panel.x_label} ", quote=False) + "%{x}"}
    layout = {
        "xaxis": {**x_axis, "hoverformat": ".6~g", "unifiedhovertitle": title},
        "yaxis": _axis(panel.y_label, panel.y_log, heights),
        "margin": {"l": 56, "r": 12, "t": 28, "b": 44},
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "hoverlabel": {"bgcolor": "#fff"},
        "hovermode": "x unified" if together else "closest",
        "modebar": {"bgcolor": _CLEAR},
        "showlegend": False,
    }
    traces = [trace for line in panel.lines for trace in _traces(line, looks[line.name], hover)]
    return {"data": [*traces, *(_reach(panel, lines) if shared else ())], "layout": layout, "config": CONFIG}


def _traces(line: Line, look: drawing.Look, hover: str) -> Iterable[dict[str, Any]]:
    common = {"x": _numbers(line.x), "type": "scatter", "meta": line.name}
    if len(line.low):
        band = {**common, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        yield {**band, "y": _numbers(line.low)}
        yield {**band, "y": _numbers(line.high), "fill": "tonexty", "fillcolor": look.colour + "26"}
    yield {
        **common,
        "y": _numbers(line.y),
        "name": html.escape(line.name, quote=False),
        "mode": "lines+markers" if len(line.x) <= drawing.FEW else "lines",
        "line": {"color": look.colour, "width": _WIDTH, "dash": ",".join(dashes(look, "px")) or "solid"},
        "marker": {"size": 6, "color": look.colour},
        "hovertemplate": hover,
    }


def _reach(panel: Panel, lines: Sequence[Line]) -> Iterable[dict[str, Any]]:
    """Yield unseen points as high and low as each line of a row, so that its panels find one range of y."""
    across = [x for line in panel.lines for x in _seen(panel.x_log, line.x)]
    for name in dict.fromkeys(line.name for line in lines):
        of_name = [line for line in lines if line.name == name]
        heights = [y for line in of_name for y in _seen(panel.y_log, line.y, line.low, line.high)]
        if across and heights:
            ends = _numbers((min(heights), max(heights)))
            look = {"mode": "markers", "marker": {"size": 6, "opacity": 0}, "hoverinfo": "skip"}
            yield {
                "x": _numbers((min(across), max(across))),
                "y": ends,
                "type": "scatter",
                "meta": name,
                **look,
            }


def _axis(label: str, logarithmic: bool, numbers: Sequence[float]) -> dict[str, Any]:
    few = len(numbers) > 0 and max(numbers) < 150 * min(numbers)
    return {
        "title": {"text": html.escape(label, quote=False), "standoff": 8},
        "type": "log" if logarithmic else "linear",
        # So a logarithmic axis of few decades has numbers at 1, 2 and 5, and not at 6 to 9, which overlap.
        "nticks": (3 if few else 5) if logarithmic else 0,
        "tickformat": ".6~g",
        "showline": True,
        "zeroline": False,
        "automargin": True,
    }


def _seen(logarithmic: bool, *parts: Sequence[float]) -> list[float]:
    """Return the numbers that an axis can show."""
    numbers = map(float, itertools.chain(*parts))
    return [number for number in numbers if math.isfinite(number) and not (logarithmic and number <= 0)]


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Prepare numbers for JSON, which has no NaN and no infinity: those are gaps. Seven digits suffice."""
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]
