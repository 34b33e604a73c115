"""A step after its products: values and gradients of rows of any magnitude, compared with the reference in
float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from layernorm import Variant, backends
from layernorm.variants import GATES, parameter_shapes, resolve
from tests.recurrent.cases import GATES_CELLS, GATES_INPUTS, called_gates, gates_results

from .draws import DTYPES, Draw, by_reference, check, rounded, run_case, same_bits
from .judging import largest_share, moved_by_roundings, second_order
from .layers import variant_of


@dataclass
class Case:
    cell: str
    variant: str | Variant
    dtype: torch.dtype
    tensors: dict[str, Tensor]  # of GATES_INPUTS, and the parameters


def case_of(seed: int) -> tuple[Draw, Case]:
    """Draw a case: rows of any magnitude, whose norms take any path."""
    draw = Draw("gates", seed)
    cell, dtype = draw.choice(GATES_CELLS), draw.choice((torch.float32, *DTYPES))
    variant = variant_of(draw, cell)
    spec = resolve(variant, cell)
    hidden, rows = draw.size(), draw.choice((0, 1, 1, 2, 3, 4, 5, 8, 33, 70))
    far = {torch.float16: 5, torch.float64: 200}.get(dtype, 60) if spec.kind != "none" else 3

    def magnitudes(*shape: int) -> Tensor:
        a = draw.normal(*shape)
        if draw.chance(0.6):
            a = torch.ldexp(
                a, torch.tensor([[draw.randint(-far, far)] for _ in range(rows)]).reshape(rows, 1)
            )
        return a

    widths = (GATES[cell] * hidden, GATES[cell] * hidden, hidden)
    tensors = {name: magnitudes(rows, width) for name, width in zip(GATES_INPUTS, widths, strict=True)}
    if rows and draw.chance(0.1):
        tensors["input_gates"][0] = 0
    for name, shape in parameter_shapes(cell, spec, 1, hidden).items():
        if name.startswith("weight") or (name.startswith("bias") and draw.chance(0.2)):
            continue
        tensors[name] = draw.normal(*shape) * 0.3 + name.startswith("gain")
    draw.note(
        cell=cell,
        variant=variant,
        dtype=dtype,
        rows=rows,
        hidden=hidden,
        parameters=[n for n in tensors if n not in GATES_INPUTS],
    )
    return draw, Case(cell, variant, dtype, {name: rounded(t, dtype) for name, t in tensors.items()})


def run(seed: int) -> float:
    """Draw a case, run it and judge it; return the largest share of what is allowed."""
    return run_case(case_of(seed), judged)


def judged(draw: Draw, case: Case) -> float:
    state, compute = case.tensors["state"], partial(gates_results, case.cell, case.variant)
    rows = state.size(0)
    laid = {name: draw.laid(t) for name, t in case.tensors.items()}
    seeds = [rounded(draw.normal(*state.shape), case.dtype) for _ in range(2)]
    with backends.use("native"):
        found = compute(laid, seeds)
    if rows:
        chosen = torch.tensor(sorted(draw.sample(range(rows), draw.randint(1, min(rows, 5)))))
        fewer = {name: t[chosen] if name in GATES_INPUTS else t for name, t in case.tensors.items()}
        with backends.use("native"):
            some = compute(fewer, [s[chosen] for s in seeds])
        for name in (*(name for name in found if name.startswith("output")), *GATES_INPUTS):
            check(
                same_bits([some[name]], [found[name][chosen]]),
                f"{name} of rows {chosen.tolist()} alone: other bits",
            )

    def by_seeds(seeds: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = {name: t.to(dtype) for name, t in case.tensors.items()}
        found = compute(tensors, [s.to(dtype) for s in seeds])
        return {name: t.double() for name, t in found.items()}

    with by_reference():
        expected = by_seeds(seeds, torch.float64)
        wide_seeds = [s.double() for s in seeds]
        allowed = moved_by_roundings(draw, case.dtype, expected, wide_seeds, by_seeds)
    if draw.chance(0.2) and resolve(case.variant, case.cell).eps >= 1e-5:
        ordinary = {
            name: draw.normal(*t.shape) if name in GATES_INPUTS else t.double()
            for name, t in case.tensors.items()
        }
        second_order(draw, partial(called_gates, case.cell, case.variant), ordinary)
    return largest_share(expected, found, expected, allowed, case.dtype)
