"""Skip-thoughts: which sentences are said, their loss, and the tests of the vectors."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from layernorm.experiments.data import Pair
from layernorm.experiments.networks.sentence_encoder import NORMS
from layernorm.experiments.task import Batch, ExperimentError, MissingData
from layernorm.experiments.tasks.skip_thoughts import running_text, sentence_tests
from layernorm.experiments.tasks.skip_thoughts import task as skip_thoughts
from layernorm.experiments.tasks.skip_thoughts.task import TASK, TRANSFER, VALIDATION_LOSS, SkipThoughts

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["stone", "river", "cloud", "lamp", "road"]


def sentence(place: int) -> str:
    return " ".join(WORDS[place % 5 : place % 5 + 1] * (1 + place % 3)) + "."


@pytest.fixture
def data(monkeypatch):
    play = "\n\n".join(f"ONE:\n{sentence(2 * k)}\n{sentence(2 * k + 1)}" for k in range(20))
    monkeypatch.setattr(running_text.data, "tiny_shakespeare", lambda: play)
    pairs = [Pair(sentence(k), sentence(k + k % 4), 1.0 + k % 5 * 0.9) for k in range(30)]
    monkeypatch.setattr(sentence_tests.data, "sick", lambda part: pairs)
    texts = [sentence(5 * k + k % 2) for k in range(40)]
    labels = torch.tensor([k % 2 for k in range(40)])
    monkeypatch.setattr(sentence_tests.data, "sentence_set", lambda name: (texts, labels))


def problem(**sizes):
    small = {"held_out": 10, "vocabulary": 8, "embedding": 4, "units": 6, "folds": 2}
    return TASK.problem(**{**TASK.presets["small"].sizes, **small, **sizes})


def batch(cases: torch.Tensor) -> Batch:
    return Batch(cases, 0, len(cases), torch.Generator())


def test_the_text_is_split_into_sentences_without_speakers(data):
    (document,) = running_text.load("shakespeare")
    assert len(document) == 40
    assert document[:2] == [["stone", "."], ["river", "river", "."]]


def test_books_are_documents_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERNORM_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(MissingData, match=r"A collection of books is not here .* the folder books of"):
        running_text.load("books")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text("One.\n\n Two !\n")
    (tmp_path / "books" / "a.txt").write_text("Zero\n")
    assert running_text.load("books") == [[["zero"]], [["one", "."], ["two", "!"]]]
    with pytest.raises(ExperimentError, match="unknown text 'bible'; expected one of shakespeare, books"):
        running_text.load("bible")


def test_a_triple_stays_in_its_document():
    documents = [[["a"]] * 4, [["b"]] * 2, [["c"]] * 3]
    assert skip_thoughts._middles(documents).tolist() == [1, 2, 7]


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_is_that_of_saying_the_neighbours_word_by_word(norm, data):
    task = problem()
    network = task.network(norm)
    cases = torch.tensor([0, 5, 3, 4])
    loss = task.loss(network, batch(cases))
    rows = task._sentences.indices
    expected, words = 0.0, 0
    for middle in (cases + 1).tolist():
        state = network.encoder.encode(skip_thoughts.Sentences([indices(rows, middle)]))[None]
        for decoder, place in ((network.previous, middle - 1), (network.next, middle + 1)):
            said, h = 0, state
            for word in [*indices(rows, place), 0]:
                output, h = decoder(network.encoder.words(torch.tensor([[said]])), h)
                expected -= F.log_softmax(network.logits(output[0, 0]), -1)[word].item()
                said, words = word, words + 1
    assert loss.count == words
    # Sums of some tens of float32 terms near 2.
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    loss.total.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def indices(rows: torch.Tensor, place: int) -> list[int]:
    return [index for index in rows[place].tolist() if index]


def test_the_end_of_the_text_is_held_out(data):
    task = problem(held_out=10)
    assert task.cases == len(task._train) == 28
    assert task._train.max() + 1 == 29
    assert task._held_out.tolist() == list(range(31, 39))
    with pytest.raises(ExperimentError, match=r"held_out must be at least 3 .* the text's 40, got 38"):
        problem(held_out=38)


def test_evaluation_has_the_loss_and_every_test(data):
    task = problem()
    network = task.network("layer")
    before, state = task.network("none"), torch.get_rng_state()
    with torch.no_grad():
        values = task.evaluate(network)
        whole = task._cross_entropy(network, task._held_out)
    assert torch.equal(state, torch.get_rng_state())
    assert list(values) == [metric.name for metric in TASK.metrics]
    assert values[VALIDATION_LOSS.name] == pytest.approx(whole.total.item() / whole.count, rel=1e-6)
    assert np.isfinite(list(values.values())).all()
    # The label is the sentence's word.
    assert values["mr"] > 90
    with pytest.raises(TypeError, match="network must be SkipThoughts, got GRU"):
        task.evaluate(before.next)


def test_it_learns(data):
    task = problem()
    network = task.network("layer")
    optimizer = torch.optim.Adam(network.parameters(), 0.03)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = task.loss(network, batch(torch.arange(task.cases)))
        (loss.total / loss.count).backward()
        optimizer.step()
        losses.append(loss.total.item() / loss.count)
    assert losses[-1] < 0.3 * losses[0]


def test_relatedness_is_read_from_vectors_that_hold_it():
    generator = np.random.default_rng(0)

    def pairs(count: int) -> sentence_tests.Related:
        first = torch.from_numpy(generator.normal(size=(count, 3)))
        shift = torch.from_numpy(generator.uniform(size=count))
        second = first + torch.stack((shift, 0 * shift, 0 * shift), -1)
        return sentence_tests.related(first, second, 5 - 4 * shift.numpy())

    train, trial, test = pairs(300), pairs(50), pairs(100)
    pearson, spearman, error = sentence_tests.relatedness(train, trial, test)
    assert pearson > 0.97
    assert spearman > 0.97
    # The scores vary by 4²/12 around their mean.
    assert error < 0.3 * 4**2 / 12
    shuffled = test._replace(scores=generator.permutation(test.scores))
    assert abs(sentence_tests.relatedness(train, trial, shuffled)[0]) < 0.4


def test_accuracy_is_of_cases_that_were_not_trained_on():
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=120)
    noise = generator.normal(size=(120, 60))
    assert 0.3 < sentence_tests.accuracy(noise, labels, 4) < 0.7
    assert sentence_tests.accuracy(np.c_[noise[:, :10], 10 * labels], labels, 4) > 0.95


def test_a_missing_test_is_named(data, monkeypatch):
    def missing(name):
        raise MissingData(f"{name} is not here")

    monkeypatch.setattr(sentence_tests.data, "sentence_set", missing)
    with pytest.raises(MissingData, match="MR is not here"):
        problem()


def test_folds_need_cases(data):
    with pytest.raises(ExperimentError, match="at least 8 tested cases for each, got 3 folds and 20 cases"):
        problem(folds=3, tested=20)


def test_norms_begin_with_the_same_weights():
    networks = []
    for norm in NORMS:
        torch.manual_seed(3)
        networks.append(dict(SkipThoughts(norm, words=9, embedding=4, units=6).named_parameters()))
    for name in networks[0].keys() & networks[1].keys() & networks[2].keys():
        assert torch.equal(networks[0][name], networks[1][name])
        assert torch.equal(networks[0][name], networks[2][name])


def test_cards_and_table_take_each_run_where_its_loss_is_least():
    rows = []
    runs = (("none", 0.0, (3.0, 2.5, 2.0, 2.1)), ("layer", 1.0, (3.0, 1.0, 1.5, 1.6)))
    for seed, (norm, better, losses) in itertools.product((0, 1), runs):
        for place, loss in enumerate(losses):
            row = {"norm": norm, "batch_size": 128, "seed": seed, "update": 60 * place}
            row |= {"validation_loss": loss, "learning_rate": 1e-3}
            best = loss == min(losses)
            for metric in TRANSFER:
                row[metric.name] = (50.0 + better * (1 if metric.higher else -1)) if best else 0.0
            rows.append(row)
    results = pd.DataFrame(rows)
    assert [card.verdict for card in TASK.judge(results)] == ["agrees", "agrees"]
    results.loc[5, "mr"] = 10.0
    card = TASK.judge(results)[1]
    assert card.verdict == "partly"
    assert "Better in 6 of 7, beyond chance in 6:" in card.figure
    assert TASK.judge(results[results.seed == 0])[1].verdict == "cannot tell"
    assert "a difference is chance" in card.remark
    assert [card.verdict for card in TASK.judge(results[results.norm == "none"])] == ["not run", "not run"]
    (table,) = TASK.tables(results)
    assert {len(row) for row in table.rows} == {len(table.columns)} == {8}
    assert table.rows[-1][:2] == ("here: layer, batch 128", "51.000")


def test_both_sizes_can_be_changed_in_the_same_ways():
    small, paper = TASK.presets["small"].sizes, TASK.presets["paper"].sizes
    assert small.keys() == paper.keys()
    assert [type(value) for value in small.values()] == [type(paper[name]) for name in small]
