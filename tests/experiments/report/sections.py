"""Sections of a report, with what is hard to show in them."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from layernorm.experiments.section import Card, Chart, Line, Panel, Picture, Section, Table

NASTY = "<b>&amp;</script><script>alert('no')</script> {{ 1 }} \"'"
# Names that are integers are where a JavaScript object would not keep the order.
NAMES = ["9", "layer", "3", NASTY]


def training() -> Chart:
    def line(name: str, factor: float) -> Line:
        y = [factor * math.exp(-0.1 * x) + 0.5 for x in range(40)]
        return Line(name, range(40), y, [0.8 * value for value in y], [1.3 * value for value in y])

    def panel(title: str, label: str, scale: float) -> Panel:
        lines = [line("none", 40 * scale), line("batch", 20 * scale), line("layer", 8 * scale)]
        return Panel(title, "epoch", label, lines, y_log=True)

    row = [panel("batch size 128", "test error (%)", 1.0), panel("batch size 4", "test error (%)", 2.0)]
    return Chart("curves", "Test error over the epochs.", [row])


def scales() -> Chart:
    lines = [Line(name, [1, 2, 4], [place, math.nan, 1 / 3]) for place, name in enumerate(NAMES)]
    return Chart("scales", "Curvature.", [[Panel(NASTY, "scale", NASTY, lines, x_log=True)]])


def table(repeats: int = 1) -> Table:
    headings = ["norm", "best test error (%)", "epochs to baseline's best", "remark"]
    cells = ["layer", "1.48 ± 0.10", "not reached", "its statistics are of this case alone, in every layer"]
    return Table(
        "Means over three seeds.",
        headings * repeats,
        [cells * repeats, [cells[0], "2", "3.5", "–"] * repeats],
        "A note.",
    )


def sections(folder: Path) -> list[Section]:
    command = "layernorm compare digits --norms none,batch,layer --batch-sizes 128,4 --out runs/digits"
    cards = [
        Card("Layer norm trains faster.", "§6.6, figure 6", "2.1 times fewer epochs.", "agrees"),
        Card(
            "Batch norm is behind with batches of 4.", "§6.6", "2.67 against 1.19 %.", "partly", "Few seeds."
        ),
        Card(
            "Its error is lower with batches of 128.",
            "§6.6",
            "1.48 against 1.33 %.",
            "differs",
            "Small data.",
        ),
    ]
    facts = [("torch", "2.13.0"), ("machine", "A processor with a long name, Linux x86_64, 2 threads, cpu")]
    pictures = [Picture(folder / "samples.png", "Eight cases.")]
    tables, charts = [table(), table(5)], [training()]
    return [
        Section("digits", "Digits", "8×8 pixels.", command, cards, tables, charts, pictures, facts),
        Section("scales", NASTY, NASTY, NASTY, [Card(NASTY, NASTY, NASTY, "not run", NASTY)], (), [scales()]),
        Section("bare", "A bare one", "Nothing but a command.", "true"),
    ]


def write_png(path: Path) -> None:
    picture = Figure(figsize=(8, 2))
    picture.subplots().plot([1, 2])
    picture.savefig(path, dpi=150)
