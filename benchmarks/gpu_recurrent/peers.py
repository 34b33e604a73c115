"""Recurrent layers over a whole sequence on a GPU, next to those of ``benchmarks.recurrent.peers``.

The layer-normalized cell by hand has no Python loop inside its graph here: hundreds of steps in one would
take ``torch.compile`` very long. Others' kernels compute the un-normalized cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.core import cuda
from benchmarks.core.subjects import NotSupportedError, Subject, module
from benchmarks.recurrent import peers as recurrent_peers
from benchmarks.recurrent.case import Case, of_function
from benchmarks.recurrent.loops import PARTS
from benchmarks.recurrent.peers import compiled
from layernorm import backends
from layernorm.variants import resolve


def _ours(name: str, case: Case, kernel: str = "triton") -> Subject:
    context = cuda.kernels(case.x.device.type, kernel)
    with context():
        made = recurrent_peers.PEERS[name](case)

    def results() -> list[Tensor]:
        with context():
            return made.results()

    return replace(made, results=results, context=context)


def _of_kernel(kernel: str, case: Case) -> Subject:
    x = case.x
    if not x.is_cuda:
        raise NotSupportedError
    with backends.use(kernel):
        choice = backends.tier(case.cell, resolve("paper", case.cell), case.hidden, x.dtype, x.device)
    if choice.kernel != kernel:
        raise NotSupportedError(choice.reason)
    return _ours("layernorm", case, kernel)


def _split(case: Case, leaves: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights of the product with the input, and those of the steps."""
    weights = dict(zip(case.normalized, leaves, strict=True))
    parts = PARTS[case.cell]
    return [weights[name] for name in parts.project_weights], [weights[name] for name in parts.step_weights]


def _start(x: Tensor, case: Case) -> tuple[Tensor, ...]:
    """Return a state of zeros, each tensor with memory of its own."""
    return tuple(x.new_zeros([x.size(1), case.hidden]) for _ in range(PARTS[case.cell].states))


def _tuple(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def _compiled_step(case: Case) -> Subject:
    """Compile what is outside the loop, and one step; loop over time in Python."""
    torch._dynamo.reset()
    parts = PARTS[case.cell]
    project = torch.compile(parts.project, dynamic=False, fullgraph=True)
    step = torch.compile(parts.step, dynamic=False, fullgraph=True)

    def sequence(x: Tensor, *leaves: Tensor) -> Tensor:
        outside, inside = _split(case, leaves)
        state, outputs = _start(x, case), []
        for x_t in project(x, *outside).unbind(0):
            state = _tuple(step(x_t, *state, *inside))
            outputs.append(state[0])
        return torch.stack(outputs)

    return compiled(of_function(sequence, case, case.normalized))


def _scan(case: Case) -> Subject:
    """Loop over time by PyTorch's operator, all of it compiled."""
    import torch._functorch.config as settings
    from torch._higher_order_ops import scan

    torch._dynamo.reset()
    parts = PARTS[case.cell]

    def sequence(x: Tensor, *leaves: Tensor) -> Tensor:
        outside, inside = _split(case, leaves)

        def step(state: tuple[Tensor, ...], x_t: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            following = _tuple(parts.step(x_t, *state, *inside))
            # Neither state nor output may share memory with the other, or with what is kept for backward
            # (pytorch issue 195977).
            return tuple(tensor.clone() for tensor in following), following[0].clone()

        output: Tensor = scan(step, _start(x, case), parts.project(x, *outside))[1]
        return output

    function = torch.compile(sequence, dynamic=False, fullgraph=True)
    # Else Inductor writes over what the loop's backward still needs (pytorch issue 153679; in 2.13).
    with settings.patch(donated_buffer=False):
        return compiled(of_function(function, case, case.normalized))


def _batch_first(case: Case) -> Case:
    """Lay out each sequence in memory on its own, as others' kernels want them."""

    def moved(t: Tensor) -> Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    return replace(case, x=moved(case.x), grad=moved(case.grad))


def _flashrnn(case: Case) -> Subject:
    if case.cell == "rnn":
        raise NotSupportedError
    flashrnn = module("flashrnn").flashrnn
    size = case.hidden
    # The fused kernels are for GPUs; the package's own reference has the same layouts. The GRU's fall back
    # to kernels that alternate with products, which the package decides itself.
    backend = "cuda_fused" if case.x.is_cuda else "vanilla"
    dtype = str(case.x.dtype).removeprefix("torch.")
    call = partial(flashrnn, function=case.cell, backend=backend, dtype=dtype)

    def sequence(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
        # (T, N, G·H) to sequences first, with a dimension of one head.
        products = F.linear(x, weight_ih).unflatten(-1, (-1, 1, size)).transpose(0, 1)
        recurrent, a, b = (t.unflatten(0, (-1, 1, size)) for t in (weight_hh, bias_ih, bias_hh))
        if case.cell == "gru":
            # Its gates are n, r, z where only the state counts, r, z, n with the input; biases n, r, z, n.
            recurrent = recurrent.roll(1, 0)
            biases = torch.cat([b[2:], a[:2] + b[:2], a[2:]])
        else:
            biases = a + b
        output: Tensor = call(products, recurrent, biases)[0]
        return output[0].squeeze(-2).transpose(0, 1)

    return compiled(of_function(sequence, _batch_first(case), case.unnormalized))


def _torchrl(case: Case) -> Subject:
    if case.cell == "rnn":
        raise NotSupportedError
    kernels = module("torchrl.modules.tensordict_module._rnn_triton")
    function = getattr(kernels, f"{case.cell}_triton")
    steps, rows, _ = case.x.shape
    # What a sequence begins with is given for every step, and where one begins.
    states = [case.x.new_zeros(rows, steps, case.hidden) for _ in range(PARTS[case.cell].states)]
    begins = torch.zeros(rows, steps, dtype=torch.bool, device=case.x.device)
    begins[:, 0] = True

    def sequence(x: Tensor, *weights: Tensor) -> Tensor:
        output: Tensor = function(x.transpose(0, 1), *states, *weights, begins, compute_dtype=x.dtype)[0]
        return output.transpose(0, 1)

    return compiled(of_function(sequence, _batch_first(case), case.unnormalized))


#: The kernel that loops over the steps of small layers, and the one that keeps the weights of larger ones on
#: the chip, which has a process of its own, since it may end it.
LOOPED: Final = "layernorm-looped"
PERSISTENT: Final = "layernorm-persistent"
#: By name; the order is that of tables.
PEERS: Final[dict[str, Callable[[Case], Subject]]] = {
    "layernorm": partial(_ours, "layernorm"),
    LOOPED: partial(_of_kernel, "looped"),
    PERSISTENT: partial(_of_kernel, "persistent"),
    "layernorm-recompute": partial(_ours, "layernorm-recompute"),
    "layernorm-none": partial(_ours, "layernorm-none"),
    "torch": recurrent_peers.PEERS["torch"],
    "loop": recurrent_peers.PEERS["loop"],
    "compile-step": _compiled_step,
    "scan": _scan,
    "flashrnn": _flashrnn,
    "torchrl": _torchrl,
}
#: Those that compute PyTorch's un-normalized cell.
UNNORMALIZED: Final = ("layernorm-none", "torch", "flashrnn", "torchrl")
#: The layer-normalized cell written by hand, and kernels of others.
BY_HAND: Final = ("loop", "compile-step", "scan")
KERNELS: Final = ("flashrnn", "torchrl")
#: Those that take long to start, or may end their process; each has one of its own at each point.
ALONE: Final = ("compile-step", "scan", *KERNELS)


def is_missing(peer: str) -> bool:
    """Return whether the peer's package is not installed."""
    return peer in KERNELS and find_spec(peer) is None
