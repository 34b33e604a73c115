"""Networks drawn with options of every kind, by a kernel and by the reference in float64."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from layernorm import Variant, backends
from tests.recurrent.cases import GATES_FUNCTIONS, HALVES, as_hx, flat, largest, made, module_state

CHOICES = {
    "hidden": (1, 3, 7, 31, 33, 130),
    "features": (1, 5, 33, 70),
    "layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, True, False),
    "proj": (False, True),
    "relu": (False, True),
    "resets": (False, True),
    "state": ("none", "given", "expanded"),
    "recompute": (False, True),
    "packed": (False, False, True),
    "layout": ("plain", "batch first", "strided", "expanded", "within a wider one"),
    "needs": ("all", "all", "input", "parameters", "state", "some parameters"),
    "steps": (1, 2, 5, 9),
    "rows": (1, 2, 5, 13),
}


@dataclass(frozen=True)
class Case:
    cell: str
    variant: Variant
    seed: int
    hidden: int = 9
    features: int = 6
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj: bool = False
    relu: bool = False
    resets: bool = True
    state: str = "given"
    recompute: bool = False
    packed: bool = False
    layout: str = "plain"
    needs: str = "all"
    steps: int = 4
    rows: int = 3


def drawn_cases(times: int, seed: int, choices=CHOICES, functions=GATES_FUNCTIONS) -> list[Case]:
    """Return every function several times, with options of which each value is as frequent as any."""
    generator = random.Random(seed)
    functions = functions * times
    columns = {}
    for name, values in choices.items():
        column = (values * len(functions))[: len(functions)]
        columns[name] = generator.sample(column, len(column))
    return [
        Case(*function, seed + i, **{name: column[i] for name, column in columns.items()})
        for i, function in enumerate(functions)
    ]


# Sums longer than a block of a product's terms, sequences longer than a chunk of steps, batches of more
# than one block of rows, and a packed one of all three.
LARGE = [
    Case(cell, variant, 1 + i, recompute=i % 2 == 1, **sizes)
    for i, ((cell, variant), sizes) in enumerate(
        itertools.product(
            (
                ("lstm", Variant()),
                ("lstm", Variant(inputs="summed", scope="gate", cell="carried")),
                ("gru", Variant()),
                ("gru", Variant(inputs="summed", scope="gate")),
                ("rnn", Variant(kind="none")),
            ),
            (
                {"hidden": 300, "features": 1030, "steps": 2, "rows": 7},
                {"hidden": 5, "features": 3, "steps": 130, "rows": 9},
                {"hidden": 5, "features": 3, "steps": 31, "rows": 70, "packed": True},
            ),
        )
    )
]


def of_cases(cases):
    """Parametrize a test by cases."""
    return pytest.mark.parametrize("case", [pytest.param(c, id=f"{c.cell}-{c.seed}") for c in cases])


# ---- one case, by either kernel ----


def network(case: Case, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a case's module, and the tensors of which its input and state are made."""
    torch.manual_seed(case.seed)
    options = {"nonlinearity": "relu" if case.relu else "tanh"}
    if case.cell == "lstm" and case.proj and case.hidden > 1:
        options["proj_size"] = case.hidden // 2
    module = made(
        case.cell,
        (case.features, case.hidden),
        num_layers=case.layers,
        bias=case.bias,
        batch_first=case.layout == "batch first",
        bidirectional=case.bidirectional,
        variant=case.variant,
        recompute=case.recompute,
        **options,
    ).to(dtype)
    leaves = {"x": torch.randn(case.steps, 1 if case.layout == "expanded" else case.rows, case.features)}
    if case.state != "none":
        state = module_state(module, 1 if case.state == "expanded" else case.rows)
        leaves |= dict(zip(("h", "c"), state, strict=False))
    return module, {name: tensor.detach().to(dtype) for name, tensor in leaves.items()}


def laid_out(x: Tensor, case: Case) -> Tensor:
    """Return the same values in the case's layout."""
    if case.layout == "batch first":
        return x.transpose(0, 1).contiguous()
    if case.layout == "strided":
        return torch.stack([x, x.flip(-1)], -1)[..., 0]
    if case.layout == "expanded":
        return x.expand(-1, case.rows, -1)
    if case.layout == "within a wider one":
        return nn.functional.pad(x, (1, 2, 0, 1))[:, :-1, 1:-2]
    return x


def module_arguments(case: Case, leaves: dict[str, Tensor]):
    """Return the module's input, state and resets."""
    generator = random.Random(case.seed)
    x = laid_out(leaves["x"], case)
    resets = torch.tensor([[generator.random() < 0.3 for _ in range(case.rows)] for _ in range(case.steps)])
    if case.layout == "batch first":
        resets = resets.T
    if case.packed:
        lengths = [case.steps, *(generator.randint(1, case.steps) for _ in range(case.rows - 1))]
        generator.shuffle(lengths)
        x, resets = (
            pack_padded_sequence(t, torch.tensor(lengths), case.layout == "batch first", enforce_sorted=False)
            for t in (x, resets)
        )
    states = [leaves[name].expand(-1, case.rows, -1) for name in ("h", "c") if name in leaves]
    return x, as_hx(states), resets if case.resets else None


def require_gradients(case: Case, module: nn.Module, leaves: dict[str, Tensor]) -> list[Tensor]:
    """Let the tensors that the case names need a gradient, and return them."""
    parameters, needs = list(module.parameters()), case.needs
    state = [leaves[name] for name in ("h", "c") if name in leaves]
    chosen = {
        "all": [*leaves.values(), *parameters],
        "input": [leaves["x"]],
        "parameters": parameters,
        "state": state or [leaves["x"]],
        "some parameters": [p for i, p in enumerate(parameters) if i % 3 == case.seed % 3],
    }[needs]
    for tensor in (*leaves.values(), *parameters):
        tensor.requires_grad_(any(tensor is c for c in chosen))
    return chosen


def results(case: Case, module: nn.Module, leaves: dict[str, Tensor], kernel: str):
    """Return outputs, final states and the gradients of a random sum of them."""
    device = "cuda" if kernel == "triton" else "cpu"
    module = copy.deepcopy(module).to(device)
    leaves = {name: leaf.detach().to(device, copy=True) for name, leaf in leaves.items()}
    needed = require_gradients(case, module, leaves)
    x, state, resets = module_arguments(case, leaves)
    with backends.use(kernel):
        found = flat(module(x, state, resets=None if resets is None else resets.to(device)))
    generator = torch.Generator().manual_seed(case.seed)
    seeds = [torch.randn(t.shape, generator=generator, device="cpu").to(device, t.dtype) for t in found]
    pairs = [(t, s) for t, s in zip(found, seeds, strict=True) if t.requires_grad]
    outputs, seeds = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, needed, seeds, materialize_grads=True)
    for tensor, grad in zip(needed, grads, strict=True):
        assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape)
    return [t.detach().cpu() for t in found], [grad.cpu() for grad in grads]


# ---- against the reference ----


def alike_in_float64(case: Case):
    """Check the compiled kernel against the reference in float64."""
    module, leaves = network(case, torch.float64)
    found, expected = (results(case, module, leaves, kernel) for kernel in ("native", "reference"))
    # Two ways to add up the same numbers: sums of at most 203 products round to √203 = 14 units of
    # 1.1e-16 where the roundings are random; 9 steps of 2 layers pass that on, and the norm of a row whose
    # deviation is small, at worst √eps = 1/316, amplifies it by 1/0.003 at once and by a few on average:
    # 14·18·316·1.1e-16 = 9e-12 of the largest, which is of the order of 1. A gradient goes that way once
    # more, and is large where the norm amplifies.
    for a, e in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert largest(a - e) <= 1e-11 * (1 + largest(e))


def alike(case: Case, dtype: torch.dtype, draws: int = 2, kernel: str = "native"):
    """Check a kernel in a precision below float64 against the reference in float64 on the same numbers.

    How far a result may be off follows from how far it moves when every number that goes in does by a
    random unit of roundoff: a product's sum of K terms moves by √K units of a term then, as its K roundings
    move it, and whatever the norms amplify, they amplify both. What is not seen that way, as it
    cancels whatever goes in, is measured: float32 rounding in the reference, bfloat16 rounding in its
    derivative (an instruction that multiplies pairs of bfloat16 wants the gradients of products rounded,
    and a norm's gradient cancels against its weights), and a unit of what is largest.
    Eight times the sum of these; the typical ratio is 0.4 in float32 and, as a half precision rounds states
    and what is kept but not sums, 0.2 there.
    """
    module, leaves = network(case, dtype)
    exact = copy.deepcopy(module).double()
    wide = {name: leaf.double() for name, leaf in leaves.items()}
    expected = list(itertools.chain(*results(case, exact, wide, "reference")))
    found = list(itertools.chain(*results(case, module, leaves, kernel)))
    unit = torch.finfo(dtype).eps / 2
    allowed = [unit * (1 + largest(e)) for e in expected]
    others = []
    if dtype in (torch.float32, torch.bfloat16):
        outputs, grads = results(case, module, leaves, "reference")
        others.append((outputs if dtype == torch.float32 else expected[: len(outputs)], grads))
    generator = torch.Generator().manual_seed(case.seed)
    for _ in range(draws):
        moved = copy.deepcopy(exact), {name: leaf.clone() for name, leaf in wide.items()}
        with torch.no_grad():
            for t in (*moved[0].parameters(), *moved[1].values()):
                t.mul_(1 + unit * torch.randn(t.shape, generator=generator, dtype=t.dtype))
        others.append(results(case, *moved, "reference"))
    for other in others:
        for i, (a, e) in enumerate(zip(itertools.chain(*other), expected, strict=True)):
            allowed[i] += largest(a.double() - e) / (1 if a.dtype == dtype else draws)
    # A half precision turns single units of a relu on or off: gradients differ.
    count = 2 if case.relu and dtype in HALVES else len(expected)
    for i, (a, e) in enumerate(zip(found[:count], expected[:count], strict=True)):
        assert largest(a.double() - e) <= 8 * allowed[i], i
