"""One run: schedules, clipping, precision, checkpoints, and several processes that act as one."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import random
import socket
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from layernorm.experiments import registry
from layernorm.experiments.classification import Classification, Data
from layernorm.experiments.run import processes, training
from layernorm.experiments.run.optimizers import UncorrectedAdam
from layernorm.experiments.run.training import Interrupted, Run, Trainer
from layernorm.experiments.task import Batch, ExperimentError, Loss, Preset, Problem

pytestmark = pytest.mark.usefixtures("one_thread")
PRESET = Preset(epochs=2, batch_sizes=(32,), norms=("layer",))


class Noisy(Problem):
    """All that must survive a restart: noise drawn for a case, and dropout from the global generator."""

    cases = 96

    def __init__(self, dtype: torch.dtype = torch.float32, dropout: float = 0.2) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(self.cases, 8, generator=generator, dtype=dtype)
        self.targets = self.inputs.sin().sum(1, keepdim=True)
        self.dropout = dropout

    def to(self, device):
        pass

    def network(self, norm):
        layers = [nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(16, 1)]
        return nn.Sequential(*layers).to(self.inputs.dtype)

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        noise = batch.normal(8).to(self.inputs.dtype) + 0.1 * batch.uniform(8).to(self.inputs.dtype)
        output = network(self.inputs[batch.cases] + 0.1 * noise)
        # A count that is not the number of cases, and cases that meet one another.
        weight = 1 + batch.cases % 3
        everyone = processes.gather(output)
        spread = (everyone.mean() - output).square().sum()
        total = (weight[:, None] * (output - self.targets[batch.cases]).square()).sum() + spread
        return Loss(total, int(weight.sum()))

    def evaluate(self, network):
        return {"error": F.mse_loss(network(self.inputs), self.targets)}


def trained(tmp_path: Path, preset: Preset = PRESET, problem: Problem | None = None, **options) -> Trainer:
    trainer = Trainer(problem or Noisy(), Run("layer", 32, 1e-3, 1), preset, tmp_path / "run", **options)
    trainer.train()
    return trainer


def state(trainer: Trainer) -> tuple:
    weights = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    return weights, [{**record, "seconds": 0.0} for record in trainer.records]


def assert_same(one: tuple, other: tuple) -> None:
    assert one[1] == other[1]
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name


def test_a_stopped_run_ends_like_an_undisturbed_one(tmp_path):
    whole = trained(tmp_path / "whole")
    for stop_at in (0, 1, 2, 3, 4, 100):  # 3 updates an epoch; it stops after one more
        torch.rand(3)  # whatever else uses the global generator
        stopped = Trainer(Noisy(), Run("layer", 32, 1e-3, 1), PRESET, tmp_path / "stopped")
        assert stopped.update == min(stop_at, 5)
        if stop_at < stopped.updates:
            with pytest.raises(Interrupted):
                stopped.train(stop=lambda trainer=stopped, n=stop_at: trainer.update >= n)
        else:
            stopped.train()
    assert_same(state(whole), state(stopped))


def _context() -> multiprocessing.context.BaseContext:
    """Return a context whose processes start with everything imported, torch._dynamo included."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "layernorm.experiments.classification", "pytest"])
    return context


def _train_until_killed(checkpoint: Path) -> None:
    """Train slowly and save all the time in a process of its own, so that a kill finds it at work."""
    torch.set_num_threads(1)
    training.CHECKPOINT_SECONDS = 0.0
    preset = dataclasses.replace(PRESET, epochs=60, schedule="cosine")
    trainer = Trainer(Noisy(), Run("layer", 32, 1e-3, 1), preset, checkpoint)
    trainer.train(stop=lambda: bool(time.sleep(0.002)))
    trainer.save()


def test_a_run_killed_twenty_times_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    context = _context()
    checkpoint, kills, reached = tmp_path / "killed", 0, []
    chance = random.Random(0)
    while True:
        process = context.Process(target=_train_until_killed, args=(checkpoint,))
        process.start()
        if kills < 20:
            before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and (
                not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before
            ):
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.03))
            process.kill()
            process.join()
            kills += 1
            reached.append(torch.load(checkpoint, weights_only=True)["update"])
        else:
            process.join()
            assert process.exitcode == 0
            break
    # It was killed in its middle, and each time a later one.
    assert reached == sorted(reached)
    assert 0 < reached[0] < 180
    assert len(set(reached)) > 10
    preset = dataclasses.replace(PRESET, epochs=60, schedule="cosine")
    whole = trained(tmp_path / "whole", preset)
    ended = Trainer(Noisy(), Run("layer", 32, 1e-3, 1), preset, checkpoint)
    assert ended.update == whole.update == 180
    assert_same(state(whole), state(ended))


def _process(rank: int, port: int, path: Path, problem: Problem, preset: Preset) -> None:
    """One of two processes as torchrun starts them."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    with processes.joined("cpu") as device:
        trainer = Trainer(problem, Run("layer", 32, 1e-3, 1), preset, path / "run", device)
        halfway = trainer.updates // 2
        if trainer.update == 0:
            # The first process sees the wish to stop, both stop, and the checkpoint is that of process 0.
            with pytest.raises(Interrupted):
                trainer.train(stop=lambda: rank == 1 and trainer.update >= halfway)
            trainer = Trainer(problem, Run("layer", 32, 1e-3, 1), preset, path / "run", device)
            assert trainer.update == halfway + 1
        trainer.train()
        torch.save(state(trainer), path / f"rank{rank}")


def _by_two(path: Path, problem: Problem, preset: Preset) -> tuple:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = _context()
    started = [context.Process(target=_process, args=(rank, port, path, problem, preset)) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    states = [torch.load(path / f"rank{rank}", weights_only=False) for rank in (0, 1)]
    assert_same(*states)
    return states[0]


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_two_processes_make_the_updates_of_one(tmp_path, dtype, tolerance):
    # Sums in another order differ by some 16 eps of a gradient, and Adam divides a gradient by its own size:
    # in float64 18 updates are within 1e-10 unless something is counted twice. Of float32 only the
    # metrics and losses are compared.
    preset = dataclasses.replace(PRESET, epochs=6, evaluate_every=1, clip=1.0, schedule="linear")
    problem = Noisy(dtype, dropout=0.0)
    weights, records = _by_two(tmp_path, problem, preset)
    one_weights, one_records = state(trained(tmp_path / "one", preset, problem))
    assert [r["update"] for r in records] == list(range(19))
    for record, expected in zip(records, one_records, strict=True):
        assert record["error"] == pytest.approx(expected["error"], rel=tolerance)
        if record["update"]:
            assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=tolerance)
    if dtype == torch.float64:
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, one_weights[name], rtol=0, atol=tolerance, msg=name)


def test_what_is_drawn_for_a_case_does_not_depend_on_the_processes(tmp_path):
    def draw(start: int, end: int) -> torch.Tensor:
        batch = Batch(torch.arange(start, end), start, 10, torch.Generator().manual_seed(3))
        return torch.cat((batch.normal(2, 2).flatten(1), batch.uniform(5), batch.normal(1)), 1)

    whole = draw(0, 10)
    assert torch.equal(torch.cat((draw(0, 3), draw(3, 10))), whole)
    assert whole.unique().numel() == whole.numel()  # successive draws differ


def rates(tmp_path: Path, rate: float, warmup: int = 0, **changes) -> list[float]:
    """The learning rate of each of 6 updates."""
    run = Run("layer", 32, rate, 0, warmup)
    trainer = Trainer(Noisy(), run, dataclasses.replace(PRESET, **changes), tmp_path / "run")
    seen = []
    step = trainer._optimizer.step
    trainer._optimizer.step = lambda: (seen.append(trainer._optimizer.param_groups[0]["lr"]), step())
    trainer.train()
    return seen


def test_schedules(tmp_path):
    assert rates(tmp_path, 0.5) == [0.5] * 6
    assert rates(tmp_path, 6.0, schedule="linear") == pytest.approx([6, 5, 4, 3, 2, 1])
    cosine = [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert rates(tmp_path, 1.0, schedule="cosine") == pytest.approx(cosine)
    assert rates(tmp_path, 1.0, warmup=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_clipping_bounds_the_norm_of_all_gradients_together(tmp_path):
    preset = dataclasses.replace(PRESET, clip=1e-3, optimizer="sgd")
    trainer = Trainer(Noisy(), Run("layer", 32, 1.0, 0), preset, tmp_path / "run")
    norms = []
    step = trainer._optimizer.step

    def seen():
        gradients = [p.grad.flatten() for p in trainer.network.parameters()]
        norms.append(torch.cat(gradients).norm().item())
        step()

    trainer._optimizer.step = seen
    trainer.train()
    assert norms == pytest.approx([1e-3] * 6, rel=1e-4)


def test_clipping_may_bound_each_gradient_by_itself(tmp_path):
    preset = dataclasses.replace(PRESET, clip=1e-3, clip_each=True, optimizer="sgd")
    trainer = Trainer(Noisy(), Run("layer", 32, 1.0, 0), preset, tmp_path / "run")
    norms = []
    step = trainer._optimizer.step

    def stepped():
        norms.extend(parameter.grad.norm().item() for parameter in trainer.network.parameters())
        step()

    trainer._optimizer.step = stepped
    trainer.step(torch.arange(32))
    assert len(norms) > 1
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-4)


def test_the_sum_may_be_what_is_minimized(tmp_path):
    class Summed(Noisy):
        def loss(self, network, batch):
            return dataclasses.replace(super().loss(network, batch), is_summed=True)

    grads, losses = [], []
    for problem in (Noisy(), Summed()):
        preset = dataclasses.replace(PRESET, clip=None)
        trainer = Trainer(problem, Run("layer", 32, 1e-3, 1), preset, tmp_path / type(problem).__name__)
        trainer.step(torch.arange(32))
        grads.append([parameter.grad.clone() for parameter in trainer.network.parameters()])
        losses.append(trainer._loss_sum)
    assert losses[0] == losses[1]  # it is told as the mean
    count = int((1 + torch.arange(32) % 3).sum())
    for mean, total in zip(*grads, strict=True):
        torch.testing.assert_close(total, count * mean, rtol=1e-5, atol=1e-5)


def test_the_authors_adam_takes_larger_first_steps():
    """Against the formulas of their code, with b1 = 0.1 and b2 = 0.001, in float64."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = UncorrectedAdam([p], lr=0.01)
    expected, m, v = p.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for t in range(1, 6):
        g = torch.tensor([0.3 * t, -1.0], dtype=torch.float64)
        p.grad = g.clone()
        before = p.detach().clone()
        optimizer.step()
        rate = 0.01 * (1 - 0.001**t) ** 0.5 / (1 - 0.1**t)
        m, v = 0.1 * g + 0.9 * m, 0.001 * g**2 + 0.999 * v
        expected -= rate * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
        if t == 1:
            assert ((before - p.detach()).abs() > 0.03).all()  # Adam's is 0.01


@pytest.mark.parametrize("optimizer", ["adam", "adam-uncorrected", "sgd", "rmsprop"])
def test_every_optimizer_lowers_the_loss_and_resumes(tmp_path, optimizer):
    preset = dataclasses.replace(PRESET, epochs=10, optimizer=optimizer)
    whole = trained(tmp_path / "whole", preset)
    assert whole.records[-1]["error"] < 0.9 * whole.records[0]["error"]
    stopped = Trainer(Noisy(), Run("layer", 32, 1e-3, 1), preset, tmp_path / "stopped")
    with pytest.raises(Interrupted):
        stopped.train(stop=lambda: stopped.update >= 7)
    assert_same(state(whole), state(trained_on(tmp_path / "stopped", preset)))


def trained_on(checkpoint: Path, preset: Preset) -> Trainer:
    trainer = Trainer(Noisy(), Run("layer", 32, 1e-3, 1), preset, checkpoint)
    trainer.train()
    return trainer


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_close_to_float32(tmp_path, precision):
    preset = dataclasses.replace(PRESET, epochs=10)
    exact = trained(tmp_path / "exact", preset, Noisy(dropout=0.0))
    mixed = trained(tmp_path / "mixed", preset, Noisy(dropout=0.0), precision=precision)
    losses = [[record["train_loss"] for record in t.records[1:]] for t in (exact, mixed)]
    assert losses[0] != losses[1]
    # A forward pass rounded to 8 bits moves a mean squared error of order 1 by some per cent.
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert all(p.dtype == torch.float32 for p in mixed.network.parameters())


def test_evaluations_come_as_asked(tmp_path):
    assert [r["update"] for r in trained(tmp_path / "a").records] == list(range(7))  # 3 updates an epoch
    every = dataclasses.replace(PRESET, evaluate_every=4)
    assert [r["update"] for r in trained(tmp_path / "b", every).records] == [0, 4, 6]
    held_out = (torch.randn(9, 4), torch.ones(9).long())
    data = Data(torch.randn(800, 4), torch.zeros(800, dtype=torch.long), *held_out, *held_out)
    problem = Classification(data, lambda norm: nn.Linear(4, 2), at_once=4)
    updates = [r["update"] for r in trained(tmp_path / "c", PRESET, problem).records]
    assert updates == [0, 6, 12, 18, 25, 31, 37, 43, 50]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    stopped = Trainer(Noisy(), Run("layer", 32, 1e-3, 1), PRESET, tmp_path / "run", identity="epochs=2")
    stopped.save()
    make = partial(Trainer, Noisy(), preset=PRESET, checkpoint=tmp_path / "run")
    for run, identity in ((Run("layer", 32, 1e-3, 2), "epochs=2"), (Run("layer", 32, 1e-3, 1), "epochs=3")):
        with pytest.raises(
            ExperimentError, match=r"cannot be used .it is of the run epochs=2 layer-batch32-rate0.001-seed1"
        ):
            make(run=run, identity=identity)
    content = (tmp_path / "run").read_bytes()
    (tmp_path / "run").write_bytes(content[: len(content) // 2])
    with pytest.raises(ExperimentError, match="delete it to train this run from its start"):
        make(run=Run("layer", 32, 1e-3, 1), identity="epochs=2")
    torch.save({"run": "x"}, tmp_path / "run")
    with pytest.raises(ExperimentError, match="it is of another version of layernorm"):
        make(run=Run("layer", 32, 1e-3, 1), identity="epochs=2")


@pytest.mark.parametrize("name", ["digits", "digits-rows"])
def test_every_norm_of_a_task_trains(name, tmp_path):
    task = registry.find(name)
    problem = task.problem()
    for preset in task.presets.values():
        assert set(preset.norms) <= set(task.norms)
    preset = dataclasses.replace(task.presets["small"], epochs=1)
    for norm in task.norms:
        trainer = Trainer(problem, Run(norm, 64, 1e-3, 0), preset, tmp_path / "none")
        trainer.train()
        assert trainer.records[-1]["validation_loss"] < trainer.records[0]["validation_loss"], norm
