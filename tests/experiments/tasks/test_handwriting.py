"""Handwriting: the density, the window, the network step by step and whole, lines out of strokes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, distributions

from layernorm.experiments import data
from layernorm.experiments.data import Drawing, WrittenLine
from layernorm.experiments.run.training import Run, Trainer
from layernorm.experiments.task import Batch, ExperimentError, Preset
from layernorm.experiments.tasks.handwriting import lines as handwriting_lines
from layernorm.experiments.tasks.handwriting import network as handwriting_network
from layernorm.experiments.tasks.handwriting import task as handwriting
from layernorm.experiments.tasks.handwriting.density import negative_log_likelihood, sample
from layernorm.experiments.tasks.handwriting.lines import Lines, pen_steps, simplified
from layernorm.experiments.tasks.handwriting.network import NORMS, HandwritingNetwork, WindowedLSTM
from layernorm.experiments.tasks.handwriting.task import Handwriting

pytestmark = pytest.mark.usefixtures("one_thread")
CHARACTERS = 6


def drawings() -> list[Drawing]:
    """Four characters by each of ten people; character n of person p is n + 1 strokes from (p, n) on."""
    found = []
    for character in range(4):
        for drawer in range(10):
            strokes = [
                np.array([[drawer, character, 0], [drawer + 5, character + 9, 1], [drawer + 9, stroke, 2]])
                for stroke in range(character + 1)
            ]
            found.append(Drawing("Made_up", character + 1, drawer + 1, tuple(strokes)))
    return found


@pytest.fixture
def strokes(monkeypatch) -> None:
    monkeypatch.setattr(data, "omniglot_strokes", drawings)


def problem(**sizes) -> Handwriting:
    options = {"steps": 30, "lines": 8, "valid_lines": 5, "hidden": 7, "mixtures": 2, "components": 3}
    return Handwriting(**{**options, **sizes})


def network(norm: str, **options) -> HandwritingNetwork:
    sizes = {"hidden_size": 8, "mixtures": 2, "components": 3, "pace": 0.2}
    return HandwritingNetwork(norm, CHARACTERS, **{**sizes, **options})


def pen_and_text(steps: int = 9) -> tuple[Tensor, Tensor]:
    """Steps (steps, 2, 3) and two texts, the second of them the shorter one."""
    pen = torch.randn(steps, 2, 3)
    pen[..., 2] = (pen[..., 2] > 1).float()
    return pen, torch.tensor([[0, 3, 2, 5], [4, 1, CHARACTERS, CHARACTERS]])


def mixture(parameters: Tensor) -> distributions.MixtureSameFamily:
    """The distribution of offsets, as PyTorch builds it."""
    weight, mean_x, mean_y, log_x, log_y, slant = parameters[..., :-1].chunk(6, -1)
    x, y, correlation = log_x.exp(), log_y.exp(), slant.tanh()
    rows = (torch.stack((x * x, correlation * x * y), -1), torch.stack((correlation * x * y, y * y), -1))
    normal = distributions.MultivariateNormal(torch.stack((mean_x, mean_y), -1), torch.stack(rows, -2))
    return distributions.MixtureSameFamily(distributions.Categorical(logits=weight), normal)


def test_the_density_is_that_of_pytorchs_distributions():
    parameters = torch.randn(5, 3, 6 * 4 + 1, dtype=torch.float64)
    pen = torch.randn(5, 3, 3, dtype=torch.float64)
    pen[..., 2] = (pen[..., 2] > 0).double()
    end = distributions.Bernoulli(logits=parameters[..., -1]).log_prob(pen[..., 2])
    expected = -mixture(parameters).log_prob(pen[..., :2]) - end
    torch.testing.assert_close(negative_log_likelihood(parameters, pen), expected)


def test_the_density_holds_where_a_gaussian_is_nearly_a_line():
    # tanh(12) is 1 in float32, and 1 - tanh² there 0.
    values = [0.0, 0.0, 0.0, 0.0, 0.0, 12.0, 0.0]
    parameters = torch.tensor(values, requires_grad=True)
    pen = torch.zeros(3)
    nats = negative_log_likelihood(parameters, pen)
    nats.backward()
    assert nats.item() == pytest.approx(math.log(4 * math.pi) + math.log(1 / math.cosh(12)), rel=1e-5)
    assert parameters.grad.isfinite().all()


def test_samples_have_the_densitys_moments():
    row = torch.tensor([[1.0, -1.0, -20.0, 20.0, 1.0, -1.0, 0.5, -0.5, -1.0, 0.2, 1.0, -0.4, -0.7]])
    count = 40_000
    drawn = sample(row.expand(count, -1), torch.Generator().manual_seed(0))
    expected = mixture(row[0])
    normal = expected.component_distribution
    for component, own in enumerate((drawn[:, 0] < 0, drawn[:, 0] > 0)):
        weight = expected.mixture_distribution.probs[component].item()
        assert own.float().mean().item() == pytest.approx(weight, abs=0.01)
        # Five standard errors of 40,000 · 0.12 samples are 7 % of a deviation, and 10 % of a variance.
        covariance = normal.covariance_matrix[component]
        scale = covariance.diagonal().max().item()
        torch.testing.assert_close(
            drawn[own, :2].mean(0), normal.mean[component], atol=0.07 * scale**0.5, rtol=0
        )
        torch.testing.assert_close(torch.cov(drawn[own, :2].T), covariance, atol=0.1 * scale, rtol=0)
    assert drawn[:, 2].mean().item() == pytest.approx(torch.sigmoid(row[0, -1]).item(), abs=0.02)


def test_a_bias_narrows_the_samples_and_prefers_the_likely():
    row = torch.tensor([[0.5, -0.5, -30.0, 30.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    drawn = sample(row.expand(20_000, -1), torch.Generator().manual_seed(0), bias=2.0)
    likely = drawn[:, 0] < 0
    # The weights are softmax(±0.5 · (1 + bias)), the deviations exp(-bias).
    assert likely.float().mean().item() == pytest.approx(1 / (1 + math.exp(-3)), abs=0.01)
    assert drawn[likely, 1].std().item() == pytest.approx(math.exp(-2), rel=0.05)


def test_the_window_is_the_sum_over_the_text():
    layer = WindowedLSTM("layer", 3, CHARACTERS, 8, components=2, pace=0.5).double()
    pen, text = pen_and_text()
    codes = network("none").double().one_hot(text)
    with torch.no_grad():
        hidden, windows = layer(pen.double(), codes)
        for line in range(2):
            places = [0.0, 0.0]
            for step in range(len(pen)):
                numbers = layer.reader(hidden[step, line]).exp().tolist()
                expected = torch.zeros(CHARACTERS, dtype=torch.float64)
                for component in range(2):
                    weight, sharpness, forward = numbers[component::2]
                    places[component] += forward
                    for place, character in enumerate(text[line].tolist()):
                        if character < CHARACTERS:
                            seen = weight * math.exp(-sharpness * (places[component] - place) ** 2)
                            expected[character] += seen
                torch.testing.assert_close(windows[step, line], expected)


@pytest.mark.parametrize("norm", NORMS)
def test_the_first_layer_is_its_cell_step_by_step_with_all_gradients(norm):
    layer = WindowedLSTM(norm, 3, CHARACTERS, 8, components=3, pace=0.5).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    pen, text = pen_and_text()
    pen, codes = pen.double().requires_grad_(), network("none").double().one_hot(text)
    hidden, windows = layer(pen, codes)
    state, states = layer.start(codes), []
    for step in pen:
        state, attention = layer.step(step, codes, state)
        states.append(state)
        torch.testing.assert_close((attention.unsqueeze(1) @ codes).squeeze(1), state.window)
    torch.testing.assert_close(hidden, torch.stack([state.hidden for state in states]))
    torch.testing.assert_close(windows, torch.stack([state.window for state in states]))
    wanted = [pen, *layer.parameters()]
    by_hand = sum(state.hidden.sin().sum() + state.window.cos().sum() for state in states)
    ours = torch.autograd.grad(hidden.sin().sum() + windows.cos().sum(), wanted)
    for gradient, expected in zip(ours, torch.autograd.grad(by_hand, wanted), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_written_step_by_step_is_what_the_network_predicts(norm, monkeypatch):
    model = network(norm, pace=1e-3).double()
    pen, text = pen_and_text()
    pen = pen.double()
    pen[0] = 0.0
    seen = []

    def follow(parameters: Tensor, generator: torch.Generator, bias: float) -> Tensor:
        seen.append(parameters)
        return pen[len(seen)]

    monkeypatch.setattr(handwriting_network, "sample", follow)
    written = model.write(text, len(pen) - 1, torch.Generator())
    torch.testing.assert_close(torch.stack(written, 1), pen)
    torch.testing.assert_close(torch.stack(seen), model(pen[:-1], text))


def test_a_line_ends_where_the_window_leaves_its_text():
    model = network("none")
    with torch.no_grad():
        model.first.reader.weight.zero_()
        model.first.reader.bias.copy_(torch.tensor([0.0, 2.0, math.log(0.25)]).repeat_interleave(3))
    _, text = pen_and_text()
    lines = model.write(text, 100, torch.Generator().manual_seed(0))
    # A quarter of a character a step: place u is nearest until u + ½, beyond which the next one is.
    assert [len(line) - 1 for line in lines] == [14, 6]
    assert [len(line) - 1 for line in model.write(text, 5, torch.Generator())] == [5, 5]


def test_the_papers_network_has_its_3_7_million_weights(strokes):
    english = len(handwriting_lines._CHARACTERS) + 1
    paper = dict(handwriting.TASK.presets["paper"].sizes)
    with torch.device("meta"):
        parameters = HandwritingNetwork("none", english, hidden_size=paper["hidden"]).parameters()
    assert round(sum(parameter.numel() for parameter in parameters) / 1e6, 1) == 3.7
    for preset in handwriting.TASK.presets.values():
        assert problem(**{**preset.sizes, "source": "omniglot", "lines": 4, "valid_lines": 1}).cases == 4


@pytest.mark.parametrize("norm", NORMS)
def test_padding_changes_nothing(norm):
    model = network(norm)
    pen, text = pen_and_text()
    lines = Lines(pen.transpose(0, 1), torch.tensor([8, 5]), text)
    loss = handwriting._loss(model, lines)
    loss.total.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    assert loss.count == 13
    model.zero_grad()
    more = torch.full((2, 4, 3), 7.0)
    padded = torch.cat((lines.pen, more), 1)
    padded[1, 6:] = -3.0
    longer = torch.nn.functional.pad(text, (0, 3), value=CHARACTERS)
    again = handwriting._loss(model, Lines(padded, lines.steps, longer))
    again.total.backward()
    torch.testing.assert_close(again.total, loss.total)
    for parameter, expected in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4)


def test_half_precision_trains():
    model = network("layer")
    pen, text = pen_and_text()
    lines = Lines(pen.transpose(0, 1), torch.tensor([8, 8]), text)
    with torch.autocast("cpu", torch.bfloat16):
        loss = handwriting._loss(model, lines)
    assert loss.total.dtype == torch.float32
    loss.total.backward()
    half = model.first.cell.weight_hh.grad.clone()
    model.zero_grad()
    handwriting._loss(model, lines).total.backward()
    whole = model.first.cell.weight_hh.grad
    assert half.dtype == torch.float32
    # bfloat16 keeps 8 bits, of which 8 steps through three layers lose about half.
    assert (half - whole).norm() < 0.2 * whole.norm()


def test_the_parts_of_a_batch_add_up(strokes):
    task = problem()
    model = task.network("layer")
    cases = torch.tensor([5, 0, 3, 6])
    generator = torch.Generator()
    whole = task.loss(model, Batch(cases, 0, 4, generator))
    parts = [task.loss(model, Batch(cases[start : start + 2], start, 4, generator)) for start in (0, 2)]
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total)
    assert parts[0].count + parts[1].count == whole.count


def test_lines_are_one_persons_characters_side_by_side(strokes):
    corpus = handwriting_lines.load("omniglot", 30, 12, 20)
    assert corpus.alphabet == tuple(f"Made_up {n}" for n in range(1, 5))
    assert (len(corpus.train), len(corpus.valid)) == (12, 20)
    # Character n has n + 1 strokes of 3 points; all but the first point of a line are a step.
    for lines in (corpus.train, corpus.valid):
        for pen, steps, text in zip(lines.pen, lines.steps.tolist(), lines.text, strict=True):
            own = text[text < 4]
            assert int(3 * (own + 1).sum()) - 1 == steps <= 30
            assert steps > 30 - 12
            assert int(pen[:, 2].sum()) == int((own + 1).sum())
            assert not pen[steps + 1 :].any()
            points = corpus.offsets(pen[1 : steps + 1]).cumsum(0)
            # Strokes are 9 wide and 10 apart, give or take a pixel's random half at each end.
            width = 19 * len(own) - 10
            assert points[:, 0].max() == pytest.approx(width, abs=len(own) + 1)
    offsets = torch.cat(
        [pen[1 : n + 1, :2] for pen, n in zip(corpus.train.pen, corpus.train.steps, strict=True)]
    )
    torch.testing.assert_close(offsets.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(offsets.std(0, correction=0), torch.ones(2), atol=1e-5, rtol=0)


def test_the_writers_held_out_are_not_learned_from(monkeypatch):
    # Person p's strokes are p pixels high; randomness moves a point by half a pixel at most.
    tall = [
        Drawing("Made_up", character, drawer, (np.array([[0.0, 0, 0], [0.0, 10.0 * drawer, 1]]),))
        for character in (1, 2)
        for drawer in range(1, 11)
    ]
    monkeypatch.setattr(data, "omniglot_strokes", lambda: tall)
    corpus = handwriting_lines.load("omniglot", 9, 60, 60)
    heights = []
    for lines in (corpus.train, corpus.valid):
        strokes = corpus.offsets(lines.pen)[:, 1::2, 1]
        heights.append(set((strokes / 10).round().int().flatten().tolist()))
    assert heights == [set(range(1, 9)), {9, 10}]


def test_lines_of_english(monkeypatch):
    stroke = np.array([[0.0, 0.0, 0.0], [4.0, 1.0, 0.1], [2.0, 3.0, 0.2]])
    written = [
        WrittenLine(f"Ab, {writer}!", (stroke * (1 + writer), stroke[:1]), f"{writer:02d}")
        for writer in range(10)
    ]
    monkeypatch.setattr(data, "iam_ondb", lambda: [*written, WrittenLine("dot", (stroke[:1],), "00")])
    corpus = handwriting_lines.load("iam", 2, 100, 100)
    assert (len(corpus.alphabet), len(corpus.train), len(corpus.valid)) == (57, 8, 2)
    texts = ["".join(corpus.alphabet[i] for i in row) for row in corpus.valid.text]
    assert texts == [f"Ab, {handwriting_lines._OTHER * 2}"] * 2
    assert corpus.train.steps.tolist() == [2] * 8
    # y grows upwards, and the first offset is nothing.
    heights = {round(corpus.offsets(pen)[1, 1].item()) for pen in corpus.valid.pen}
    assert heights == {-9, -10}
    assert not corpus.train.pen[:, 0].any()
    assert len(handwriting_lines.load("iam", 3, 3, 1).train) == 3


def test_simplified_strokes_keep_their_ends_and_stay_near():
    angle = np.linspace(0.0, 6.0, 200)
    curve = np.stack((angle * np.cos(angle), angle * np.sin(angle)), 1)
    corners = simplified(curve, 0.1)
    assert 5 < len(corners) < 40
    np.testing.assert_array_equal(corners[[0, -1]], curve[[0, -1]])
    start, chord = corners[:-1], np.diff(corners, axis=0)
    from_start = curve[:, None] - start
    along = np.clip((from_start * chord).sum(2) / np.square(chord).sum(1), 0, 1)
    distance = np.linalg.norm(from_start - along[..., None] * chord, axis=2).min(1)
    assert distance.max() <= 0.1
    # A stroke that ends where it began, and one that never moved.
    assert len(simplified(np.concatenate((curve, curve[::-1])), 0.1)) > len(corners)
    assert len(simplified(np.ones((5, 2)), 0.1)) == 2
    assert pen_steps([curve[:1]]).tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"source": "chalk"}, "unknown source 'chalk' of handwriting; expected omniglot or iam"),
        ({"steps": 0}, "steps of handwriting must be at least 1, got 0"),
        ({"mixtures": 0}, "mixtures of handwriting must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(sizes, message, strokes):
    with pytest.raises(ExperimentError, match=message):
        problem(**sizes)
    with pytest.raises(ExperimentError, match="unknown norm 'batch' of handwriting"):
        problem().network("batch")


def test_too_few_writers_are_refused(monkeypatch):
    monkeypatch.setattr(data, "omniglot_strokes", lambda: [each for each in drawings() if each.drawer < 9])
    with pytest.raises(ExperimentError, match="9 writers or more, got 8"):
        problem()


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_it_learns_and_draws(norm, strokes, tmp_path):
    task = problem(steps=24, lines=16)
    preset = Preset(4, (4,), (norm,), clip=10.0)
    trainer = Trainer(task, Run(norm, 4, 0.01, 0), preset, tmp_path / "checkpoint")
    trainer.train()
    first, last = trainer.records[0], trainer.records[-1]
    assert last["valid_nll"] < first["valid_nll"] - 5
    assert last["valid_nll"] == pytest.approx(
        last["valid_nll_step"] * task._valid.steps.float().mean().item()
    )
    with torch.no_grad():
        pictures = task.pictures(trainer.network)
    (axes,) = pictures["handwriting"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a person", "the network"] * 3
    # What the people wrote: line by line its strokes, all of them on the page.
    strokes_drawn = axes.collections[0].get_paths()
    assert len(strokes_drawn) >= int(task._valid.pen[:3, :, 2].sum())
    pictures["handwriting"].savefig(tmp_path / "drawn.png")


def test_a_network_that_diverged_draws_nothing(strokes):
    task = problem()
    model = task.network("none")
    torch.nn.init.constant_(model.second.weight_hh_l0, math.nan)
    assert task.pictures(model) == {}
    assert math.isnan(task.evaluate(model)["valid_nll"])
