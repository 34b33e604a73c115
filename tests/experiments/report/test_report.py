"""The contents of the report's page."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest

from layernorm.experiments.report import norms
from layernorm.experiments.report.page import write
from layernorm.experiments.section import Chart, Picture, Section, Table
from layernorm.experiments.task import ExperimentError
from tests.experiments.report.sections import NAMES, sections, write_png


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``report.html`` of three experiments, ``single.html`` of one, and the picture in them."""
    path = tmp_path_factory.mktemp("report")
    write_png(path / "samples.png")
    write(path / "report.html", "The evidence", sections(path))
    digits = dataclasses.replace(sections(path)[0], charts=())
    write(path / "single.html", "Digits", [digits], norms.background())
    return path


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text and scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts.append(data)
        else:
            self.text += data

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page(folder / "report.html")


def test_everything_of_the_sections_is_on_the_page(folder, page):
    def texts(value) -> Iterator[str]:
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                if field.name not in ("charts", "path", "name"):
                    yield from texts(getattr(value, field.name))
        elif isinstance(value, str):
            yield value
        elif not isinstance(value, Path):
            for part in value:
                yield from texts(part)

    text = " ".join(page.text.split())
    for expected in texts(sections(folder)):
        assert " ".join(expected.split()) in text
    assert "Test error over the epochs." in text


def test_what_looks_like_markup_stays_text(page):
    assert not page.having("b")
    # One for each panel, plotly.js, and the page's own.
    assert len(page.having("script")) == 3 + 2


def test_charts_come_as_data_and_as_pictures(page):
    left, right, drawn = (json.loads(script) for script in page.scripts if script.startswith("{"))
    assert [trace["meta"] for trace in drawn["data"]] == NAMES
    assert drawn["data"][1]["y"] == [1.0, None, 0.3333333]
    for panel in (left, right, drawn):
        # Raises ValueError at a property that plotly does not know.
        go.Figure({"data": panel["data"], "layout": panel["layout"]})
    reach = [[trace["y"] for trace in panel["data"] if trace["mode"] == "markers"] for panel in (left, right)]
    assert reach[0] == reach[1]  # one range of y
    assert max(reach[0][0]) == pytest.approx(1.3 * (2 * 40 + 0.5))
    stills = [image for image in page.having("img") if image["src"].startswith("data:image/svg+xml;base64,")]
    assert "lines: none, batch, layer" in stills[0]["alt"]
    assert len(stills) == 2


def test_nothing_is_asked_of_a_network(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)
    policy = next(meta for meta in page.having("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'; img-src data:;")


def test_the_overview_links_to_every_experiment(folder, page):
    identifiers = [section["id"] for section in page.having("section") if "id" in section]
    assert [link["href"][1:] for link in page.having("a")] == 2 * identifiers  # contents, overview
    assert identifiers == ["digits", "scales", "bare"]
    single = Page(folder / "single.html")
    assert not single.having("a")
    assert "Overview" not in single.text


@pytest.mark.parametrize("name", ["report.html", "single.html"])
def test_headings_tables_and_pictures_can_be_followed_without_seeing_them(folder, name):
    page = Page(folder / name)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(cell["scope"] in ("col", "row") for cell in page.having("th"))
    assert all(image["alt"] for image in page.having("img"))
    assert page.having("html") == [{"lang": "en"}]
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_what_the_norms_do_is_folded_at_the_end(folder, page):
    single = Page(folder / "single.html")
    assert "What the norms do" in single.text
    assert "the same for all: 1  2  4  5" in single.text
    assert single.having("details") == [{}]  # closed
    assert len([image for image in single.having("img") if image["alt"] == norms.AXES_CAPTION]) == 1
    assert not page.having("details")
    grown = (folder / "single.html").stat().st_size
    write(folder / "without.html", "Digits", [dataclasses.replace(sections(folder)[0], charts=())])
    assert grown - (folder / "without.html").stat().st_size < 100_000


def test_columns_of_numbers_stand_to_the_right(page):
    first = [head.get("class") for head in page.having("th") if head["scope"] == "col"][:4]
    assert first == [None, "number", "number", None]


def test_what_cannot_be_shown_is_named_and_the_old_page_stays(folder, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    (tmp_path / "not.png").write_text("nothing")
    section = Section("digits", "Digits", "", "")

    def broken(**parts) -> list[Section]:
        return [dataclasses.replace(section, **parts)]

    for found, error, message in (
        ([], ValueError, "sections: expected at least one"),
        ([section, section], ValueError, "got 'digits' 2 times"),
        (broken(tables=[Table("T", ["a", "b"], [["1"]])]), ValueError, "'T': expected 2 cells .* got 1"),
        (broken(charts=[Chart("c", "", [])]), ValueError, "'c': rows: expected at least one panel"),
        (broken(pictures=[Picture(tmp_path / "none.png", "")]), ExperimentError, r"none\.png: No such file"),
        (broken(pictures=[Picture(tmp_path / "not.png", "")]), ExperimentError, r"not\.png is damaged"),
    ):
        with pytest.raises(error, match=message):
            write(path, "A title", found)
    assert path.read_text() == "old"
    with pytest.raises(ExperimentError, match=r"cannot write .*missing/report\.html"):
        write(tmp_path / "missing" / "report.html", "A title", [section])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["not.png", "report.html"]
