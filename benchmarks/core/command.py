"""``python -m benchmarks``: options that all commands share, and the run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from benchmarks.core import workers
from benchmarks.core.benchmark import BASE, INSTALL, OURS, PROGRAM, Benchmark, Command, Work, plural
from benchmarks.core.outputs import Outputs, in_checkout, in_folder
from benchmarks.core.table import Table, TableError, read
from layernorm import machine
from layernorm.arguments import Parser, positive, printable, say, some_of

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.core.progress import Display

_EPILOG: Final = """\
Times are medians of interleaved samples; other work on the machine spoils them. Continue a run that was
stopped with the same command and --resume. --report-only writes pictures and page again.
"""


def main(commands: Sequence[Command], arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; return the exit code."""
    options = parser(commands).parse_args(arguments)
    outputs = in_folder(options.out) if options.out else in_checkout(workers.ROOT)
    try:
        return run(options, commands, outputs)
    except TableError as error:
        return _fail(str(error), code=2)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"cannot read or write{where}: {error.strerror or error}", code=2)


def parser(commands: Sequence[Command]) -> Parser:
    """Return the parser of the arguments, which sets ``command`` among others."""
    description = (
        "The benchmarks that the project publishes; and first_contact, the first minutes on a GPU, which has "
        f"options of its own ({PROGRAM} first_contact --help)."
    )
    found = Parser(prog=PROGRAM, description=description)
    kinds = found.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for command in commands:
        examples = "".join(f"  {PROGRAM} {command.name} {example}\n" for example in command.examples)
        about = [command.about, *(each.about for each in command.benchmarks)]
        parts = [*filter(None, about), f"examples:\n{examples}" if examples else "", _EPILOG]
        kind: argparse.ArgumentParser = kinds.add_parser(
            command.name,
            help=command.title,
            description=command.description,
            epilog="\n".join(filter(None, parts)),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        kind.set_defaults(command=command)
        _add_options(kind, command)
    return found


def _add_options(kind: argparse.ArgumentParser, command: Command) -> None:
    first = command.benchmarks[0]
    for axis in command.axes():
        axis.add_to(kind)
    add = kind.add_argument
    add(
        "--rounds",
        type=positive,
        metavar="N",
        help=f"samples of each peer, at most (default: {first.rounds})",
    )
    for name, settings in (option for each in command.benchmarks for option in each.options.items()):
        add(f"--{name}", **settings)
    smaller = " and a smaller grid" if any(axis.quick for axis in command.axes()) else ""
    add("--quick", action="store_true", help=f"{first.quick_rounds} rounds{smaller}")
    if not first.on_gpu:
        text = "numbers of threads, or all (default: 1,all)"
        add("--threads", type=_threads, default="1,all", metavar="N,…", help=text)
    if set(command.peers) - {OURS, BASE}:
        but = f" but {', '.join(first.on_request)}" if first.on_request else ""
        text = (
            f"some of {', '.join(command.peers)} (default: all{but}); {OURS} and {BASE} are always measured"
        )
        add("--peers", type=some_of(command.peers), metavar="A,B,…", help=text)
    add("--resume", action="store_true", help="measure only the points that the table does not have")
    add("--report-only", action="store_true", help="write pictures and page again from the table")
    default = "the published files, in benchmarks/results and docs"
    add("--out", type=Path, metavar="DIR", help=f"folder for the results (default: {default})")


def run(options: argparse.Namespace, commands: Sequence[Command], outputs: Outputs) -> int:
    """Measure, or only report; return the exit code.

    Raises:
        TableError: a table is missing or damaged or cannot be written.
        OSError: a file cannot be read or written.
    """
    command: Command = options.command
    try:
        from rich.console import Console

        from benchmarks.core import report
    except ModuleNotFoundError as error:
        return _fail(f"this command needs {error.name}: {INSTALL} (pip 25.1 or later)", code=2)
    console = Console()
    problem = None if options.report_only else command.benchmarks[0].problem()
    if problem is not None:
        return _fail(problem, code=2)
    every = [each for one in commands for each in one.benchmarks]
    path = outputs.page
    try:
        with _stoppable():
            if not options.report_only:
                _warn_if_busy(console)
            for benchmark in _asked_for(command, options, outputs):
                path = outputs.table(benchmark.name)
                if not options.report_only:
                    _measure(benchmark, options, path, console)
                for line in report.write(benchmark, every, outputs):
                    say(console, line)
    except workers.WorkerError as error:
        return _fail(f"{error}; what was measured before is in {path}", code=1)
    except KeyboardInterrupt:
        return _fail(f"interrupted; what was measured is in {path}; go on with --resume", code=130)
    say(console, f"Page: {outputs.page}")
    return 0


def _asked_for(command: Command, options: argparse.Namespace, outputs: Outputs) -> list[Benchmark]:
    """Return the benchmarks that have points, or where the command only reports those with a table."""
    if options.report_only:
        found = [each for each in command.benchmarks if outputs.table(each.name).is_file()]
    else:
        found = [each for each in command.benchmarks if any(work.points for work in each.works(options))]
    return found or [command.benchmarks[0]]


def _warn_if_busy(console: Console) -> None:
    """Say so where other work takes CPUs: a thread that waits for one then takes milliseconds."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        text = "Times will be off, most of all with all threads."
        say(console, f"Other work is running here (load {load:.1f}). {text}")


def _measure(benchmark: Benchmark, options: argparse.Namespace, path: Path, console: Console) -> None:
    """Fill the table, point by point."""
    from benchmarks.core.progress import Display

    works = benchmark.works(options)
    if options.resume:
        works = _missing(benchmark, works, path)
    keep = _kept_rows(benchmark, options, works)
    points = sum(len(work.points) for work in works)
    with Table(path, benchmark.columns, keep) as table, Display(console, points) as display:
        run = _Run(benchmark, table, display, machine.environment())
        for work in works:
            if work.points:
                run.work(work)


def _missing(benchmark: Benchmark, works: Sequence[Work], path: Path) -> list[Work]:
    """Return the works without the points that the table has."""
    rows = read(path, benchmark.columns) if path.is_file() else []
    found = {(benchmark.key(row), row["peer"]) for row in rows}

    def is_missing(work: Work, point: Any) -> bool:
        return (benchmark.key(work.fields(point)), work.only or BASE) not in found

    return [replace(work, points=[p for p in work.points if is_missing(work, p)]) for work in works]


def _kept_rows(
    benchmark: Benchmark, options: argparse.Namespace, works: Sequence[Work]
) -> Callable[[Mapping[str, str]], bool]:
    """Return what chooses the rows of an earlier table that stay."""
    if options.resume:
        return lambda row: True
    column = benchmark.replaced_by
    if column is not None:
        replaced = benchmark.axis(column).chosen(options)
        return lambda row: row[column] not in replaced
    points = {benchmark.key(work.fields(point)) for work in works for point in work.points}
    return lambda row: benchmark.key(row) not in points


@dataclass
class _Run:
    """A run that fills a table; ``said`` holds the notes that were shown, each without its point."""

    benchmark: Benchmark
    table: Table
    display: Display
    environment: dict[str, str]
    said: set[str] = field(default_factory=set)

    def work(self, work: Work) -> None:
        """Run one worker."""
        where, name = "before the first point", ""
        job = {**work.job, "points": [asdict(point) for point in work.points]}
        module = f"benchmarks.{self.benchmark.folder}.measure"
        try:
            with closing(workers.events(module, job, work.threads, work.limit)) as events:
                for event in events:
                    if "note" in event:
                        self._say_once(event["note"])
                    elif "point" in event:
                        name = work.points[event["point"]].name
                        where = f"at {name}"
                        self.display.begin()
                    else:
                        self._add(name, [r for r in event["rows"] if work.only in (None, r["peer"])], work)
        except workers.WorkerError as error:
            if work.only is None:
                raise workers.WorkerError(f"{where}, {error}") from error
            self.display.say(f"{where}, {work.only}: {error}")
            status = "timed out" if isinstance(error, workers.TimedOutError) else "failed"
            row = {**work.fields(work.points[0]), "peer": work.only, "status": status}
            self._add(work.points[0].name, [row], work)

    def _say_once(self, note: str) -> None:
        reason = note.partition(": ")[2]
        if reason not in self.said:
            self.display.say(note)
        self.said.add(reason)

    def _add(self, name: str, rows: Sequence[Mapping[str, Any]], work: Work) -> None:
        self.table.add({**row, **self.environment} for row in rows)
        self.display.finish(latest(name, rows, work.threads))


def latest(point: str, rows: Sequence[Mapping[str, Any]], threads: int) -> str:
    """Return what a point gave, in one line."""
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
    """Let SIGTERM do what Ctrl-C does, within the block."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"{PROGRAM}: {printable(message)}\n")
    return code
