"""A fresh process for each number of threads, because thread pools are sized when a library starts.

The parent calls ``events``; the module that it names ends with ``serve(measure)`` under
``if __name__ == "__main__"``. A job goes in as JSON, events come out as lines of JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

import torch

#: The checkout, which workers find whatever the current folder is.
ROOT: Final = Path(__file__).resolve().parents[2]
Event = dict[str, Any]
_END_WITH_PARENT: Final = 1  # PR_SET_PDEATHSIG
Emit = Callable[[Event], None]


class WorkerError(RuntimeError):
    """A worker ended before its job was done; the text says how."""


class TimedOutError(WorkerError):
    """A worker was ended because its time was over."""


def events(module: str, job: Mapping[str, Any], threads: int, limit: float | None = None) -> Generator[Event]:
    """Run ``python -m module`` with this many threads and yield what it reports, as it comes.

    Args:
        module: the full name of a module that ends with ``serve(measure)``.
        job: what to do; must go into JSON.
        threads: for PyTorch, OpenMP, XLA and everything else that asks for the number of CPUs.
        limit: seconds after which the process is ended.

    Raises:
        WorkerError: the process failed, or was killed.
        TimedOutError: the limit was reached.
    """
    over = threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | _environment(threads),
            text=True,
            start_new_session=True,
        )

        def end() -> None:
            over.set()
            os.killpg(process.pid, signal.SIGKILL)  # with those that it has started

        timer = threading.Timer(limit, end) if limit is not None else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield from _conversation(process, json.dumps({**job, "threads": threads}))
        finally:
            if timer is not None:
                timer.cancel()
            if process.poll() is None:  # interrupted, or no longer wanted
                process.terminate()
                process.wait()
        if process.returncode and over.is_set():
            raise TimedOutError(f"the worker took longer than {limit:g} seconds")
        if process.returncode:
            raise WorkerError(_ending(process.returncode, threads, log))


def serve(measure: Callable[[dict[str, Any], Emit], None]) -> None:
    """Be the worker: read the job, limit the threads, and call ``measure(job, emit)``."""
    # Ctrl-C may reach it; the parent decides what that means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # nor does a worker, or the worker of one, outlive whoever wanted its figures
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    # Whatever libraries print must not get between the events.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        job = json.load(sys.stdin)
        _limit(job["threads"])

        def emit(event: Event) -> None:
            channel.write(json.dumps(event) + "\n")
            channel.flush()

        measure(job, emit)


def _environment(threads: int) -> dict[str, str]:
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables["JAX_PLATFORMS"] = "cpu"
    # Inductor's pool of compiling processes would run next to what is measured.
    variables["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if threads == 1:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    return variables


def _limit(threads: int) -> None:
    torch.set_num_threads(threads)
    # XLA's flags alone leave it a second thread; a process that may run on one CPU has none.
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        # The last ones: the first CPU is the one that most interrupts go to.
        os.sched_setaffinity(0, allowed[-threads:])


def _conversation(process: subprocess.Popen[str], job: str) -> Iterator[Event]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the worker has no pipes")
    with process.stdin as pipe, process.stdout as lines:
        try:
            pipe.write(job)
            pipe.close()
        except BrokenPipeError:
            pass  # it has ended already, and its exit code tells more
        for line in lines:
            yield json.loads(line)
    process.wait()


def _ending(code: int, threads: int, log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    if code < 0:
        try:
            how = f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            how = f"was killed by signal {-code}"
    else:
        how = f"failed with exit code {code}"
    last = f": {lines[-1]}" if lines else ""
    return f"the worker with {threads} thread{'s' if threads > 1 else ''} {how}{last}"
