"""Charts as still pictures."""

from __future__ import annotations

import math

import pytest
from matplotlib.colors import to_hex

from layernorm.experiments.report import drawing
from layernorm.experiments.section import Chart, Line, Panel


def panel(*names: str, label: str = "loss", **options) -> Panel:
    lines = [Line(name, [1, 2, 3], [3.0, 2.0, 1.0 + place]) for place, name in enumerate(names)]
    return Panel("a panel", "epoch", label, lines, **options)


def chart(*rows: list[Panel]) -> Chart:
    return Chart("some", "Some lines.", rows)


def test_a_norm_looks_alike_in_every_chart():
    few = drawing.looks(chart([panel("layer", "other", "none")]))
    many = drawing.looks(chart([panel("none", "batch")], [panel("rms", "layer", "weight")]))
    assert few["layer"] == many["layer"]
    assert few["none"] == many["none"]
    assert few["other"] not in (few["layer"], few["none"])
    assert list(many) == ["none", "batch", "rms", "layer", "weight"]


def test_more_lines_than_colours_are_still_told_apart():
    appearance = drawing.looks(chart([panel("layer", *(f"line {place}" for place in range(20)))]))
    assert len(set(appearance.values())) == 21


def test_the_picture_has_the_lines_of_each_panel_in_their_looks():
    drawn = drawing.figure(chart([panel("none", "layer"), panel("layer")], [panel("new", label="error (%)")]))
    shown = [axes for axes in drawn.axes if axes.axison]
    assert [[line.get_label() for line in axes.lines] for axes in shown] == [
        ["none", "layer"],
        ["layer"],
        ["new"],
    ]
    assert {to_hex(axes.lines[-1].get_color()).upper() for axes in shown[:2]} == {"#0072B2"}
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["none", "layer", "new"]
    assert [axes.get_ylabel() for axes in shown] == ["loss", "loss", "error (%)"]


def test_panels_that_measure_the_same_share_their_axis():
    low = Panel("low", "epoch", "loss", [Line("layer", [1, 2], [1.0, 2.0])])
    high = Panel("high", "epoch", "loss", [Line("layer", [1, 2], [7.0, 9.0])])
    left, right = drawing.figure(chart([low, high])).axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] < 1
    assert left.get_ylim()[1] > 9
    other = Panel("high", "epoch", "seconds", high.lines)
    left, right = drawing.figure(chart([low, other])).axes
    assert left.get_ylim() != right.get_ylim()


def test_scales_bands_and_gaps():
    line = Line("layer", [1, 10, 1000], [1.0, math.nan, 2.0], low=[0.5, 1.0, 1.5], high=[2.0, 3.0, 4.0])
    drawn = drawing.figure(chart([Panel("p", "x", "y", [line], x_log=True, y_log=True)]))
    (axes,) = drawn.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().bounds == pytest.approx((1, 0.5, 999, 3.5))
    # Of less than two decades numbers other than powers of ten are on the axis.
    drawn.canvas.draw()
    assert {"1", "2"} <= {text.get_text() for text in axes.get_yticklabels()}


def test_few_points_are_marked():
    long = Line("none", range(100), range(100))
    drawn = drawing.figure(chart([Panel("p", "x", "y", [long, Line("layer", [3], [4])])]))
    assert [line.get_marker() for line in drawn.axes[0].lines] == ["", "o"]


def test_it_writes_both_pictures_and_the_same_bytes_again(tmp_path):
    both = [tmp_path / "some.png", tmp_path / "some.svg"]
    drawing.save(chart([panel("none", "layer")]), tmp_path)
    assert sorted(tmp_path.iterdir()) == both
    assert both[0].read_bytes().startswith(b"\x89PNG")
    assert both[1].read_text() == drawing.svg(chart([panel("none", "layer")]))
    before = [path.read_bytes() for path in both]
    drawing.save(chart([panel("none", "layer")]), tmp_path)
    assert [path.read_bytes() for path in both] == before


@pytest.mark.parametrize(
    ("line", "got"),
    [
        (Line("layer", [1, 2], [1.0]), "2 in x, 1 in y"),
        (Line("layer", [1], [1.0], low=[1.0]), "1 in low, 0 in high"),
        (Line("layer", [1, 2], [1.0, 2.0], low=[1.0], high=[1.0]), "1 in low, 1 in high"),
    ],
)
def test_lines_of_unequal_lengths_are_named(tmp_path, line, got):
    with pytest.raises(ValueError, match=rf"'some', panel 'p', line 'layer': expected .*{got}"):
        drawing.save(chart([Panel("p", "x", "y", [line])]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_chart_needs_a_panel():
    with pytest.raises(ValueError, match="'some': rows: expected at least one panel"):
        drawing.figure(chart([]))
