"""Dropout inside of the recurrence: what is dropped, how often, and that evaluation knows nothing of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from layernorm import LayerNormLSTM, RecurrentDropout
from tests.recurrent.cases import FUNCTIONS, SEQUENCES, flat

T, N, F, H = 7, 3, 4, 6
EVERYTHING = RecurrentDropout(input=0.3, hidden=0.3, candidate=0.3, weight=0.3, zoneout=0.3, zoneout_cell=0.3)


def of_cell(dropout, cell):
    if cell == "lstm":
        return dropout
    changes = {"zoneout_cell": 0.0} | ({"candidate": 0.0} if cell == "rnn" else {})
    return dataclasses.replace(dropout, **changes)


def made(cell, dropout, **options):
    torch.manual_seed(5)
    module = SEQUENCES[cell](F, H, dtype=torch.float64, recurrent_dropout=of_cell(dropout, cell), **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "gain" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


X = torch.randn(T, N, F, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("cell", "variant"), FUNCTIONS)
def test_evaluation_is_as_without(cell, variant):
    module = made(cell, EVERYTHING, variant=variant).eval()
    plain = SEQUENCES[cell](F, H, dtype=torch.float64, variant=variant)
    plain.load_state_dict(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(flat(module(X)), flat(plain(X)), strict=True))
    stream = module.train().stream(N)
    assert torch.equal(torch.stack([stream.step(x) for x in X]), plain(X)[0])


@pytest.mark.parametrize("per", ["sequence", "step"])
@pytest.mark.parametrize(("cell", "variant"), FUNCTIONS)
def test_a_seed_decides(cell, variant, per):
    module = made(cell, dataclasses.replace(EVERYTHING, per=per), variant=variant, bidirectional=True)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(module(X)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    (gradient,) = torch.autograd.grad(outputs[0].sum(), [module.weight_hh_l0])
    assert gradient.isfinite().all()


def by_hand(module, masks, x=X):
    """Compute an LSTM of the variant "none" with masks, step by step."""
    w = module.layer_weights()[0]
    h = c = torch.zeros(N, H, dtype=torch.float64)
    outputs = []
    for t, x_t in enumerate(x):
        gates = x_t @ w["weight_ih"].T + w["bias_ih"] + w["bias_hh"]
        gates = gates + (h * masks["hidden"][t]) @ w["weight_hh"].T
        i, f, g, o = gates.chunk(4, -1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh() * masks["candidate"][t]
        new_h = o.sigmoid() * new_c.tanh()
        h = torch.where(masks["stays_h"][t], h, new_h)
        c = torch.where(masks["stays_c"][t], c, new_c)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("per", ["sequence", "step"])
def test_the_formula(per):
    dropout = RecurrentDropout(hidden=0.4, candidate=0.2, zoneout=0.3, zoneout_cell=0.5, per=per)
    module = made("lstm", dropout, variant="none")
    torch.manual_seed(3)
    output, _ = module(X)
    torch.manual_seed(3)
    drawn = dropout.masks(T, [torch.zeros(N, H).double()] * 2, H)
    count = T if per == "step" else 1
    assert drawn.hidden.shape == drawn.candidate.shape == (count, N, H)
    assert set(drawn.hidden.unique().tolist()) <= {0.0, 1 / 0.6}
    masks = {"hidden": drawn.hidden.expand(T, N, H), "candidate": drawn.candidate.expand(T, N, H)}
    masks |= dict(zip(("stays_h", "stays_c"), drawn.stays, strict=True))
    torch.testing.assert_close(output, by_hand(module, masks), rtol=0, atol=1e-13)


def test_everything_dropped_is_an_lstm_of_its_inputs():
    module = made("lstm", RecurrentDropout(hidden=1.0))
    alone = torch.cat([module(x[None], tuple(s * 0 for s in module(X)[1]))[0] for x in X])
    # Each step's h depends on the steps before through c alone, and at the first step through nothing.
    torch.testing.assert_close(module(X)[0][0], alone[0])
    stay = made("lstm", RecurrentDropout(zoneout=1.0, zoneout_cell=1.0))
    h, c = torch.randn(2, 1, N, H, dtype=torch.float64).unbind(0)
    output, (last_h, last_c) = stay(X, (h, c))
    assert torch.equal(output, h.expand(T, N, H))
    assert torch.equal(last_h, h)
    assert torch.equal(last_c, c)


def test_input_and_weights_are_dropped_for_the_compiled_kernels():
    dropout = RecurrentDropout(input=0.5, weight=0.5)
    assert dropout.masks(T, [torch.zeros(N, H)] * 2, H) is None
    x = dropout.of_input(torch.ones(T, N, F), None)
    assert all(torch.equal(x[0], step) for step in x)
    assert set(x.unique().tolist()) == {0.0, 2.0}
    packed = pack_padded_sequence(torch.ones(T, N, F), [7, 5, 2])
    sizes = packed.batch_sizes.tolist()
    parts = dropout.of_input(packed.data, sizes).split(sizes)
    assert all(torch.equal(part, parts[0][: len(part)]) for part in parts)
    step = dataclasses.replace(dropout, per="step").of_input(torch.ones(T, N, F), None)
    assert not all(torch.equal(step[0], other) for other in step)
    weights = {"weight_hh": torch.ones(4 * H, H), "bias": torch.ones(4 * H)}
    dropped = dropout.of_weights(weights)
    assert set(dropped["weight_hh"].unique().tolist()) == {0.0, 2.0}
    assert dropped["bias"] is weights["bias"]


def test_packed_rows_have_the_masks_of_their_sequence():
    dropout = RecurrentDropout(hidden=0.5, candidate=0.3, zoneout=0.2)
    module = made("lstm", dropout)
    torch.manual_seed(2)
    whole, _ = module(X)
    torch.manual_seed(2)
    packed, _ = module(pack_padded_sequence(X, [7, 7, 7]))
    torch.testing.assert_close(packed.data, whole.flatten(0, 1))


def test_autocast_and_half():
    module = LayerNormLSTM(F, H, recurrent_dropout=EVERYTHING)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(X.float())[0].dtype == torch.bfloat16
    assert module.bfloat16()(X.bfloat16())[0].isfinite().all()


def test_a_layer_in_a_compiled_program():
    module = LayerNormLSTM(F, H, recurrent_dropout=RecurrentDropout(hidden=0.5))
    with torch._dynamo.config.patch(allow_rnn=True):
        assert torch.compile(module, backend="eager")(X.float())[0].isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: RecurrentDropout(zoneout=1.5),
            ValueError,
            "zoneout must be a probability, in .0, 1., got 1.5",
        ),
        (lambda: RecurrentDropout(input=-0.1), ValueError, "input must be a probability"),
        (lambda: RecurrentDropout(hidden=float("nan")), ValueError, "hidden must be a probability"),
        (lambda: RecurrentDropout(weight="0.5"), TypeError, "weight must be a number, got str"),
        (lambda: RecurrentDropout(per="batch"), ValueError, "per must be 'sequence' or 'step', got 'batch'"),
        (
            lambda: SEQUENCES["gru"](F, H, recurrent_dropout=RecurrentDropout(zoneout_cell=0.1)),
            ValueError,
            "zoneout_cell is of an LSTM, which has a cell; this is a GRU",
        ),
        (
            lambda: SEQUENCES["rnn"](F, H, recurrent_dropout=RecurrentDropout(candidate=0.1)),
            ValueError,
            "candidate is of an LSTM or a GRU; an RNN has none",
        ),
        (
            lambda: LayerNormLSTM(F, H, recurrent_dropout=0.1),
            TypeError,
            r"recurrent_dropout must be a layernorm\.RecurrentDropout or None, got float",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
