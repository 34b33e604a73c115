"""The attentive reader, and the questions that it is asked."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from layernorm.experiments import data
from layernorm.experiments.data import Question, words
from layernorm.experiments.task import Batch, ExperimentError
from layernorm.experiments.tasks.attentive_reader import cloze
from layernorm.experiments.tasks.attentive_reader import task as attentive_reader
from layernorm.experiments.tasks.attentive_reader.task import NORMS, TASK, AttentiveReader, Reading

PLAY = """ROMEO:
Is the day so young?

BENVOLIO:
But new struck nine, good Romeo.

Nurse:
All is well.

ROMEO:
Ay me! sad hours seem long."""

NEWS = Question(
    "by @entity4 . the @entity7 dog ran home . it rained in @entity2 all day . the dog slept .",
    "the dog of @placeholder ran",
    "@entity7",
    ("@entity4", "@entity7", "@entity2"),
)


def sizes(**changed):
    return {"embedding": 6, "hidden": 8, "vocabulary": 50, **changed}


@pytest.fixture
def plays(monkeypatch):
    """A play of three persons, without end, in the place of Shakespeare's."""
    names = ["ANNE", "BOB", "CARL"]
    speeches = [f"{names[i % 3]}:\nword{i % 5} and {names[(i + i // 7) % 3].title()}" for i in range(90)]
    monkeypatch.setattr(data, "tiny_shakespeare", lambda: "\n\n".join(speeches))


def batch(problem, start=0, end=8, size=8, seed=1):
    return Batch(torch.arange(start, end), start, size, torch.Generator().manual_seed(seed))


def reader(norm, **options):
    options = {"indices": 40, "markers": 5, "embedding": 6, "hidden": 8, "bidirectional": True, **options}
    return AttentiveReader(norm, **options)


def questions():
    """Indices and lengths of six passages and queries."""
    lengths = torch.tensor([7, 3, 9, 1, 4, 9]), torch.tensor([2, 5, 5, 1, 3, 4])
    return torch.randint(40, (6, 9)), lengths[0], torch.randint(40, (6, 5)), lengths[1]


def test_a_question_on_a_play_asks_who_speaks_next_among_those_who_did():
    first, *more = cloze.who_speaks(PLAY, speeches=3, length=4)
    assert not more
    romeo, benvolio, nurse = "@entity2", "@entity0", "@entity1"
    assert first.passage == (
        f"{romeo} : is the day so {benvolio} : but new struck nine {nurse} : all is well ."
    )
    assert first.query == "@placeholder : ay me ! sad"
    assert first.answer == romeo
    assert set(first.candidates) == {romeo, benvolio, nurse}
    # Nobody of the last speech is asked for; a name in a speech is a marker too.
    assert not cloze.who_speaks(PLAY, speeches=1)
    (long,) = cloze.who_speaks(PLAY, speeches=3, length=10)
    assert f"good {romeo} ." in long.passage
    assert f"{nurse} : all is" in long.passage


def test_markers_are_numbered_as_they_appear_after_the_words_of_the_vocabulary():
    vocabulary = cloze.vocabulary([NEWS], 8)
    assert not any(word.startswith("@entity") for word in vocabulary.words)
    found = cloze.Indexer(vocabulary)([NEWS, NEWS._replace(passage="@entity9 barks", answer="@entity3")])
    first = len(vocabulary)
    assert found.passages[0, 1] == first
    assert found.passages[0, 4] == first + 1
    assert found.answers.tolist() == [1, 1]  # the second one's stands nowhere, after @entity9
    assert found.markers.tolist() == [3, 2]
    assert found.passage_lengths.tolist() == [len(words.tokens(NEWS.passage)), 2]
    assert found.passages[1, :2].tolist() == [first, words.UNKNOWN]
    assert found.query_lengths.tolist() == [5, 5]
    assert first not in found.queries


def test_the_nearest_sentences_are_kept_in_their_order():
    found = cloze.Indexer(cloze.vocabulary([NEWS], 50), sentences=2)([NEWS])
    assert found.passage_lengths.tolist() == [10]
    passage = cloze.nearest_sentences(NEWS.passage.split(), NEWS.query.split(), 2)
    assert " ".join(passage) == "the @entity7 dog ran home . the dog slept ."


def test_renumbered_markers_are_the_same_question():
    vocabulary = cloze.vocabulary([NEWS], 50)
    first = len(vocabulary)
    before = cloze.Indexer(vocabulary)([NEWS])
    after = before.renumbered(torch.tensor([[2, 0, 1]]), first)
    is_word = before.passages < first
    assert torch.equal(before.passages[is_word], after.passages[is_word])
    assert before.passages[~is_word].sub(first).tolist() == [0, 1, 2]
    assert after.passages[~is_word].sub(first).tolist() == [2, 0, 1]
    assert after.answers.tolist() == [0]


def test_training_numbers_the_markers_by_the_place_in_the_batch_and_validation_always_alike(plays):
    problem = Reading(**sizes())
    seen = []

    def network(passages, passage_lengths, queries, query_lengths):
        seen.append(passages)
        return torch.zeros(len(passages), problem.markers)

    loss = problem.loss(network, batch(problem))
    problem.loss(network, batch(problem, start=3))
    problem.loss(network, batch(problem, seed=2))
    assert loss.total.item() == pytest.approx(8 * torch.tensor(3.0).log().item())
    assert loss.count == 8
    assert torch.equal(seen[1], seen[0][3:])
    assert not torch.equal(seen[2], seen[0])
    again = Reading(**sizes())
    problem.evaluate(network)
    again.evaluate(network)
    assert torch.equal(seen[3], seen[4])
    assert {seen[3][case, 0].item() for case in range(len(seen[3]))} == set(
        range(problem.words, problem.words + 3)
    )


def test_the_metrics_are_those_of_the_validation_questions(plays):
    problem = Reading(**sizes(held_out=7))
    answers = problem._validation.answers

    def network(passages, *rest):
        return 20.0 * F.one_hot(answers, problem.markers).roll(1, 0)

    wrong = (answers != answers.roll(1)).float().mean().item()
    assert 0 < wrong < 1
    found = problem.evaluate(network)
    assert found["validation_error"] == pytest.approx(100 * wrong)
    assert found["validation_loss"] == pytest.approx(20 * wrong, rel=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_padding_changes_nothing(norm):
    network = reader(norm).eval()
    passages, passage_lengths, queries, query_lengths = questions()
    expected = network(passages, passage_lengths, queries, query_lengths)
    other, longer = F.pad(passages, (0, 2)), F.pad(queries, (0, 3), value=17)
    other[torch.arange(11) >= passage_lengths[:, None]] = 23
    torch.testing.assert_close(network(other, passage_lengths, longer, query_lengths), expected)
    alone = network(*(tensor[1:2] for tensor in (other, passage_lengths, longer, query_lengths)))
    torch.testing.assert_close(alone[0], expected[1])
    other[1, 0] += 1
    assert not torch.equal(network(other, passage_lengths, longer, query_lengths)[1], expected[1])


@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_takes_part(norm):
    network = reader(norm)
    F.cross_entropy(network(*questions()), torch.arange(6) % 5).backward()
    assert not {name for name, parameter in network.named_parameters() if parameter.grad is None}


def test_the_attention_is_that_of_the_equations():
    network = reader("none", bidirectional=False)
    with torch.no_grad():
        for start in (network.passage_start, network.query_start):
            start.normal_()
    passages, _, queries, _ = questions()
    logits = network(passages[:1], torch.tensor([9]), queries[:1], torch.tensor([5]))
    starts = (
        (start[:, None], torch.zeros(1, 1, 8)) for start in (network.passage_start, network.query_start)
    )
    y, _ = network.passage(network.embedding(passages[:1]), next(starts))
    _, (u, _) = network.query(network.embedding(queries[:1]), next(starts))
    u, y = u[0, 0], y[0]
    likeness = (y @ network.likeness.weight.T) @ (network.likeness.weight @ u)
    m = torch.tanh(network.attend_passage(y) + network.attend_query(u) + likeness[:, None])
    r = (m @ network.score.weight[0]).softmax(0) @ y
    g = torch.tanh(network.join_passage(r) + network.join_query(u) + network.join_mean(y.mean(0)))
    torch.testing.assert_close(logits[0], network.logits(g))


@pytest.mark.parametrize("norm", NORMS)
def test_weights_start_as_in_the_authors_code(norm):
    network = reader(norm, embedding=8)
    assert {name for name, p in network.named_parameters() if "bias" in name and p.any()} == set()
    assert not network.passage_start.any()
    eye = 0.05**2 * torch.eye(8)
    for lstm in (network.passage, network.query):
        for name in ("weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"):
            for gate in getattr(lstm, name).chunk(4):
                # Rounding of eight products of numbers below 0.05.
                torch.testing.assert_close(gate @ gate.T, eye, rtol=0, atol=1e-8)
    wide = 0.05**2 * torch.eye(16)
    for linear in (network.attend_passage[0], network.likeness):
        torch.testing.assert_close(linear.weight @ linear.weight.T, wide, rtol=0, atol=1e-8)
    for matrix in (network.join_mean[0].weight, network.logits.weight, network.embedding.weight):
        bound = (6 / (sum(matrix.shape) + 1)) ** 0.5
        assert 0.8 * bound < matrix.abs().max() <= bound
    gate = reader(norm, embedding=6).passage.weight_ih_l0[:8]
    assert 0.7 * (6 / 15) ** 0.5 < gate.abs().max() <= (6 / 15) ** 0.5


def test_the_norms_of_the_paper_differ_where_they_should():
    gains = {norm: dict(reader(norm).named_parameters()) for norm in NORMS}
    assert gains["layer"]["passage.gain_hh_l0"].unique().tolist() == [1.0]
    small = [p for name, p in gains["layer-0.1"].items() if ".gain_" in name]
    assert len(small) == 12
    assert all(p.unique().item() == pytest.approx(0.1) for p in small)
    assert "attend_query.1.weight" not in gains["batch"]
    assert gains["batch-everywhere"]["attend_query.1.weight"].unique().item() == pytest.approx(0.1)


def test_reading_is_learned(plays):
    """Who speaks next in the play goes by turns, so that reading tells, and guessing does not."""
    problem = Reading(**sizes(embedding=16, hidden=16, bidirectional=True))
    torch.manual_seed(0)
    network = problem.network("layer")
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for update in range(120):
        cases = torch.arange(problem.cases)
        generator = torch.Generator().manual_seed(update)
        loss = problem.loss(network, Batch(cases, 0, problem.cases, generator))
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    with torch.no_grad():
        assert problem.evaluate(network.eval())["validation_error"] < 25


def test_what_is_not_possible_is_named(plays):
    with pytest.raises(ExperimentError, match='corpus must be "plays" or "cnn", got \'films\''):
        Reading("films")
    with pytest.raises(ExperimentError, match="sentences must be at least 1, got 0"):
        Reading(**sizes(sentences=0))


def test_questions_of_the_news_are_read_where_they_are(monkeypatch):
    monkeypatch.setattr(data, "cnn_questions", {"train": [NEWS] * 3, "valid": [NEWS]}.__getitem__)
    problem = Reading("cnn", **sizes(sentences=4))
    assert (problem.cases, problem.markers, problem.words) == (3, 3, 2 + 14)


def test_cards_and_table():
    results = pd.DataFrame(
        [
            (seed, norm, 10 * place, error + seed / 100)
            for seed in range(3)
            for norm, errors in (
                ("none", (60.0, 50.0, 50.5)),
                ("layer", (49.0, 48.0, 48.5)),
                ("layer-0.1", (48.0, 47.0, 47.5)),
            )
            for place, error in enumerate(errors)
        ],
        columns=["seed", "norm", "update", "validation_error"],
    ).assign(batch_size=64, learning_rate=3e-3)
    assert [card.verdict for card in TASK.judge(results)] == ["agrees", "agrees", "not run", "differs"]
    (table,) = TASK.tables(results)
    assert [row[2] for row in table.rows] == ["50.3", "49.5", "50.0"]
    assert attentive_reader.TASK.presets["paper"].sizes["sentences"] == 4
