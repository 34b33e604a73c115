"""Where the files of a run go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outputs:
    """The files of a run; all benchmarks share a page.

    Attributes:
        tables: the folder of the CSV files.
        images: the folder of the pictures.
        page: the Markdown page.
        shown: what the page writes before a table's name.
    """

    tables: Path
    images: Path
    page: Path
    shown: str

    def table(self, benchmark: str) -> Path:
        """Return the CSV file of a benchmark."""
        return self.tables / f"{benchmark}.csv"

    def image(self, *parts: str) -> Path:
        """Return the file of a picture; the parts of its name begin with the benchmark's."""
        return self.images / f"{'-'.join(('bench', *parts))}.png"


def in_folder(folder: Path) -> Outputs:
    """Return the files of a run that has a folder to itself."""
    return Outputs(folder, folder, folder / "benchmarks.md", "")


def in_checkout(root: Path) -> Outputs:
    """Return the files that the project publishes."""
    name = "benchmarks/results/"
    return Outputs(root / name, root / "docs/images", root / "docs/benchmarks.md", name)
