"""The page and the pictures of all benchmarks, from their tables alone."""

from __future__ import annotations

import io
from types import ModuleType
from typing import Final

import pandas as pd

from benchmarks.core.benchmark import Outputs
from benchmarks.core.table import TableError
from benchmarks.gpu_norms import report as gpu_report
from benchmarks.gpu_recurrent import report as gpu_recurrent_report
from benchmarks.norms import report as norms_report
from benchmarks.recurrent import report as recurrent_report
from benchmarks.stream import report as stream_report
from benchmarks.updates import report as updates_report
from layernorm.experiments.storage import files

#: By the benchmark's name, in the order of the page. Each has ``load``, ``pictures``, ``options``,
#: ``section`` and ``summary``.
REPORTS: Final[dict[str, ModuleType]] = {
    "recurrent": recurrent_report,
    "stream": stream_report,
    "updates": updates_report,
    "norms": norms_report,
    "gpu": gpu_report,
    "gpu_recurrent": gpu_recurrent_report,
}
#: The commands of tables that are not named after them.
_COMMANDS: Final = {"gpu_recurrent": "gpu"}

_HEAD: Final = """\
# Benchmarks

This package beside PyTorch and others. The programs that measure write this page:

```console
pip install 'layernorm[bench]'
{commands}
```

`python -m benchmarks` is for a checkout and writes the page itself; `layernorm bench` works everywhere and
writes tables, pictures and a page to `runs/bench`. `--quick` is a short run, `--resume` goes on with one that
was stopped, `--report-only` writes the page again without measuring, `--help` has the rest. All figures are
in {tables}.
"""


def write(name: str, outputs: Outputs) -> list[str]:
    """Writes the benchmark's pictures, and the page of all benchmarks that have a table.

    Returns:
        What was found, in a few lines.

    Raises:
        TableError: a table is missing or damaged or has no rows, or a file cannot be written.
    """
    data = REPORTS[name].load(outputs.table(name))
    try:
        for path in (outputs.images, outputs.page.parent):
            path.mkdir(parents=True, exist_ok=True)
        for path, picture in REPORTS[name].pictures(data, outputs):
            content = io.BytesIO()
            picture.savefig(content, format="png", dpi=130, metadata={"Software": None})
            files.write(path, content.getvalue())
        files.write(outputs.page, page(outputs))
    except OSError as error:
        raise TableError(f"cannot write into {outputs.page.parent}: {error.strerror or error}") from error
    lines: list[str] = REPORTS[name].summary(data)
    return lines


def page(outputs: Outputs) -> str:
    """The page in Markdown.

    Raises:
        TableError: a table is damaged.
    """
    found: dict[str, pd.DataFrame] = {
        name: report.load(outputs.table(name))
        for name, report in REPORTS.items()
        if outputs.table(name).is_file()
    }
    options = {name: "".join(f" {o}" for o in REPORTS[name].options(data)) for name, data in found.items()}
    commands = [
        f"{start} {_COMMANDS.get(name, name)}{options[name]}"
        for start in ("python -m benchmarks", "layernorm bench")
        for name in found
    ]
    tables = ", ".join(f"`{outputs.shown}{name}.csv`" for name in found)
    parts = [_HEAD.format(commands="\n".join(commands), tables=tables)]
    for name, data in found.items():
        parts.extend(REPORTS[name].section(data, outputs))
    return "\n".join(parts)


__all__ = ["REPORTS", "page", "write"]
