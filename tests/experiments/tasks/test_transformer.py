"""The transformer: what each form computes, how those without norms start, what the cards say."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layernorm.baselines import DynamicTanh, Norm
from layernorm.experiments import data
from layernorm.experiments.task import Batch, ExperimentError
from layernorm.experiments.tasks.transformer import TASK
from layernorm.experiments.tasks.transformer.network import FORMS, Transformer
from layernorm.experiments.tasks.transformer.task import Characters

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "".join(chr(97 + (i * i + i // 7) % 7) for i in range(2000))


@pytest.fixture
def problem(monkeypatch) -> Characters:
    monkeypatch.setattr(data, "tiny_shakespeare", lambda: TEXT)
    return Characters(context=8, width=8, layers=2, heads=2, held_out=40, cases=20)


def transformer(norm: str, layers: int = 2) -> Transformer:
    torch.manual_seed(0)
    return Transformer(7, 8, 8, layers, 2, norm).double()


def attention(x, block):
    """Causal attention of two heads, by its formula."""
    found = block.inputs(block.shift(x))
    heads = []
    for query, key, value in zip(*(part.split(4, -1) for part in found.split(8, -1)), strict=True):
        scores = block.query_norm(query) @ block.key_norm(key).transpose(-1, -2) / math.sqrt(4)
        seen = torch.ones(x.size(1), x.size(1)).tril().bool()
        heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ value)
    return block.out(block.shift_out(torch.cat(heads, -1)))


@pytest.mark.parametrize("norm", FORMS)
def test_every_form_is_its_formula(norm):
    network = transformer(norm)
    with torch.no_grad():  # away from where parameters start, which hides much of ReZero and Fixup
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    form, characters = FORMS[norm], torch.randint(7, (3, 6))
    stream = network.characters.weight[characters] + network.places.weight[:6]
    for index, block in enumerate(network.blocks):
        branch = (lambda x, b=block.branch: attention(x, b)) if index % 2 == 0 else block.branch
        if form.is_after:
            stream = block.norm(stream + branch(stream))
        elif form.start:
            stream = stream + block.scale * branch(stream)
        else:
            stream = stream + branch(block.norm(stream))
    expected = network.logits(network.norm(stream))
    # Both are sums of some hundred products in float64.
    torch.testing.assert_close(network(characters), expected, rtol=1e-10, atol=1e-10)
    kinds = {type(block.norm) for block in network.blocks}
    assert kinds == {type(Norm(form.norm)(8))}
    assert isinstance(network.norm, nn.Identity) is (form.is_after or form.norm == "none")


@pytest.mark.parametrize("norm", FORMS)
def test_a_place_sees_only_those_before_it_and_every_parameter_learns(problem, norm):
    network = problem.network(norm)
    windows = torch.randint(7, (2, 8))
    changed = windows.clone()
    changed[:, 5:] = (windows[:, 5:] + 1) % 7
    assert torch.equal(network(windows)[:, :5], network(changed)[:, :5])
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for update in range(3):  # what follows a product that starts at 0 learns one update later
        optimizer.zero_grad()
        loss = problem.loss(network, Batch(torch.arange(4), 0, 4, torch.Generator().manual_seed(update)))
        loss.total.backward()
        optimizer.step()
    assert loss.count == 32
    still = [name for name, p in network.named_parameters() if not p.grad.abs().sum() > 0]
    assert still == []


def test_fixup_and_rezero_start_as_the_identity():
    for norm in ("fixup", "rezero"):
        network = transformer(norm, layers=3)
        stream = torch.randn(2, 5, 8, dtype=torch.float64)
        assert torch.equal(network.blocks(stream), stream)
    plain, fixup = transformer("none", layers=3), transformer("fixup", layers=3)
    characters = torch.randint(7, (2, 8))
    assert torch.equal(fixup(characters), torch.zeros(2, 8, 7, dtype=torch.float64))
    # Six branches of two products each.
    size = 6**-0.5
    for one, other in zip(plain.blocks, fixup.blocks, strict=True):
        first = next(m.weight for m in one.modules() if isinstance(m, nn.Linear))
        started = next(m.weight for m in other.modules() if isinstance(m, nn.Linear))
        # Of so many weights the root mean square is within a fifth of its own.
        found, expected = (weight.square().mean().sqrt().item() for weight in (started, first))
        assert found == pytest.approx(size * expected, rel=0.2)


def test_what_is_measured_is_the_text(problem):
    network = problem.network("pre-layer")
    part = problem._valid
    expected = []
    for start in range(0, len(part) - 8, 8):
        logits = network(part[None, start : start + 8])
        expected.append(F.cross_entropy(logits[0], part[start + 1 : start + 9], reduction="none"))
    bits = torch.cat(expected).mean().item() / math.log(2)
    assert problem.evaluate(network)["validation_bits"] == pytest.approx(bits, rel=1e-5)
    codes = {character: code for code, character in enumerate(sorted(set(TEXT)))}
    assert problem._valid.tolist() == [codes[c] for c in TEXT[1800:1840]]
    assert problem._test.tolist() == [codes[c] for c in TEXT[1900:1940]]


def test_sizes_that_are_not_possible_are_refused(problem):
    for sizes, message in (
        ({"width": 0}, "width must be 1 to 4096, got 0"),
        ({"heads": 3, "width": 8}, "heads must divide the width, 8, got 3"),
        ({"context": 64, "held_out": 64}, "held_out must be more than the context, 64, got 64"),
        ({"context": 8, "cases": 224}, "cases must be 1 to 223 with a context of 8, got 224"),
    ):
        with pytest.raises(ExperimentError, match=message):
            Characters(**sizes)


def test_dynamic_tanh_is_its_formula_in_both_layouts():
    features = torch.randn(2, 5, 4, dtype=torch.float64)
    norm = DynamicTanh(4, alpha=0.7).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(4)), norm.bias.copy_(torch.randn(4))
    expected = norm.weight * torch.tanh(0.7 * features) + norm.bias
    torch.testing.assert_close(norm(features), expected, rtol=1e-6, atol=1e-6)  # 0.7 is kept in float32
    channels = Norm("dyt")(4, dim=1).double()
    channels.load_state_dict(norm.state_dict())
    found = channels(features.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(found, norm(features))
    assert Norm("dyt")(4).alpha.item() == 0.5


def records(**bits: float) -> pd.DataFrame:
    """Results of three seeds that get no better at the end."""
    return pd.concat(
        [
            pd.DataFrame(
                [
                    {"norm": norm.replace("_", "-"), "batch_size": 16, "learning_rate": rate, "seed": seed}
                    | {"warmup": warmup, "update": update}
                    | {"validation_bits": value, "test_bits": value + 0.001 * seed}
                    for seed in range(3)
                    for update, value in enumerate((6.0, end, end + 0.0001 * (seed + 1)))
                ]
            )
            for norm, end in bits.items()
            for rate in (0.01, 0.03)
            for warmup in (0, 100)
        ],
        ignore_index=True,
    )


def test_the_cards_follow_the_results():
    found = records(none=4.0, pre_layer=3.0, pre_rms=3.01, pre_dyt=3.5, fixup=3.01, rezero=3.6)
    verdicts = [card.verdict for card in TASK.judge(found[found.learning_rate == 0.01].query("warmup == 0"))]
    assert verdicts == ["agrees", "agrees", "differs", "agrees", "agrees", "agrees"]
    found = records(post_layer=3.0, pre_layer=3.1, pre_layer_qk=3.05)
    found.loc[(found.norm == "post-layer") & (found.warmup == 0), ["validation_bits", "test_bits"]] += 1.0
    assert [card.verdict for card in TASK.judge_settings(found)] == ["agrees"] * 3
    found.loc[found.norm == "pre-layer", ["validation_bits", "test_bits"]] += 2.0
    found.loc[(found.norm == "pre-layer-qk"), ["validation_bits", "test_bits"]] += 3.0
    found.loc[(found.norm == "post-layer") & (found.warmup > 0), ["validation_bits", "test_bits"]] += 2.0
    assert [card.verdict for card in TASK.judge_settings(found)] == ["differs"] * 3
    assert {card.verdict for card in TASK.judge_settings(found[found.norm == "none"])} == {"not run"}
