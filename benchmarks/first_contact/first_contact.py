"""First contact with a GPU: what runs, what is right, and what it takes, the most valuable first.

    python3 -W ignore benchmarks/first_contact/first_contact.py --out DIR --budget 380 [STAGE ...]

This file needs Python alone, its stages PyTorch and Triton: neither the compiled module nor a package of
the benchmarks, nor an installation. Each stage is a process of its own, since an error of the device stays
with its process, and each has a limit. A figure is a line of JSON in ``DIR/first_contact.jsonl``, which is
there when it is printed. The last line of a stage has its status; the whole ends within the budget, whatever
fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
#: The stages in their order, and seconds for each.
STAGES: Final[Mapping[str, float]] = {
    "device": 60,
    "exchange": 60,
    "triton:lstm:bfloat16": 90,
    "looped:lstm:bfloat16": 60,
    "dependent:lstm:bfloat16": 60,
    "persistent:lstm:bfloat16": 120,
    "cudnn": 90,
    "norms:bfloat16": 90,
    "hand:lstm:bfloat16": 90,
    "triton:gru:bfloat16": 60,
    "looped:gru:bfloat16": 60,
    "persistent:gru:bfloat16": 90,
    "triton:lstm:float32": 60,
    "persistent:lstm:float16": 60,
    "norms:float32": 60,
    "triton:rnn:bfloat16": 60,
    "persistent:rnn:bfloat16": 60,
}
#: Seconds that all of it may take at most, and does unless a budget is given.
MOST_BUDGET: Final = 540.0
BUDGET: Final = 380.0
#: Seconds for a process that was killed to be gone. The driver may keep it; then the run goes on without it.
GRACE: Final = 5.0
_LEAST: Final = 2.0
_ERROR_CHARACTERS: Final = 2000


class Log:
    """The file of figures, which the threads that read processes share."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._lock = file, threading.Lock()

    def write(self, line: str) -> None:
        """Put a line into the file, and then on the screen."""
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def follow(self, stage: str, lines: IO[str]) -> None:
        """Write what a process prints, as it comes; what is no JSON becomes the text of some."""
        with lines:
            for line in lines:
                text = line.rstrip("\n")
                self.write(text if _is_json(text) else _json(stage=stage, text=text))


def run_stages(
    stages: Mapping[str, float],
    command: Sequence[str],
    out: Path,
    budget: float,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run stages one after another, each in a process group of its own; return how many failed.

    Args:
        stages: their names, in order, and seconds for each.
        command: that a stage's name is added to.
        out: the folder of ``first_contact.jsonl``, which is appended to.
        budget: seconds for everything; a stage for which none are left is not begun.
        environment: of the processes, None for this one's.
    """
    deadline = time.monotonic() + budget
    failed = 0
    out.mkdir(parents=True, exist_ok=True)
    with (out / "first_contact.jsonl").open("a", encoding="utf-8") as file:
        log = Log(file)
        for name, limit in stages.items():
            left = deadline - time.monotonic() - 2 * GRACE  # to kill it, and to read the rest
            if left < _LEAST:
                log.write(_json(stage=name, status="no time was left"))
                continue
            began = time.monotonic()
            status, error = _run(name, [*command, name], min(limit, left), log, environment)
            seconds = round(time.monotonic() - began, 1)
            failed += status != 0
            log.write(_json(stage=name, status=status, seconds=seconds, error=error))
    return failed


def _run(
    name: str, command: Sequence[str], limit: float, log: Log, environment: Mapping[str, str] | None
) -> tuple[int | str, str]:
    """Run a stage; return its exit code, or what else ended it, and the end of what it wrote to stderr."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=log.follow, args=(name, process.stdout), daemon=True)
        reader.start()
        status: int | str
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"took longer than {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # what it has started and left behind ends with it
                os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            status = f"{status}, and cannot be killed"
        reader.join(GRACE)
        if status == 0:
            return status, ""
        errors.seek(0)
        return status, errors.read()[-_ERROR_CHARACTERS:]


def _json(**fields: Any) -> str:
    return json.dumps(fields)


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def environment(*, rehearse: bool) -> dict[str, str]:
    """Return the environment of the stages: the checkout on the path, and what CUDA and Triton ask for."""
    path = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TRITON_INTERPRET": "1" if rehearse else "0",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a stage failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks first_contact",
        description="Find out on a GPU, in minutes, what runs, what is right and what it takes.",
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    text = f"seconds for everything, {MOST_BUDGET:g} at most (default: {BUDGET:g})"
    parser.add_argument("--budget", type=_budget, default=BUDGET, metavar="S", help=text)
    text = "tiny sizes on the CPU, in Triton's interpreter: whether it runs, no figure of a GPU"
    parser.add_argument("--rehearse", action="store_true", help=text)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"there is no stage {', '.join(unknown)}; the stages are {', '.join(STAGES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage that runs is ended
    stages = {name: limit for name, limit in STAGES.items() if name in (options.stages or STAGES)}
    found = environment(rehearse=options.rehearse)
    return int(run_stages(stages, command(options), options.out, options.budget, found) > 0)


def command(options: argparse.Namespace) -> list[str]:
    """Return what a stage's name is added to."""
    return [sys.executable, "-m", "benchmarks.first_contact.stages", *["--rehearse"] * options.rehearse]


def _budget(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MOST_BUDGET:
        raise argparse.ArgumentTypeError(f"expected seconds, {MOST_BUDGET:g} at most; got {text!r}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
