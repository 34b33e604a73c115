"""Write what `layernorm reproduce` found into docs/reproduce.md: `python -m tools.reproduce_page DIR LOG`.

The page's words stay; the table of each experiment, its time and the counts of the verdicts are made anew.
LOG is what the command printed, which has the times.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from layernorm.experiments.commands import reproduce
from layernorm.experiments.section import Section

PAGE = Path(__file__).parents[1] / "docs" / "reproduce.md"
HEAD = "| the paper | | measured | |\n|---|---|---|---|\n"


def table(section: Section) -> str:
    """Return the claims of a section."""
    rows = []
    for card in section.cards:
        remark = f" {card.remark[0].upper()}{card.remark[1:].rstrip('.')}." if card.remark else ""
        texts = (card.claim, card.section, card.figure, f"**{card.verdict}**{'.' if remark else ''}{remark}")
        rows.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |\n")
    return HEAD + "".join(rows)


def written(page: str, sections: list[Section], times: dict[str, str]) -> str:
    """Return the page with these sections."""
    for section in sections:
        pattern = re.compile(
            rf"(`{re.escape(section.name)}`), [\d:]+ minutes(.*?\n)(.*?){re.escape(HEAD)}(?:\|[^\n]*\n)*",
            re.S,
        )
        new = lambda found, s=section: f"{found[1]}, {times[s.name]} minutes{found[2]}{found[3]}{table(s)}"  # noqa: E731
        page, count = pattern.subn(new, page, count=1)
        if count != 1:
            raise SystemExit(f"{PAGE} has no section of {section.name}")
    counts = Counter(card.verdict for section in sections for card in section.cards)
    total = ", ".join(f"{counts[verdict]} *{verdict}*" for verdict in counts)
    return re.sub(r"Of \d+ claims[^.]*\.", f"Of {sum(counts.values())} claims: {total}.", page, count=1)


def main() -> None:
    """Write the page."""
    folder, log = map(Path, sys.argv[1:])
    times = dict(re.findall(r"^([a-z-]+): ([\d:]+)\s*$", log.read_text("utf-8"), re.M))
    PAGE.write_text(written(PAGE.read_text("utf-8"), reproduce.read(folder), times), "utf-8")


if __name__ == "__main__":
    main()
