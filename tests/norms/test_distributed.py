"""The norms of DTensors, and sharded recurrent layers, by two processes on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.processes import needs_gloo, run_two

pytestmark = needs_gloo

PROGRAM = """
import sys
import pytest, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
import layernorm
from layernorm import backends, functional as LF, ops, reference

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
EPS32 = 2.0**-23


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def case(name, shape, tail, placement, affine, dtype=torch.float64):
    torch.manual_seed(0)
    add, layer = name.startswith("add_"), name.endswith("layer_norm")
    normalized = shape[len(shape) - tail :]
    x = torch.randn(shape, dtype=dtype) * 2 + 5
    rows = [x, torch.randn(shape, dtype=dtype)] if add else [x]
    weights = [torch.randn(normalized, dtype=dtype) for _ in range(2 if layer else 1)] if affine else []
    local = leaves(*rows, *weights)
    count = len(rows)
    function = getattr(LF, name)
    expected = function(*local[:count], normalized, *local[count:], eps=0.1)
    at = placement.dim - (len(shape) - tail) if isinstance(placement, Shard) else -1
    affine_placement = Shard(at) if at >= 0 else Replicate()
    spread = [distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in rows]
    spread += [distribute_tensor(t.detach(), mesh, [affine_placement]).requires_grad_() for t in weights]
    with CommDebugMode() as communication:
        actual = function(*spread[:count], normalized, *spread[count:], eps=0.1)
    # One gather (of layer norm) or all-reduce (of RMS norm) where rows are cut, else nothing.
    assert communication.get_total_counts() == (1 if at >= 0 else 0), communication.get_comm_counts()
    expected, actual = (r if isinstance(r, tuple) else (r,) for r in (expected, actual))
    grads = [torch.randn(shape, dtype=dtype) for _ in expected]
    tol = 1e-12 if dtype == torch.float64 else 64 * 20 * EPS32
    for a, e in zip(actual, expected, strict=True):
        assert isinstance(a, DTensor) and a.placements == (placement,) and a.shape == e.shape
        assert a.to_local().is_contiguous()
        torch.testing.assert_close(a.full_tensor(), e, rtol=tol, atol=tol)
    torch.autograd.backward(expected, grads)
    torch.autograd.backward(actual, [distribute_tensor(g, mesh, [placement]) for g in grads])
    for a, e in zip(spread, local, strict=True):
        assert a.grad.dtype == e.grad.dtype
        torch.testing.assert_close(a.grad.full_tensor(), e.grad, rtol=tol, atol=tol)


for name in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"):
    for affine in (True, False):
        for shape, tail, placement in (
            ((4, 6, 16), 1, Shard(0)),  # data parallel
            ((4, 6, 16), 1, Shard(1)),  # sequence parallel
            ((4, 6, 16), 1, Shard(2)),  # tensor parallel
            ((4, 6, 7), 1, Shard(2)),  # of parts that are not equal
            ((4, 6, 1), 1, Shard(2)),  # of which one is empty
            ((3, 5, 8), 1, Shard(0)),
            ((4, 6, 16), 2, Shard(1)),  # the first of two normalized dimensions
            ((4, 6, 16), 2, Shard(2)),
            ((4, 16), 1, Replicate()),
        ):
            case(name, shape, tail, placement, affine)
        case(name, (5, 33), 1, Shard(1), affine, torch.float32)

# The modules, with parameters as parallelize_module leaves them; a partial sum is summed first.
module = layernorm.LayerNorm(8)
x = torch.randn(4, 8)
expected = module(x)
spread = torch.distributed.tensor.distribute_module(module, mesh)
partial = DTensor.from_local(x / 2, mesh, [Partial()], run_check=False)
torch.testing.assert_close(spread(partial).full_tensor(), expected, rtol=1e-5, atol=1e-5)

# A large offset loses nothing where rows are cut.
x = torch.randn(3, 64) * 1e-3 + 1e4
exact = reference.layer_norm(x.double(), (64,), eps=1e-12)
cut = LF.layer_norm(distribute_tensor(x, mesh, [Shard(1)]), (64,), eps=1e-12).full_tensor()
offset = (x.double().mean(-1) / x.double().std(-1, correction=0)).unsqueeze(-1)
assert ((cut - exact).abs() <= 4 * EPS32 * (1 + offset)).all()

# Half inputs and a residual stream in float32.
x, residual = torch.randn(4, 16).bfloat16(), torch.randn(4, 16)
for placement in (Shard(0), Shard(1)):
    output, total = LF.add_rms_norm(
        distribute_tensor(x, mesh, [placement]), distribute_tensor(residual, mesh, [placement]), (16,)
    )
    assert (output.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    wanted = LF.add_rms_norm(x, residual, (16,))
    torch.testing.assert_close(output.full_tensor(), wanted[0], rtol=2**-7, atol=1e-6)
    assert torch.equal(total.full_tensor(), wanted[1])

# Whatever kernel is asked for; PyTorch's own operator too.
x = torch.randn(4, 16)
expected = LF.layer_norm(x, (16,))
for kernel in ("reference", "torch") + (("native",) if ops.NATIVE_PROBLEM is None else ()):
    with backends.use(kernel):
        for placement in (Shard(0), Shard(1)):
            found = LF.layer_norm(distribute_tensor(x, mesh, [placement]), (16,))
            torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-5, atol=1e-5)

x = distribute_tensor(torch.randn(4, 16), mesh, [Shard(1)])
with pytest.raises(RuntimeError, match=r"Given normalized_shape=\\[8\\], expected input with shape"):
    LF.layer_norm(x, (8,))
with pytest.raises(RuntimeError, match="weight to be of same shape"):
    LF.layer_norm(x, (16,), distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
with pytest.raises(RuntimeError, match="residual to be of the input's shape"):
    LF.add_rms_norm(x, distribute_tensor(torch.ones(2, 16), mesh, [Shard(1)]), (16,))
with pytest.raises(RuntimeError, match="weight must be one on it too, but got a plain Tensor"):
    LF.layer_norm(x, (16,), torch.ones(16))
y = LF.layer_norm(x.requires_grad_(), (16,)).to_local().square().sum()
(grad,) = torch.autograd.grad(y, x, create_graph=True)
with pytest.raises(RuntimeError, match="once_differentiable"):
    grad.to_local().sum().backward()
complex_rows = distribute_tensor(torch.ones(4, 16, dtype=torch.complex64), mesh, [Shard(0)])
assert LF.rms_norm(complex_rows, (16,)).dtype == torch.complex64
with pytest.raises(RuntimeError, match="input must be of a floating-point dtype, got torch.complex64"):
    LF.rms_norm(complex_rows.redistribute(placements=[Shard(1)]), (16,))

# A sharded recurrent layer runs, and has a stream only where its weights are gathered.
x = torch.randn(4, 1, 3)


def refuses(module, message):
    with pytest.raises(RuntimeError, match=message):
        module.stream()


def steps_are(module, expected):
    stream = module.stream()
    torch.testing.assert_close(torch.stack([stream.step(x_t) for x_t in x]), expected, rtol=1e-5, atol=1e-6)
    return stream


torch.manual_seed(0)
module = layernorm.LayerNormGRU(3, 8, 2)
expected = module(x)[0].detach()
fully_shard(module, mesh=mesh)
refuses(module, "weight_ih_l0 is a DTensor over DeviceMesh.*call the module's unshard.. first")
module.unshard()
stream = steps_are(module, expected)
module.reshard()
with pytest.raises(RuntimeError, match="weight_ih_l0 is a DTensor"):
    stream.refresh()
torch.testing.assert_close(module(x)[0], expected)
for use_orig_params, got in ((False, "memory that was freed"), (True, "shape")):
    torch.manual_seed(0)
    module = layernorm.LayerNormGRU(3, 8, 2)
    options = {"device_id": torch.device("cpu"), "use_orig_params": use_orig_params}
    whole = FullyShardedDataParallel(module, **options)
    refuses(module, f"must have shape .*, got {got}.*, as of parameters that are sharded")
    output = whole(x)[0]
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    with FullyShardedDataParallel.summon_full_params(whole):
        steps_are(module, expected)
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path):
    run_two(PROGRAM, tmp_path)


def test_plain_tensors_know_nothing_of_it():
    program = "import sys, torch, layernorm; layernorm.LayerNorm(4)(torch.zeros(2, 4)); "
    program += "sys.exit('layernorm.distributed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
