"""Compare the verdicts of two folders of `layernorm reproduce`, made with other seeds: a table in Markdown.

`python -m tools.other_seeds DIR OTHER` prints a line for each claim that both have, and ends with code 1
where *agrees* has become *differs* or the other way round.
"""

from __future__ import annotations

import sys
from pathlib import Path

from layernorm.experiments.commands import reproduce
from layernorm.experiments.section import Card


def _cards(folder: Path) -> dict[tuple[str, str], Card]:
    sections = reproduce.read(folder)
    return {(section.name, card.claim): card for section in sections for card in section.cards}


def main() -> int:
    """Print the table."""
    first, second = (_cards(Path(place)) for place in sys.argv[1:])
    print("| experiment | the paper | seeds 0 to 4 | other seeds |\n|---|---|---|---|")
    flips = 0
    for (name, claim), card in first.items():
        if (name, claim) in second:
            verdicts = card.verdict, second[name, claim].verdict
            flips += set(verdicts) == {"agrees", "differs"}
            print(f"| `{name}` | {claim} | {verdicts[0]} | {verdicts[1]} |")
    print(f"\nOf *agrees* and *differs* {flips} became the other.")
    return int(flips > 0)


if __name__ == "__main__":
    sys.exit(main())
