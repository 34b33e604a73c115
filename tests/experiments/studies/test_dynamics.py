"""Traces of hidden states and gradients against plain loops; the study's cards, resumption and errors."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from torch import nn

import layernorm
from layernorm.experiments import registry
from layernorm.experiments.report import drawing
from layernorm.experiments.studies import dynamics
from layernorm.experiments.task import ExperimentError
from tests.experiments.studies.tables_by_hand import put

pytestmark = pytest.mark.usefixtures("one_thread")
# The RNN (relu) without norm grows by about 1.48 a step at scale 2: 40 steps are enough to tell.
SIZES = {"lengths": (4, 40), "hidden_size": 16, "seeds": 2}


def loop(cell: str, norm: str, scale: float, steps: int, hidden_size: int, seed: int) -> dynamics.Trace:
    """The definition of a trace of an RNN: one step after the other, one derivative after the other."""
    torch.manual_seed(seed)
    activation = {"RNN (relu)": torch.relu, "RNN (tanh)": torch.tanh}[cell]
    made = {"none": nn.RNN, "layer": layernorm.LayerNormRNN}[norm](hidden_size, hidden_size).double()
    weights = dict(made.named_parameters())
    w_x = scale * nn.init.orthogonal_(torch.empty(hidden_size, hidden_size, dtype=torch.float64))
    w_h = scale * nn.init.orthogonal_(torch.empty(hidden_size, hidden_size, dtype=torch.float64))
    inputs = torch.randn(steps, 4, hidden_size, dtype=torch.float64)
    projection = torch.randn(4, hidden_size, dtype=torch.float64)
    rows = [x.requires_grad_() for x in inputs.clone().unbind()]
    h = torch.zeros(4, hidden_size, dtype=torch.float64)
    sizes = []
    for x in rows:
        summed = x @ w_x.T + h @ w_h.T
        if norm == "layer":
            deviation = summed - summed.mean(1, keepdim=True)
            h = activation(deviation / (deviation.square().mean(1, keepdim=True) + 1e-5).sqrt())
        else:
            h = activation(summed + weights["bias_ih_l0"] + weights["bias_hh_l0"])
        sizes.append(h.detach().square().mean().sqrt())
    gradients = torch.autograd.grad((h * projection).sum(), rows)
    return dynamics.Trace(torch.stack(sizes), torch.stack([g.norm() for g in gradients]))


@pytest.mark.parametrize("norm", dynamics.NORMS)
@pytest.mark.parametrize("cell", ["RNN (relu)", "RNN (tanh)"])
def test_a_trace_is_that_of_a_plain_loop(cell, norm):
    arguments = (cell, norm, 0.5, 7, 6, 3)
    # Rounding of float64, of which layer norm's division by small deviations makes some more.
    for found, expected in zip(dynamics.trace(*arguments), loop(*arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_norms_beyond_the_range_of_squares_are_told():
    trace = dynamics.trace("RNN (relu)", "none", 5.0, 500, 8, seed=0)
    assert trace.hidden[-1] > 1e200
    assert trace.gradient[0] > 1e200
    trace = dynamics.trace("RNN (tanh)", "none", 0.1, 300, 8, seed=0)
    assert 0 < trace.gradient[0] < 1e-200


def test_there_is_no_gradient_of_a_state_that_has_overflowed():
    trace = dynamics.trace("RNN (relu)", "none", 8.0, 500, 8, seed=0)
    assert not trace.hidden[-1].isfinite()
    assert trace.gradient.isnan().all()


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    dynamics.trace("GRU", "layer", 1.0, 2, 4, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("cell", "norm", "name"), [("RNN", "none", "cell"), ("GRU", "batch", "norm")])
def test_bad_arguments_are_named(cell, norm, name):
    with pytest.raises(ValueError, match=f"^{name}: expected one of .*, got '"):
        dynamics.trace(cell, norm, 1.0, 2, 4, seed=0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamics")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dynamics.run(folder, lambda line: None, **SIZES)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def results(measured, tmp_path):
    for name in ("dynamics.csv", "dynamics.csv.sha256"):
        (tmp_path / name).write_bytes((measured / name).read_bytes())
    return tmp_path


def test_a_row_is_the_geometric_mean_over_the_seeds(measured):
    table = pd.read_csv(measured / "dynamics.csv")
    rows = table[(table.cell == "GRU") & (table.norm == "none") & (table.scale == 0.5) & (table.steps == 40)]
    rows = rows.set_index("step")
    traces = [dynamics.trace("GRU", "none", 0.5, 40, 16, seed) for seed in (0, 1)]
    # Hidden states by their step; gradients by the steps back, the last one's being 1.
    for step in (1, 3, 40):
        hidden = math.sqrt(math.prod(float(trace.hidden[step - 1]) for trace in traces))
        gradient = math.sqrt(math.prod(float(trace.gradient[-step]) for trace in traces))
        assert rows.hidden[step] == pytest.approx(hidden, rel=1e-12)
        assert rows.gradient[step] == pytest.approx(gradient, rel=1e-12)


def verdicts(folder):
    return [card.verdict for card in registry.find_study("dynamics").read(folder).cards]


def test_cards_tables_and_charts(measured):
    section = registry.find_study("dynamics").read(measured)
    # Gradients of the RNNs and the GRU vanish with layer norm too, and the card says so.
    assert [card.verdict for card in section.cards] == ["agrees", "agrees", "partly"]
    assert "forgets" in section.cards[2].remark
    for table in section.tables:
        assert len(table.rows) == len(dynamics.CELLS) * len(dynamics.NORMS) * len(dynamics.SCALES)
        assert all(len(row) == len(table.columns) == 5 for row in table.rows)
    assert [chart.name for chart in section.charts] == [
        "dynamics-rnn-relu",
        "dynamics-rnn-tanh",
        "dynamics-lstm",
        "dynamics-gru",
    ]
    for chart in section.charts:
        drawing.check(chart)
        assert all(len(line.x) > 3 for row in chart.rows for panel in row for line in panel.lines)


@pytest.mark.parametrize(("norm", "expected"), [("none", "differs"), ("layer", "agrees")])
def test_cards_flip_when_the_norm_is_none(results, monkeypatch, norm, expected):
    """The cells of one norm in place of the other's: what the cards say comes from the numbers."""
    for cell in ("RNN (relu)", "RNN (tanh)", "LSTM", "GRU"):
        monkeypatch.setitem(dynamics._MODULES, (cell, "layer"), dynamics._MODULES[cell, norm])
    (results / "dynamics.csv").unlink()
    dynamics.run(results, lambda line: None, lengths=(40,), hidden_size=8, seeds=1)
    first, second, third = verdicts(results)
    assert (first, second) == (expected, expected)
    assert third == {"none": "differs", "layer": "partly"}[norm]


def test_gradients_that_are_kept_agree(results):
    path = results / "dynamics.csv"
    table = pd.read_csv(path)
    table.loc[table.norm == "layer", "gradient"] = 1.0
    put(path, table)
    assert verdicts(results) == ["agrees", "agrees", "agrees"]


def test_what_has_overflowed_is_said(results):
    path = results / "dynamics.csv"
    table = pd.read_csv(path)
    grown = (table.cell == "RNN (relu)") & (table.norm == "none") & (table.scale == 2) & (table.steps == 40)
    table.loc[grown & (table.step > 20), "hidden"] = math.inf
    table.loc[grown, "gradient"] = math.nan
    put(path, table)
    section = registry.find_study("dynamics").read(results)
    assert "overflow" in section.cards[0].figure
    assert [table.rows[2][-1] for table in section.tables] == ["overflow", "overflow"]
    hidden, gradient = section.charts[0].rows
    assert max(hidden[2].lines[0].x) <= 20
    # The gradients that can be shown are those of the other length.
    assert max(gradient[2].lines[0].x) == 4
    assert max(section.charts[1].rows[1][2].lines[0].x) == 40


def test_a_run_goes_on_where_it_was_stopped(results, measured, monkeypatch):
    path = results / "dynamics.csv"
    table = pd.read_csv(path)
    # Stopped in the last length, in the middle of writing.
    stopped = (table.steps == 40) & (table.cell.isin(["LSTM", "GRU"]))
    put(path, table[~stopped])
    path.with_name("dynamics.csv.new").write_text("step,hid")
    traced = []
    original = dynamics.trace

    def counted(cell, norm, scale, steps, hidden_size, seed):
        traced.append((cell, steps, seed))
        return original(cell, norm, scale, steps, hidden_size, seed)

    monkeypatch.setattr(dynamics, "trace", counted)
    dynamics.run(results, lambda line: None, **SIZES)
    assert len(traced) == 2 * 2 * 3 * 2
    assert {cell for cell, _, _ in traced} == {"LSTM", "GRU"}
    assert {steps for _, steps, _ in traced} == {40}
    pd.testing.assert_frame_equal(pd.read_csv(path), pd.read_csv(measured / "dynamics.csv"), rtol=1e-12)
    traced.clear()
    dynamics.run(results, lambda line: None, **SIZES)
    assert not traced


def test_an_interrupt_keeps_what_was_finished(tmp_path, monkeypatch):
    lines = []

    def say(line):
        lines.append(line)
        if len(lines) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dynamics.run(tmp_path, say, lengths=(4,), hidden_size=4, seeds=1)
    assert len(pd.read_csv(tmp_path / "dynamics.csv")[["norm", "scale"]].drop_duplicates()) == 3
    with pytest.raises(ExperimentError, match="no length finished yet; the same command goes on"):
        dynamics.read(tmp_path)


def test_only_finished_lengths_are_reported(results):
    path = results / "dynamics.csv"
    table = pd.read_csv(path)
    put(path, table[(table.steps == 4) | (table.cell != "GRU")])
    assert [table.columns[3:] for table in dynamics.read(results).tables] == [("4 steps",)] * 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"step,hidden\n1,2\n",
        b"\x89PNG\xff\xfe",
        b"step,hidden,gradient,cell,norm,scale,steps\n1,a,b,c,d,e,f\n",
    ],
)
def test_a_damaged_file_is_named_and_measured_again(results, measured, monkeypatch, content):
    (results / "dynamics.csv").write_bytes(content)
    with pytest.raises(ExperimentError, match=r"dynamics.csv is damaged \(.+\); delete it"):
        dynamics.read(results)
    monkeypatch.setattr(dynamics, "_cases", lambda lengths: [("GRU", "none", 0.5, 4)])
    lines = []
    dynamics.run(results, lines.append, **SIZES)
    assert "dynamics.csv is damaged (its content does not have its SHA-256); it is measured again" in lines[0]
    again, before = (pd.read_csv(folder / "dynamics.csv") for folder in (results, measured))
    chosen = (before.cell == "GRU") & (before.norm == "none") & (before.scale == 0.5) & (before.steps == 4)
    pd.testing.assert_frame_equal(again, before[chosen].reset_index(drop=True), rtol=1e-12)


def test_a_file_of_others_is_named_and_kept(tmp_path):
    (tmp_path / "dynamics.csv").write_text("step,hidden\n1,2\n")
    for use in (dynamics.read, lambda folder: dynamics.run(folder, print, **SIZES)):
        with pytest.raises(ExperimentError, match=r"is damaged \(it has no dynamics.csv.sha256 beside it\)"):
            use(tmp_path)
    (tmp_path / "dynamics.csv").unlink()
    with pytest.raises(ExperimentError, match=r"dynamics.csv is missing; the same command"):
        dynamics.read(tmp_path)
