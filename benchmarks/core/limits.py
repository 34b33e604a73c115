"""What bounds a recurrent layer from below: its bare matrix products, and reading its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.core.timing import Call, Samples, quartiles


def products(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, training: bool) -> Call:
    """Return the matrix products of a sequence with nothing between them, into memory that is there.

    With T steps, N rows, F inputs, H features and G gates: one product (T·N × F)·(F × G·H) and T
    products (N × H)·(H × G·H); in training also T products (N × G·H)·(G·H × H), one
    (T·N × G·H)·(G·H × F), and those of the weights' gradients, (G·H × T·N)·(T·N × F) and
    (G·H × T·N)·(T·N × H).

    Args:
        x: (T, N, F).
        weight_ih: (G·H, F).
        weight_hh: (G·H, H).
        training: whether those of backward are among them.
    """
    steps, rows, inputs = x.shape
    width, hidden = weight_hh.shape
    flat = x.reshape(steps * rows, inputs)
    # A product of zeros would be faster on a GPU, which takes less power for it.
    gates, states = (torch.randn(steps * rows, size, device=x.device).to(x) for size in (width, hidden))
    input_grad = torch.empty_like(flat)
    weight_grads = torch.empty_like(weight_ih), torch.empty_like(weight_hh)
    gates_of, states_of = (list(t.view(steps, rows, -1).unbind(0)) for t in (gates, states))
    out_of = torch.empty_like(gates_of[0])
    back_of = torch.empty_like(states_of[0])
    ih_t, hh_t = weight_ih.t(), weight_hh.t()

    def forward() -> None:
        torch.mm(flat, ih_t, out=gates)
        for h in states_of:
            torch.mm(h, hh_t, out=out_of)

    def both() -> None:
        forward()
        for grad in gates_of:
            torch.mm(grad, weight_hh, out=back_of)
        torch.mm(gates, weight_ih, out=input_grad)
        torch.mm(gates.t(), flat, out=weight_grads[0])
        torch.mm(gates.t(), states, out=weight_grads[1])

    return _without_gradients(both if training else forward)


def reads(size: int) -> dict[str, Call]:
    """Return what ``read_us`` needs: a dot product that reads this many bytes, and one that reads none."""
    half = torch.ones(2, max(1, size // 8))
    one = torch.ones(2, 1)
    return {
        "read": _without_gradients(partial(torch.dot, half[0], half[1])),
        "read nothing": _without_gradients(partial(torch.dot, one[0], one[1])),
    }


def read_us(samples: Mapping[str, Samples]) -> float:
    """Return the microseconds for reading the bytes, without the call's own."""
    whole, nothing = (quartiles(samples[name].seconds).median for name in ("read", "read nothing"))
    return 1e6 * max(0.0, whole - nothing)


def _without_gradients(call: Callable[[], object]) -> Call:
    def guarded() -> None:
        with torch.no_grad():
            call()

    return guarded
