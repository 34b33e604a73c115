"""Turns the formulas of the pages into MathML when they are built: no script, no network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replaces every formula of a page."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        formula: str = convert(html.unescape(match[3]).strip(), display=display)
        return formula if display == "inline" else f'<div class="formula">{formula}</div>'

    return _FORMULA.sub(mathml, content)
