"""The batch-normalized LSTM against a loop of PyTorch's batch norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from layernorm.baselines import BatchNormLSTM

# Sums of at most 100 products of numbers about 1, in another order: 100 · 2^-53 ≈ 1e-14, with room.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class StepByStep:
    """A batch-normalized LSTM of one layer that uses PyTorch's batch norm step by step."""

    def __init__(self, lstm: BatchNormLSTM, suffix: str = "_l0") -> None:
        self.weights = {n.removesuffix(suffix): p for n, p in lstm.named_parameters() if n.endswith(suffix)}
        self.eps, self.hidden = lstm.eps, lstm.hidden_size
        self.seen: list[dict[str, tuple[Tensor, Tensor]]] = []

    def norm(self, t: int, name: str, x: Tensor, training: bool, bias: Tensor | None = None) -> Tensor:
        gain = self.weights[f"gain_{name}"]
        if training:
            # The batch is always the same, so its statistics are the running ones.
            self.seen[t][name] = (x.mean(0).detach(), x.var(0).detach())
            return nn.functional.batch_norm(x, None, None, gain, bias, True, 0.0, self.eps)
        mean, var = self.seen[min(t, len(self.seen) - 1)][name]
        return nn.functional.batch_norm(x, mean, var, gain, bias, False, 0.0, self.eps)

    def __call__(self, x: Tensor, h: Tensor, c: Tensor, training: bool = True) -> tuple[Tensor, Tensor]:
        w, outputs = self.weights, []
        if training:
            self.seen = [{} for _ in x]
        for t, x_t in enumerate(x):
            from_input = self.norm(t, "ih", x_t @ w["weight_ih"].t(), training)
            from_state = self.norm(t, "hh", h @ w["weight_hh"].t(), training)
            i, f, g, o = (from_input + from_state + w["bias"]).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self.norm(t, "cell", c, training, w["bias_cell"]).tanh()
            outputs.append(h)
        return torch.stack(outputs), c


def lstm(**options) -> BatchNormLSTM:
    module = BatchNormLSTM(3, 4, **{"dtype": torch.float64, "max_length": 9} | options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_the_lstm_is_the_plain_loop_in_training_and_evaluation():
    module = lstm()
    loop = StepByStep(module)
    x, h, c = (t.requires_grad_() for t in (draw(5, 6, 3), draw(6, 4), draw(6, 4)))
    inputs = [x, h, c, *module.parameters()]
    output, (h_n, c_n) = module(x, (h.unsqueeze(0), c.unsqueeze(0)))
    expected, c_expected = loop(x, h, c)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(h_n[0], expected[-1], **CLOSE)
    torch.testing.assert_close(c_n[0], c_expected, **CLOSE)
    grads = draw(5, 6, 4), draw(6, 4)
    found = torch.autograd.grad((output, c_n[0]), inputs, grads, retain_graph=True)
    wanted = torch.autograd.grad((expected, c_expected), inputs, grads)
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e, **CLOSE)
    # Evaluation, two steps beyond those of training; its derivative too.
    module.eval()
    x = draw(7, 6, 3).requires_grad_()
    inputs = [x, *module.parameters()]
    output, (_, c_n) = module(x, (h.unsqueeze(0), c.unsqueeze(0)))
    expected, c_expected = loop(x, h, c, training=False)
    torch.testing.assert_close(output, expected, **CLOSE)
    found = torch.autograd.grad(output, inputs, output.detach())
    wanted = torch.autograd.grad(expected, inputs, output.detach())
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e, **CLOSE)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_layers_directions_and_packed_sequences(training, monkeypatch):
    module = BatchNormLSTM(2, 2, num_layers=2, bidirectional=True, gain=0.7, dtype=torch.float64)
    lengths = torch.tensor([3, 2, 2])

    def outputs(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        output, state = module(pack_padded_sequence(x, lengths), (h, c))
        return output.data, *state

    inputs = [t.requires_grad_() for t in (draw(3, 3, 2), draw(4, 3, 2), draw(4, 3, 2))]
    outputs(*inputs)
    # The single row of step 3 uses running statistics in training too; they must not move in between.
    monkeypatch.setattr(module, "_track", lambda *_: None)
    module.train(training)
    assert torch.autograd.gradcheck(outputs, inputs)


def test_packed_sequences_of_equal_length_are_the_padded_batch_in_both_directions():
    module = lstm(bidirectional=True)
    x = draw(5, 3, 3)
    output, state = module(x)
    packed, others = module(pack_padded_sequence(x, torch.tensor([5, 5, 5])))
    assert torch.equal(pad_packed_sequence(packed)[0], output)
    assert all(map(torch.equal, state, others))


def test_the_reverse_direction_counts_steps_from_each_sequences_end():
    module = lstm(bidirectional=True, max_length=2)
    lengths = torch.tensor([4, 3, 2])
    x = draw(4, 3, 3)
    forward = lstm(max_length=2)
    reverse = {n: getattr(module, f"{n}_reverse").detach() for n, _ in forward.named_parameters()}
    forward.load_state_dict(reverse, strict=False)
    turned = x.clone()
    for case, length in enumerate(lengths):
        turned[:length, case] = x[:length, case].flip(0)
    output = pad_packed_sequence(module(pack_padded_sequence(x, lengths))[0])[0][..., 4:]
    expected = pad_packed_sequence(forward(pack_padded_sequence(turned, lengths))[0])[0]
    for case, length in enumerate(lengths):
        torch.testing.assert_close(output[:length, case], expected[:length, case].flip(0), **CLOSE)
    torch.testing.assert_close(module.running_var_hh_l0_reverse, forward.running_var_hh_l0, **CLOSE)


def test_a_row_that_is_alone_leaves_running_statistics_as_they_are():
    module = lstm()
    module(pack_padded_sequence(draw(5, 3, 3), torch.tensor([5, 3, 3])))
    assert module.steps_seen() == 3
    assert module.num_batches_tracked_l0.tolist() == [1, 1, 1] + [0] * 6
    assert (module.running_var_cell_l0[3:] == 1).all()


def test_statistics_average_at_first_and_then_forget():
    module = lstm(momentum=0.4, max_length=2)
    batches = [draw(4, 8, 3) for _ in range(4)]
    products = [(x @ module.weight_ih_l0.t()).detach() for x in batches]
    for x in batches:
        module(x)
    # The shares are 1, 1/2, 0.4 (instead of 1/3), 0.4.
    mean = 0.36 * (products[0] + products[1]) / 2 + 0.24 * products[2] + 0.4 * products[3]
    torch.testing.assert_close(module.running_mean_ih_l0, mean.mean(1)[:2], **CLOSE)
    var = [p.var(1)[:2] for p in products]
    expected = 0.36 * (var[0] + var[1]) / 2 + 0.24 * var[2] + 0.4 * var[3]
    torch.testing.assert_close(module.running_var_ih_l0, expected, **CLOSE)
    assert module.num_batches_tracked_l0.tolist() == [4, 4]


def test_the_state_dict_carries_statistics_and_the_steps_seen():
    module, other = lstm(num_layers=2), lstm(num_layers=2)
    module(draw(5, 4, 3))
    other.load_state_dict(module.state_dict())
    assert other.steps_seen() == 5
    x = draw(8, 4, 3)
    assert torch.equal(module.eval()(x)[0], other.eval()(x)[0])
    other.reset_parameters()
    assert other.steps_seen() == 0
    assert (other.gain_cell_l0 == 0.1).all()


def test_layouts_and_dtypes():
    module = lstm(batch_first=True)
    x = draw(6, 5, 3)
    time_major = lstm()
    time_major.load_state_dict(module.state_dict())
    assert torch.equal(module(x)[0], time_major(x.transpose(0, 1))[0].transpose(0, 1))
    module.eval()
    assert torch.equal(module(x[0])[0], module(x[:1])[0][0])
    single = BatchNormLSTM(3, 4, bias=False)
    assert not [name for name, _ in single.named_parameters() if name.startswith("bias")]
    plain = single(x.float().transpose(0, 1))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(single(x.float().transpose(0, 1))[0], plain)


def test_the_lstm_refuses_what_does_not_fit():
    with pytest.raises(
        ValueError, match=r"Expected more than 1 value per channel when training, got a batch of 1"
    ):
        lstm()(draw(5, 1, 3))
    with pytest.raises(ValueError, match="resets must be None"):
        lstm()(draw(5, 2, 3), resets=torch.zeros(5, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="BatchNormLSTM has no stream"):
        lstm().stream()
    with pytest.raises(ValueError, match="float32 or float64, got torch\\.float16"):
        lstm(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.bfloat16"):
        lstm().bfloat16()(draw(5, 2, 3).bfloat16())
    for option in ({"max_length": 0}, {"momentum": 0.0}, {"momentum": 2.0}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
            lstm(**option)
    assert repr(lstm()) == "BatchNormLSTM(3, 4, max_length=9, momentum=0.1, eps=1e-05)"
