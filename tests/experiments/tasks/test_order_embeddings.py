"""Order-embeddings: loss and recalls against plain loops, captions of any length, images held out."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from layernorm.experiments.data.words import PAD
from layernorm.experiments.networks.sentence_encoder import NORMS, SentenceEncoder, Sentences
from layernorm.experiments.task import Batch, ExperimentError
from layernorm.experiments.tasks.order_embeddings import captioned_images
from layernorm.experiments.tasks.order_embeddings import task as order_embeddings
from layernorm.experiments.tasks.order_embeddings.captioned_images import Bags
from layernorm.experiments.tasks.order_embeddings.task import (
    METRICS,
    TASK,
    TEST_METRICS,
    OrderEmbedding,
    order_violations,
    ranking_loss,
    retrieval,
)

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = 6


def caption(image: int, k: int) -> str:
    """Captions that share a word with those of their image alone, of different lengths."""
    return " ".join([f"thing{image}", *["a", "very", "small"][: k % 4], f"way{k}"])


@pytest.fixture
def data(monkeypatch):
    captions = [tuple(caption(image, k) for k in range(5)) for image in range(IMAGES)]
    monkeypatch.setattr(captioned_images.data, "flickr8k", lambda part: captions)
    monkeypatch.setattr(captioned_images.data, "coco_features", lambda part: (torch.eye(IMAGES), captions))


def problem(**sizes):
    small = {"vocabulary": 30, "embedding": 5, "units": 7}
    return TASK.problem(**{**TASK.presets["small"].sizes, **small, **sizes})


def batch(cases: list[int]) -> Batch:
    return Batch(torch.tensor(cases), 0, len(cases), torch.Generator())


def violation(caption: torch.Tensor, image: torch.Tensor) -> float:
    return sum(max(0.0, (c - i).item()) ** 2 for c, i in zip(caption, image, strict=True))


def test_the_ranking_loss_is_the_sum_over_wrong_captions_and_wrong_images():
    captions, images = torch.rand(5, 3), torch.rand(5, 3)
    owners = torch.tensor([0, 1, 1, 2, 3])
    images[2] = images[1]
    expected = 0.0
    for i in range(5):
        right = violation(captions[i], images[i])
        for j in range(5):
            if owners[i] != owners[j]:
                expected += max(0.0, 0.05 + right - violation(captions[i], images[j]))
                expected += max(0.0, 0.05 + right - violation(captions[j], images[i]))
    # Sums of 32 float32 terms below 1.
    assert ranking_loss(captions, images, owners, 0.05).item() == pytest.approx(expected, rel=1e-5)


def test_the_ranking_loss_of_two_processes_is_that_of_one(monkeypatch):
    captions, images, owners = torch.rand(5, 3), torch.rand(5, 3), torch.arange(5)
    whole = ranking_loss(captions, images, owners, 0.05)
    right = (captions - images).clamp(min=0).square().sum(-1)
    everyone = {3: images, 1: owners}
    parts = []
    for part in (slice(0, 2), slice(2, 5)):
        given = iter((everyone[3], everyone[1], right))
        monkeypatch.setattr(order_embeddings.processes, "gather", lambda tensor, given=given: next(given))
        parts.append(ranking_loss(captions[part], images[part], owners[part], 0.05))
    torch.testing.assert_close(sum(parts), whole)


def test_order_violations_are_the_same_in_parts(monkeypatch):
    captions, images = torch.rand(5, 3), torch.rand(4, 3)
    whole = order_violations(captions, images)
    assert whole[2, 3].item() == pytest.approx(violation(captions[2], images[3]))
    monkeypatch.setattr(order_embeddings, "_ELEMENTS", 2 * images.numel())
    torch.testing.assert_close(order_violations(captions, images), whole, rtol=0, atol=0)


def test_recalls_and_ranks_are_those_of_sorting():
    owners = torch.arange(30).repeat_interleave(torch.arange(30) % 3 + 1)
    violations = torch.rand(len(owners), 30)
    image_ranks = [
        sorted(range(30), key=row.__getitem__).index(owner)
        for row, owner in zip(violations.tolist(), owners.tolist(), strict=True)
    ]
    caption_ranks = []
    for image, column in enumerate(violations.T.tolist()):
        best = min((c for c in range(len(owners)) if owners[c] == image), key=column.__getitem__)
        better = [c for c in range(len(owners)) if column[c] < column[best]]
        caption_ranks.append(len(better))
    values = retrieval(violations, owners)
    assert list(values) == [metric.name for metric in METRICS]
    recalls = []
    for side, ranks in (("caption", caption_ranks), ("image", image_ranks)):
        for k in (1, 5, 10):
            recalls.append(100 * sum(rank < k for rank in ranks) / len(ranks))
            assert values[f"{side}_recall_{k}"] == pytest.approx(recalls[-1])
        assert values[f"{side}_mean_rank"] == pytest.approx(sum(ranks) / len(ranks) + 1)
    assert values["mean_recall"] == pytest.approx(sum(recalls) / 6)


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_a_network_that_cannot_tell_finds_nothing(value):
    values = retrieval(torch.full((40, 20), value), torch.arange(20).repeat_interleave(2))
    assert values["mean_recall"] == 0
    assert values["image_mean_rank"] == 20


@pytest.mark.parametrize("norm", NORMS)
def test_a_sentence_is_read_as_if_it_were_alone(norm):
    encoder = SentenceEncoder(norm, words=9, embedding=4, units=6)
    rows = [[3, 4], [5, 6, 7, 8, 2], [4]]
    together = encoder.encode(Sentences(rows))
    alone = torch.cat([encoder.encode(Sentences([row])) for row in rows])
    # Sums of 6 products of float32 in another order, five steps.
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    turned = encoder.encode(Sentences(rows[::-1])).flip(0)
    torch.testing.assert_close(together, turned, rtol=1e-5, atol=1e-6)


def test_encoders_begin_alike_whatever_the_norm():
    networks = []
    for norm in NORMS:
        torch.manual_seed(3)
        networks.append(OrderEmbedding(norm, words=9, features=5, embedding=4, units=6))
    *networks, weight_normalized = networks
    first, *others = [dict(network.named_parameters()) for network in networks]
    square = first["captions.gru.weight_hh_l0"][6:12]
    torch.testing.assert_close(square @ square.T, torch.eye(6))
    for other in others:
        for name in first.keys() & other.keys():
            torch.testing.assert_close(first[name], other[name], rtol=0, atol=0)
        assert "captions.gru.gain_hh_l0" in other
    torch.testing.assert_close(
        weight_normalized.captions.gru.weight_hh_l0, first["captions.gru.weight_hh_l0"]
    )


def test_sentences_are_packed_with_their_ends():
    sentences = Sentences([[3, 4], [5]])
    before = sentences.packed(torch.tensor([1, 0]), before=True)
    after = sentences.packed(torch.tensor([1, 0]), after=True)
    assert before.data.tolist() == [PAD, PAD, 3, 5, 4]
    assert after.data.tolist() == [3, 5, 4, PAD, PAD]
    with pytest.raises(ValueError, match="at least one word each, got none in row 1"):
        Sentences([[3], []])


def test_bags_say_which_words_there_are():
    bags = Bags(Sentences([[2, 3, 2, 1], [4], [1]]), words=6)
    root = math.sqrt(0.5)
    expected = torch.tensor([[0, 0, 0, 0, 0, 0.0], [0, 0, root, root, 0, 0]])
    torch.testing.assert_close(bags[torch.tensor([2, 0])], expected)


def test_in_training_every_two_captions_of_an_image_are_a_pair(data):
    captions = captioned_images.load("flickr8k", "train", 3)[1]
    vocabulary = captioned_images.Vocabulary(words for of in captions for words in of)
    pairs = captioned_images.described(captions, vocabulary)
    assert len(pairs) == 3 * 5 * 4
    assert (pairs.caption != pairs.row).all()
    assert (pairs.caption // 5 == pairs.owner).all()
    assert (pairs.row // 5 == pairs.owner).all()
    assert len(set(zip(pairs.caption.tolist(), pairs.row.tolist(), strict=True))) == len(pairs)
    held_out = captioned_images.described_once(captions, vocabulary)
    assert len(held_out) == len(held_out.captions) == 3 * 4
    words = held_out.features[torch.tensor([2])][0].nonzero().flatten().tolist()
    assert words == sorted(vocabulary.indices(captions[2][0]))


@pytest.mark.parametrize("source", captioned_images.SOURCES)
def test_it_learns_to_find_the_image(source, data):
    task = problem(source=source, images=4, held_out=4, units=16)
    assert task.cases == 4 * (20 if source == "flickr8k" else 5)
    network = task.network("layer")
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = task.loss(network, batch(list(range(0, task.cases, 2 if source == "flickr8k" else 1))))
        (loss.total / loss.count).backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
        losses.append(loss.total.item() / loss.count)
    assert losses[-1] < 0.2 * losses[0]
    state = torch.get_rng_state()
    with torch.no_grad():
        values = task.evaluate(network)
    assert torch.equal(state, torch.get_rng_state())
    assert values["caption_recall_1"] == 100
    assert values["image_mean_rank"] < 1.5


def test_validation_and_test_images_are_others_and_sentences_have_an_end(data):
    found = problem(source="coco", held_out=4)
    network = found.network("none")
    with torch.no_grad():
        values = found.evaluate(network)
    assert values.keys() == {metric.name for metric in (*METRICS, *TEST_METRICS)}
    assert found._held_out["dev"] is not found._held_out["test"]
    read = []
    network.captions.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    found.loss(network, batch([0, 1]))
    network.caption_points(found._held_out["dev"].captions)
    for packed in read:
        rows, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        ends = rows[torch.arange(len(rows)), lengths - 1]
        assert (ends == PAD).all()
        assert (rows != PAD).sum(1).tolist() == (lengths - 1).tolist()


def test_many_images_are_searched_a_gallery_at_a_time(data, monkeypatch):
    monkeypatch.setattr(order_embeddings, "_GALLERY", 2)
    found = problem(source="coco", held_out=5)
    network = found.network("none")
    with torch.no_grad():
        values = found.evaluate(network)
        points = network.image_points(torch.eye(IMAGES)[:5])
        captions = network.caption_points(found._held_out["dev"].captions)
    expected = []
    for start in (0, 2):
        violations = order_violations(captions[start * 5 : start * 5 + 10], points[start : start + 2])
        expected.append(retrieval(violations, torch.arange(2).repeat_interleave(5))["image_mean_rank"])
    assert values["image_mean_rank"] == pytest.approx(sum(expected) / 2)


def test_wrong_sizes_are_answered(data):
    with pytest.raises(ExperimentError, match="unknown source 'flickr'; expected one of coco, flickr8k"):
        problem(source="flickr")
    with pytest.raises(ExperimentError, match="at least 2 images of coco's part train, got 1"):
        problem(source="coco", images=1)
    with pytest.raises(TypeError, match="network must be an OrderEmbedding, got Linear"):
        problem().evaluate(torch.nn.Linear(1, 1))


def test_the_table_has_the_papers_rows_and_the_best_of_each_run():
    # The evaluation is chosen by validation images, where the test images' is not the best.
    columns = {metric.name: [1.0, 3.0, 2.0] for metric in METRICS}
    columns |= {metric.name: [9.0, 3.0, 2.0] for metric in TEST_METRICS}
    columns["test_image_mean_rank"] = [9.0, 7.0, 8.0]
    rows = {"norm": "layer", "batch_size": 128, "learning_rate": 1e-3, "seed": 0, "update": [0, 1, 2]}
    results = pd.DataFrame(rows | columns)
    (table,) = TASK.tables(results)
    assert {len(row) for row in table.rows} == {len(table.columns)} == {9}
    assert table.rows[3][1] == "48.5"
    assert table.rows[-1] == ("here: layer, batch 128", *["3.0"] * 7, "7.0")
    assert [card.verdict for card in TASK.judge(results)] == ["not run", "not run"]


def test_both_sizes_can_be_changed_in_the_same_ways(data):
    small, paper = TASK.presets["small"].sizes, TASK.presets["paper"].sizes
    assert small.keys() == paper.keys()
    assert TASK.problem(**paper).cases == 5 * IMAGES
