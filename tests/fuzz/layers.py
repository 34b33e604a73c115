"""Recurrent layers: outputs, states and gradients, compared with the reference in float64.

float64 is judged by the reference in float64, whose errors are of the same kind. Beyond the range of its
squares a norm without eps is the same function of rows times a power of two: the reference gets them without.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from layernorm import Variant, backends
from layernorm.variants import PRESETS
from tests.recurrent.cases import SEQUENCES, as_hx, flat, state_sizes

from .draws import DTYPES, Draw, by_reference, check, rounded, run_case
from .judging import largest_share, moved_by_roundings

NAMES = ("input", "h", "c")


@dataclass
class Case:
    cell: str
    variant: str | Variant
    module: nn.Module
    dtype: torch.dtype
    tensors: dict[str, Tensor]  # input (T, N, F), h and c
    resets: Tensor | None
    lengths: Tensor | None  # of a packed sequence
    scale: int  # binary orders by which the products are larger than the reference's
    wanted: str

    @property
    def relu(self) -> bool:
        return getattr(self.module, "nonlinearity", "") == "relu"


def variant_of(draw: Draw, cell: str) -> str | Variant:
    """Draw a preset that has this cell, or any variant."""
    if draw.chance(0.4):
        return draw.choice([name for name, cells in PRESETS.items() if cell in cells])
    return Variant(
        kind=draw.choice(("layer", "layer", "rms", "none")),
        inputs=draw.choice(("separate", "summed")),
        scope=draw.choice(("matrix", "all", "gate")),
        cell=draw.choice(("output", "carried", "none")),
        projection_bias=draw.chance(0.4),
        eps=draw.choice((0.0, 1e-12, 1e-5, 1e-5, 1e-3, 1.0)),
    )


def case_of(seed: int, part: str = "layers") -> tuple[Draw, Case]:
    """Draw a case."""
    draw = Draw(part, seed)
    cell, dtype = draw.choice(tuple(SEQUENCES)), draw.choice((torch.float32, *DTYPES))
    variant = variant_of(draw, cell)
    hidden, features = draw.size(), draw.size(70)
    options: dict[str, Any] = {"bias": draw.chance(0.8), "recompute": draw.chance(0.3)}
    options |= {"batch_first": draw.chance(0.2), "bidirectional": draw.chance(0.3)}
    if cell == "lstm" and hidden > 1 and draw.chance(0.25):
        options["proj_size"] = draw.randint(1, hidden - 1)
    if cell == "rnn":
        options["nonlinearity"] = draw.choice(("tanh", "relu"))
    # With several layers the pattern of the relu could not be seen.
    options["num_layers"] = 1 if options.get("nonlinearity") == "relu" else draw.choice((1, 1, 2))
    module = SEQUENCES[cell](features, hidden, variant=variant, dtype=torch.float64, **options)
    steps, rows = draw.choice((1, 2, 3, 5, 9)), draw.choice((1, 1, 2, 3, 4, 5, 8, 13))
    if draw.chance(0.03):
        steps, rows = draw.choice(((31, 9), (3, 70)))
    spec = module.variant
    without_eps = spec.eps == 0 and spec.kind != "none"
    case = Case(
        cell=cell,
        variant=variant,
        module=module,
        dtype=dtype,
        tensors={},
        resets=None if without_eps or draw.chance(0.6) else draw.normal(steps, rows) > 0.6,
        lengths=None,
        scale=draw.randint(-500, 500) if dtype == torch.float64 and without_eps and draw.chance(0.8) else 0,
        wanted=draw.choice(("all", "all", "input", "parameters", "some")),
    )
    fill(draw, case, steps, rows, given=without_eps or draw.chance(0.6))
    if draw.chance(0.3):
        case.lengths = torch.tensor([steps, *(draw.randint(1, steps) for _ in range(rows - 1))])
    draw.note(
        cell=cell, variant=variant, dtype=dtype, sizes=(steps, rows, features, hidden), scale=case.scale
    )
    draw.note(**options, state="h" in case.tensors, resets=case.resets is not None, lengths=case.lengths)
    draw.note(wanted=case.wanted)
    return draw, case


def fill(draw: Draw, case: Case, steps: int, rows: int, given: bool) -> None:
    """Draw parameters, input and state, all numbers of the case's dtype."""
    module, dtype = case.module, case.dtype
    far = {torch.float16: 3, torch.float64: 200}.get(dtype, 45)
    if module.variant.kind == "none":
        far = 3
    far = draw.choice((0, 0, 1, far))
    orders = {"weights": draw.randint(-far, far), "state": draw.randint(-far, far), "bias": 0}
    draw.note(orders=orders)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "weight" in name:
                parameter.copy_(torch.ldexp(parameter, torch.tensor(orders["weights"] * ("hr" not in name))))
            elif "gain" in name or "bias" in name:
                parameter.add_(draw.normal(*parameter.shape) * 0.3)
            parameter.copy_(rounded(parameter, dtype))
        if draw.chance(0.1):
            next(iter(module.parameters())).zero_()  # every row of x is constant
    x = draw.normal(steps, rows, module.input_size)
    if draw.chance(0.5):
        scales = torch.tensor([[draw.randint(-far, far) for _ in range(rows)] for _ in range(steps)])
        x = torch.ldexp(x, scales.unsqueeze(-1))
    if draw.chance(0.2):
        x[draw.randrange(steps)] = 0
    case.tensors["input"] = rounded(x, dtype)
    if given:
        count = module.num_layers * (1 + module.bidirectional)
        for name, size in state_sizes(case.cell, module.hidden_size, module.proj_size).items():
            state = torch.ldexp(draw.normal(count, rows, size), torch.tensor(orders["state"]))
            case.tensors[name] = rounded(state, dtype)


# ---- by either kernel ----


def arguments(case: Case, tensors: dict[str, Tensor], draw: Draw | None = None) -> tuple[Any, Any, Any]:
    """Return input, state and resets as the module takes them; with ``draw``, laid out in some way."""
    x, resets = tensors["input"], case.resets
    first = case.module.batch_first
    if first:
        x, resets = x.transpose(0, 1), None if resets is None else resets.T
    if case.lengths is not None:
        packed = pack_padded_sequence(x, case.lengths, first, enforce_sorted=False)
        if resets is not None:
            resets = pack_padded_sequence(resets, case.lengths, first, enforce_sorted=False)
        x = packed
    elif draw is not None:
        x = draw.laid(x)
    state = [tensors[name] for name in ("h", "c") if name in tensors]
    if draw is not None:
        state = [draw.laid(s) for s in state]
    return x, as_hx(state), resets


def leaves_of(case: Case, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that need a gradient, by name."""
    named = tensors | dict(module.named_parameters())
    chosen = {
        "all": lambda i, name: True,
        "input": lambda i, name: name == "input",
        "parameters": lambda i, name: name not in NAMES,
        "some": lambda i, name: i % 3 == 0,
    }[case.wanted]
    needed = {name: t for i, (name, t) in enumerate(named.items()) if chosen(i, name)}
    for name, tensor in named.items():
        tensor.requires_grad_(name in needed)
    return needed


@dataclass
class Result:
    outputs: list[Tensor]
    grads: dict[str, Tensor]


def result(
    case: Case,
    module: nn.Module,
    tensors: dict[str, Tensor],
    seeds: list[Tensor] | None,
    kernel: str,
    draw: Draw | None = None,
) -> Result:
    """Return outputs and the gradients of Σ seeds·outputs."""
    tensors = {name: t.detach().clone() for name, t in tensors.items()}
    needed = leaves_of(case, module, tensors)
    x, state, resets = arguments(case, tensors, draw)
    with backends.use(kernel):
        found = flat(module(x, state, resets=resets))
    if seeds is None:
        return Result([t.detach() for t in found], {})
    grads = torch.autograd.grad(
        found, list(needed.values()), [s.to(found[0].dtype) for s in seeds], materialize_grads=True
    )
    for (name, leaf), grad in zip(needed.items(), grads, strict=True):
        check(
            leaf.shape == grad.shape and leaf.dtype == grad.dtype,
            f"gradient of {name}: {grad.dtype} {grad.shape}",
        )
    return Result([t.detach() for t in found], dict(zip(needed, grads, strict=True)))


def scaled(case: Case, name: str) -> int:
    """Return the binary orders of a parameter in the products of which the case's scale is."""
    inside = name.startswith(("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    return case.scale if inside else 0


def enlarged(case: Case, module: nn.Module) -> nn.Module:
    """Return the module with its products larger by the case's scale."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.ldexp(parameter, torch.tensor(scaled(case, name))))
    return module


# ---- judged ----


def named(outcome: Result) -> dict[str, Tensor]:
    """Return all tensors of a result by name."""
    outputs = {("output", "output h", "output c")[i]: t for i, t in enumerate(outcome.outputs)}
    return {name: t.double() for name, t in (outputs | outcome.grads).items()}


def run(seed: int) -> float:
    """Draw a case, run it and judge it; return the largest share of what is allowed."""
    return run_case(case_of(seed), judged)


def judged(draw: Draw, case: Case) -> float:
    module = enlarged(case, case.module).to(case.dtype)
    first = result(case, module, case.tensors, None, "native")
    seeds = [draw.normal(*t.shape).to(case.dtype).double() for t in first.outputs]
    found = named(result(case, module, case.tensors, seeds, "native", draw))
    for name, before in named(first).items():
        check(
            torch.equal(before.nan_to_num(), found[name].nan_to_num()),
            f"{name}: other bits in another layout",
        )
    for name in found:
        if name in case.module.state_dict():
            found[name] = torch.ldexp(found[name], torch.tensor(scaled(case, name)))
    expected, allowed = judgement(draw, case, seeds)
    names = list(found)
    if case.relu and not torch.equal(found["output"] == 0, expected["output"] == 0):
        names = ["output"]  # a rounding turned a unit on or off
    return largest_share(names, found, expected, allowed, case.dtype)


def judgement(draw: Draw, case: Case, seeds: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the right results, and the allowed differences from them."""

    def by_seeds(seeds: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = {name: t.to(dtype) for name, t in case.tensors.items()}
        return named(result(case, copy.deepcopy(case.module).to(dtype), tensors, seeds, "reference"))

    with by_reference():
        expected = by_seeds(seeds, torch.float64)
        squashed = not case.relu
        return expected, moved_by_roundings(draw, case.dtype, expected, seeds, by_seeds, squashed)
