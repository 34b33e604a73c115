"""The results of experiments as one HTML page that needs nothing else: no network, no other file.

The page is ``report.html.j2`` with ``report.css`` and ``report.js`` in it. Its charts are the figures of
``plots``, drawn by plotly.js, which is in the page too; without JavaScript and on paper the pictures of
``drawing`` stand in their place.
"""

from __future__ import annotations

import base64
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Final, get_args

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from layernorm.experiments.errors import ExperimentError, reason
from layernorm.experiments.report import drawing, plots
from layernorm.experiments.section import Background, Chart, Picture, Section, Table, Verdict
from layernorm.experiments.storage import files

_PNG: Final = b"\x89PNG\r\n\x1a\n"
#: A cell that goes into a column of numbers: one with whatever follows it, or the lack of one.
_NUMBER: Final = re.compile(r"[-–−+±<>≤≥≈~]?\s*\d.*|[-–—]|not .*|", re.DOTALL)


def write(path: Path, title: str, sections: Sequence[Section], background: Background | None = None) -> Path:
    """Write the page, whole or not at all; the folder of ``path`` must be there.

    With several sections an overview of all their cards comes first.

    Args:
        path: the HTML file.
        title: of the page.
        sections: one for each experiment, in their order, each with a name of its own.
        background: folded at the end.

    Returns:
        ``path``.

    Raises:
        ValueError: there is no section, two have one name, a chart cannot be drawn, or a row of a table has
            not as many cells as the table has columns.
        ExperimentError: a picture is missing or is no PNG file, or the page cannot be written.

    Examples:
        >>> import pathlib, tempfile
        >>> from layernorm.experiments.report import page
        >>> from layernorm.experiments.section import Card, Section
        >>> card = Card("Layer norm trains faster.", "§6.6", "2.1 times fewer updates.", "agrees")
        >>> section = Section("mnist", "MNIST", "784-1000-1000-10", "layernorm compare mnist", [card])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = page.write(pathlib.Path(folder) / "report.html", "The evidence", [section])
        ...     "2.1 times fewer updates." in path.read_text("utf-8")
        True
    """
    _check(sections)
    page = _template().render(
        title=title,
        sections=sections,
        background=background,
        verdicts=Counter(card.verdict for section in sections for card in section.cards),
        known_verdicts=get_args(Verdict),
        css=Markup(_text("report.css")),  # noqa: S704 - the package's own
        scripts=[_script(get_plotlyjs()), _script(_text("report.js"))],
    )
    try:
        files.write(path, page)
    except OSError as error:
        raise ExperimentError(f"cannot write {path}: {reason(error)}") from error
    return path


def _check(sections: Sequence[Section]) -> None:
    if not sections:
        raise ValueError("sections: expected at least one, got none")
    for name, count in Counter(section.name for section in sections).items():
        if count > 1:
            raise ValueError(f"sections: expected names that differ, got {name!r} {count} times")
    for chart in itertools.chain.from_iterable(section.charts for section in sections):
        drawing.check(chart)
    for table in itertools.chain.from_iterable(section.tables for section in sections):
        for row in table.rows:
            if len(row) != len(table.columns):
                raise ValueError(
                    f"table {table.caption!r}: expected {len(table.columns)} cells in each row, one for each "
                    f"column, got {len(row)} in {tuple(row)}"
                )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        looks=drawing.looks,
        dashes=plots.dashes,
        figures=plots.figures,
        still=_still,
        picture=_picture,
        numeric=_numeric,
    )
    return environment.from_string(_text("report.html.j2"))


def _text(name: str) -> str:
    return resources.files("layernorm.experiments.report").joinpath(name).read_text("utf-8")


def _script(text: str) -> Markup:
    """Return a script as it can stand in a page: no text in it ends the element."""
    return Markup(text.replace("</script", r"<\/script"))  # noqa: S704 - the package's own, and plotly's


def _still(chart: Chart) -> str:
    return _address("image/svg+xml", drawing.svg(chart).encode())


def _picture(picture: Picture) -> str:
    if isinstance(picture.png, bytes):
        return _address("image/png", picture.png)
    try:
        content = picture.png.read_bytes()
    except OSError as error:
        raise ExperimentError(f"cannot read the picture {picture.png}: {reason(error)}") from error
    if not _is_whole(content):
        raise ExperimentError(f"the picture {picture.png} is damaged: expected a whole PNG file; delete it")
    return _address("image/png", content)


def _is_whole(content: bytes) -> bool:
    """Return whether this is a PNG file whose parts have their checksums, and nothing behind the last."""
    at, kind = len(_PNG), b""
    if not content.startswith(_PNG):
        return False
    while kind != b"IEND":
        if at + 12 > len(content):
            return False
        length = int.from_bytes(content[at : at + 4], "big")
        kind, end = content[at + 4 : at + 8], at + 8 + length
        if zlib.crc32(content[at + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            return False
        at = end + 4
    return at == len(content)


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _numeric(table: Table) -> list[bool]:
    """Return for each column whether it holds numbers, which stand to the right."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    return [
        any(map(str.isdigit, "".join(column))) and all(map(_NUMBER.fullmatch, column)) for column in columns
    ]
