"""The paper's analysis: table 1, the Fisher information compared with its definition, growing weights."""

from __future__ import annotations

import ast
import itertools
import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import layernorm
from layernorm import theory
from layernorm.experiments import registry
from layernorm.experiments.studies.theory import study
from layernorm.experiments.task import ExperimentError
from layernorm.theory import invariances
from layernorm.theory.models import NORMS
from tests.experiments.studies.tables_by_hand import put

pytestmark = pytest.mark.usefixtures("one_thread")
# Sums over 100 cases of products that no model here amplifies a hundredfold: 100·100·1e-16.
ROUNDING = 1e-12
SIZES = {"seeds": 1, "layers": (5, 6, 4), "outputs": 3, "inputs": 3, "widths": (3, 12), "updates": 20}


def test_every_cell_of_table_1():
    for seed in (0, 1):
        cells = theory.invariance_table(seed)
        assert len(cells) == 30
        for cell in cells:
            assert cell.paper is None or cell.invariant == cell.paper, cell
            # Either rounding or a visible change, nothing in between.
            assert cell.deviation < 1e-13 if cell.invariant else cell.deviation > 1e-2, cell
    rms = [cell.invariant for cell in cells if cell.norm == "rms"]
    assert rms == [True, False, False, True, False, True]
    assert not any(cell.invariant for cell in cells if cell.norm == "none")


def test_table_1_as_printed():
    # Columns: matrix re-scaling, re-centering; vector re-scaling; data re-scaling, re-centering; one case.
    rows = {
        norm: "".join("yes " if cell else "no " for cell in row).split()
        for norm, row in invariances.PAPER.items()
    }
    assert rows == {
        "batch": ["yes", "no", "yes", "yes", "yes", "no"],
        "weight": ["yes", "no", "yes", "no", "no", "no"],
        "layer": ["yes", "yes", "no", "yes", "no", "yes"],
    }


def test_cells_flip_when_the_norm_is_another_one(monkeypatch):
    def without_mean(self, input):
        return layernorm.functional.rms_norm(input, self.normalized_shape, self.weight, 0.0) + self.bias

    monkeypatch.setattr(layernorm.LayerNorm, "forward", without_mean)
    verdicts = [theory.invariance("layer", name).invariant for name in theory.TRANSFORMATIONS]
    assert verdicts == [True, False, False, True, False, True]


@pytest.mark.parametrize("eps", [0.1, 1e-8])
def test_an_eps_is_seen(monkeypatch, eps):
    def with_eps(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, eps)

    monkeypatch.setattr(layernorm.LayerNorm, "forward", with_eps)
    if eps == 0.1:
        assert not theory.invariance("layer", "dataset re-scaling").invariant
        assert theory.invariance("layer", "weight matrix re-centering").invariant
    else:  # more than rounding, but not clearly a change
        with pytest.raises(ArithmeticError, match="neither rounding"):
            theory.invariance("layer", "dataset re-scaling")


def test_the_weights_found_are_those_that_are_normalized():
    for norm in invariances.NORMS:
        network = theory.network(norm, (3, 5, 2), torch.Generator().manual_seed(0))
        assert [tuple(w.shape) for w in theory.weights(network)] == [(5, 3), (2, 5)]
        inputs = torch.randn(4, 3, dtype=torch.float64)
        before = network(inputs)
        with torch.no_grad():
            theory.weights(network)[1].add_(torch.randn(2, 5, dtype=torch.float64))
        assert not torch.equal(before, network(inputs))


def test_the_models_normalize_as_the_operators_do():
    inputs, size = theory.features(), (5,)
    for norm in NORMS:
        model = theory.model(norm, "Gaussian", outputs=5)
        summed = inputs @ model.weight.T
        expected = {
            "none": lambda m, a: a + m.bias,
            "batch": lambda m, a: F.batch_norm(a, None, None, m.gain, m.bias, training=True, eps=1e-300),
            "weight": lambda m, a: F.linear(inputs, F.normalize(m.weight) * m.gain[:, None], m.bias),
            "layer": lambda m, a: layernorm.functional.layer_norm(a, size, m.gain, m.bias, 0.0),
            "rms": lambda m, a: layernorm.functional.rms_norm(a, size, m.gain, 0.0) + m.bias,
        }[norm](model, summed)
        torch.testing.assert_close(model.natural(inputs), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", ["Bernoulli", "categorical"])
def test_fisher_is_the_mean_outer_product_of_the_scores(family):
    """Check equation 9, with the expectation taken over all values of y."""
    inputs = theory.features(cases=6, inputs=2)
    values = (
        torch.eye(3) if family == "categorical" else torch.tensor([*itertools.product((0.0, 1.0), repeat=3)])
    )
    for norm in NORMS:
        model = theory.model(norm, family, outputs=3, inputs=2)

        def log_probability(parameters, y, model=model):
            natural = model.with_parameters(parameters).natural(inputs)
            if family == "categorical":
                return natural.log_softmax(-1) @ y
            return -F.binary_cross_entropy_with_logits(natural, y.expand_as(natural), reduction="none").sum(
                -1
            )

        expected = 0.0
        for y in values.double():
            score = torch.func.jacrev(log_probability)(model.parameters, y)  # (cases, H, P)
            probability = log_probability(model.parameters, y).exp()
            expected += torch.einsum("n,nip,njq->ipjq", probability, score, score) / len(inputs)
        torch.testing.assert_close(theory.fisher(model, inputs), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("norm", NORMS)
def test_blocks_agree_with_the_equations_where_the_statistics_are_a_neurons_own(norm):
    inputs = theory.features(inputs=3)
    for family in theory.FAMILIES:
        blocks = theory.compare_blocks(theory.model(norm, family, outputs=3, inputs=3), inputs)
        assert len(blocks) == 9 * (3 if norm == "none" else 6)
        assert max(block.complete for block in blocks) < ROUNDING
        wrong = {(b.parameters, b.neurons[0] == b.neurons[1]) for b in blocks if b.printed > ROUNDING}
        if norm not in ("layer", "rms"):
            assert not wrong
            continue
        weight = ("weight", "weight"), ("weight", "bias"), ("weight", "gain")
        # With independent outputs a bias or gain has a block only with the weights of its own neuron.
        own = weight if family == "categorical" else weight[:1]
        assert wrong == {(pair, False) for pair in weight} | {(pair, True) for pair in own}


def test_what_the_equation_lacks_under_layer_norm_falls_with_the_width():
    inputs = theory.features()

    def deviation(width):
        model = theory.model("layer", "Bernoulli", width)
        printed, complete = (theory.fisher_equation(model, inputs, complete=c) for c in (False, True))
        own = [f[range(width), :6, range(width), :6] for f in (printed, complete)]
        return float((own[0] - own[1]).norm() / own[1].norm())

    assert deviation(8) == pytest.approx(2 * deviation(16), rel=0.2)
    assert deviation(16) == pytest.approx(2 * deviation(32), rel=0.2)


def test_the_kl_divergence_of_gaussians():
    inputs = theory.features()
    model = theory.model("layer", "Gaussian")
    other = model.parameters + 0.1
    shift = model.with_parameters(other).natural(inputs) - model.natural(inputs)
    expected = shift.square().sum(1).mean() / (2 * model.family.dispersion)
    torch.testing.assert_close(theory.kl_divergence(model, inputs, other), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("norm", "scaled", "same"),
    [
        ("batch", "vector", True),
        ("weight", "vector", True),
        ("layer", "vector", False),
        ("layer", "matrix", True),
        ("rms", "matrix", True),
        ("none", "matrix", False),
    ],
)
def test_curvature_falls_with_the_square_of_the_weights_length(norm, scaled, same):
    model = theory.model(norm, "categorical", outputs=3, inputs=3)
    result = theory.scale_weights(model, theory.features(inputs=3), scaled, factor=3.0)
    assert (result.outputs < ROUNDING) == same
    assert result.proportional == same
    assert (abs(result.weights - 1 / 9) < ROUNDING) == same
    assert (abs(result.weights_bias - 1 / 3) < ROUNDING) == same
    assert (abs(result.along) < ROUNDING) == same


def test_the_metric_along_the_gains():
    inputs = theory.features(inputs=3)
    for norm, family in itertools.product(NORMS, theory.FAMILIES):
        result = theory.compare_gain_metric(theory.model(norm, family, 3, 3), inputs)
        assert result.equation == {"batch": 32, "layer": 33, "weight": 34, "none": 35}.get(norm)
        # Equation 32 leaves out a factor that is 1 in the mean only with a constant covariance.
        assert (result.deviation < ROUNDING) == (norm != "batch" or family == "Gaussian")
        robust = norm in ("batch", "layer", "rms")
        assert (abs(result.inputs_doubled - 1) < ROUNDING) == robust
        if family == "Gaussian" and not robust:
            assert result.inputs_doubled == pytest.approx(4)
        assert (abs(result.weights_doubled - 1) < ROUNDING) == (norm != "none" or family == "Gaussian")


def classifier(norm: nn.Module, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8, bias=False), norm, nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        network[0].weight *= scale
    return network


def growth(network: nn.Module) -> list[theory.Step]:
    inputs = theory.features()
    targets = (
        inputs @ torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).argmax(1)
    return theory.weight_growth(network, inputs, targets, learning_rate=0.5, updates=30)


def test_weights_of_a_normalized_network_grow_at_right_angles():
    steps = growth(classifier(layernorm.LayerNorm(8, eps=0.0)))
    assert [step.update for step in steps] == list(range(30))
    for step, after in itertools.pairwise(steps):
        assert abs(step.cosine) < ROUNDING
        # Pythagoras: the update is the opposite leg of the angle.
        longer = step.norm / math.cos(math.radians(step.angle))
        assert after.norm == pytest.approx(longer, rel=1e-9)
        assert step.effective_rate == pytest.approx(0.5 / step.norm**2)
    plain = growth(classifier(nn.Identity()))
    assert max(abs(step.cosine) for step in plain) > 0.01


def test_an_update_turns_weights_four_times_as_long_by_a_sixteenth():
    angles = [growth(classifier(layernorm.LayerNorm(8, eps=0.0), scale))[0].angle for scale in (1.0, 4.0)]
    tangents = [math.tan(math.radians(angle)) for angle in angles]
    assert tangents[0] == pytest.approx(16 * tangents[1], rel=1e-9)


def test_bad_arguments_are_named():
    inputs, targets = torch.randn(4, 2), torch.zeros(4, dtype=torch.long)
    model = theory.model("layer", "Gaussian")
    for call, text in (
        (lambda: theory.invariance("layer", "rotation"), "transformation: expected one of weight matrix"),
        (lambda: theory.invariance("group", "dataset re-scaling"), "norm: expected one of batch"),
        (lambda: theory.model("group", "Gaussian"), "norm: expected one of none"),
        (lambda: theory.model("layer", "Gamma"), "family: expected one of Gaussian"),
        (lambda: theory.scale_weights(model, theory.features(), "row"), "scaled: expected"),
        (lambda: theory.scale_weights(model, theory.features(), factor=0.0), "factor: expected a positive"),
        (lambda: theory.weight_growth(nn.Tanh(), inputs, targets, 0.1, 1, 2), "network: expected one with"),
        (
            lambda: theory.weight_growth(nn.Linear(2, 2), inputs, targets, 0.1, 1),
            "batch_size: expected at most",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory")
    torch.set_num_threads(1)
    study.run(folder, lambda line: None, **SIZES)
    return folder


@pytest.fixture
def results(measured, tmp_path):
    for path in measured.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_the_study_compares_the_paper_with_what_it_measured(measured):
    section = registry.find_study("theory").read(measured)
    assert [card.verdict for card in section.cards if card.section == "§5.1, table 1"] == ["agrees"] * 3
    assert {card.verdict for card in section.cards} == {"agrees", "partly"}
    for card in section.cards:
        assert (card.verdict == "agrees") or card.remark
    table = section.tables[0]
    assert table.columns[1:] == ("batch", "weight", "layer", "rms", "none")
    assert table.rows[1] == ["weight matrix re-centering", "no, no", "no, no", "yes, yes", "no", "no"]
    assert all(len(row) == len(t.columns) for t in section.tables for row in t.rows)


def test_bands_go_over_the_seeds(results):
    for path in results.glob("*.csv"):
        table = pd.read_csv(path)
        put(path, pd.concat([table, table.assign(seed=1)]))
    charts = registry.find_study("theory").read(results).charts
    for line in [line for chart in charts for row in chart.rows for panel in row for line in panel.lines]:
        if line.name != "1/factor":
            assert list(line.low) == list(line.y) == list(line.high)
        assert len(line.x) == len(line.y) > 1


def test_what_was_measured_is_not_measured_again(results):
    (results / "gains.csv").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    lines: list[str] = []
    study.run(results, lines.append, **SIZES)
    after = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    assert {name for name in after if before.get(name) != after[name]} == {"gains.csv", "gains.csv.sha256"}
    assert sum("measured before" in line for line in lines) == 5


def test_a_verdict_follows_from_the_numbers(results):
    path = results / "invariance.csv"
    table = pd.read_csv(path)
    wrong = (table.norm == "layer") & (table.transformation == "dataset re-scaling")
    table.loc[wrong, "invariant"] = False
    put(path, table)
    card = next(
        card for card in registry.find_study("theory").read(results).cards if "Layer norm is" in card.claim
    )
    assert (card.verdict, card.remark) == ("partly", "Not: dataset re-scaling.")
    assert "5 of 6" in card.figure


def test_a_missing_or_damaged_file_is_named(results):
    put(results / "gains.csv", pd.DataFrame({"seed": [0], "norm": ["layer"]}))
    with pytest.raises(ExperimentError, match=r"gains.csv is damaged \(no column 'family'\); delete it"):
        registry.find_study("theory").read(results)
    content = (results / "fisher.csv").read_bytes()
    (results / "fisher.csv").write_bytes(content[: content.rindex(b"\n", 0, -1) + 1])  # at a line's end
    with pytest.raises(
        ExperimentError, match=r"fisher.csv is damaged \(its content does not have its SHA-256"
    ):
        registry.find_study("theory").read(results)
    lines: list[str] = []
    study.run(results, lines.append, **SIZES)
    assert sum("is measured again" in line for line in lines) == 2
    assert (results / "fisher.csv").read_bytes() == content
    (results / "gains.csv").unlink()
    with pytest.raises(ExperimentError, match=r"gains.csv is missing"):
        registry.find_study("theory").read(results)


def test_the_analysis_needs_only_torch():
    for path in Path(theory.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                for module in modules:
                    first, *rest = module.split(".")
                    assert first in {"torch", "layernorm", *sys.stdlib_module_names}, (path.name, module)
                    assert first != "layernorm" or rest[:1] in ([], ["theory"]), (path.name, module)
