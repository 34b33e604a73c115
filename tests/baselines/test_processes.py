"""Batch norm and the batch-normalized LSTM in two processes that share a batch."""

from __future__ import annotations

from pathlib import Path

from tests.processes import needs_gloo, run_two

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


@needs_gloo
def test_two_processes_are_as_one(tmp_path: Path):
    run_two(PROGRAM, tmp_path)
