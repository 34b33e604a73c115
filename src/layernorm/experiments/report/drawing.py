"""Charts as still pictures, and the looks that the interactive ones share with them.

The name of a line gives its looks: a norm has the same colour and dashes in every chart of every experiment.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from layernorm.experiments.section import Chart, Line, Panel
from layernorm.experiments.storage import files

#: A line of so few points shows each of them.
FEW: Final = 20

# Okabe and Ito's palette, told apart in every kind of colour vision; dashes repeat the distinction.
_COLOURS: Final = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: Final = ((3.7, 1.6), (6.4, 1.6, 1, 1.6), (), (4, 1, 1, 1, 1, 1), (1, 1.65), (6, 2), (9, 2, 3, 2))
_PLACES: Final = {"none": 0, "batch": 1, "layer": 2, "rms": 3, "weight": 4}


class Look(NamedTuple):
    """The style of a line.

    Attributes:
        colour: as #RRGGBB.
        dashes: lengths of dash, gap, dash, ... in widths of the line; empty for a solid line.
    """

    colour: str
    dashes: tuple[float, ...]


def looks(chart: Chart) -> dict[str, Look]:
    """Return the looks of a chart's lines by name, in the order in which the names first appear.

    Norms have their own; other names take those that no norm of the chart has, in order.

    Examples:
        >>> from layernorm.experiments.report.drawing import looks
        >>> from layernorm.experiments.section import Chart, Line, Panel
        >>> lines = [Line("layer", [0, 1], [3, 2]), Line("paper's", [0, 1], [3, 1])]
        >>> looks(Chart("loss", "Loss.", [[Panel("MNIST", "epoch", "loss", lines)]]))["layer"]
        Look(colour='#0072B2', dashes=())
    """
    names = dict.fromkeys(line.name for row in chart.rows for panel in row for line in panel.lines)
    taken = {_PLACES.get(name) for name in names}
    free = (place for place in itertools.count() if place not in taken)
    return {name: _look(_PLACES[name] if name in _PLACES else next(free)) for name in names}


def _look(place: int) -> Look:
    """Return each colour with its own dashes first, then with the others'."""
    turn, colour = divmod(place, len(_COLOURS))
    return Look(_COLOURS[colour], _DASHES[(colour + turn) % len(_DASHES)])


def shares_y(row: Sequence[Panel]) -> bool:
    """Return whether the panels of a row measure the same on the same scale, and so have one y axis."""
    return len({(panel.y_label, panel.y_log) for panel in row}) == 1


def check(chart: Chart) -> None:
    """Check that a chart can be drawn.

    Raises:
        ValueError: it has no panel, or a line's points are not as many on both axes.
    """
    if not any(chart.rows):
        raise ValueError(f"chart {chart.name!r}: rows: expected at least one panel, got none")
    for panel in itertools.chain.from_iterable(chart.rows):
        for line in panel.lines:
            counts = {name: len(getattr(line, name)) for name in ("x", "y", "low", "high")}
            points = counts["x"]
            if counts["y"] != points or (counts["low"], counts["high"]) not in ((0, 0), (points, points)):
                got = ", ".join(f"{count} in {name}" for name, count in counts.items())
                raise ValueError(
                    f"chart {chart.name!r}, panel {panel.title!r}, line {line.name!r}: expected as many "
                    f"values in x and y, and in low and high as many or none, got {got}"
                )


def figure(chart: Chart) -> Figure:
    """Draw a chart as a picture: its panels, and one legend below them.

    Panels of a row with the same label and scale share the y axis. Bands are drawn around the lines.

    Raises:
        ValueError: the chart has no panel, or a line's points are not as many on both axes.

    Examples:
        >>> from layernorm.experiments.report import drawing
        >>> from layernorm.experiments.section import Chart, Line, Panel
        >>> panel = Panel("batch size 4", "epoch", "test error (%)", [Line("layer", [1, 2], [3.5, 2.4])])
        >>> [axes.get_title() for axes in drawing.figure(Chart("error", "Error.", [[panel]])).axes]
        ['batch size 4']
    """
    check(chart)
    appearance = looks(chart)
    rows = [list(row) for row in chart.rows]
    columns = max(map(len, rows))
    width = 4.6 if columns <= 2 else 3.6  # so that text can still be read where the picture fits a page
    drawn = Figure(figsize=(width * columns + 0.6, 3.1 * len(rows) + 0.5), layout="constrained")
    axes = drawn.subplots(len(rows), columns, squeeze=False)
    for row, places in zip(rows, axes, strict=True):
        for place in places[len(row) :]:
            place.set_axis_off()
        for panel, place in zip(row, places, strict=False):
            if place is not places[0] and shares_y(row):
                place.sharey(places[0])
            _draw(panel, place, appearance)
    handles = {
        label: handle
        for place in axes.flat
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    if handles:
        # An entry is a line and its text, about 0.08 inch a letter.
        fitting = int(drawn.get_figwidth() / (0.6 + 0.08 * max(map(len, handles))))
        drawn.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=max(1, min(len(handles), fitting)),
            frameon=False,
        )
    return drawn


def _draw(panel: Panel, axes: Axes, appearance: dict[str, Look]) -> None:
    for line in panel.lines:
        _draw_line(line, axes, appearance[line.name])
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for logarithmic, axis, scale in (
        (panel.x_log, axes.xaxis, axes.set_xscale),
        (panel.y_log, axes.yaxis, axes.set_yscale),
    ):
        if logarithmic:
            scale("log")
            low, high = axis.get_view_interval()
            # Of less than two decades the powers of ten alone would be too few.
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def _draw_line(line: Line, axes: Axes, look: Look) -> None:
    axes.plot(
        line.x,
        line.y,
        color=look.colour,
        linestyle=(0, look.dashes) if look.dashes else "-",
        marker="o" if len(line.x) <= FEW else "",
        markersize=3.5,
        label=line.name,
    )
    if len(line.low):
        axes.fill_between(line.x, line.low, line.high, color=look.colour, alpha=0.12, linewidth=0)


def svg(chart: Chart) -> str:
    """Draw a chart as an SVG document, the same text for the same chart.

    Raises:
        ValueError: as ``figure``.
    """
    return _svg(figure(chart))


def _svg(drawn: Figure) -> str:
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "layernorm"}):
        drawn.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def save(chart: Chart, folder: Path) -> None:
    """Write ``NAME.png`` and ``NAME.svg`` for the chart's name, each whole or not at all.

    Raises:
        ValueError: as ``figure``.
        OSError: the folder is missing or cannot be written to.
    """
    drawn = figure(chart)
    files.write(folder / f"{chart.name}.svg", _svg(drawn))
    files.write(folder / f"{chart.name}.png", png(drawn, dpi=120))


def png(drawn: Figure, dpi: int) -> bytes:
    """Return a figure as a PNG file."""
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=dpi)
    return content.getvalue()
