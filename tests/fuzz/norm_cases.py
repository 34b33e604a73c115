"""Cases of the norms: an operator, its arguments, and gradients for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import layernorm
from layernorm import functional as LF

from . import exact_norm
from .draws import EDGES, EPS, HALVES, Draw, computed, rounded

OPERATORS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
KINDS = ("plain", "own", "offset", "constant", "zeros", "spread", "one-hot", "denormal", "infinite", "nan")


@dataclass
class Case:
    operator: str
    shape: tuple[int, ...]
    width: int  # elements of a row
    tail: tuple[int, ...]  # the normalized dimensions
    eps: float | None
    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    grad: Tensor  # of the output
    grad_sum: Tensor | None
    entry: str
    wanted: dict[str, bool] = field(default_factory=dict)

    @property
    def centred(self) -> bool:
        return "layer" in self.operator

    def tensors(self) -> dict[str, Tensor]:
        """Return the operator's tensors by name."""
        named = {name: getattr(self, name) for name in ("input", "residual", "weight", "bias")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def call(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the output and, with a residual, the sum."""
        parameters = [tensors.get("weight"), *([tensors.get("bias")] if self.centred else [])]
        first = [tensors["input"], *([tensors["residual"]] if "residual" in tensors else [])]
        if self.entry == "operator":
            eps = torch.finfo(computed(self.input.dtype)).eps if self.eps is None else self.eps
            result = getattr(torch.ops.layernorm, self.operator)(*first, self.tail, *parameters, eps)
        elif self.entry == "module":
            kind = layernorm.LayerNorm if self.centred else layernorm.RMSNorm
            module = kind(self.tail, eps=self.eps, elementwise_affine=False)
            for name, tensor in zip(("weight", "bias"), parameters, strict=False):
                delattr(module, name)  # a plain tensor takes the parameter's place
                setattr(module, name, tensor)
            result = module(*first)
        else:
            result = getattr(LF, self.operator)(*first, self.tail, *parameters, self.eps)
        return result if isinstance(result, tuple) else (result,)


def case_of(seed: int) -> tuple[Draw, Case]:
    """Draw a case."""
    draw = Draw("norms", seed)
    operator = draw.choice(OPERATORS)
    dtype = draw.choice((torch.float32, torch.float32, torch.float64, *HALVES))
    if not exact_norm.IS_WIDER and dtype == torch.float64:
        dtype = torch.float32  # there is no judge of float64 then
    rows, width, shape, tail = sizes_of(draw)
    eps = draw.choice(EPS)
    if draw.chance(0.1):
        eps = 2.0 ** draw.randint(-300 if dtype == torch.float64 else -140, 3)
    if "rms" in operator and draw.chance(0.1):
        eps = None
    parameter_types = [dtype, torch.float32] if dtype in HALVES else [dtype]

    def parameter(present: float, one: float) -> Tensor | None:
        if not draw.chance(present):
            return None
        extremes = draw.chance(0.1)
        a = draw.tensor(draw.choice(parameter_types), width, extremes=extremes)
        return draw.laid((a if extremes else a + one).reshape(tail))

    def given(a: Tensor) -> Tensor:
        if rows > 1 and draw.chance(0.05):
            return a[:1].expand(rows, width).reshape(shape)
        return draw.laid(a.reshape(shape))

    added = operator.startswith("add")
    case = Case(
        operator=operator,
        shape=shape,
        width=width,
        tail=tail,
        eps=eps,
        input=given(rows_of(draw, dtype, rows, width)),
        residual=given(rows_of(draw, dtype, rows, width)) if added else None,
        weight=parameter(0.7, 1.0),
        bias=parameter(0.6, 0.0) if "layer" in operator else None,
        grad=given(gradient_of(draw, dtype, rows, width)),
        grad_sum=given(gradient_of(draw, dtype, rows, width)) if added and draw.chance(0.6) else None,
        entry=draw.choice(
            ("function", "function", "operator") if added else ("function", "operator", "module")
        ),
    )
    if added and dtype in HALVES and case.entry == "function" and draw.chance(0.3):
        case.residual = given(rows_of(draw, torch.float32, rows, width))
        case.grad_sum = None if case.grad_sum is None else case.grad_sum.float()
    case.wanted = {name: draw.chance(0.8) for name in case.tensors()}
    draw.note(
        operator=operator, dtype=dtype, shape=shape, tail=tail, eps=eps, entry=case.entry, wanted=case.wanted
    )
    return draw, case


def sizes_of(draw: Draw) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Draw the number of rows, their width, the shape of all, and the normalized shape."""
    width = (
        draw.size()
        if draw.chance(0.85)
        else draw.choice(EDGES[3:]) * draw.randint(1, 2) + draw.randint(-1, 1)
    )
    rows = draw.choice((0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 33, 70))
    if width < 10 and draw.chance(0.05):
        rows = draw.choice((2049, 2100))
    leading = draw.choice(((rows,), (rows,), (1, rows), (rows, 1)) if rows % 3 else ((3, rows // 3), (rows,)))
    if rows == 1 and draw.chance(0.3):
        leading = ()
    tail = (2, width // 2) if width % 2 == 0 and draw.chance(0.15) else (width,)
    return rows, width, (*leading, *tail), tail


def rows_of(draw: Draw, dtype: torch.dtype, rows: int, width: int) -> Tensor:
    """Draw rows of one magnitude, some of them special."""
    base = draw.exponent(dtype)
    ordinary = draw.choice((0.0, 0.5, 0.9, 1.0))
    a = rounded(torch.ldexp(draw.normal(rows, width), torch.tensor(base)), dtype)
    kinds = []
    for row in range(min(rows, 70)):
        kind = "plain" if draw.chance(ordinary) else draw.choice(KINDS)
        kinds.append(kind)
        if kind != "plain":
            a[row] = special_row(draw, kind, dtype, width)
    draw.note(**{f"rows{len(draw.notes)}": (base, kinds if len(kinds) < 10 else sorted(set(kinds)))})
    return a


def special_row(draw: Draw, kind: str, dtype: torch.dtype, width: int) -> Tensor:
    """Return a special row of this kind."""
    a = draw.tensor(dtype, width)
    info = torch.finfo(dtype)
    at = draw.randrange(width)
    if kind == "offset":
        offset = draw.tensor(dtype, 1).double()
        a = rounded(offset * (1 + draw.normal(width) * 2.0 ** -draw.randint(0, 30)), dtype)
    elif kind == "constant":
        a = a[:1].expand(width).clone()
    elif kind == "zeros":
        a = torch.zeros_like(a)
    elif kind == "spread":
        a = draw.tensor(dtype, width, spread=20)
    elif kind == "one-hot":
        a = torch.zeros_like(a).index_fill(0, torch.tensor([at]), a[0].item())
    elif kind == "denormal":
        a = rounded(draw.normal(width) * 8 * info.smallest_normal * info.eps, dtype)
    elif kind == "infinite":
        a[at] = draw.choice((-1, 1)) * float("inf")
    elif kind == "nan":
        a[at] = float("nan")
    return a


def gradient_of(draw: Draw, dtype: torch.dtype, rows: int, width: int) -> Tensor:
    """Draw a gradient, most often of ordinary magnitude."""
    kind = draw.choice(("plain",) * 6 + ("scaled", "ones", "zero rows", "one-hot"))
    if kind == "ones":
        return torch.ones((), dtype=dtype).expand(rows, width)
    a = draw.tensor(dtype, rows, width, extremes=kind == "scaled")
    draw.note(
        **{f"grad{len(draw.notes)}": (kind, f"{float(a.double().abs().max()) if a.numel() else 0:.3g}")}
    )
    if kind == "zero rows":
        a[::2] = 0
    if kind == "one-hot":
        a = a * (torch.arange(width) == draw.randrange(width))
    return a
