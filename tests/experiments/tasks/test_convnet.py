"""The convolutional network of the comparison: where its norms are, how it starts, what its cards say."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

from layernorm.experiments import data
from layernorm.experiments.task import Batch, ExperimentError
from layernorm.experiments.tasks import convnet, mnist

pytestmark = pytest.mark.usefixtures("one_thread")


SHAPES = {"mnist": (28, 28), "cifar10": (3, 32, 32)}


@pytest.fixture(autouse=True)
def images(monkeypatch):
    """Put random images in the place of the data sets."""
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str, count: int):
        pixels = torch.randint(0, 256, (count, *SHAPES[name]), dtype=torch.uint8, generator=generator)
        return pixels, (torch.arange(count) % 10).to(torch.uint8)

    monkeypatch.setattr(data, "mnist", lambda part: drawn("mnist", 5020 if part == "train" else 9))
    monkeypatch.setattr(data, "cifar10", lambda part: drawn("cifar10", 5020 if part == "train" else 9))


@pytest.fixture(params=SHAPES)
def problem(request) -> convnet.ConvolutionalImages:
    return convnet.ConvolutionalImages(request.param, width=8, cases=20, held_out=6)


@pytest.mark.parametrize("norm", convnet.NORMS)
def test_every_parameter_learns_with_each_norm(problem, norm):
    network = problem.network(norm)
    loss = problem.loss(network, Batch(torch.arange(5), 0, 5, torch.Generator()))
    loss.total.backward()
    assert loss.count == 5
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    with torch.no_grad():
        metrics = problem.evaluate(network.eval())
    errors = (network(problem._data.test_inputs).argmax(1) != torch.arange(6)).float().mean().item()
    assert metrics["test_error"] == pytest.approx(100 * errors)


def changed(network: nn.Module, index: int, factor: float) -> nn.Module:
    """The network with the weights of a convolution multiplied."""
    with torch.no_grad():
        network[index].weight.mul_(factor)
    return network


@pytest.mark.parametrize(("norm", "invariant"), [("none", False), ("layer", True), ("batch", True)])
def test_the_norms_stand_after_the_convolutions(norm, invariant):
    """Normalized outputs do not depend on the scale of the weights (paper, table 1)."""
    network = convnet.network((4, 8), norm).double()
    images = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    convolutions = [i for i, layer in enumerate(network) if isinstance(layer, nn.Conv2d)]
    assert [network[i].out_channels for i in convolutions] == [4, 4, 8, 8]
    for index in convolutions:
        expected = network(images)
        found = changed(network, index, 100.0)(images)
        # eps = 1e-5 next to variances of about 0.01 is a part in a thousand of them.
        assert torch.allclose(found, expected, rtol=0, atol=0.01) is invariant


def test_layer_norm_knows_one_image_and_batch_norm_all():
    images = torch.rand(5, 1, 28, 28)
    for norm, alone in (("layer", True), ("group:8", True), ("instance", True), ("batch", False)):
        network = convnet.network((8,), norm)
        # The kernels of one image and of five may add in another order.
        assert torch.allclose(network(images)[:2], network(images[:2]), rtol=0, atol=1e-5) is alone


def test_weight_norm_starts_from_training_cases(problem):
    network = problem.network("weight")
    features = network[0](problem._data.train_inputs)
    torch.testing.assert_close(features.std((0, 2, 3), correction=0), torch.ones(8), rtol=0, atol=1e-4)
    logits = network(problem._data.train_inputs)
    torch.testing.assert_close(logits.mean(0), torch.zeros(10), rtol=0, atol=1e-4)


def test_sizes_that_are_not_possible_are_refused():
    for name, value in (("width", 0), ("held_out", 10_001), ("cases", 45_001)):
        with pytest.raises(ExperimentError, match=f"{name} must be 1 to .*, got {value}"):
            convnet.ConvolutionalImages("cifar10", **{name: value})
    with pytest.raises(ExperimentError, match="images must be one of mnist, cifar10, got 'cifar100'"):
        convnet.ConvolutionalImages("cifar100")
    narrow = convnet.ConvolutionalImages(width=4, cases=20, held_out=6)
    with pytest.raises(
        ExperimentError, match=r"group:8 cannot be of this width: .* must divide the width, got 4"
    ):
        narrow.network("group:8")


def test_the_parts_are_apart_and_in_order(monkeypatch):
    whole = data.cifar10("train")
    monkeypatch.setattr(data, "cifar10", lambda part: whole)
    found = convnet.load("cifar10", 20, 6)
    assert found.train_inputs.shape == (20, 3, 32, 32)
    assert found.train_inputs.max() <= 1
    assert torch.equal(found.train_inputs, whole[0][5000:] / 255)
    assert torch.equal(found.valid_inputs, whole[0][4997:5000] / 255)
    assert found.valid_targets.tolist() == [7, 8, 9]


def test_mnist_refuses_more_cases_than_there_are():
    with pytest.raises(ExperimentError, match="cases must be 1 to 55000, got 60000"):
        mnist.load(60_000)


def records(batch_size: int = 128, **errors: tuple[float, ...]) -> pd.DataFrame:
    """Results of three seeds that get no better at the end; the training loss is a tenth of the error."""
    rows = [
        {"norm": norm, "batch_size": batch_size, "learning_rate": 1e-3, "seed": seed, "update": update}
        | {"test_error": error, "validation_error": error, "train_loss": error / 10 if update else None}
        for seed in range(3)
        for norm, values in errors.items()
        for update, error in enumerate((*values, values[-1] + 0.01 * (seed + 1)))
    ]
    return pd.DataFrame(rows)


def test_the_cards_follow_the_results():
    paper = records(none=(90, 5, 3), layer=(90, 3, 2), batch=(90, 2, 1))
    assert [card.verdict for card in convnet.judge(paper)] == ["agrees"] * 3
    other = records(none=(90, 3, 2), layer=(90, 5, 3), batch=(90, 5, 4))
    assert [card.verdict for card in convnet.judge(other)] == ["differs"] * 3


def test_the_cards_of_mnist_follow_the_results():
    large = records(128, none=(90, 4, 2), layer=(90, 3, 2.5), batch=(90, 3, 1))
    small = records(4, none=(90, 4, 2), layer=(90, 2, 1), batch=(90, 4, 3))
    verdicts = [card.verdict for card in mnist.judge(pd.concat([large, small]))]
    # Robust to small batches; layer norm in fewer updates than batch norm and no norm, at one of two sizes.
    assert verdicts == ["agrees", "partly", "partly"]
    assert [card.verdict for card in mnist.judge(large[large.norm == "none"])] == ["not run"] * 3
