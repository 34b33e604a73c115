"""What is on the report's page, and what it does in a browser."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from layernorm.experiments import report
from layernorm.experiments.section import Card, Chart, Line, Panel, Picture, Section, Table
from layernorm.experiments.task import ExperimentError

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``report.html`` of three experiments, ``single.html`` of one, and the picture in them."""
    path = tmp_path_factory.mktemp("report")
    picture = Figure(figsize=(8, 2))
    picture.subplots().plot([1, 2])
    picture.savefig(path / "samples.png", dpi=150)
    report.write(path / "report.html", "The evidence", sections(path))
    report.write(path / "single.html", "Digits", [dataclasses.replace(sections(path)[0], charts=())])
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
    # One for each chart, plotly.js, and the page's own.
    assert len(page.having("script")) == 2 + 2


def test_charts_come_as_data_and_as_pictures(page):
    curves, drawn = (json.loads(script) for script in page.scripts if script.startswith("{"))
    assert [look["name"] for look in drawn["looks"]] == NAMES
    assert drawn["rows"][0]["panels"][0]["lines"][1]["y"] == [1.0, None, 0.3333333]
    assert [row["shared"] for row in curves["rows"]] == [True]
    assert curves["columns"] == 2
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
    assert [link["href"][1:] for link in page.having("a")] == identifiers == ["digits", "scales", "bare"]
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
            report.write(path, "A title", found)
    assert path.read_text() == "old"
    with pytest.raises(ExperimentError, match=r"cannot write .*missing/report\.html"):
        report.write(tmp_path / "missing" / "report.html", "A title", [section])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["not.png", "report.html"]


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium: neither chromium, chromium-browser nor google-chrome is found")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def complaints() -> list[str]:
    """What the browser complained about, and what it asked of a network."""
    return []


@pytest.fixture(scope="module")
def visit(browser, folder, complaints):
    """Opens the page in a browser of this size."""

    def note(request) -> None:
        if not request.url.startswith(("file:", "data:")):
            complaints.append(request.url)

    def go(width: int, height: int, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        visited = context.new_page()
        visited.on("console", lambda message: complaints.append(message.text))
        visited.on("pageerror", lambda error: complaints.append(str(error)))
        visited.on("request", note)
        visited.goto((folder / "report.html").as_uri())
        if options.get("java_script_enabled", True):
            draw(visited)
        return visited

    return go


@pytest.fixture(scope="module")
def desk(visit):
    """The page on a desk; who changes something there sets it back."""
    return visit(1280, 900)


@pytest.fixture(scope="module")
def phone(visit):
    return visit(360, 740, has_touch=True, is_mobile=True)


@pytest.fixture(autouse=True)
def _no_complaints(complaints) -> Iterator[None]:
    yield
    assert not complaints


def draw(visited) -> None:
    """Scrolls to every plot, for a plot is drawn when it comes near the view."""
    for plot in visited.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator(".modebar").wait_for(state="attached")


def ranges(visited, plot: int = 0) -> list[float]:
    """The ranges of a plot's axes: x from, x to, y from, y to."""
    return visited.evaluate(
        "n => { const {xaxis, yaxis} = document.querySelectorAll('.plot')[n]._fullLayout;"
        " return [...xaxis.range, ...yaxis.range]; }",
        plot,
    )


def until(visited, condition: str, before: list[float]) -> None:
    """Waits until the ranges ``now`` of the first plot's axes are in this relation to those ``before``."""
    visited.wait_for_function(
        "before => { const {xaxis, yaxis} = document.querySelector('.plot')._fullLayout;"
        f" const now = [...xaxis.range, ...yaxis.range]; return {condition}; }}",
        arg=before,
    )


def drawn_lines(visited) -> list[int]:
    """How many lines, the edges of bands among them, each plot shows."""
    return visited.evaluate(
        "[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.scatterlayer .trace').length)"
    )


def test_the_legend_hides_and_shows_a_line_in_all_panels(desk):
    assert drawn_lines(desk) == [9, 9, 4]
    before = ranges(desk)
    button = desk.get_by_role("button", name="none").first
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert drawn_lines(desk) == [6, 6, 4]
    assert ranges(desk)[3] < before[3]
    button.press("Enter")
    assert drawn_lines(desk) == [9, 9, 4]
    assert ranges(desk) == before
    names = desk.locator("figure.chart").nth(1).locator(".legend button").all_text_contents()
    assert names == NAMES
    assert desk.locator(".ytitle").last.text_content() == NASTY


def test_a_drag_zooms_and_a_double_click_restores(desk):
    desk.locator(".plot").first.scroll_into_view_if_needed()
    before, beside = ranges(desk), ranges(desk, 1)
    assert before[2:] == beside[2:]
    box = desk.locator(".plot .nsewdrag").first.bounding_box()
    desk.mouse.move(box["x"] + 50, box["y"] + 50)
    desk.mouse.down()
    desk.mouse.move(box["x"] + 200, box["y"] + 150, steps=4)
    desk.mouse.up()
    inside = "now[0] > before[0] && now[1] < before[1] && now[2] > before[2] && now[3] < before[3]"
    until(desk, inside, before)
    zoomed = ranges(desk)
    assert ranges(desk, 1) == beside
    # Hiding a line leaves the reader where he is.
    desk.get_by_role("button", name="none").first.click()
    assert ranges(desk) == zoomed
    desk.get_by_role("button", name="none").first.click()
    desk.mouse.dblclick(box["x"] + 100, box["y"] + 100)
    until(desk, "String(now) == String(before)", before)
    for _ in range(2):  # where there is nothing to restore
        desk.locator(".modebar-btn[data-title=Everything]").first.click()
        assert ranges(desk) == before


def test_the_values_under_the_pointer_are_shown(desk):
    box = desk.locator(".plot .nsewdrag").first.bounding_box()
    left, right = ranges(desk)[:2]
    desk.mouse.move(box["x"] + (10 - left) / (right - left) * box["width"], box["y"] + 90)
    shown = desk.locator(".hoverlayer .legend", has_text="epoch 10")
    shown.wait_for()
    assert f"layer : {8 * math.exp(-1) + 0.5:.5g}" in shown.text_content()


def test_a_finger_scrolls_the_page_until_it_asks_for_the_zoom(phone):
    plot = phone.locator(".plot").first
    touch = phone.context.new_cdp_session(phone)

    def drag(right: int, down: int) -> None:
        # Also ends the scrolling of a drag before.
        plot.evaluate("plot => plot.scrollIntoView({block: 'center', behavior: 'instant'})")
        box = plot.bounding_box()
        x, y = box["x"] + 150, box["y"] + 150
        for kind, share in [("touchStart", 0.0), *(("touchMove", step / 5) for step in range(1, 6))]:
            points = [{"x": x + share * right, "y": y + share * down}]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    before = ranges(phone)
    drag(0, -100)
    moved = "() => { const box = document.querySelector('.plot').getBoundingClientRect();"
    phone.wait_for_function(moved + " return box.y + box.height / 2 < innerHeight / 2 - 20; }")
    assert ranges(phone) == before
    plot.locator(".modebar-btn").first.tap()
    drag(80, -80)
    until(phone, "now[1] < before[1]", before)
    plot.locator(".modebar-btn").last.tap()
    until(phone, "String(now) == String(before)", before)


def test_it_fits_a_phone(phone):
    _fits(phone)
    lefts = {plot.bounding_box()["x"] for plot in phone.locator(".plot").all()}
    assert len(lefts) == 1  # one below the other
    assert not phone.locator(".still").first.is_visible()


def test_without_javascript_there_are_still_pictures(visit):
    visited = visit(360, 740, java_script_enabled=False)
    _fits(visited)
    assert visited.locator(".still").first.is_visible()


def _fits(visited) -> None:
    assert visited.evaluate("document.documentElement.scrollWidth") == 360
    # Wide tables are scrolled in their own boxes, which the keyboard reaches.
    wide = "box => box.scrollWidth > box.clientWidth && box.tabIndex == 0"
    assert visited.locator(".scroll").first.evaluate(wide)


def test_on_paper_nothing_is_cut(desk):
    width = round((210 - 2 * 14) / 25.4 * 96)  # of A4 between the margins, in CSS pixels
    desk.set_viewport_size({"width": width, "height": 1000})
    desk.emulate_media(media="print", color_scheme="dark")
    assert desk.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not desk.locator(".panels").first.is_visible()
    stills = desk.locator(".still img").all()
    assert [still.is_visible() for still in stills] == [True, True]
    assert all(still.evaluate("image => image.complete && image.naturalWidth > 300") for still in stills)
    beyond = desk.evaluate(
        "width => [...document.querySelectorAll('body *')]"
        ".filter(e => e.getBoundingClientRect().right > width + 1).map(e => e.outerHTML.slice(0, 99))",
        width,
    )
    assert not beyond
    breaks = "cards => cards.map(card => getComputedStyle(card).breakInside)"
    assert desk.locator(".card").evaluate_all(breaks) == ["avoid"] * 4
    paper = desk.pdf(prefer_css_page_size=True)
    # The overview and each experiment begin on a page of their own.
    assert len(re.findall(rb"/Type /Page\b", paper)) >= 4
    desk.set_viewport_size({"width": 1280, "height": 900})
    desk.emulate_media(media="screen", color_scheme="light")


_CONTRASTS = r"""() => {
    const channels = (text) => text.match(/[\d.]+/g).map(Number);
    const luminance = (text) => {
        const [r, g, b] = channels(text).map((c) => c / 255).map(
            (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        const colour = getComputedStyle(element).backgroundColor;
        return channels(colour)[3] === 0 ? ground(element.parentElement) : colour;
    };
    const found = {};
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!own || element.closest("svg, script, style") || !element.checkVisibility()) continue;
        const pair = [luminance(getComputedStyle(element).color), luminance(ground(element))];
        found[element.className + " " + element.tagName] =
            (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    }
    return found;
}"""


@pytest.mark.parametrize(("scheme", "ink"), [("light", "#1d2129"), ("dark", "#e4e7eb")])
def test_every_text_can_be_told_from_its_ground(desk, scheme, ink):
    desk.emulate_media(color_scheme=scheme)
    desk.wait_for_function("ink => document.querySelector('.plot')._fullLayout.font.color == ink", arg=ink)
    button = desk.locator(".legend button").first
    button.click()
    contrasts = desk.evaluate(_CONTRASTS)
    button.click()
    desk.emulate_media(color_scheme="light")
    verdicts = {f"verdict {kind} SPAN" for kind in ("agrees", "partly", "differs", "not-run")}
    assert verdicts < set(contrasts)
    # The least that WCAG 2 asks for at level AA.
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}
