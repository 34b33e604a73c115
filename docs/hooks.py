"""Changes the pages when they are built: formulas become MathML, long tables open on request."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
# Above which a table of the page of all measurements is folded.
_MOST_ROWS = 15


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replaces every formula of a page, and folds long tables of measurements."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        formula: str = convert(html.unescape(match[3]).strip(), display=display)
        return formula if display == "inline" else f'<div class="formula">{formula}</div>'

    def folded(match: re.Match[str]) -> str:
        rows = match[0].count("<tr>") - 1  # without the headings
        if page.file.src_uri != "benchmarks.md" or rows <= _MOST_ROWS:
            return match[0]
        return f"<details><summary>{rows} rows</summary>{match[0]}</details>"

    return _TABLE.sub(folded, _FORMULA.sub(mathml, content))
