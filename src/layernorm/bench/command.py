"""``layernorm bench norms``, which is ``python -m benchmarks norms`` too: options, and the run."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from layernorm import backends, machine
from layernorm.arguments import positive, some_of
from layernorm.bench import norms, workers
from layernorm.bench.peers import PEERS
from layernorm.bench.table import Table, TableError

if TYPE_CHECKING:
    from rich.console import Console

    from layernorm.bench.progress import Display

DEFAULT_OUT: Final = Path("runs/bench-norms")
DEFAULT_DTYPES: Final = ("float32", "bfloat16")
#: Rows and width: an activation in and out of the caches, a long row, a single step of a small network.
DEFAULT_SIZES: Final = ((64, 256), (512, 512), (4096, 1024), (16384, 2048), (1, 64), (8, 768))
DEFAULT_ROUNDS: Final = 30
_QUICK_SIZES: Final = ((64, 256), (512, 512), (1, 64), (8, 768))
_QUICK_ROUNDS: Final = 10
_BUDGET: Final = 9.0  # seconds for each point
_ALWAYS: Final = ("layernorm", "torch")


@dataclass(frozen=True)
class Outputs:
    """The files of a run.

    Attributes:
        table: the CSV file.
        image: the picture of ``layer_norm``; those of other operators have their name added.
        page: the Markdown page.
        table_name: how the page calls the table.
    """

    table: Path
    image: Path
    page: Path
    table_name: str


def in_folder(folder: Path) -> Outputs:
    """All files in one folder."""
    return Outputs(
        folder / "norms.csv", folder / "bench-norms.png", folder / "benchmarks.md", table_name="norms.csv"
    )


def in_checkout(root: Path) -> Outputs:
    """The files that the project publishes."""
    name = "benchmarks/results/norms.csv"
    return Outputs(root / name, root / "docs/images/bench-norms.png", root / "docs/benchmarks.md", name)


def add_to(commands: Any) -> None:
    """Adds the command ``bench`` with its own command ``norms``."""
    bench = commands.add_parser("bench", help="the speed of the norm operators beside others'")
    kinds = bench.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    add_norms_to(kinds, str(DEFAULT_OUT))


def add_norms_to(commands: Any, out: str) -> None:
    """Adds the command ``norms``; ``out`` tells where results go by default."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "norms",
        help="the norm operators",
        description="Measures the norm operators beside PyTorch's and others', interleaved in one process "
        "for each number of threads; writes a table, a picture and a page.",
    )
    add = parser.add_argument
    add(
        "--operator",
        type=some_of(backends.NORMS),
        default=("layer_norm",),
        metavar="A,B,…",
        help=f"some of {', '.join(backends.NORMS)} (default: layer_norm); an earlier table in the same place "
        "keeps its other operators",
    )
    add(
        "--dtypes",
        type=some_of(norms.DTYPES),
        default=DEFAULT_DTYPES,
        metavar="A,B,…",
        help=f"some of {', '.join(norms.DTYPES)} (default: {','.join(DEFAULT_DTYPES)})",
    )
    sizes = ",".join(f"{rows}x{width}" for rows, width in DEFAULT_SIZES)
    add("--sizes", type=_sizes, metavar="RxW,…", help=f"rows and width (default: {sizes})")
    add(
        "--modes",
        type=some_of(norms.MODES),
        default=norms.MODES,
        metavar="A,B",
        help="forward, training (forward and backward); default: both",
    )
    add(
        "--threads",
        type=_threads,
        default="1,all",
        metavar="N,…",
        help="numbers of threads, or all (default: 1,all)",
    )
    add(
        "--peers",
        type=some_of(tuple(PEERS)),
        default=tuple(PEERS),
        metavar="A,B,…",
        help=f"some of {', '.join(PEERS)} (default: all); {' and '.join(_ALWAYS)} are always measured",
    )
    add("--rounds", type=positive, metavar="N", help=f"samples of each peer (default: {DEFAULT_ROUNDS})")
    add("--quick", action="store_true", help=f"{_QUICK_ROUNDS} rounds, and the small sizes only")
    add("--report-only", action="store_true", help="write picture and page again from the table")
    add("--out", type=Path, metavar="DIR", help=f"folder for the results (default: {out})")


def run(options: argparse.Namespace, outputs: Outputs, program: str) -> int:
    """Measures, or only reports; returns the exit code."""
    try:
        from rich.console import Console

        from layernorm.bench import report
    except ModuleNotFoundError as error:
        return _fail(program, f"this command needs {error.name}: pip install 'layernorm[bench]'", code=2)
    console = Console()
    try:
        with _stoppable():
            if not options.report_only:
                _warn_if_busy(console)
                _measure(options, outputs.table, console)
            report.write(outputs)
    except TableError as error:
        return _fail(program, str(error), code=2)
    except workers.WorkerError as error:
        return _fail(program, f"{error}; what was measured before is in {outputs.table}", code=1)
    except KeyboardInterrupt:
        return _fail(program, f"interrupted; what was measured is in {outputs.table}", code=130)
    console.print(f"Page: {outputs.page}", soft_wrap=True, highlight=False)
    return 0


def _warn_if_busy(console: Console) -> None:
    """Threads that wait for one that something else keeps from its CPU take milliseconds for microseconds."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        console.print(
            f"Other work is running here (load {load:.1f}). Times will be off, most of all with all threads.",
            highlight=False,
            soft_wrap=True,
        )


def _measure(options: argparse.Namespace, path: Path, console: Console) -> None:
    """Fills the table, point by point."""
    from layernorm.bench.progress import Display

    names = [name for name in PEERS if name in _ALWAYS or name in options.peers]
    sizes = options.sizes or (_QUICK_SIZES if options.quick else DEFAULT_SIZES)
    rounds = options.rounds or (_QUICK_ROUNDS if options.quick else DEFAULT_ROUNDS)
    points = list(norms.grid(options.operator, options.dtypes, sizes, options.modes))
    job = norms.job(points, names, rounds, _BUDGET)
    environment = machine.environment()
    others = Table(path, norms.COLUMNS, keep=lambda row: row["operator"] not in options.operator)
    with others as table, Display(console, len(points) * len(options.threads)) as display:
        for threads in options.threads:
            _work(job, points, threads, environment, table, display)


def _work(
    job: dict[str, Any],
    points: Sequence[norms.Point],
    threads: int,
    environment: dict[str, str],
    table: Table,
    display: Display,
) -> None:
    """Runs the worker for one number of threads."""
    where = "before the first point"
    try:
        with closing(workers.events("layernorm.bench.norms", job, threads)) as events:
            for event in events:
                if "note" in event:
                    display.say(event["note"])
                elif "point" in event:
                    where = f"at {points[event['point']].name}"
                    display.begin()
                else:
                    table.add(row | environment for row in event["rows"])
                    display.finish(_latest(event["rows"], threads))
    except workers.WorkerError as error:
        raise workers.WorkerError(f"{where}, {error}") from error


def _latest(rows: Sequence[dict[str, Any]], threads: int) -> str:
    """What a point gave, in one line."""
    ours = rows[0]
    point = norms.Point(*(ours[name] for name in norms.KEYS[:-1]))
    start = f"{point.name}, {plural(threads, 'thread')}:"
    missing = [f"{row['peer']} {row['status']}" for row in rows if row["status"] != "measured"]
    if ours["status"] == "measured":
        time, spread = ours["median_us"], f"{ours['ratio_q25']:.2f}-{ours['ratio_q75']:.2f}"
        start += f" {time:.4g} µs, {ours['ratio_to_torch']:.2f} ({spread}) times torch's speed"
        if float(ours["other_cpus"] or 0) > 0.1:
            missing.append(f"other work took {ours['other_cpus']:.1f} CPUs, so these times are off")
    return "; ".join([start, *missing])


def plural(count: int, noun: str) -> str:
    """The count with its noun.

    Examples:
        >>> from layernorm.bench.command import plural
        >>> plural(1, "thread"), plural(2, "thread")
        ('1 thread', '2 threads')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([1-9]\d*)[x×]([1-9]\d*)\s*", part)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"expected ROWSxWIDTH separated by commas, as in 64x256,8x768; got {part!r}"
            )
        sizes.append((int(found[1]), int(found[2])))
    return tuple(dict.fromkeys(sizes))


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
    sys.stderr.write(f"{program}: {message}\n")
    return code
