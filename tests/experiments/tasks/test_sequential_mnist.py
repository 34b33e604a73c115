"""Sequential and permuted MNIST on a few small images in MNIST's place."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from layernorm.experiments import data
from layernorm.experiments.task import Batch, ExperimentError
from layernorm.experiments.tasks import permuted_mnist, sequential_mnist
from layernorm.experiments.tasks.sequential_mnist import NORMS, PixelByPixel, PixelReader

COUNT = 50_040  # beyond the 50,000 that are trained on


@pytest.fixture(autouse=True)
def few_images(monkeypatch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images that differ in their last pixel, the validation cases among them all black."""
    sets = {}
    for part, count in (("train", COUNT), ("t10k", 30)):
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        images[:50_000, -1, -1] = (torch.arange(min(count, 50_000)) % 256).byte()
        sets[part] = (images, torch.arange(count) % 10)
    monkeypatch.setattr(data, "mnist", sets.__getitem__)
    return sets


def batch(problem: PixelByPixel, cases: slice, start: int = 0, size: int = 8) -> Batch:
    return Batch(torch.arange(problem.cases)[cases], start, size, torch.Generator().manual_seed(3))


class Spy(torch.nn.Module):
    """Remembers what it is given; its logits say class 0."""

    def forward(self, pixels, noise=None):
        self.pixels, self.noise = pixels, noise
        return F.one_hot(torch.zeros(pixels.size(1), dtype=torch.long), 10) * 50.0


def test_pixels_come_row_by_row_between_zero_and_one():
    problem, spy = PixelByPixel(False, hidden=6, cases=300), Spy()
    problem.loss(spy, batch(problem, slice(200, 208)))
    assert spy.pixels.shape == (784, 8, 1)
    torch.testing.assert_close(spy.pixels[-1, :, 0], torch.arange(200, 208) / 255)
    assert not spy.pixels[:-1].any()


def test_squares_of_pixels_are_replaced_by_their_mean(few_images):
    images = few_images["train"][0]
    images[0] = torch.arange(28).expand(28, 28) * 4
    problem, spy = PixelByPixel(False, hidden=6, cases=300, down=2), Spy()
    problem.loss(spy, batch(problem, slice(0, 8)))
    assert spy.pixels.shape == (196, 8, 1)
    torch.testing.assert_close(spy.pixels[:14, 0, 0] * 255, torch.arange(14) * 8.0 + 2)


@pytest.mark.parametrize("down", [1, 4])
def test_the_order_of_permuted_pixels_is_one_permutation_for_all_images(down, few_images):
    few_images["train"][0][:8] = torch.randint(256, (8, 28, 28), dtype=torch.uint8)
    plain, permuted, again = (PixelByPixel(p, 6, down, 300, 20) for p in (False, True, True))
    spies = [Spy(), Spy(), Spy()]
    for problem, spy in zip((plain, permuted, again), spies, strict=True):
        problem.loss(spy, batch(problem, slice(0, 8)))
    assert not torch.equal(spies[0].pixels, spies[1].pixels)
    assert torch.equal(spies[1].pixels, spies[2].pixels)
    # The eight values of a step are a column of a table whose columns alone have changed places.
    columns = [sorted(map(tuple, spy.pixels.squeeze(-1).tolist())) for spy in spies]
    assert columns[0] == columns[1]


def test_the_noise_of_the_initial_state_is_that_of_the_place_in_the_whole_batch():
    problem, whole, part = PixelByPixel(False, hidden=6, cases=300), Spy(), Spy()
    total = problem.loss(whole, batch(problem, slice(0, 8)))
    problem.loss(part, batch(problem, slice(5, 8), start=5))
    assert whole.noise.shape == (8, 6)
    assert torch.equal(part.noise, whole.noise[5:])
    assert 0.05 < whole.noise.std() < 0.2
    assert total.count == 8


def test_the_metrics_are_of_the_validation_and_the_test_cases(few_images):
    few_images["train"][1][50_000:50_010] = 7
    problem = PixelByPixel(False, hidden=6, held_out=10)
    found = problem.evaluate(Spy())
    assert found["validation_error"] == 100.0
    assert found["validation_loss"] == pytest.approx(50.0, rel=1e-6)
    assert found["test_error"] == pytest.approx(90.0)


@pytest.mark.parametrize("norm", NORMS)
def test_weights_start_alike_for_every_norm(norm):
    reader = PixelReader(norm, hidden=5, steps=9)
    weights = {name: weight.detach() for name, weight in reader.lstm.named_parameters()}
    recurrent = reader.lstm.weight_hh_l0.detach()
    gates = torch.cat((recurrent[:10], recurrent[15:]))
    torch.testing.assert_close(recurrent[10:15], torch.eye(5))
    torch.testing.assert_close(gates.T @ gates, torch.eye(5))
    assert float(reader.lstm.weight_ih_l0.detach().norm()) == pytest.approx(1.0)
    biases = sum(bias for name, bias in weights.items() if name.startswith("bias_") and bias.numel() == 20)
    assert biases.tolist() == [0.0] * 5 + [1.0] * 5 + [0.0] * 10


@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_takes_part_and_the_last_step_counts(norm):
    reader = PixelReader(norm, hidden=5, steps=9)
    pixels = torch.rand(9, 6, 1)
    logits = reader(pixels, torch.randn(6, 5))
    F.cross_entropy(logits, torch.arange(6)).backward()
    unused = {name for name, parameter in reader.named_parameters() if parameter.grad is None}
    assert not unused
    changed = pixels.clone()
    changed[-1] += 0.5 * torch.rand(6, 1)
    assert not torch.equal(reader(changed), reader(pixels))


def test_sizes_that_are_not_possible_are_named():
    with pytest.raises(ExperimentError, match="down must be 1, 2 or 4, got 3"):
        PixelByPixel(False, down=3)
    with pytest.raises(ExperimentError, match="cases must be 1 to 50000, got 60000"):
        PixelByPixel(False, cases=60_000)
    with pytest.raises(ExperimentError, match="held_out must be 1 to 10000, got 0"):
        PixelByPixel(False, held_out=0)


@pytest.mark.parametrize(("task", "permuted"), [(sequential_mnist.TASK, False), (permuted_mnist.TASK, True)])
def test_the_table_gives_the_test_error_at_the_least_validation_error(task, permuted):
    assert task.problem.args == (permuted,)
    results = pd.DataFrame(
        [
            ("none", 64, 0, 0, 90.0, 91.0),
            ("none", 64, 0, 10, 5.0, 6.0),
            ("none", 64, 0, 20, 7.0, 4.0),
            ("none", 64, 1, 20, 3.0, 2.0),
            ("layer", 64, 0, 5, 4.5, 1.5),
        ],
        columns=["norm", "batch_size", "seed", "update", "validation_error", "test_error"],
    ).assign(learning_rate=1e-3)
    (table,) = task.tables(results)
    assert [tuple(row) for row in table.rows] == [
        ("none", "64", "4.00", "9.8" if permuted else "1.1"),
        ("layer", "64", "1.50", ""),
    ]
    assert [card.verdict for card in task.judge(results)] == ["cannot tell", "not run", "not run"]
