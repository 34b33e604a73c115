"""One network in batches and step by step: against plain loops; the study's cards, resumption, errors."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

from layernorm import backends
from layernorm.baselines import BatchNorm
from layernorm.experiments import registry
from layernorm.experiments.classification import Data
from layernorm.experiments.report import drawing
from layernorm.experiments.studies.online import study as online
from layernorm.experiments.task import ExperimentError
from layernorm.experiments.tasks import digits
from tests.experiments.studies.tables_by_hand import put

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"epochs": 1, "train_batch_sizes": (1, 50), "batch_sizes": (1, 40), "seeds": 1}
# Products of 64 numbers of about 1 in float32, over eight steps.
ROUNDING = 1e-5
DIGITS = digits.load


@pytest.fixture
def images():
    return torch.rand(6, 8, 8)


def subject(norm, images):
    reader = online.RowReader
    told = reader.told if norm == "batch" else None
    ways = (reader.states, reader.online, told)
    return online.Subject(trained(norm), images, *ways, lambda net, h: net.logits(h))


def trained(norm):
    """A reader whose batch norm has statistics of other images."""
    reader = online.RowReader(norm)
    reader(torch.rand(9, 8, 8, generator=torch.Generator().manual_seed(1)))
    return reader


def measured_rows(norm, images):
    rows = online.measure(subject(norm, images), torch.zeros(len(images), dtype=torch.long), (1, 4))
    return pd.DataFrame(rows).set_index(["mode", "steps", "batch_size"]).sort_index()


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_reading_online_is_a_loop_over_the_rows(images, norm):
    reader = online.RowReader(norm)
    state = None
    for row in range(8):
        _, state = reader.lstm(images[:, row : row + 1], state)
    torch.testing.assert_close(reader.online(images), state[0][0], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(reader.states(images), state[0][0], rtol=0, atol=ROUNDING)


def test_layer_norm_has_the_same_bits_in_every_way(native, images):
    rows = measured_rows("layer", images)
    assert list(rows.index) == [
        *(("evaluation", "online", size) for size in (1, 4, 6)),
        *(("evaluation", "whole", size) for size in (1, 4, 6)),
        *(("training", "whole", size) for size in (1, 4, 6)),
    ]
    assert (rows.bits == 1).all()
    assert (rows.deviation == 0).all()
    assert (rows.loc["training"].mode_bits == 1).all()


def test_the_reference_has_the_same_numbers_up_to_rounding(images):
    with backends.use("reference"):
        rows = measured_rows("layer", images)
    assert rows.deviation.max() < ROUNDING
    assert rows.changed.sum() == 0


def test_batch_norm_depends_on_mode_and_batch(images):
    rows = measured_rows("batch", images)
    assert rows.loc[("evaluation", "whole")].deviation.max() < ROUNDING
    assert "batch norm needs two" in rows.problem["training", "whole", 1]
    assert rows.loc[("training", "whole")].deviation[[4, 6]].min() > 1e-2


def test_batch_norm_needs_to_be_told_which_step_it_is(images):
    rows = measured_rows("batch", images)
    assert rows.loc[("evaluation", "online")].deviation.min() > 1e-3
    assert rows.loc[("evaluation", "told")].deviation.max() < ROUNDING
    reader = trained("batch").eval()
    before = {name: buffer.clone() for name, buffer in reader.named_buffers()}
    state = None
    with torch.no_grad():
        found = reader.online(images)
        for step in range(8):  # every step with the statistics of the first
            _, state = reader.lstm(images[:, step : step + 1], state)
        assert torch.equal(found, state[0][0])
        reader.told(images)
    assert all(torch.equal(buffer, before[name]) for name, buffer in reader.named_buffers())


def test_what_is_counted():
    """A batch norm by itself: means of the batch against the running ones, by hand."""
    norm = BatchNorm(2)
    cases = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 4.0]])
    targets = torch.tensor([0, 0, 1, 0])
    rows = online.measure(
        online.Subject(norm, cases, lambda net, x: net(x), None, None, lambda net, x: x), targets, (2,)
    )
    table = pd.DataFrame(rows).set_index(["mode", "batch_size"])
    evaluated = table.loc[("evaluation", 2)]
    assert (evaluated.bits, evaluated.changed, evaluated.test_error) == (1, 0, 25)
    # Two cases of 1 and 3 become -1 and 1, and the feature that is constant 0; the evaluation has the cases.
    trained = table.loc[("training", 2)]
    assert trained.deviation == trained.by_mode == pytest.approx(3, abs=1e-4)
    # Predictions, ties being 0: evaluation 0, 0, 1, 1; training 1, 0, 0, 1.
    assert (trained.changed, trained.test_error, trained.bits, trained.mode_bits) == (2, 75, 0, 0)
    # What was measured is as it was.
    assert norm.running_mean.tolist() == [0, 0]
    assert norm.training


def few():
    """100 training, 20 validation and 60 test cases."""
    sizes = {"train": 100, "valid": 20, "test": 60}
    return Data(**{name: part[: sizes[name.partition("_")[0]]] for name, part in vars(DIGITS()).items()})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "load", few)
        online.run(folder, lambda line: None, **SIZES)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def results(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "load", few)
    for path in measured.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def cards(folder):
    return registry.find_study("online").read(folder).cards


def test_cards_tables_and_charts(measured):
    section = registry.find_study("online").read(measured)
    # One epoch teaches the LSTM enough only with batch size 1, which is what the last card is of.
    assert [card.verdict for card in section.cards[:3]] == ["agrees"] * 3
    assert "batch norm cannot be trained so" in section.cards[3].figure
    assert all(len(row) == len(table.columns) for table in section.tables for row in table.rows)
    ways = {tuple(row[:3]): row[3:] for row in section.tables[0].rows}
    assert len(ways) == 2 * 2 * 2 + 2 * 3 + 2 + 4 + 2 + 1
    assert "same bits" not in ways["LSTM", "batch", "step by step"]
    assert all(cell == "same bits" or float(cell) < 1e-4 for cell in ways["LSTM", "batch", "told which step"])
    assert ways["norm alone", "layer", "training mode"] == ["same bits"] * 3
    assert ways["feed-forward", "batch", "training mode"][0] == "not possible"
    for chart in section.charts:
        drawing.check(chart)
    assert {line.name for line in section.charts[0].rows[0][0].lines} == {
        *online.NORMS,
        "batch, training mode",
    }
    assert not list(measured.glob("*.checkpoint"))


def test_cards_flip_with_the_numbers(results):
    path = results / "inference.csv"
    table = pd.read_csv(path)
    one = (table.network == "LSTM") & (table.batch_size == 1)
    wrong = one & ((table.norm == "layer") | (table.steps == "told"))
    for choice, flipped in (
        (table["mode"] == "training", 0),
        ((table["mode"] == "evaluation") & (table.steps == "whole"), 1),
        (table.steps == "online", 2),
        ((table.steps == "told") & (table.norm == "batch"), 2),
    ):
        changed = table.copy()
        changed.loc[wrong & choice, ["deviation", "by_mode"]] = 0.01
        changed.loc[wrong & choice, ["bits", "mode_bits"]] = 0.0
        put(path, changed)
        assert [card.verdict for card in cards(results)][:3] == [
            "differs" if index == flipped else "agrees" for index in range(3)
        ]
    put(path, table)
    training = pd.read_csv(results / "training.csv")
    for error, verdict in ((4.0, "agrees"), (90.0, "differs")):
        training.loc[(training.norm == "layer") & (training.train_batch_size == 1), "test_error"] = error
        put(results / "training.csv", training)
        assert cards(results)[3].verdict == verdict


def test_a_norm_that_depends_on_the_batch_is_found(monkeypatch, images):
    """A mutant in place of layer norm: statistics over the batch too."""
    network = online.RowReader("layer")
    original = online.RowReader.states

    def mixed(self, images):
        states = original(self, images)
        return states - states.mean(0)

    monkeypatch.setattr(online.RowReader, "states", mixed)
    mutant = online.Subject(network, images, mixed, None, None, lambda net, h: net.logits(h))
    rows = pd.DataFrame(online.measure(mutant, torch.zeros(6, dtype=torch.long), (1, 4)))
    assert (rows[rows.batch_size < 6].bits == 0).all()
    assert rows[rows.batch_size == 1].deviation.min() > 1e-3


def test_a_run_goes_on_where_it_was_stopped(results, measured, monkeypatch):
    trained = []
    original = online._train

    def counted(folder, data, network, norm, seed, batch_size, epochs):
        trained.append((network, norm, batch_size))
        return original(folder, data, network, norm, seed, batch_size, epochs)

    monkeypatch.setattr(online, "_train", counted)
    path = results / "training.csv"
    table = pd.read_csv(path)
    # Stopped after inference.csv was written and before training.csv.
    put(path, table[:-1])
    with pytest.raises(ExperimentError, match="no seed finished yet; the same command goes on"):
        online.read(results)
    online.run(results, lambda line: None, **SIZES)
    assert trained == [("feed-forward", "layer", 50)]
    for name in ("training.csv", "inference.csv"):
        again, before = pd.read_csv(results / name), pd.read_csv(measured / name)
        pd.testing.assert_frame_equal(again, before)
    online.run(results, lambda line: None, **SIZES)
    assert len(trained) == 1


def test_a_training_goes_on_from_its_checkpoint(results, measured, monkeypatch):
    steps = []
    original = online.Trainer.step

    def interrupted(self, cases, stop):
        steps.append(self.update)
        if len(steps) == 2:
            self.save()
            raise KeyboardInterrupt
        return original(self, cases, stop)

    path = results / "training.csv"
    table = pd.read_csv(path)
    put(path, table[:-1])
    monkeypatch.setattr(online.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        online.run(results, lambda line: None, **SIZES)
    online.run(results, lambda line: None, **SIZES)
    assert steps == [0, 1, 1]
    pd.testing.assert_frame_equal(pd.read_csv(path), table)


@pytest.mark.parametrize("name", ["training", "inference"])
@pytest.mark.parametrize("content", [b"", b"network,norm\nLSTM,layer\n", b"\x89PNG\xff\xfe"])
def test_a_damaged_file_is_named(results, name, content):
    (results / f"{name}.csv").write_bytes(content)
    with pytest.raises(ExperimentError, match=rf"{name}.csv is damaged \(.+\); delete training.csv"):
        online.read(results)
    (results / f"{name}.csv").unlink()
    with pytest.raises(ExperimentError, match=rf"{name}.csv is missing; the same command"):
        online.read(results)


def test_damaged_files_are_measured_again(results, measured, monkeypatch):
    (results / "inference.csv").write_bytes((measured / "inference.csv").read_bytes()[:-100])
    checkpoint = results / "feed-forward-none-batch50-seed0.checkpoint"
    checkpoint.write_bytes(b"")
    monkeypatch.setattr(online, "NORMS", ("none",))
    lines = []
    online.run(results, lines.append, **SIZES)
    assert (
        "inference.csv is damaged (its content does not have its SHA-256); it is measured again" in lines[0]
    )
    assert sum("it is empty or cut off); this run begins again" in line for line in lines) == 1
    again, before = (pd.read_csv(folder / "training.csv") for folder in (results, measured))
    assert again.test_error.tolist() == before[before.norm == "none"].test_error.tolist()


def test_the_network_is_the_tasks():
    reader = online.RowReader("none")
    assert isinstance(reader.lstm, nn.LSTM)
    assert (reader.lstm.input_size, reader.lstm.hidden_size) == (8, 64)
