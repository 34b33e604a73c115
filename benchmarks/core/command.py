"""``python -m benchmarks``: options that all commands share, and the run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from benchmarks.core import filling, progress, workers
from benchmarks.core.benchmark import BASE, INSTALL, OURS, PROGRAM, Benchmark, Command, plural
from benchmarks.core.filling import BUDGET
from benchmarks.core.outputs import Outputs, in_checkout, in_folder
from benchmarks.core.table import TableError
from layernorm import machine
from layernorm.arguments import Parser, positive, printable, seconds, some_of

if TYPE_CHECKING:
    from rich.console import Console

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
    if first.on_gpu:
        text = f"seconds after which the command ends; go on with --resume (default: {BUDGET:g})"
        add("--budget", type=seconds, default=BUDGET, metavar="S", help=text)
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
    report, lacking = _reporting()
    # A machine with a GPU may have nothing but PyTorch.
    if lacking and (options.report_only or not command.on_gpu):
        return _fail(lacking, code=2)
    problem = None if options.report_only else command.benchmarks[0].problem()
    if problem is not None:
        return _fail(problem, code=2)
    every = [each for one in commands for each in one.benchmarks]
    console, asked = progress.console(), _asked_for(command, options, outputs)
    try:
        with _stoppable():
            if not options.report_only:
                _warn_if_busy(console)
                filling.fill(asked, options, outputs, console)
            for benchmark in asked if report else ():
                for line in report.write(benchmark, every, outputs):
                    progress.show(console, line)
    except workers.WorkerError as error:
        return _fail(f"{error}; what was measured before is in {outputs.tables}", code=1)
    except KeyboardInterrupt:
        return _fail(f"interrupted; what was measured is in {outputs.tables}; go on with --resume", code=130)
    progress.show(console, f"Page: {outputs.page}" if report else f"There is no page: {lacking}")
    return 0


def _reporting() -> tuple[Any, str]:
    """Return the module that writes the page, or what it lacks."""
    try:
        from benchmarks.core import report
    except ModuleNotFoundError as error:
        return None, f"this command needs {error.name}: {INSTALL} (pip 25.1 or later)"
    return report, ""


def _asked_for(command: Command, options: argparse.Namespace, outputs: Outputs) -> list[Benchmark]:
    """Return the benchmarks that have points, or where the command only reports those with a table."""
    if options.report_only:
        found = [each for each in command.benchmarks if outputs.table(each.name).is_file()]
    else:
        found = [each for each in command.benchmarks if any(work.points for work in each.works(options))]
    return found or [command.benchmarks[0]]


def _warn_if_busy(console: Console | None) -> None:
    """Say so where other work takes CPUs: a thread that waits for one then takes milliseconds."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        text = "Times will be off, most of all with all threads."
        progress.show(console, f"Other work is running here (load {load:.1f}). {text}")


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
