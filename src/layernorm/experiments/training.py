"""One run: a network trained with one norm, batch size and seed, resumable to the bit.

The order of the training cases is a function of (seed, epoch), and a checkpoint holds the network, the
optimizer, the position and the random state: a run that was interrupted ends with the weights of one
that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from layernorm.experiments.files import replacing
from layernorm.experiments.task import Data, ExperimentError, Task

EVALUATIONS_PER_EPOCH: Final = 4
#: Seconds between checkpoints inside an epoch.
CHECKPOINT_SECONDS: Final = 10.0
_TEST_CASES_AT_ONCE: Final = 1000


class Record(NamedTuple):
    """One logged step; the fields are the columns of ``results.csv``.

    Attributes:
        norm: of the run.
        batch_size: of the run.
        seed: of the run.
        update: updates made.
        epoch: passes over the training cases made.
        seconds: spent on updates.
        train_loss: mean over the updates since the last record; None before the first update.
        test_loss: mean over the test cases.
        test_error: percentage of the test cases.
    """

    norm: str
    batch_size: int
    seed: int
    update: int
    epoch: float
    seconds: float
    train_loss: float | None
    test_loss: float
    test_error: float


class Interrupted(Exception):
    """Training was asked to stop; everything reached is in the checkpoint."""


@dataclass(frozen=True)
class Run:
    """What distinguishes one run of a comparison from another."""

    norm: str
    batch_size: int
    seed: int

    @property
    def name(self) -> str:
        """As in file names."""
        return f"{self.norm}-batch{self.batch_size}-seed{self.seed}"


class Trainer:
    """Trains one run of a task and keeps its records.

    Args:
        task: what is trained.
        data: the task's data on the device to train on.
        run: norm, batch size and seed.
        epochs: passes over the training cases.
        checkpoint: the file that keeps an unfinished run; read if it exists.

    Raises:
        ExperimentError: the checkpoint is damaged or of another run.
    """

    def __init__(self, task: Task, data: Data, run: Run, epochs: int, checkpoint: Path) -> None:
        self.run = run
        self._task, self._data, self._checkpoint = task, data, checkpoint
        self._per_epoch = len(data.train_inputs) // run.batch_size
        self.updates = self._per_epoch * epochs
        torch.manual_seed(run.seed)
        self.network = task.network(run.norm).to(data.train_inputs.device)
        self._optimizer = torch.optim.Adam(self.network.parameters(), task.learning_rate, fused=True)
        self.update = 0
        self.records: list[Record] = []
        self._seconds = 0.0
        self._loss_sum, self._loss_count = 0.0, 0
        if checkpoint.is_file():
            self._restore()

    def train(self, progress: Callable[[Trainer], None], stop: Callable[[], bool]) -> None:
        """Trains to the end, calling ``progress`` now and then.

        Raises:
            Interrupted: ``stop`` answered True; the checkpoint holds what was reached.
        """
        if not self.records:
            self._evaluate()
        marks = self._evaluation_marks()
        saved = shown = time.monotonic()
        order = self._order(self.update // self._per_epoch)
        while self.update < self.updates:
            epoch, position = divmod(self.update, self._per_epoch)
            if position == 0:
                order = self._order(epoch)
            size = self.run.batch_size
            self._step(order[position * size : (position + 1) * size])
            if self.update % self._per_epoch in marks:
                self._evaluate()
            now = time.monotonic()
            if now - shown > 0.1:
                progress(self)
                shown = now
            if stop():
                self.save()
                raise Interrupted
            if now - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = now
        progress(self)

    def save(self) -> None:
        """Replaces the checkpoint by the present state, whole or not at all."""
        state = {
            "run": self.run.name,
            "update": self.update,
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "records": [record._asdict() for record in self.records],
            "seconds": self._seconds,
            "loss": (self._loss_sum, self._loss_count),
        }
        with replacing(self._checkpoint) as fresh:
            torch.save(state, fresh)

    def _restore(self) -> None:
        try:
            state = torch.load(self._checkpoint, weights_only=True)
            if state["run"] != self.run.name:
                raise ValueError(f"it is of the run {state['run']}")
            self.network.load_state_dict(state["network"])
            self._optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            self.update = state["update"]
            self.records = [Record(**record) for record in state["records"]]
            self._seconds = state["seconds"]
            self._loss_sum, self._loss_count = state["loss"]
        except Exception as error:  # whatever a damaged file makes of the reader
            reason = str(error).splitlines()[0]
            raise ExperimentError(
                f"the checkpoint {self._checkpoint} cannot be used ({reason}); delete it to train "
                "this run from its start"
            ) from error

    def _step(self, cases: Tensor) -> None:
        began = time.perf_counter()
        self.network.train()
        inputs, targets = self._data.train_inputs[cases], self._data.train_targets[cases]
        loss = self._task.loss(self.network(inputs), targets)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._loss_sum += loss.item()
        self._loss_count += 1
        self.update += 1
        self._seconds += time.perf_counter() - began

    def _evaluate(self) -> None:
        """Records the mean training loss since the last record, and loss and error on the test cases."""
        loss, error = self._test()
        self.records.append(
            Record(
                norm=self.run.norm,
                batch_size=self.run.batch_size,
                seed=self.run.seed,
                update=self.update,
                epoch=self.update / self._per_epoch,
                seconds=self._seconds,
                train_loss=self._loss_sum / self._loss_count if self._loss_count else None,
                test_loss=loss,
                test_error=error,
            )
        )
        self._loss_sum, self._loss_count = 0.0, 0

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        """Mean loss and percentage of errors over the test cases."""
        self.network.eval()
        inputs, targets = self._data.test_inputs, self._data.test_targets
        loss = error = 0.0
        for start in range(0, len(inputs), _TEST_CASES_AT_ONCE):
            part = slice(start, start + _TEST_CASES_AT_ONCE)
            output = self.network(inputs[part])
            loss += self._task.loss(output, targets[part]).item() * len(inputs[part])
            error += self._task.error(output, targets[part]).sum().item()
        return loss / len(inputs), 100.0 * error / len(inputs)

    def _evaluation_marks(self) -> set[int]:
        """The updates of an epoch after which there is an evaluation; 0 is its end."""
        count = min(EVALUATIONS_PER_EPOCH, self._per_epoch)
        return {self._per_epoch * k // count for k in range(count)}

    def _order(self, epoch: int) -> Tensor:
        """The training cases in the order of this epoch."""
        generator = torch.Generator().manual_seed(self.run.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._data.train_inputs), generator=generator)
        return order.to(self._data.train_inputs.device)
