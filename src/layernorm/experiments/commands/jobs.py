"""The runs of a comparison side by side, in processes of this machine."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import Any

import torch

from layernorm.experiments import registry
from layernorm.experiments.commands import compare
from layernorm.experiments.commands.compare import Comparison
from layernorm.experiments.commands.progress import Display
from layernorm.experiments.errors import ExperimentError
from layernorm.experiments.run.training import Interrupted, Run
from layernorm.experiments.task import Problem

#: Seconds between looks at whether to stop.
_LOOK = 0.2
_asked: Event | None = None


class Jobs:
    """Trains runs side by side, each in a process with its share of the threads.

    Args:
        count: how many at a time.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(
        self, comparison: Comparison, runs: list[Run], display: Display, stop: Callable[[], bool]
    ) -> None:
        """Train the runs, and show each when it ends.

        Raises:
            Interrupted: ``stop`` answered True; checkpoints hold what was reached.
            ExperimentError: a run failed, or a process was lost.
        """
        if not runs:
            return
        context = multiprocessing.get_context("spawn")  # a fork would have half of the threads' locks
        asked = context.Event()
        threads = max(1, torch.get_num_threads() // self._count)
        with ProcessPoolExecutor(
            min(self._count, len(runs)), context, initializer=_begin, initargs=(asked, threads)
        ) as pool:
            pending: dict[Future[None], Run] = {pool.submit(_train, comparison, run): run for run in runs}
            try:
                while pending and not stop():
                    done, _ = wait(pending, _LOOK, FIRST_COMPLETED)
                    for future in done:
                        run = pending.pop(future)
                        future.result()
                        display.finish(run, compare.recorded(comparison, run))
            except BrokenProcessPool as error:
                raise ExperimentError(
                    "a process that trains was lost; the same command goes on from what was reached"
                ) from error
            finally:
                asked.set()
                pool.shutdown(cancel_futures=True)
        if pending:
            raise Interrupted


def _begin(asked: Event, threads: int) -> None:
    """Prepare a process: Ctrl-C is for the one that started it, which tells the others."""
    global _asked
    _asked = asked
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)


@functools.cache
def _problem(task: str, sizes: tuple[tuple[str, Any], ...]) -> Problem:
    return registry.find(task).problem(**dict(sizes))


def _train(comparison: Comparison, run: Run) -> None:
    assert _asked is not None  # noqa: S101 - the initializer has run
    if not _asked.is_set():
        problem = _problem(comparison.task, tuple(comparison.preset.sizes.items()))
        with contextlib.suppress(Interrupted):  # whoever asked for it knows
            compare.train(comparison, run, problem, None, _asked.is_set)
