"""``layernorm bench``, which is ``python -m benchmarks`` too: options that all share, and the run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from benchmarks.core import workers
from benchmarks.core.benchmark import OURS, Benchmark, Outputs, Work, in_folder, plural
from benchmarks.core.measuring import BASE
from benchmarks.core.table import Table, TableError, read
from benchmarks.gpu_norms.measure import GPU
from benchmarks.norms.measure import NORMS
from benchmarks.recurrent.measure import RECURRENT
from benchmarks.stream.measure import STREAM
from benchmarks.updates.measure import UPDATES
from layernorm import machine
from layernorm.arguments import plain, say, some_of

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.core.progress import Display

#: In the order of the page.
BENCHMARKS: Final = {benchmark.name: benchmark for benchmark in (RECURRENT, STREAM, UPDATES, NORMS, GPU)}
DEFAULT_OUT: Final = Path("runs/bench")
_EPILOG: Final = """\
Times are medians of interleaved samples; other work on the machine spoils them. A run that was stopped
goes on with the same command and --resume. --report-only writes pictures and page again.
"""


def add_to(commands: Any) -> None:
    """Adds the command ``bench`` with a command of its own for each benchmark."""
    bench = commands.add_parser(
        "bench",
        help="speed beside others': recurrent networks, steps, training updates, norm operators, on a GPU",
        description="Measures this package beside PyTorch and others.",
    )
    kinds = bench.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    add_benchmarks_to(kinds, str(DEFAULT_OUT))


def add_benchmarks_to(commands: Any, out: str) -> None:
    """Adds a command for each benchmark; ``out`` tells where results go by default."""
    for benchmark in BENCHMARKS.values():
        parser: argparse.ArgumentParser = commands.add_parser(
            benchmark.name,
            help=benchmark.title,
            description=benchmark.description,
            epilog=f"{benchmark.epilog}{_EPILOG}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        benchmark.add_options(parser)
        _add_shared_options(parser, benchmark, out)


def _add_shared_options(parser: argparse.ArgumentParser, benchmark: Benchmark, out: str) -> None:
    add = parser.add_argument
    if benchmark.threaded:
        add(
            "--threads",
            type=_threads,
            default="1,all",
            metavar="N,…",
            help="numbers of threads, or all (default: 1,all)",
        )
    peers = list(dict.fromkeys(name for table in benchmark.tables for name in table.peers))
    if set(peers) - {OURS, BASE}:
        unasked = f" but {', '.join(benchmark.unasked)}" if benchmark.unasked else ""
        add(
            "--peers",
            type=some_of(peers),
            metavar="A,B,…",
            help=f"some of {', '.join(peers)} (default: all{unasked}); {OURS} and {BASE} are always measured",
        )
    add("--resume", action="store_true", help="measure only the points that the table does not have")
    add("--report-only", action="store_true", help="write pictures and page again from the table")
    add("--out", type=Path, metavar="DIR", help=f"folder for the results (default: {out})")


def run(options: argparse.Namespace, outputs: Outputs | None, program: str) -> int:
    """Measures, or only reports; returns the exit code. Without ``outputs`` a folder takes all files."""
    benchmark = BENCHMARKS[options.benchmark]
    outputs = outputs or in_folder(options.out or DEFAULT_OUT)
    try:
        from rich.console import Console

        from benchmarks.core import report
    except ModuleNotFoundError as error:
        return _fail(program, f"this command needs {error.name}: pip install 'layernorm[bench]'", code=2)
    console = Console()
    if not options.report_only and (problem := benchmark.problem()) is not None:
        return _fail(program, problem, code=2)
    tables = _tables(benchmark, options, outputs)
    path = outputs.table(tables[0].name)
    try:
        with _stoppable():
            if not options.report_only:
                _warn_if_busy(console)
            for table in tables:
                path = outputs.table(table.name)
                if not options.report_only:
                    _measure(table, options, path, console)
                for line in report.write(table.name, outputs):
                    say(console, line)
    except TableError as error:
        return _fail(program, str(error), code=2)
    except workers.WorkerError as error:
        return _fail(program, f"{error}; what was measured before is in {path}", code=1)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(program, f"cannot read or write{where}: {error.strerror or error}", code=2)
    except KeyboardInterrupt:
        return _fail(program, f"interrupted; what was measured is in {path}; go on with --resume", code=130)
    say(console, f"Page: {outputs.page}")
    return 0


def _tables(benchmark: Benchmark, options: argparse.Namespace, outputs: Outputs) -> list[Benchmark]:
    """The benchmarks that the command is for: those with points, or where it only reports with a table."""
    if options.report_only:
        found = [table for table in benchmark.tables if outputs.table(table.name).is_file()]
    else:
        found = [t for t in benchmark.tables if any(work.points for work in t.works(options))]
    return found or [benchmark]


def _warn_if_busy(console: Console) -> None:
    """Threads that wait for one that something else keeps from its CPU take milliseconds for microseconds."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        say(
            console,
            f"Other work is running here (load {load:.1f}). Times will be off, most of all with all threads.",
        )


def _measure(benchmark: Benchmark, options: argparse.Namespace, path: Path, console: Console) -> None:
    """Fills the table, point by point."""
    from benchmarks.core.progress import Display

    works = benchmark.works(options)
    if options.resume:
        works = _missing(benchmark, works, path)
    environment = machine.environment()
    keep = _keeping(benchmark, options, works)
    said: set[str] = set()
    with (
        Table(path, benchmark.columns, keep) as table,
        Display(console, sum(len(work.points) for work in works)) as display,
    ):
        for work in works:
            if work.points:
                _work(benchmark, work, environment, table, display, said)


def _missing(benchmark: Benchmark, works: Sequence[Work], path: Path) -> list[Work]:
    """The works without the points that the table has."""
    rows = read(path, benchmark.columns) if path.is_file() else []
    found = {(benchmark.key(row), row["peer"]) for row in rows}

    def is_missing(work: Work, point: Any) -> bool:
        return (benchmark.key(work.fields(point)), work.only or BASE) not in found

    return [replace(work, points=[p for p in work.points if is_missing(work, p)]) for work in works]


def _keeping(
    benchmark: Benchmark, options: argparse.Namespace, works: Sequence[Work]
) -> Callable[[Mapping[str, str]], bool]:
    """Chooses the rows of an earlier table that stay."""
    if options.resume:
        return lambda row: True
    if benchmark.group is not None:
        column, replaced = benchmark.group, getattr(options, benchmark.group)
        return lambda row: row[column] not in replaced
    points = {benchmark.key(work.fields(point)) for work in works for point in work.points}
    return lambda row: benchmark.key(row) not in points


#: The folders of benchmarks that are not named after their command.
FOLDERS: Final = {"gpu": "gpu_norms"}


def _work(
    benchmark: Benchmark,
    work: Work,
    environment: dict[str, str],
    table: Table,
    display: Display,
    said: set[str],
) -> None:
    """Runs one worker; ``said`` holds the notes that were shown, each without its point."""
    where, name = "before the first point", ""
    job = {**work.job, "points": [asdict(point) for point in work.points]}
    module = f"benchmarks.{FOLDERS.get(benchmark.name, benchmark.name)}.measure"
    try:
        with closing(workers.events(module, job, work.threads, work.limit)) as events:
            for event in events:
                if "note" in event:
                    reason = event["note"].partition(": ")[2]
                    if reason not in said:
                        display.say(event["note"])
                    said.add(reason)
                elif "point" in event:
                    name = work.points[event["point"]].name
                    where = f"at {name}"
                    display.begin()
                else:
                    rows = [row for row in event["rows"] if work.only in (None, row["peer"])]
                    table.add(row | environment for row in rows)
                    display.finish(latest(name, rows, work.threads))
    except workers.WorkerError as error:
        if work.only is None:
            raise workers.WorkerError(f"{where}, {error}") from error
        display.say(f"{where}, {work.only}: {error}")
        status = "timed out" if isinstance(error, workers.TimedOutError) else "failed"
        row = {**work.fields(work.points[0]), "peer": work.only, "status": status}
        table.add([row | environment])
        display.finish(latest(work.points[0].name, [row], work.threads))


def latest(point: str, rows: Sequence[Mapping[str, Any]], threads: int) -> str:
    """What a point gave, in one line."""
    first = rows[0]
    start = f"{point}, {plural(threads, 'thread')}"
    missing = [f"{row['peer']} {row['status']}" for row in rows if row["status"] != "measured"]
    if first["status"] == "measured":
        time, spread = first["median_us"], f"{first['ratio_q25']:.2f}-{first['ratio_q75']:.2f}"
        who = "" if first["peer"] == OURS else f" {first['peer']}"
        start += f":{who} {time:.4g} µs, {first['ratio_to_torch']:.2f} ({spread}) times torch's speed"
        if float(first["other_cpus"] or 0) > 0.1:
            missing.append(f"other work took {first['other_cpus']:.1f} CPUs, so these times are off")
        return "; ".join([start, *missing])
    return f"{start}: {'; '.join(missing)}"


def _threads(text: str) -> tuple[int, ...]:
    most = machine.cpus()
    counts = []
    for part in text.split(","):
        count = str(most) if part.strip() == "all" else part.strip()
        if not count.isdecimal() or not 1 <= int(count) <= most:
            raise argparse.ArgumentTypeError(
                f"expected numbers from 1 to the {plural(most, 'CPU')} here, or all; got {part!r}"
            )
        counts.append(int(count))
    return tuple(dict.fromkeys(counts))


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within the block SIGTERM does what Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(program: str, message: str, code: int) -> int:
    sys.stderr.write(f"{program}: {plain(message)}\n")
    return code
