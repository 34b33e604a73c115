"""One run: a network trained with one norm, batch size and seed, resumable to the bit.

The order of the training cases is a function of (seed, epoch), what a loss draws one of (seed, update), and a
checkpoint holds the network, the optimizer, the position and the random state: a run that was
interrupted ends with the weights of one that was not. With several processes each takes its part of every
batch, and an update is the one that a single process would have made.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeAlias
from urllib.parse import quote, unquote

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from layernorm.experiments.errors import ExperimentError
from layernorm.experiments.run import checkpoints, optimizers, processes
from layernorm.experiments.task import Batch, Loss, Preset, Problem

#: The layout of checkpoints and of a comparison's folder.
FORMAT: Final = 5
EVALUATIONS_PER_EPOCH: Final = 4
#: Seconds between checkpoints inside an epoch.
CHECKPOINT_SECONDS: Final = 10.0

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
#: One logged step: the values of ``COLUMNS``, and the task's metrics.
Record: TypeAlias = Mapping[str, Any]
#: The columns of every task; ``train_loss`` is the mean over the updates since the last record.
COLUMNS: Final = (
    "norm", "batch_size", "learning_rate", "warmup", "seed", "update", "epoch", "seconds", "train_loss",
)  # fmt: skip


class Interrupted(Exception):
    """Training was asked to stop; everything reached is in the checkpoint."""


@dataclass(frozen=True)
class Run:
    """The settings that distinguish one run of a comparison from another."""

    norm: str
    batch_size: int
    learning_rate: float
    seed: int
    warmup: int = 0

    @property
    def name(self) -> str:
        """The name of the run in file names."""
        norm = quote(self.norm, safe="")
        warmup = f"-warmup{self.warmup}" if self.warmup else ""
        return f"{norm}-batch{self.batch_size}-rate{self.learning_rate!r}{warmup}-seed{self.seed}"

    @classmethod
    def named(cls, name: str) -> Self | None:
        """Return the run of a name, or None.

        Examples:
            >>> from layernorm.experiments.run.training import Run
            >>> Run.named("none-batch4-rate0.001-seed0"), Run.named("notes")
            (Run(norm='none', batch_size=4, learning_rate=0.001, seed=0, warmup=0), None)
        """
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        norm, batch_size, rate, warmup, seed = found.groups()
        return cls(unquote(norm), int(batch_size), float(rate), int(seed), int(warmup or 0))


_NAME: Final = re.compile(
    r"(.+)-batch([1-9]\d{0,17})-rate(\d+(?:\.\d+)?(?:e[-+]\d+)?)"
    r"(?:-warmup([1-9]\d{0,17}))?-seed(0|[1-9]\d{0,17})",
    re.ASCII,
)


class _Objective(nn.Module):
    """A network's loss as a module's forward, which is what DistributedDataParallel watches."""

    def __init__(self, problem: Problem, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._problem = problem

    def forward(self, batch: Batch) -> Loss:
        return self._problem.loss(self.network, batch)


class Trainer:
    """Trains one run of a task and keeps its records.

    Args:
        problem: what is trained, its data on ``device``.
        run: norm, batch size, learning rate, warm-up and seed.
        preset: epochs, optimizer, schedule, clipping, evaluations.
        checkpoint: the file that keeps an unfinished run; read if it exists.
        device: where to train.
        precision: of the forward pass: float32, or autocast to one of the others.
        identity: what else must not change between a checkpoint and its continuation.
        guard: called before the checkpoint is written; raises where this process must not.

    Raises:
        DamagedFile: the checkpoint is empty, torn or changed.
        ExperimentError: it is of another run or version.
    """

    def __init__(
        self,
        problem: Problem,
        run: Run,
        preset: Preset,
        checkpoint: Path,
        device: torch.device | None = None,
        precision: Precision = "float32",
        identity: str = "",
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.preset = run, preset
        self._guard = guard
        self._problem, self._checkpoint = problem, checkpoint
        self._device = device or torch.device("cpu")
        self._precision = precision
        self._identity = f"{identity} {run.name}".strip()
        self.per_epoch = problem.cases // run.batch_size
        self.updates = self.per_epoch * preset.epochs
        torch.manual_seed(run.seed)
        self.network = problem.network(run.norm).to(self._device)
        self._optimizer = optimizers.make(preset.optimizer, run.learning_rate, self.network)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "float16")
        objective = _Objective(problem, self.network)
        self._objective: nn.Module = objective
        if processes.count() > 1:
            self._objective = DistributedDataParallel(objective)
        self.update = 0
        self.records: list[Record] = []
        self._seconds = 0.0
        self._loss_sum, self._loss_count = 0.0, 0
        self._restore()

    def train(
        self,
        progress: Callable[[Trainer], None] = lambda trainer: None,
        stop: Callable[[], bool] = lambda: False,
        recorded: Callable[[Record], None] = lambda record: None,
    ) -> None:
        """Train to the end; call ``progress`` now and then and ``recorded`` with each new record.

        Raises:
            Interrupted: ``stop`` answered True in some process; the checkpoint holds what was reached.
        """
        if not self.records:
            self._evaluate(recorded)
        saved = shown = time.monotonic()
        order = self.order(self.update // self.per_epoch)
        stopping = False
        while self.update < self.updates and not stopping:
            epoch, position = divmod(self.update, self.per_epoch)
            if position == 0:
                order = self.order(epoch)
            size = self.run.batch_size
            stopping = self.step(order[position * size : (position + 1) * size], stop())
            if self._is_mark():
                self._evaluate(recorded)
            now = time.monotonic()
            if now - shown > 0.1:
                progress(self)
                shown = now
            if not stopping and now - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = now
        if stopping and self.update < self.updates:
            self.save()
            raise Interrupted
        progress(self)

    def step(self, cases: Tensor, stop: bool = False) -> bool:
        """Make one update on these training cases; return whether any process wants to stop."""
        began = time.perf_counter()
        if not self.network.training:  # evaluations leave it so; setting it takes as long as a small layer
            self.network.train()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        with torch.autocast(self._device.type, self._autocast, enabled=self._precision != "float32"):
            loss = self._objective(self._batch(cases))
        total, total_count, stops = processes.summed(loss.total.item(), loss.count, stop)
        self._optimizer.zero_grad()
        # DistributedDataParallel takes the mean over the processes; wanted is their sum over the count.
        divisor = 1 if loss.is_summed else total_count
        self._scaler.scale(loss.total * (processes.count() / divisor)).backward()
        if self.preset.clip is not None:
            self._scaler.unscale_(self._optimizer)
            parameters = list(self.network.parameters())
            for limited in [[one] for one in parameters] if self.preset.clip_each else [parameters]:
                nn.utils.clip_grad_norm_(limited, self.preset.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._loss_sum += total / total_count
        self._loss_count += 1
        self.update += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds += time.perf_counter() - began
        return stops > 0

    def order(self, epoch: int) -> Tensor:
        """Return the training cases in the order of this epoch."""
        generator = torch.Generator().manual_seed(_mixed(self.run.seed, epoch))
        order = torch.randperm(self._problem.cases, generator=generator)
        return order.to(self._device)

    def save(self) -> None:
        """Replace the checkpoint by the present state, whole or not at all; process 0 does it for all."""
        if processes.rank() != 0:
            return
        state = {
            "format": FORMAT,
            "run": self._identity,
            "update": self.update,
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
            "records": [dict(record) for record in self.records],
            "seconds": self._seconds,
            "loss": (self._loss_sum, self._loss_count),
        }
        self._guard()
        checkpoints.write(self._checkpoint, state)

    def _restore(self) -> None:
        """Take the state of the checkpoint, which only process 0 needs to see."""
        content = None
        if processes.rank() == 0 and self._checkpoint.is_file():
            content = self._read()
        content = processes.from_leader(content)
        if content is None:
            return
        if isinstance(content, ExperimentError):
            raise content
        self.network.load_state_dict(content["network"])
        self._optimizer.load_state_dict(content["optimizer"])
        self._scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"])
        if content["random_cuda"] is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(content["random_cuda"], self._device)
        self.update = content["update"]
        self.records = list(content["records"])
        self._seconds = content["seconds"]
        self._loss_sum, self._loss_count = content["loss"]

    def _read(self) -> dict[str, Any] | ExperimentError | None:
        """Read the checkpoint's state and try it on the network; return it, what is wrong, or None."""
        try:
            state = checkpoints.read(self._checkpoint)
            if state.get("format") != FORMAT:
                raise ValueError("it is of another version of layernorm")
            if state["run"] != self._identity:
                raise ValueError(f"it is of the run {state['run']}")
            self.network.load_state_dict(state["network"])
            self._optimizer.load_state_dict(state["optimizer"])
            missing = {"scaler", "random", "random_cuda", "update", "records", "seconds", "loss"} - set(state)
            if missing:
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        except FileNotFoundError:
            return None
        except ExperimentError as error:
            return error
        except Exception as error:  # whatever a state makes of the network
            return checkpoints.unusable(self._checkpoint, error)
        return state

    @property
    def _autocast(self) -> torch.dtype | None:
        return None if self._precision == "float32" else getattr(torch, self._precision)

    def _batch(self, cases: Tensor) -> Batch:
        """Return this process's part of the batch."""
        size, rank, count = len(cases), processes.rank(), processes.count()
        start, end = rank * size // count, (rank + 1) * size // count
        generator = torch.Generator().manual_seed(_mixed(self.run.seed, self.update))
        return Batch(cases[start:end], start, size, generator)

    def _rate(self) -> float:
        """Return the learning rate of the next update."""
        schedule, warmup = self.preset.schedule, self.run.warmup
        rise = min(1.0, (self.update + 1) / warmup) if warmup else 1.0
        done = self.update / self.updates
        if schedule == "cosine":
            rise *= 0.5 * (1.0 + math.cos(math.pi * done))
        elif schedule == "linear":
            rise *= 1.0 - done
        return self.run.learning_rate * rise

    def _is_mark(self) -> bool:
        """Return whether there is an evaluation after this update."""
        every = self.preset.evaluate_every
        if every is not None:
            return self.update % every == 0 or self.update == self.updates
        count = min(EVALUATIONS_PER_EPOCH, self.per_epoch)
        return self.update % self.per_epoch in {self.per_epoch * k // count for k in range(count)}

    def _evaluate(self, recorded: Callable[[Record], None]) -> None:
        """Record the mean training loss since the last record, and the metrics."""
        metrics: dict[str, float] = {}
        if processes.rank() == 0:
            self.network.eval()
            with torch.no_grad():
                found = self._problem.evaluate(self.network)
            metrics = {name: float(value) for name, value in found.items()}
        record = {
            "norm": self.run.norm,
            "batch_size": self.run.batch_size,
            "learning_rate": self.run.learning_rate,
            "warmup": self.run.warmup,
            "seed": self.run.seed,
            "update": self.update,
            "epoch": self.update / self.per_epoch,
            "seconds": self._seconds,
            "train_loss": self._loss_sum / self._loss_count if self._loss_count else None,
            **processes.from_leader(metrics),
        }
        self.records.append(record)
        recorded(record)
        self._loss_sum, self._loss_count = 0.0, 0


def _mixed(seed: int, number: int) -> int:
    """Mix a seed and a number into another seed."""
    return seed * 1_000_003 + number
