"""The formulas by which ``torch.utils.flop_counter.FlopCounterMode`` counts this package's operators.

As PyTorch's own: two for each multiplication and addition of a matrix product, nothing for norms and gates.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Final

import torch

from layernorm.pytorch_internals import dispatch_modes, is_flop_counter_mode


def register() -> None:
    """Give the formulas to PyTorch's counter if that has been imported, and to those that count now.

    It is not imported here, since that takes longer than importing all of this package.
    """
    if (counter := sys.modules.get("torch.utils.flop_counter")) is None:
        return
    known = counter.flop_registry
    for name, formula in _FORMULAS.items():
        if (operator := getattr(torch.ops.layernorm, name)) not in known:
            known[operator] = counter.shape_wrapper(formula)
    # Each counter has copied what was registered when it was made.
    mode: Any
    for mode in dispatch_modes():
        if is_flop_counter_mode(mode, counter):
            held = getattr(mode, "counter", mode)  # the mode itself before PyTorch 2.6
            held.flop_registry = {**known, **held.flop_registry}


def _products(input: Sequence[int], weights: Sequence[Sequence[int] | None]) -> tuple[int, int, int]:
    """Return the operations of the products of the input, of the state, and of the projection."""
    rows = math.prod(input[:-1])
    return tuple(2 * rows * (math.prod(shape) if shape else 0) for shape in weights[:3])  # type: ignore[return-value]


def _forward(
    input: Sequence[int], h: Sequence[int], c: Any, weights: Sequence[Any], *_: Any, **__: Any
) -> int:
    return sum(_products(input, weights))


def _backward(
    input: Sequence[int], h: Sequence[int], c: Any, weights: Sequence[Any], *rest: Any, **named: Any
) -> int:
    """Count the gradients of the products that are wanted, and with ``recompute`` forward again."""
    *_, saved_x, _, _, _, wanted = rest
    products = _products(input, weights)
    of_input, of_state, of_projection = products
    total = (of_input if wanted[0] else 0) + of_state + of_projection  # the state's comes with every other
    total += sum(operations for operations, is_wanted in zip(products, wanted[5:8], strict=True) if is_wanted)
    return total + (sum(products) if len(saved_x) == 1 else 0)


def _nothing(*_: Any, **__: Any) -> int:
    return 0


_FORMULAS: Final = {
    "recurrent": _forward,
    "recurrent_forward": _forward,
    "recurrent_backward": _backward,
    **dict.fromkeys(
        (
            "layer_norm",
            "rms_norm",
            "add_layer_norm",
            "add_rms_norm",
            "norm_forward",
            "norm_backward",
            "lstm_gates",
            "lstm_gates_backward",
            "gru_gates",
            "gru_gates_backward",
        ),
        _nothing,
    ),
}
