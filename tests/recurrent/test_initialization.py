"""How the parameters of recurrent modules start."""

from __future__ import annotations

import pytest
import torch

from layernorm import LayerNormGRU, LayerNormGRUCell, LayerNormLSTM, LayerNormRNN
from tests.recurrent import cases

SEQUENCES = {"lstm": LayerNormLSTM, "gru": LayerNormGRU, "rnn": LayerNormRNN}
every_cell = pytest.mark.parametrize("cell", SEQUENCES)
both = pytest.mark.parametrize("kinds", [SEQUENCES, cases.CELLS], ids=["sequence", "cell"])
H = 4


def made(kinds, cell, **start):
    options = {"num_layers": 2, "bidirectional": True} if kinds is SEQUENCES else {}
    return kinds[cell](3, H, **options, **start)


def biases(module, name="bias"):
    return [weights[name].detach() for weights in module.layer_weights()]


@both
@every_cell
def test_gains_and_gate_biases_start_as_asked(cell, kinds):
    start = {"gain_init": 0.5} | {"lstm": {"forget_bias": 1.0}, "gru": {"update_bias": 2.0}, "rnn": {}}[cell]
    module, again = made(kinds, cell, **start), made(kinds, cell)
    again.reset_parameters(**start)
    for one in (module, again):
        for name, parameter in one.named_parameters():
            if "gain" in name:
                assert (parameter == 0.5).all()
            elif name.startswith("bias_l") or name == "bias":
                expected = torch.zeros(parameter.shape)
                expected[H : 2 * H] = {"lstm": 1.0, "gru": 2.0, "rnn": 0.0}[cell]
                assert torch.equal(parameter, expected)
            elif "bias" in name:
                assert not parameter.any()
    assert ", ".join(f"{name}={value:g}" for name, value in start.items()) in repr(module)
    assert "gain_init" not in repr(again)
    with torch.no_grad():
        module.reset_parameters()  # by what it was made with
    assert all((p == 0.5).all() for name, p in module.named_parameters() if "gain" in name)


def test_a_forget_bias_without_a_norm_is_added_to_torchs_start():
    torch.manual_seed(0)
    plain = torch.nn.LSTM(3, H)
    torch.manual_seed(0)
    ours = LayerNormLSTM(3, H, variant="none", forget_bias=1)
    assert torch.equal(ours.bias_ih_l0[H : 2 * H], plain.bias_ih_l0[H : 2 * H] + 1)
    assert torch.equal(ours.bias_ih_l0[2 * H :], plain.bias_ih_l0[2 * H :])
    assert torch.equal(ours.bias_hh_l0, plain.bias_hh_l0)


@both
@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_gate_starts_orthogonal(cell, kinds, dtype):
    module = made(kinds, cell, recurrent_init="orthogonal", dtype=dtype)
    for weights in module.layer_weights():
        gates = weights["weight_hh"].detach().double().split(H)
        for gate in gates:
            atol = 2e-2 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(gate @ gate.T, torch.eye(H).double(), rtol=0, atol=atol)
        assert all(not torch.allclose(gates[0], gate) for gate in gates[1:])
        assert weights["weight_ih"].abs().max() <= H**-0.5
    assert "recurrent_init='orthogonal'" in repr(module)


def test_with_a_projection_its_columns_are_orthogonal():
    weight = LayerNormLSTM(3, 6, proj_size=2, recurrent_init="orthogonal").weight_hh_l0.detach()
    for gate in weight.split(6):
        torch.testing.assert_close(gate.T @ gate, torch.eye(2), rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("variant", ["paper", "none"])
def test_chrono(kinds, variant):
    torch.manual_seed(0)
    name = "bias" if variant == "paper" else "bias_ih"
    size = 1000
    for cell, (keeping, other) in {"lstm": (1, 0), "gru": (1, None)}.items():
        module = kinds[cell](3, size, variant=variant, t_max=50)
        slack = 2 * size**-0.5 if variant == "none" else 1e-5  # of what PyTorch draws
        for bias in biases(module, name):
            gates = bias.split(size)
            times = gates[keeping].exp()
            assert times.min() >= 1 - slack
            assert times.max() <= 49 * (1 + 2 * slack)
            assert abs(times.mean() - 25) < 2  # uniform in [1, 49]: 14 / sqrt(1000) = 0.45
            if other is not None:
                torch.testing.assert_close(gates[other], -gates[keeping], rtol=0, atol=2 * slack)
            rest = [gate for place, gate in enumerate(gates) if place not in (keeping, other)]
            assert all(gate.abs().max() <= slack for gate in rest)
    assert "t_max=50" in repr(module)


def test_gains_like_nemos():
    lstm = LayerNormLSTM(3, H, gain_init="uniform")
    gains = torch.cat([p.detach() for name, p in lstm.named_parameters() if "gain" in name])
    assert gains.abs().max() <= H**-0.5
    assert gains.min() < 0 < gains.max()
    assert "gain_init='uniform'" in repr(lstm)


def test_parametrized_weights_start_too():
    gru = LayerNormGRU(3, H)
    torch.nn.utils.parametrizations.orthogonal(gru, "weight_hh_l0")
    torch.nn.utils.parametrize.register_parametrization(gru, "bias_l0", torch.nn.Identity())
    gru.reset_parameters(update_bias=1.0, recurrent_init="orthogonal")
    assert (gru.bias_l0[H : 2 * H] == 1).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LayerNormLSTM(3, H, gain_init=[1]), TypeError, "gain_init must be a number, got list"),
        (
            lambda: LayerNormLSTM(3, H, gain_init="1"),
            ValueError,
            "gain_init must be a number or 'uniform', got '1'",
        ),
        (
            lambda: LayerNormLSTM(3, H, gain_init=float("nan")),
            ValueError,
            "gain_init must be finite, got nan",
        ),
        (
            lambda: LayerNormLSTM(3, H, forget_bias=float("inf")),
            ValueError,
            "forget_bias must be finite, got inf",
        ),
        (
            lambda: LayerNormLSTM(3, H, bias=False, forget_bias=1),
            ValueError,
            "forget_bias must be 0 where .* bias=T",
        ),
        (
            lambda: LayerNormGRU(3, H).reset_parameters(forget_bias=1),
            ValueError,
            "make an LSTM with bias=True",
        ),
        (
            lambda: LayerNormGRU(3, H, forget_bias=1),
            ValueError,
            "no forget gate with a bias, got 1.0; make an LSTM",
        ),
        (
            lambda: LayerNormLSTM(3, H, update_bias=1),
            ValueError,
            "no update gate with a bias, got 1.0; make a GRU",
        ),
        (lambda: LayerNormGRU(3, H, bias=False, t_max=9), ValueError, "t_max must be None where"),
        (lambda: LayerNormRNN(3, H, t_max=9), ValueError, "t_max must be None where"),
        (lambda: LayerNormGRUCell(3, H, t_max=2), ValueError, "t_max must be at least 3 steps, got 2"),
        (lambda: LayerNormGRU(3, H, t_max=9.5), TypeError, "t_max must be an int or None, got float"),
        (
            lambda: LayerNormLSTM(3, H, t_max=9, forget_bias=1),
            ValueError,
            "t_max takes the place of forget_bias",
        ),
        (
            lambda: LayerNormRNN(3, H, recurrent_init="orthogonl"),
            ValueError,
            "recurrent_init must be 'uniform' or 'orthogonal', got 'orthogonl'",
        ),
        (lambda: LayerNormRNN(3, H, gains=1), TypeError, "unexpected keyword argument 'gains'"),
        (
            lambda: LayerNormRNN(3, H).reset_parameters(gain=1),
            TypeError,
            "unexpected keyword argument 'gain'",
        ),
    ],
)
def test_a_wrong_start_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- the initial state ----


def random_start(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("initial"):
                assert not parameter.any()
                parameter.normal_()
    return module.learned_initial_state()


@every_cell
@pytest.mark.parametrize("variant", ["paper", "none"])
def test_a_learned_state_is_the_one_where_none_is_given(cell, variant):
    module = SEQUENCES[cell](
        3, H, num_layers=2, bidirectional=True, learn_initial_state=True, variant=variant, dtype=torch.float64
    )
    learned = random_start(module)
    x = torch.randn(5, 2, 3).double()
    resets = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 0], [0, 1]])
    state = module.as_state(tuple(s.unsqueeze(1).repeat(1, 2, 1) for s in learned))
    starts = module.as_state(tuple(s.unsqueeze(1) for s in learned))
    output, final = module(x, resets=resets)
    expected, final_expected = module(x, state, resets, starts)
    assert torch.equal(output, expected)
    ours, theirs = module.as_tuple(final), module.as_tuple(final_expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(module(x)[0], module(x, state)[0])
    assert not torch.equal(
        module(x)[0], module(x, module.as_state(tuple(s * 0 for s in module.as_tuple(state))))[0]
    )
    assert torch.equal(module(x[:, 0])[0], module(x[:, :1])[0][:, 0])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [3, 5], enforce_sorted=False)
    assert torch.equal(module(packed)[0].data, module(packed, state)[0].data)
    output.sum().backward()
    assert all(module.get_parameter(name).grad.abs().sum() > 0 for name in ("initial_h",))
    assert "learn_initial_state=True" in repr(module)
    again = SEQUENCES[cell](3, H, num_layers=2, bidirectional=True, variant=variant, learn_initial_state=True)
    again.load_state_dict(module.state_dict())
    module.reset_parameters()
    assert not module.initial_h.any()


@every_cell
def test_cells_and_streams_start_from_it(cell):
    module = SEQUENCES[cell](3, H, num_layers=2, learn_initial_state=True)
    random_start(module)
    x = torch.randn(4, 2, 3)
    resets = torch.tensor([[0, 0], [0, 1], [0, 0], [1, 0]])
    expected = module(x, resets=resets)[0]
    stream = module.stream(2)
    for step, reset, output in zip(x, resets, expected, strict=True):
        stream.reset(reset)
        torch.testing.assert_close(stream.step(step), output, rtol=1e-5, atol=1e-6)
    stream.reset()
    torch.testing.assert_close(stream.step(x[0]), expected[0], rtol=1e-5, atol=1e-6)
    one = cases.CELLS[cell](3, H, learn_initial_state=True)
    state = one.as_state(tuple(s.repeat(2, 1) for s in random_start(one)))
    first = one.as_tuple(one(x[0]))
    from_state = one.as_tuple(one(x[0], state))
    other = one.as_state(tuple(torch.randn(2, H) for _ in first))
    after_reset = one.as_tuple(one(x[0], other, torch.ones(2)))
    for a, b, c in zip(first, from_state, after_reset, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert torch.equal(one.as_tuple(one(x[0, 0]))[0], first[0][0])
