"""The compiled recurrent kernels against the reference in float64: values, states and every gradient."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import dataclass, fields

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import layernorm
from layernorm import Variant, backends, ops
from layernorm.variants import GATES, PRESETS

pytestmark = pytest.mark.usefixtures("native", "one_thread")

MODULES = {"lstm": layernorm.LayerNormLSTM, "gru": layernorm.LayerNormGRU, "rnn": layernorm.LayerNormRNN}
TWINS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
HALVES = (torch.bfloat16, torch.float16)
CAPABILITIES = ops.native.capabilities() if ops.native is not None else ("none",)
SPECS = [
    *(
        (cell, Variant(kind=kind, inputs=inputs, scope=scope, cell=cell_norm, projection_bias=bias))
        for cell in GATES
        for kind in ("layer", "rms")
        for inputs in ("separate", "summed")
        for scope in ("matrix", "all", "gate")
        for cell_norm in ("output", "carried", "none")
        for bias in (False, True)
        # Fields without a meaning for a cell take their first value only.
        if {
            "lstm": scope != "all",
            "gru": cell_norm == "output",
            "rnn": (scope, cell_norm) == ("all", "output"),
        }[cell]
    ),
    *((cell, Variant(kind="none")) for cell in GATES),
]
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
    hidden: int
    features: int
    layers: int
    bidirectional: bool
    bias: bool
    proj: bool
    relu: bool
    resets: bool
    state: str
    recompute: bool
    packed: bool
    layout: str
    needs: str
    steps: int
    rows: int


def drawn_cases(times: int, seed: int, choices=CHOICES) -> list[Case]:
    """Every function of the spec so many times, with options of which each value is as frequent as any."""
    generator = random.Random(seed)
    functions = SPECS * times
    columns = {}
    for name, values in choices.items():
        column = (values * len(functions))[: len(functions)]
        columns[name] = generator.sample(column, len(column))
    return [
        Case(*function, seed + i, *(column[i] for column in columns.values()))
        for i, function in enumerate(functions)
    ]


CASES = drawn_cases(3, 1000)


def of_cases(cases):
    return pytest.mark.parametrize("case", [pytest.param(c, id=f"{c.cell}-{c.seed}") for c in cases])


def test_every_pair_of_options_occurs():
    names = [field.name for field in fields(Case)][3:]
    for a, b in itertools.combinations(names, 2):
        # An RNN only has a relu, an LSTM only a projection; those two never meet.
        cases = [c for c in CASES if ("relu" not in (a, b) or c.cell == "rnn")]
        cases = [c for c in cases if ("proj" not in (a, b) or c.cell == "lstm")]
        if "relu" in (a, b):
            continue  # 27 cases do not hold all pairs
        missing = set(itertools.product(CHOICES[a], CHOICES[b])) - {
            (getattr(c, a), getattr(c, b)) for c in cases
        }
        assert not missing, (a, b)


# ---- one case, by either kernel ----


def module_of(case: Case, dtype: torch.dtype) -> nn.Module:
    """The network with gains and biases away from their initial 1 and 0."""
    options = {"nonlinearity": "relu" if case.relu else "tanh"} if case.cell == "rnn" else {}
    if case.cell == "lstm" and case.proj and case.hidden > 1:
        options["proj_size"] = case.hidden // 2
    module = MODULES[case.cell](
        case.features,
        case.hidden,
        case.layers,
        bias=case.bias,
        batch_first=case.layout == "batch first",
        bidirectional=case.bidirectional,
        variant=case.variant,
        recompute=case.recompute,
        **options,
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.to(dtype)


def leaves_of(case: Case, module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors from which input and state are made."""
    shape = (case.steps, 1 if case.layout == "expanded" else case.rows, case.features)
    leaves = {"x": torch.randn(shape)}
    if case.state != "none":
        sizes = {"h": getattr(module, "proj_size", 0) or case.hidden}
        sizes |= {"c": case.hidden} if case.cell == "lstm" else {}
        count = case.layers * (1 + case.bidirectional)
        rows = 1 if case.state == "expanded" else case.rows
        leaves |= {name: torch.randn(count, rows, size) for name, size in sizes.items()}
    return {name: tensor.to(dtype) for name, tensor in leaves.items()}


def laid(x: torch.Tensor, case: Case) -> torch.Tensor:
    """The same values in the case's layout."""
    if case.layout == "batch first":
        return x.transpose(0, 1).contiguous()
    if case.layout == "strided":
        return torch.stack([x, x.flip(-1)], -1)[..., 0]
    if case.layout == "expanded":
        return x.expand(-1, case.rows, -1)
    if case.layout == "within a wider one":
        return nn.functional.pad(x, (1, 2, 0, 1))[:, :-1, 1:-2]
    return x


def arguments_of(case: Case, leaves: dict[str, torch.Tensor]):
    """The module's input, state and resets."""
    generator = random.Random(case.seed)
    x = laid(leaves["x"], case)
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
    state = None if not states else tuple(states) if case.cell == "lstm" else states[0]
    return x, state, resets if case.resets else None


def required(case: Case, module: nn.Module, leaves: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Those that need a gradient; says so to autograd."""
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


def flat(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def results(case: Case, module: nn.Module, leaves: dict[str, torch.Tensor], kernel: str):
    """Outputs, final states and the gradients of a random sum of them."""
    device = "cuda" if kernel == "triton" else "cpu"
    module = copy.deepcopy(module).to(device)
    leaves = {name: leaf.detach().to(device, copy=True) for name, leaf in leaves.items()}
    needed = required(case, module, leaves)
    x, state, resets = arguments_of(case, leaves)
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


def drawn(case: Case, dtype: torch.dtype):
    torch.manual_seed(case.seed)
    module = module_of(case, dtype)
    return module, leaves_of(case, module, dtype)


# ---- float64 ----


def alike_in_float64(case: Case):
    module, leaves = drawn(case, torch.float64)
    found, expected = (results(case, module, leaves, kernel) for kernel in ("native", "reference"))
    # Two ways to add up the same numbers: sums of at most 203 products round to √203 = 14 units of
    # 1.1e-16 where the roundings are random; 9 steps of 2 layers pass that on, and the norm of a row whose
    # deviation is small, at worst √eps = 1/316, amplifies it by 1/0.003 at once and by a few on average:
    # 14·18·316·1.1e-16 = 9e-12 of the largest, which is of the order of 1. A gradient goes that way once
    # more, and is large where the norm amplifies.
    for a, e in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert largest(a - e) <= 1e-11 * (1 + largest(e))


def largest(t: torch.Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0


@of_cases(CASES[: 2 * len(SPECS)])
@pytest.mark.usefixtures("poisoned")
def test_float64(case):
    alike_in_float64(case)


# ---- float32, bfloat16, float16 ----


def perturbed(tensors, unit: float, generator: torch.Generator):
    """Each number times 1 + unit·(standard normal)."""
    with torch.no_grad():
        for t in tensors:
            t.mul_(1 + unit * torch.randn(t.shape, generator=generator, dtype=t.dtype))


def alike(case: Case, dtype: torch.dtype, draws: int = 2, kernel: str = "native"):
    """Native results in a precision below float64 against the reference in float64 on the same numbers.

    How far a result may be off follows from how far it moves when every number that goes in does by a
    random unit of roundoff: a product's sum of K terms moves by √K units of a term then, as its K roundings
    move it, and whatever the norms amplify, they amplify both. What is not seen that way, as it
    cancels whatever goes in, is measured: float32 rounding in the reference, bfloat16 rounding in its
    derivative (an instruction that multiplies pairs of bfloat16 wants the gradients of products rounded,
    and a norm's gradient cancels against its weights), and a unit of what is largest.
    Eight times the sum of these; the typical ratio is 0.4 in float32 and, as a half precision rounds states
    and what is kept but not sums, 0.2 there.
    """
    module, leaves = drawn(case, dtype)
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
    count = 2 if case.relu and case.cell == "rnn" and dtype in HALVES else len(expected)
    for i, (a, e) in enumerate(zip(found[:count], expected[:count], strict=True)):
        assert largest(a.double() - e) <= 8 * allowed[i], i


def preset_cases() -> list[Case]:
    """Every public variant with its own eps."""
    shape = (9, 6, 1, False, True, False, False, True, "given", False, False, "plain", "all", 4, 3)
    cells = [(cell, variant) for preset in PRESETS.values() for cell, variant in preset.items()]
    return [Case(*function, 2000 + i, *shape) for i, function in enumerate(dict.fromkeys(cells))]


@of_cases(preset_cases())
def test_presets(case):
    alike_in_float64(case)
    alike(case, torch.float32)


@of_cases(CASES[len(SPECS) :])
@pytest.mark.usefixtures("poisoned")
def test_float32(case):
    alike(case, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@of_cases(CASES[2 * len(SPECS) :])
@pytest.mark.usefixtures("poisoned")
def test_half_precisions(case, dtype):
    alike(case, dtype)


# Sums longer than a block of a product's terms, sequences longer than a chunk of steps, batches of more
# than one block of rows, and a packed one of all three.
LARGE = [
    Case(
        cell,
        variant,
        1 + i,
        *sizes,
        1,
        False,
        True,
        False,
        False,
        True,
        "given",
        i % 2 == 1,
        packed,
        "plain",
        "all",
        *counts,
    )
    for i, ((cell, variant), (sizes, packed, counts)) in enumerate(
        itertools.product(
            (
                ("lstm", Variant()),
                ("lstm", Variant(inputs="summed", scope="gate", cell="carried")),
                ("gru", Variant()),
                ("gru", Variant(inputs="summed", scope="gate")),
                ("rnn", Variant(kind="none")),
            ),
            (
                ((300, 1030), False, (2, 7)),
                ((5, 3), False, (130, 9)),
                ((5, 3), True, (31, 70)),
            ),
        )
    )
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@of_cases(LARGE)
@pytest.mark.usefixtures("poisoned")
def test_long_sums_and_sequences(case, dtype):
    if dtype == torch.float64:
        alike_in_float64(case)
    else:
        alike(case, dtype, draws=1)


@pytest.mark.skipif(len(CAPABILITIES) < 2, reason="one instruction set only")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_other_instruction_sets(dtype):
    before = ops.native.capability()
    try:
        for capability, case in itertools.product(CAPABILITIES[:-1], [*LARGE[::6], *CASES[::24]]):
            assert ops.native.use_capability(capability)
            if dtype == torch.float64:
                alike_in_float64(case)
            else:
                alike(case, dtype, draws=1)
    finally:
        ops.native.use_capability(before)


# ---- torch.nn's own ----


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "deep"])
@pytest.mark.parametrize("hidden", [1, 7, 33, 130])
@pytest.mark.parametrize("cell", ["lstm", "lstm projected", "gru", "rnn", "rnn relu"])
def test_without_norm_it_is_torchs(cell, hidden, options):
    cell, _, kind = cell.partition(" ")
    if kind == "projected" and hidden > 1:
        options = options | {"proj_size": (hidden + 1) // 2}
    elif kind == "relu":
        options = options | {"nonlinearity": "relu"}
    theirs = TWINS[cell](5, hidden, dtype=torch.float64, **options)
    ours = MODULES[cell](5, hidden, dtype=torch.float64, variant="none", **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(9, 4, 5, dtype=torch.float64, requires_grad=True)
    expected, actual = flat(theirs(x)), flat(ours(x))
    seeds = [torch.randn_like(e) for e in expected]
    wanted = torch.autograd.grad(expected, [x, *theirs.parameters()], seeds)
    found = torch.autograd.grad(actual, [x, *ours.parameters()], seeds)
    for a, e in zip((*actual, *found), (*expected, *wanted), strict=True):
        # 9 steps of 2 layers, sums of √200 units in each: 14·18·1.1e-16 = 3e-14 of what is summed, backward
        # over 36 rows too.
        assert largest(a - e) <= 1e-12 * (1 + largest(e))
