"""The runs of a comparison on the machines of a Ray cluster, each run on one of them."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path

from layernorm.experiments import registry
from layernorm.experiments.commands import compare
from layernorm.experiments.commands.compare import Comparison
from layernorm.experiments.commands.progress import Display
from layernorm.experiments.errors import DamagedFile, ExperimentError
from layernorm.experiments.results import results_table
from layernorm.experiments.run.training import Interrupted, Run
from layernorm.experiments.storage import files
from layernorm.experiments.task import Task

#: How often a run whose worker was lost is started again.
_RETRIES = 3
#: Seconds between looks at whether to stop.
_LOOK = 0.2


class RaySweep:
    """Trains runs side by side.

    A lost worker's run is given to another one. It continues from its checkpoint where ``out`` is storage
    that all machines see, and from its start elsewhere. What a run has written comes back to
    the machine that asked.

    Args:
        address: of the cluster, as ``ray.init`` takes it; None starts one on this machine.
        cpus: for each run; also its number of threads.
        gpus: for each run, or a part of one.

    Raises:
        ExperimentError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, address: str | None = None, cpus: int = 1, gpus: float = 0.0) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ExperimentError("--ray needs ray: pip install 'layernorm[ray]'") from error
        self._ray, self._cpus, self._gpus = ray, cpus, gpus
        if ray.is_initialized():
            return
        try:
            _reach(address)
            ray.init(
                address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ExperimentError(f"--ray: cannot reach the cluster {address!r}: {reason}") from error

    def __call__(
        self, comparison: Comparison, runs: list[Run], display: Display, stop: Callable[[], bool]
    ) -> None:
        """Train the runs, and show each when it ends.

        Raises:
            Interrupted: ``stop`` answered True; runs that were not finished begin again.
            ExperimentError: a run failed, or was lost too often; the others are finished first.
        """
        ray = self._ray
        remote = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=_RETRIES)(_train)
        pending = {remote.remote(comparison, run, self._cpus): run for run in runs}
        failed: dict[str, str] = {}
        try:
            while pending:
                ready, _ = ray.wait(list(pending), num_returns=1, timeout=_LOOK)
                if stop():
                    raise Interrupted
                if not ready:
                    continue
                (done,) = ready
                run = pending.pop(done)
                try:
                    self._keep(comparison, run, ray.get(done), display)
                except (ray.exceptions.RayError, ExperimentError) as error:
                    reason = str(error).strip().splitlines()[-1]
                    failed[run.name] = reason
                    display.say(run, f"lost: {reason}")
        except (Interrupted, KeyboardInterrupt):
            for task in pending:
                ray.cancel(task, force=True)
            raise
        if failed:
            name, reason = next(iter(failed.items()))
            raise ExperimentError(
                f"{len(failed)} of {len(runs)} runs were lost, {name} first ({reason}); the same command "
                "trains them again, and what is finished is kept"
            )

    @staticmethod
    def _keep(comparison: Comparison, run: Run, written: dict[str, bytes], display: Display) -> None:
        """Keep the files that a run has written, where its machine does not share this one's storage."""
        for name, content in written.items():
            path = comparison.out / name
            if path.is_file() and path.read_bytes() == content:
                continue
            files.make_folder(path.parent)
            files.write(path, content)
        display.finish(run, compare.recorded(comparison, run))


def _reach(address: str | None) -> None:
    """Check that something listens at host:port, for which Ray itself would wait for minutes.

    Raises:
        OSError: nothing does.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _train(comparison: Comparison, run: Run, threads: int) -> dict[str, bytes]:
    """Train a run on a worker; return its files by their paths in the comparison's folder."""
    import torch

    torch.set_num_threads(threads)
    task = registry.find(comparison.task)
    table = comparison.path(run, ".csv")
    files.make_folder(table.parent)
    if not _is_finished(comparison, run, task):
        compare.train(comparison, run, task.problem(**comparison.preset.sizes), None)
    written: list[Path] = [comparison.path(run, ".pt")]
    written += (comparison.out / "samples").glob(f"{run.name}-*.png")
    written += (comparison.out / "tensorboard" / run.name).glob("*")
    written += [files.checksum(table), table]  # the table last: it says that the run is finished
    return {str(path.relative_to(comparison.out)): path.read_bytes() for path in written if path.is_file()}


def _is_finished(comparison: Comparison, run: Run, task: Task) -> bool:
    """Return whether a run has its table, on storage where another worker has written it."""
    if not comparison.path(run, ".csv").exists():
        return False
    try:
        results_table.read(comparison.path(run, ".csv"), task, comparison.about(run))
    except DamagedFile:
        return False
    return True
