"""Batch norm and the batch-normalized LSTM against PyTorch's, plain loops, and other numbers of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from layernorm.baselines import BatchNorm, BatchNormLSTM, start_weight_norm
from layernorm.baselines.statistics import BatchStandardized, Steps
from layernorm.experiments.networks import recurrent
from layernorm.experiments.task import ExperimentError

# Sums of at most 100 products of numbers about 1, in another order: 100 · 2^-53 ≈ 1e-14, with room.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize(
    ("peer", "shape"), [(nn.BatchNorm1d, (5, 3)), (nn.BatchNorm1d, (5, 3, 4)), (nn.BatchNorm2d, (5, 3, 4, 2))]
)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}]
)
def test_batch_norm_is_pytorchs(peer, shape, options):
    ours, theirs = BatchNorm(3, **options), peer(3, **options)
    for _ in range(2):
        x = torch.randn(shape) * 3 + 2
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        grad = torch.randn(shape)
        found, expected = ours(left), theirs(right)
        assert torch.equal(found, expected)
        assert torch.equal(
            torch.autograd.grad(found, left, grad)[0], torch.autograd.grad(expected, right, grad)[0]
        )
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    fresh = peer(3, **options)
    fresh.load_state_dict(state)
    ours.load_state_dict(fresh.state_dict())
    x = torch.randn(shape)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(fresh.eval()(x), theirs(x))


def test_the_running_variance_of_a_small_batch_is_the_unbiased_one():
    norm = BatchNorm(1, momentum=1.0)
    norm(torch.tensor([[0.0], [2.0]]))
    assert norm.running_var.item() == 2.0


def test_batch_norm_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"input must be \(N, 3\) or \(N, 3, \*\), got \[2, 4\]"):
        BatchNorm(3)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        BatchNorm(3)(torch.zeros(1, 3))


def test_standardized_rows_of_steps_of_different_sizes():
    steps = Steps.of([4, 4, 2, 1], None, torch.zeros(1))
    rows = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)

    def standardized(rows: Tensor) -> Tensor:
        return BatchStandardized.apply(rows, mean, var, steps, 1e-3)[0]

    expected = [(p - p.mean(0)) / (p.var(0, correction=0) + 1e-3).sqrt() for p in rows.split([4, 4, 2, 1])]
    expected[3] = (rows[10:] - mean[3]) / (var[3] + 1e-3).sqrt()
    torch.testing.assert_close(standardized(rows), torch.cat(expected), **CLOSE)
    assert torch.autograd.gradcheck(standardized, (rows,))


class Plain:
    """The batch-normalized LSTM of one layer by PyTorch's own batch norm, step by step."""

    def __init__(self, lstm: BatchNormLSTM, suffix: str = "_l0") -> None:
        self.weights = {n.removesuffix(suffix): p for n, p in lstm.named_parameters() if n.endswith(suffix)}
        self.eps, self.hidden = lstm.eps, lstm.hidden_size
        self.seen: list[dict[str, tuple[Tensor, Tensor]]] = []

    def norm(self, t: int, name: str, x: Tensor, training: bool, bias: Tensor | None = None) -> Tensor:
        gain = self.weights[f"gain_{name}"]
        if training:
            # The same batch always: running statistics are its own.
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
    plain = Plain(module)
    x, h, c = (t.requires_grad_() for t in (draw(5, 6, 3), draw(6, 4), draw(6, 4)))
    inputs = [x, h, c, *module.parameters()]
    output, (h_n, c_n) = module(x, (h.unsqueeze(0), c.unsqueeze(0)))
    expected, c_expected = plain(x, h, c)
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
    expected, c_expected = plain(x, h, c, training=False)
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
    # Running statistics serve the one row of step 3 in training too; they must not move in between.
    monkeypatch.setattr(module, "_track", lambda *_: None)
    module.train(training)
    assert torch.autograd.gradcheck(outputs, inputs)


def test_packed_sequences_of_equal_length_are_the_padded_batch_in_both_directions():
    module = lstm(bidirectional=True)
    x = draw(5, 3, 3)
    output, state = module(x)
    again, others = module(pack_padded_sequence(x, torch.tensor([5, 5, 5])))
    assert torch.equal(pad_packed_sequence(again)[0], output)
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
    # Shares 1, 1/2, 0.4 in place of 1/3, 0.4.
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


def test_weight_norm_starts_with_standardized_features():
    network = nn.Sequential(
        weight_norm(nn.Conv2d(2, 4, 3)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
        weight_norm(nn.Linear(5, 3)),
    )
    directions = [network[i].parametrizations.weight.original1.clone() for i in (0, 4)]
    middle = network[3].weight.clone()
    x = torch.randn(50, 2, 4, 4) * 3 + 1
    start_weight_norm(network, x)
    for output, dims in ((network[0](x), (0, 2, 3)), (network(x), 0)):
        # Of sums of at most 200 numbers about 1.
        torch.testing.assert_close(output.mean(dims), torch.zeros(output.size(1)), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            output.std(dims, correction=0), torch.ones(output.size(1)), rtol=0, atol=1e-5
        )
    assert all(
        torch.equal(network[i].parametrizations.weight.original1, v)
        for i, v in zip((0, 4), directions, strict=True)
    )
    assert torch.equal(network[3].weight, middle)
    assert not network[0]._forward_hooks


def test_the_start_of_weight_norm_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match=r"network must be a torch\.nn\.Module, got function"):
        start_weight_norm(lambda x: x, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must have layers with weight norm, got none"):
        start_weight_norm(nn.Linear(3, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="with a bias, got ParametrizedLinear"):
        start_weight_norm(weight_norm(nn.Linear(3, 4, bias=False)), torch.zeros(2, 3))
    network = weight_norm(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="the same in all cases"):
        start_weight_norm(network, torch.zeros(2, 3))
    assert not network._forward_hooks


@pytest.mark.parametrize("norm", [*recurrent.LSTM_NORMS, "fastrnns"])
def test_an_lstm_with_each_norm_trains_every_parameter(norm):
    network = recurrent.lstm(norm, 3, 4, num_layers=2, bidirectional=True, batch_first=True, max_length=5)
    output, (h, c) = network(torch.randn(4, 5, 3))
    assert output.shape == (4, 5, 8)
    assert h.shape == c.shape == (4, 4, 4)
    (output.square().sum() + c.sum()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("norm", recurrent.GRU_NORMS)
def test_a_gru_with_each_norm_trains_every_parameter(norm):
    network = recurrent.gru(norm, 3, 4)
    output, h = network(torch.randn(5, 4, 3))
    assert (output.shape, h.shape) == ((5, 4, 4), (1, 4, 4))
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(("make", "peer"), [(recurrent.lstm, nn.LSTM), (recurrent.gru, nn.GRU)])
def test_weight_norm_starts_as_the_network_without_and_follows_its_parameters(make, peer):
    torch.manual_seed(0)
    network = make("weight", 3, 4)
    torch.manual_seed(0)
    plain = peer(3, 4)
    x = torch.randn(5, 2, 3)
    # A row over its norm times its norm: two roundings more, carried through five steps.
    torch.testing.assert_close(network(x)[0], plain(x)[0], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        network.parametrizations.weight_hh_l0.original0.zero_()
        plain.weight_hh_l0.zero_()
    torch.testing.assert_close(network(x)[0], plain(x)[0], rtol=1e-5, atol=1e-6)


def test_an_unknown_norm_is_refused():
    with pytest.raises(
        ExperimentError, match="unknown norm 'batch' of the GRU; expected one of none, layer,"
    ):
        recurrent.gru("batch", 3, 4)
    with pytest.raises(
        ExperimentError, match="unknown norm 'group' of the LSTM; expected one of none, batch"
    ):
        recurrent.lstm("group", 3, 4)


PROGRAM = """
import sys
import pytest, torch
import torch.distributed as dist
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
import layernorm
assert "layernorm.baselines" not in sys.modules
from layernorm.baselines import BatchNorm, BatchNormLSTM

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def trained(network, call, x, grad):
    # Output, gradients of the input, of the parameters, and buffers.
    x = x.clone().requires_grad_()
    output = call(network, x)
    output.backward(grad)
    grads = {name: p.grad for name, p in network.named_parameters()}
    return output.detach(), x.grad, grads, dict(network.named_buffers())


def compare(make, call, shape, dim, own, grad_shape):
    torch.manual_seed(0)
    x, grad = torch.randn(shape, dtype=torch.float64) * 3 + 100, torch.randn(grad_shape, dtype=torch.float64)
    alone, ours = make(), make()
    ours.load_state_dict(alone.state_dict())
    alone.process_group = SINGLE[rank]
    expected = trained(alone, lambda m, x: call(m, x, slice(None)), x, grad)
    part = (slice(None),) * dim + (own,)
    found = trained(ours, lambda m, x: call(m, x, own), x[part], grad[part])
    for a, e in zip(found[:2], expected[:2]):
        torch.testing.assert_close(a, e[part], **CLOSE)
    for name, grad in found[2].items():
        dist.all_reduce(grad)
        torch.testing.assert_close(grad, expected[2][name], **CLOSE)
    for name, buffer in found[3].items():
        torch.testing.assert_close(buffer, expected[3][name], **CLOSE)


dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
SINGLE = [dist.new_group([0]), dist.new_group([1])]
half, third, none = (
    [slice(0, 3), slice(3, 6)][rank], [slice(0, 2), slice(2, 6)][rank], [slice(0, 6), slice(6, 6)][rank]
)
for own in (half, third, none):
    for shape in ((6, 3), (6, 3, 2, 5)):
        make = lambda: BatchNorm(3, dtype=torch.float64)
        compare(make, lambda m, x, _: m(x), shape, 0, own, shape)


def lstm():
    return BatchNormLSTM(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64, max_length=6)


LENGTHS = torch.tensor([5, 4, 4, 2, 2, 1])


def packed(module, x, own):
    output = module(pack_padded_sequence(x, LENGTHS[own]))[0]
    return pad_packed_sequence(output, total_length=5)[0]


for own in (half, third):
    compare(lstm, lambda m, x, _: m(x)[0], (5, 6, 3), 1, own, (5, 6, 8))
# The second process's sequences end before the first's; its part of the padded input has no gradient there.
compare(lstm, packed, (5, 6, 3), 1, half, (5, 6, 8))

# In evaluation a process waits for nobody.
if rank == 0:
    lstm().eval()(torch.randn(5, 2, 3, dtype=torch.float64))
    BatchNorm(3).eval()(torch.randn(5, 3))

# Each process may have one case, all together not.
module = BatchNorm(3)
module(torch.randn(1, 3))
with pytest.raises(ValueError, match="and none in the other processes"):
    module(torch.randn(1 - rank, 3))
assert BatchNorm(3)(torch.randn(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
dist.destroy_process_group()
"""


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo")
def test_two_processes_are_as_one(tmp_path: Path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
