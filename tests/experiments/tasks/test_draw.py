"""DRAW: its attention, its cell, its bound and its task, each against the formulas of the papers."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional as F

from layernorm.experiments import data, registry
from layernorm.experiments.run.training import Run, Trainer
from layernorm.experiments.task import Batch, ExperimentError, Preset
from layernorm.experiments.tasks.draw import network as draw_network
from layernorm.experiments.tasks.draw import task as draw
from layernorm.experiments.tasks.draw.network import DRAW, NORMS, OutputNormLSTMCell, State
from layernorm.experiments.tasks.draw.task import DigitDrawing

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE, GLIMPSES, LATENT = 9, 3, 4


def network(norm: str, **sizes) -> DRAW:
    """A small network in float64, away from its start at zero."""
    options = {"side": SIDE, "hidden": 6, "latent": LATENT, "read": 2, "write": 3}
    made = DRAW(norm, **{**options, **sizes}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def cases(count: int = 4) -> tuple[Tensor, Tensor]:
    """Pictures and noise."""
    pictures = (torch.rand(count, SIDE, SIDE) < 0.3).double()
    return pictures, torch.randn(count, GLIMPSES, LATENT, dtype=torch.float64)


def plain_filters(parameters: list[float], size: int, side: int) -> tuple[Tensor, Tensor]:
    """F_X and F_Y of one case as Gregor et al. write them, equations 19 to 26."""
    centres = [(side + 1) / 2 * (value + 1) for value in parameters[:2]]
    variance, stride = math.exp(parameters[2]), (side - 1) / (size - 1) * math.exp(parameters[3])
    filters = []
    for centre in centres:
        rows = []
        for i in range(1, size + 1):
            mean = centre + (i - size / 2 - 0.5) * stride
            row = [math.exp(-((a - mean) ** 2) / (2 * variance)) for a in range(1, side + 1)]
            rows.append([value / sum(row) for value in row])
        filters.append(torch.tensor(rows, dtype=torch.float64))
    return filters[0], filters[1]


@pytest.mark.parametrize("size", [2, 5])
def test_filters_are_those_of_a_plain_loop(size):
    parameters = 0.5 * torch.randn(4, 5, dtype=torch.float64)
    found = draw_network.filterbanks(draw_network.grid(parameters, size, 11), size, 11)
    for case, values in enumerate(parameters.tolist()):
        for axis, expected in enumerate(plain_filters(values, size, 11)):
            torch.testing.assert_close(found[axis, case], expected, rtol=1e-12, atol=1e-15)


def test_a_window_far_from_the_picture_has_finite_filters_and_gradients():
    parameters = torch.tensor([[40.0, -40.0, -3.0, 2.0, 0.0]], requires_grad=True)
    found = draw_network.filterbanks(draw_network.grid(parameters, 5, 28), 5, 28)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 1, 5))
    found.square().sum().backward()
    assert parameters.grad.isfinite().all()


def test_what_is_read_and_written_is_what_the_formulas_say():
    parameters = 0.3 * torch.randn(3, 5, dtype=torch.float64)
    first, second, patch = (torch.randn(3, n, n, dtype=torch.float64) for n in (SIDE, SIDE, 4))
    where = draw_network.grid(parameters, 4, SIDE)
    seen = draw_network.read(torch.cat((first, second), 2), where, 4)
    written = draw_network.write(first, patch, where)
    for case, values in enumerate(parameters.tolist()):
        columns, rows = plain_filters(values, 4, SIDE)
        patches = [math.exp(values[4]) * rows @ picture[case] @ columns.T for picture in (first, second)]
        # By row, picture and column.
        torch.testing.assert_close(seen[case], torch.stack(patches, 1).flatten())
        added = rows.T @ patch[case] @ columns / math.exp(values[4])
        torch.testing.assert_close(written[case], first[case] + added)


def test_gradients_of_attention():
    def glimpse(parameters: Tensor, pictures: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
        where = draw_network.grid(parameters, 2, 5)
        return draw_network.read(pictures, where, 2), draw_network.write(pictures[:, :, :5], patch, where)

    inputs = (0.3 * torch.randn(2, 5), torch.randn(2, 5, 10), torch.randn(2, 2, 2))
    assert torch.autograd.gradcheck(glimpse, [value.double().requires_grad_() for value in inputs])


def test_divergence_is_that_of_torch():
    mean, log_deviation = torch.randn(2, 5, 7, dtype=torch.float64)
    posterior = distributions.Normal(mean, log_deviation.exp())
    prior = distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = distributions.kl_divergence(posterior, prior).sum(-1)
    torch.testing.assert_close(draw_network.divergence(mean, log_deviation), expected)


def test_the_cell_without_norm_is_torch_s():
    cell, judge = OutputNormLSTMCell("none", 5, 3), nn.LSTMCell(5, 3)
    with torch.no_grad():
        cell.gates.weight.copy_(torch.cat((judge.weight_ih, judge.weight_hh), 1))
        cell.gates.bias.copy_(judge.bias_ih + judge.bias_hh)
    inputs, state = torch.randn(4, 5), State(torch.randn(4, 3), torch.randn(4, 3))
    found = cell((inputs[:, :2], inputs[:, 2:]), state)
    torch.testing.assert_close(tuple(found), judge(inputs, tuple(state)))


@pytest.mark.parametrize(
    ("norm", "judge"), [("layer", F.layer_norm), ("rms", lambda a, shape, gain: F.rms_norm(a, shape, gain))]
)
def test_the_norm_is_on_the_output_and_the_cell_is_carried_on_without_it(norm, judge):
    cell, unnormalized = OutputNormLSTMCell(norm, 5, 6), OutputNormLSTMCell("none", 5, 6)
    unnormalized.gates.load_state_dict(cell.gates.state_dict())
    with torch.no_grad():
        for parameter in cell.norm.parameters():
            parameter.normal_()
    inputs, state = torch.randn(4, 5), State(torch.randn(4, 6), torch.randn(4, 6))
    found, expected = cell((inputs,), state), unnormalized((inputs,), state)
    torch.testing.assert_close(found.cell, expected.cell)
    gate = expected.hidden / expected.cell.tanh()
    normalized = judge(expected.cell, (6,), *cell.norm.parameters())
    torch.testing.assert_close(found.hidden, gate * normalized.tanh(), rtol=1e-4, atol=1e-5)


def test_an_unknown_norm_is_refused():
    with pytest.raises(
        ExperimentError, match="unknown norm 'batch' for draw; expected one of none, layer, rms"
    ):
        OutputNormLSTMCell("batch", 2, 3)


def plain_bound(made: DRAW, picture: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One case, equation by equation: reconstruction, divergence, latent samples, final canvas."""
    nats, latents = torch.zeros((), dtype=torch.float64), []
    canvas = made.canvas_start
    encoder = State(made.encoder_start[None], torch.zeros(1, 6, dtype=torch.float64))
    decoder = State(made.decoder_start[None], torch.zeros(1, 6, dtype=torch.float64))
    for step in noise:
        reading = made.hand(decoder.hidden)[0, :5].tolist()
        columns, rows = plain_filters(reading, 2, SIDE)
        missing = picture - torch.sigmoid(canvas)
        seen = [math.exp(reading[4]) * rows @ shown @ columns.T for shown in (picture, missing)]
        encoder = made.encoder((torch.stack(seen, 1).view(1, -1), decoder.hidden), encoder)
        mean, log_deviation = made.posterior(encoder.hidden)[0].chunk(2)
        posterior = distributions.Normal(mean, log_deviation.exp())
        prior = distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        nats = nats + distributions.kl_divergence(posterior, prior).sum()
        latents.append(mean + log_deviation.exp() * step)
        decoder = made.decoder((latents[-1][None],), decoder)
        hand = made.hand(decoder.hidden)[0]
        columns, rows = plain_filters(hand[5:10].tolist(), 3, SIDE)
        canvas = canvas + rows.T @ hand[10:].view(3, 3) @ columns / hand[9].exp()
    bernoulli = distributions.Bernoulli(logits=canvas)
    return -bernoulli.log_prob(picture).sum(), nats, torch.stack(latents), canvas


@pytest.mark.parametrize("norm", NORMS)
def test_bound_and_drawing_are_those_of_the_equations(norm):
    made = network(norm)
    pictures, noise = cases()
    with torch.no_grad():
        bound = made(pictures, noise)
        for case in range(len(pictures)):
            reconstruction, nats, latents, canvas = plain_bound(made, pictures[case], noise[case])
            torch.testing.assert_close(bound.reconstruction[case], reconstruction)
            torch.testing.assert_close(bound.divergence[case], nats)
            drawn, windows = made.generate(latents[None])
            assert drawn.shape == (1, GLIMPSES + 1, SIDE, SIDE)
            assert len(windows) == GLIMPSES
            torch.testing.assert_close(drawn[0, 0], made.canvas_start.sigmoid())
            torch.testing.assert_close(drawn[0, -1], canvas.sigmoid())


@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_takes_part(norm):
    made = network(norm)
    bound = made(*cases())
    (bound.reconstruction + bound.divergence).sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.fixture
def digits(monkeypatch) -> dict[str, Tensor]:
    """Forty digits a part, each a bar whose column grows with its place in the file."""
    found = {}
    for part in ("train", "valid", "test"):
        pictures = torch.zeros(40, 28, 28, dtype=torch.uint8)
        for place in range(40):
            pictures[place, 6:22, 4 + place // 2] = 1
        found[part] = pictures.flatten(1)
    monkeypatch.setattr(data, "binarized_mnist", found.__getitem__)
    return found


TINY = {"cases": 20, "held_out": 8, "glimpses": 2, "hidden": 12, "latent": 3, "read": 2, "write": 4}


def batch(start: int, end: int, size: int = 12) -> Batch:
    return Batch(torch.arange(start, end), start, size, torch.Generator().manual_seed(5))


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_is_the_bound_and_adds_up_over_parts_of_a_batch(norm, digits):
    problem = DigitDrawing(**TINY)
    made = problem.network(norm)
    whole, *parts = (problem.loss(made, batch(*ends)) for ends in ((0, 12), (0, 5), (5, 12)))
    assert (whole.count, [part.count for part in parts]) == (12, [5, 7])
    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total)
    pictures = digits["train"][::2][:12].view(-1, 28, 28).float()
    bound = made(pictures, batch(0, 12).normal(2, 3))
    torch.testing.assert_close(whole.total, torch.cat(bound).sum())


def test_cases_are_spread_over_the_file(digits):
    problem = DigitDrawing(**TINY)
    assert problem.cases == 20
    assert problem._test.shape == (8, 28, 28)
    assert problem._test.flatten(1).equal(digits["test"][::5])


def test_evaluation_draws_its_own_noise(digits, monkeypatch):
    problem = DigitDrawing(**TINY)
    made = problem.network("layer").eval()
    before = torch.get_rng_state()
    with torch.no_grad():
        found = problem.evaluate(made)
        assert torch.get_rng_state().equal(before)
        assert problem.evaluate(made) == found
        noise = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(0))
        bound = made(digits["test"][::5].view(-1, 28, 28).float(), noise)
    assert list(found) == [metric.name for metric in draw.TASK.metrics]
    assert found["valid_bound"] == found["valid_reconstruction"] + found["valid_divergence"]
    assert found["test_bound"] == pytest.approx(torch.cat(bound).sum().item() / 8, rel=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_it_learns_and_shows_what_it_draws(norm, digits, tmp_path):
    problem = DigitDrawing(**TINY)
    preset = Preset(epochs=8, batch_sizes=(10,), norms=(norm,), evaluate_every=8)
    trainer = Trainer(problem, Run(norm, 10, 0.02, 0), preset, tmp_path / "checkpoint")
    trainer.train()
    first, last = trainer.records[0], trainer.records[-1]
    assert last["valid_bound"] < 0.6 * first["valid_bound"]
    before = torch.get_rng_state()
    figures = problem.pictures(trainer.network)
    assert torch.get_rng_state().equal(before)
    assert list(figures) == ["digits", "stages"]
    # Eight rows of a blank canvas and of two glimpses, each of which is framed.
    assert len(figures["stages"].axes[0].patches) == 16
    assert figures["stages"].axes[0].images[0].get_size() == (8 * 28 + 7, 3 * 28 + 2)


def test_mixed_precision_gives_nearly_the_same_bound(digits):
    problem = DigitDrawing(**TINY)
    made = problem.network("layer")
    exact = problem.loss(made, batch(0, 12)).total
    with torch.autocast("cpu", torch.bfloat16):
        rounded = problem.loss(made, batch(0, 12)).total
    rounded.backward()
    # bfloat16 has 8 bits; errors of single products average out over the pixels.
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"cases": 41}, "cases must be from 1 to 40, the digits of train; got 41"),
        ({"held_out": 0}, "held_out must be from 1 to 40, the digits of valid; got 0"),
        ({"glimpses": 0}, "glimpses must be at least 1, got 0"),
        ({"write": 1}, "write must be at least 2, got 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message, digits):
    with pytest.raises(ExperimentError, match=message):
        DigitDrawing(**{**TINY, **sizes})


def test_the_task_judges_and_has_the_paper_s_sizes(digits):
    assert registry.find("draw") is draw.TASK
    paper = draw.TASK.presets["paper"]
    assert (paper.batch_sizes, paper.epochs, paper.optimizer, paper.learning_rates) == (
        (128,),
        200,
        "adam",
        (1e-3,),
    )
    sizes = {name: paper.sizes[name] for name in ("glimpses", "hidden", "latent", "read", "write")}
    assert list(sizes.values()) == [64, 256, 100, 2, 5]
    results = pd.DataFrame(
        {"norm": norm, "batch_size": 128, "learning_rate": 1e-3, "seed": seed}
        | {"update": 100 * step, "epoch": float(step)}
        | {"valid_bound": 150.0 - speed * gained, "test_bound": 151.0 - speed * gained}
        for norm, speed in (("none", 5), ("layer", 10))
        for seed in range(2)
        for step, gained in enumerate((0, 1, 2, 3, 4, 3.9))
    )
    earlier, better = draw.TASK.judge(results)
    # Five epochs tell nothing about where the bounds end.
    assert (earlier.verdict, better.verdict) == ("agrees", "partly")
    assert "After 5 of 200 epochs" in better.remark
    assert "after 200 updates, no norm itself after 400" in earlier.figure
    assert draw.TASK.judge(results.assign(epoch=40 * results.epoch))[1].verdict == "agrees"
    (table,) = draw.TASK.tables(results)
    assert [list(row) for row in table.rows] == [
        ["none", "128", "131.50", "5", "82.36"],
        ["layer", "128", "112.00", "5", "82.09"],
    ]
