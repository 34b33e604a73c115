"""The report's page in a browser."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from layernorm.experiments.report.page import write
from tests.experiments.report.sections import NAMES, NASTY, sections, write_png


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``report.html`` of three experiments."""
    path = tmp_path_factory.mktemp("report")
    write_png(path / "samples.png")
    write(path / "report.html", "The evidence", sections(path))
    return path


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
    """Return the browser's complaints and its requests to a network."""
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
    """Return the number of lines, edges of bands included, in each plot."""
    count = "plot => plot.querySelectorAll('.trace:has(.js-line)').length"
    return visited.evaluate(f"[...document.querySelectorAll('.plot')].map({count})")


def colours(visited, selector: str, kind: str) -> set[str]:
    found = "(all, kind) => all.map(one => getComputedStyle(one)[kind])"
    return set(visited.locator(selector).evaluate_all(found, kind))


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
    before, neighbour = ranges(desk), ranges(desk, 1)
    assert before[2:] == neighbour[2:]
    box = desk.locator(".plot .nsewdrag").first.bounding_box()
    desk.mouse.move(box["x"] + 50, box["y"] + 50)
    desk.mouse.down()
    desk.mouse.move(box["x"] + 200, box["y"] + 150, steps=4)
    desk.mouse.up()
    inside = "now[0] > before[0] && now[1] < before[1] && now[2] > before[2] && now[3] < before[3]"
    until(desk, inside, before)
    zoomed = ranges(desk)
    assert ranges(desk, 1) == neighbour
    # Hiding a line leaves the reader where he is.
    desk.get_by_role("button", name="none").first.click()
    assert ranges(desk) == zoomed
    desk.get_by_role("button", name="none").first.click()
    desk.mouse.dblclick(box["x"] + 100, box["y"] + 100)
    until(desk, "String(now) == String(before)", before)
    for _ in range(2):  # where there is nothing to restore
        desk.locator(".modebar-btn[data-title='Reset axes']").first.click()
        assert ranges(desk) == before


def test_the_values_under_the_pointer_are_shown(desk):
    area = desk.locator(".plot .nsewdrag").first
    shown = desk.locator(".hoverlayer .legend", has_text="epoch 10")
    # A pointer moves many times, and one move may come while the plot is still drawn anew.
    for attempt in range(120):
        area.scroll_into_view_if_needed()
        box, (left, right) = area.bounding_box(), ranges(desk)[:2]
        desk.mouse.move(box["x"] + (10 - left) / (right - left) * box["width"], box["y"] + 90 + attempt % 2)
        if shown.is_visible():
            break
        desk.wait_for_timeout(250)
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


@pytest.mark.parametrize(("scheme", "ink"), [("light", "rgb(29, 33, 41)"), ("dark", "rgb(228, 231, 235)")])
def test_every_text_can_be_told_from_its_ground(desk, scheme, ink):
    desk.emulate_media(color_scheme=scheme)
    assert colours(desk, ".plot text", "fill") == {ink}
    assert ink in colours(desk, ".plot .js-line", "stroke")  # of the line that is black on white
    assert not {"rgb(0, 0, 0)", "rgb(255, 255, 255)"} & colours(desk, ".plot .gridlayer path", "stroke")
    button = desk.locator(".legend button").first
    button.click()
    contrasts = desk.evaluate(_CONTRASTS)
    button.click()
    desk.emulate_media(color_scheme="light")
    verdicts = {f"verdict {kind} SPAN" for kind in ("agrees", "partly", "differs", "not-run")}
    assert verdicts < set(contrasts)
    # The least that WCAG 2 asks for at level AA.
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 4.5} == {}
