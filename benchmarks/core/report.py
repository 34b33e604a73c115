"""The page and the pictures of all benchmarks, from their tables alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import pandas as pd

from benchmarks.core import pages
from benchmarks.core.benchmark import INSTALL, PROGRAM, Benchmark
from benchmarks.core.outputs import Outputs
from benchmarks.core.sections import Report
from benchmarks.core.table import TableError, read
from layernorm.experiments.storage import files

_HEAD: Final = """\
# Benchmarks

This package next to PyTorch and others. The programs that measure are in the checkout of the source, and
write this page:

```console
{install}
{commands}
```

The first line needs pip 25.1 or later. `--out DIR` writes tables, pictures and a page to a folder of yours
instead. `--quick` is a short run, `--resume` continues one that was stopped, `--report-only` writes the page
again without measuring, `--help` has the rest. All figures are in {tables}.
"""


def report_of(benchmark: Benchmark) -> Report:
    """Return the report of a benchmark."""
    found: Report = import_module(f"benchmarks.{benchmark.folder}.report").REPORT
    return found


def load(report: Report, path: Path) -> pd.DataFrame:
    """Return a table in the report's order, with its numbers as such and the report's derived columns.

    Args:
        report: of the benchmark.
        path: the file.

    Raises:
        TableError: the file is missing or damaged, or has no rows.
    """
    benchmark = report.benchmark
    data = pd.DataFrame(read(path, benchmark.columns), columns=list(benchmark.columns))
    if data.empty:
        raise TableError(f"{path} has no rows; measure first")
    choices = {axis.columns[0]: axis.choices for axis in benchmark.axes if axis.choices}
    choices["peer"] = benchmark.peers
    try:
        for name in benchmark.numbers:
            data[name] = pd.to_numeric(data[name].replace("", None))
        places = {name: data[name].map(values.index) for name, values in choices.items()}
    except (ValueError, TypeError) as error:
        raise TableError(f"{path} is damaged: {error}") from error
    data = data.assign(**{name: column(data) for name, column in report.derived.items()})
    keys = [places.get(name, data.get(name)) for name in (*report.order, "peer")]
    names = [str(index) for index in range(len(keys))]
    order = pd.concat(keys, axis=1, keys=names).sort_values(names, kind="stable").index
    return data.loc[order].reset_index(drop=True)


def write(benchmark: Benchmark, every: Sequence[Benchmark], outputs: Outputs) -> list[str]:
    """Write the benchmark's pictures, and the page of all benchmarks that have a table.

    Returns:
        What was found, in a few lines.

    Raises:
        TableError: a table is missing or damaged or has no rows, or a file cannot be written.
    """
    report = report_of(benchmark)
    data = load(report, outputs.table(benchmark.name))
    try:
        for path in (outputs.images, outputs.page.parent):
            path.mkdir(parents=True, exist_ok=True)
        for path, picture in report.pictures(data, outputs):
            content = io.BytesIO()
            picture.savefig(content, format="png", dpi=130, metadata={"Software": None})
            files.write(path, content.getvalue())
        files.write(outputs.page, page(every, outputs))
    except OSError as error:
        raise TableError(f"cannot write into {outputs.page.parent}: {error.strerror or error}") from error
    return report.lines(data)


def page(every: Sequence[Benchmark], outputs: Outputs) -> str:
    """Return the page of all benchmarks in Markdown.

    Raises:
        TableError: a table is damaged.
    """
    reports = [report_of(each) for each in every if outputs.table(each.name).is_file()]
    found = [(report, load(report, outputs.table(report.benchmark.name))) for report in reports]
    commands = [" ".join([PROGRAM, *_command(report.benchmark, data)]) for report, data in found]
    tables = ", ".join(f"`{outputs.shown}{report.benchmark.name}.csv`" for report in reports)
    head = _HEAD.format(install=INSTALL, commands="\n".join(commands), tables=tables)
    sections = (text for report, data in found for text in report.markdown(data, outputs))
    return "\n".join([head, *sections])


def _command(benchmark: Benchmark, data: pd.DataFrame) -> list[str]:
    """Return the command that measures a table's points again, with the options that are not the defaults."""
    found = [benchmark.command]
    for axis in benchmark.axes:
        columns = [data[name] for name in axis.columns if name in data]
        values = list(dict.fromkeys(zip(*columns, strict=True)))
        usual = {tuple(axis.set(value).values()) for value in axis.usual}
        if axis.always_shown or set(values) != usual:
            found.append(f"--{axis.option} {','.join('x'.join(map(str, value)) for value in values)}")
    peers = peers_to_name(benchmark, data)
    if peers is not None:
        found.append(f"--peers {','.join(peers)}")
    if not benchmark.on_gpu and data.threads.nunique() == 1:
        found.append(f"--threads {pages.joined(data.threads)}")
    if data.rounds.notna().any() and data.rounds.max() != benchmark.rounds:
        found.append(f"--rounds {data.rounds.max():.0f}")
    return found


def peers_to_name(benchmark: Benchmark, data: Any) -> Sequence[str] | None:
    """Return the peers that a run like that of a table has to name, None where they are the default."""
    if benchmark.peers_to_name is not None:
        return benchmark.peers_to_name(data)
    # A peer of one mode may have no rows only because there is none of that mode.
    modes = set(data["mode"]) if benchmark.only_in else set()
    possible = {name for name in benchmark.default_peers if benchmark.only_in.get(name) in (None, *modes)}
    return None if set(data.peer) == possible else list(dict.fromkeys(data.peer))
