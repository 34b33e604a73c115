"""What the tests of benchmarks build: jobs, rows and tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.core import command, workers
from benchmarks.core.benchmark import Benchmark
from benchmarks.core.table import Table, read
from benchmarks.registry import COMMANDS

#: The package that each peer needs; ONNX Runtime needs ONNX to be given a model.
PACKAGES = dict.fromkeys(("onnxruntime", "onnxruntime-none"), ("onnxruntime", "onnx")) | {"jax": ("jax",)}


def options_of(*arguments: str) -> Any:
    """Return the parsed arguments of the program."""
    return command.parser(COMMANDS).parse_args(arguments)


def installed(peers: Iterable[str]) -> list[str]:
    """Return the peers whose packages are here."""
    return [peer for peer in peers if all(find_spec(name) for name in PACKAGES.get(peer, ()))]


def job(points: Iterable[Any], peers: Iterable[str], **changes: Any) -> dict[str, Any]:
    """Return what a worker is told: one round."""
    told = {"points": [asdict(point) for point in points], "peers": list(peers), "threads": 1}
    return told | {"rounds": 1, "budget": 1.0, "each": 0.01, "least_rounds": 1} | changes


def measured(
    measure: Callable[..., None], points: Iterable[Any], peers: Iterable[str], **changes: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure in this process; return the rows and the notes."""
    events: list[dict[str, Any]] = []
    measure(job(points, peers, **changes), events.append)
    return rows_and_notes(events)


def measured_by_worker(
    folder: str, points: Iterable[Any], peers: Iterable[str], **changes: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure in a worker; return the rows and the notes."""
    return rows_and_notes(workers.events(f"benchmarks.{folder}.measure", job(points, peers, **changes), 1))


def in_this_process(measure: Callable[..., None]) -> Callable[..., Iterator[dict[str, Any]]]:
    """Return what stands in for ``workers.events``: the work of this worker, done here."""

    def events(
        module: str, job: Mapping[str, Any], threads: int, limit: float | None
    ) -> Iterator[dict[str, Any]]:
        assert module == measure.__module__
        found: list[dict[str, Any]] = []
        measure(dict(job) | {"threads": threads}, found.append)
        yield from found

    return events


def rows_and_notes(events: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    found = list(events)
    rows = [row for event in found for row in event.get("rows", ())]
    return rows, [event["note"] for event in found if "note" in event]


def rows_of_point(
    times: Mapping[str, float | str], figures: Mapping[str, Any] | None = None, **fields: Any
) -> list[dict[str, Any]]:
    """Return the rows of a point: microseconds by peer, or why there are none; ratios follow."""
    rows = []
    for peer, time in times.items():
        row = fields | {"peer": peer}
        if isinstance(time, str):
            rows.append(row | {"status": time, "rounds": ""})
        else:
            ratio = times["torch"] / time
            names = ("ratio_q25", "ratio_to_torch", "ratio_q75")
            rows.append(row | dict.fromkeys(names, ratio) | {"median_us": time} | dict(figures or {}))
    return rows


def write_table(benchmark: Benchmark, path: Path, rows: Iterable[Mapping[str, Any]], **common: Any) -> None:
    """Write a table with these rows; what they do not say is the same in all."""
    usual = dict.fromkeys(benchmark.columns, "") | {
        "threads": 1,
        "status": "measured",
        "rounds": benchmark.rounds,
        "machine": "A processor",
        "date": "2026-01-02T03:04:05Z",
    }
    with Table(path, benchmark.columns, keep=lambda row: False) as table:
        table.add(usual | common | row for row in rows)


def table_of(benchmark: Benchmark, folder: Path, *names: str) -> list[Any]:
    """Return the rows that a run has written: their cells of these columns, or all of them."""
    rows = read(folder / f"{benchmark.name}.csv", benchmark.columns)
    return [tuple(row[name] for name in names) for row in rows] if names else rows


def is_running(pid: int) -> bool:
    """Return whether there is a process that has not ended, even if nobody has asked how it did."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def ends(pid: int) -> bool:
    """Return whether a process ends within a time that a busy machine may take."""
    deadline = monotonic() + 30
    while is_running(pid) and monotonic() < deadline:
        sleep(0.02)
    return not is_running(pid)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that refuses wrong arguments."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert re.match(r"python -m benchmarks( [\w-]+)?: error: ", errors)
    assert errors.count("\n") == 1
    return errors


def failure(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Return the one line with which a run fails."""
    assert main(arguments) == code
    errors = capsys.readouterr().err
    assert errors.startswith("python -m benchmarks: ")
    assert errors.count("\n") == 1
    return errors
