"""The persistent recurrent kernel without a GPU: its very source compiled for a CPU, where ``tests/emulator``
runs a cluster's threads in a random order; and compiled by NVRTC.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from layernorm.gpu.persistent import compiling as persistent_compile
from layernorm.gpu.persistent import launches as persistent
from layernorm.gpu.persistent import plan as persistent_plan
from layernorm.gpu.persistent.plan import Layout, Plan
from layernorm.reference import recurrent as reference
from layernorm.variants import Variant, parameter_shapes

EMULATOR = Path(__file__).parent / "emulator"
KERNELS = Path(persistent.__file__).parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# Each of the ways in which a plan can differ: blocks, the last one with fewer units or not, warps that share
# the sums, weights in shared memory, in registers or in both, eights of rows.
PLANS = {
    "lstm": (
        Plan("lstm", 32, "bfloat16", 2, 16, 2, 0, 8),
        Plan("lstm", 48, "float16", 2, 32, 1, 1, 16),
    ),
    "gru": (
        Plan("gru", 64, "bfloat16", 4, 16, 2, 1, 8),
        Plan("gru", 16, "float16", 1, 16, 1, 0, 8),
    ),
    "rnn": (
        Plan("rnn", 48, "bfloat16", 2, 32, 2, 0, 16),
        Plan("rnn", 64, "float16", 4, 16, 1, 1, 8),
    ),
}
ALL = [plan for plans in PLANS.values() for plan in plans]


def name_of(plan: Layout) -> str:
    return "-".join(str(value) for value in dataclasses.astuple(plan))


class Emulator:
    """The kernel of a plan on the CPU."""

    def __init__(self, plan: Layout, library: Path) -> None:
        self.plan = plan
        self.library = ctypes.CDLL(str(library))
        self.library.emulate.restype = ctypes.c_char_p
        self.library.emulate.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int),
        )
        arguments = persistent.Arguments if isinstance(plan, Plan) else persistent.BackwardArguments
        assert self.library.argument_bytes() == ctypes.sizeof(arguments)

    def run(self, arguments: ctypes.Structure, seed: int = 0, races: bool = False, dropped: int = -1):
        clusters = -(-arguments.batch // self.plan.rows)
        error = self.library.emulate(ctypes.addressof(arguments), clusters, seed, races, dropped)
        if error is not None:
            raise RuntimeError(error.decode())


@pytest.fixture(scope="session")
def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


@pytest.fixture(scope="session")
def emulator(compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-w"]

    @functools.cache
    def build(plan: Layout) -> Emulator:
        library = folder / f"{type(plan).__name__}-{name_of(plan)}.so"
        macros = [f"-D{name}={value}" for name, value in plan.macros().items()]
        done = subprocess.run(
            [*command, f"-I{KERNELS}", *macros, str(EMULATOR / "emulator.cpp"), "-o", str(library)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Emulator(plan, library)

    return build


@dataclasses.dataclass
class Case:
    """Inputs of one layer, in the plan's dtype."""

    plan: Plan
    cell: str  # of the operator
    variant: Variant
    lengths: list[int]  # of the rows, not increasing
    packed: bool
    reverse: bool
    tensors: dict[str, torch.Tensor | None]
    vectors: dict[str, torch.Tensor | None]

    @property
    def batch_sizes(self) -> list[int]:
        return [sum(length > t for length in self.lengths) for t in range(max(self.lengths, default=0))]


def make(plan, cell, variant, batch, steps, *, packed=False, reverse=False, resets=False, affine=True):
    dtype = DTYPES[plan.dtype]
    generator = torch.Generator().manual_seed(batch * 100 + steps)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    lengths = [max(1, steps - n // 2) if packed else steps for n in range(batch)]
    rows, width, hidden = sum(lengths), plan.gates * plan.hidden, plan.hidden
    tensors = {
        "x": random(rows, width),
        "h0": random(batch, hidden),
        "c0": random(batch, hidden) if plan.cell == "lstm" else None,
        "weight_hh": random(width, hidden) * hidden**-0.5,
    }
    names = parameter_shapes(plan.cell, variant, 1, hidden)
    vectors = {}
    for name, shape in names.items():
        if not name.startswith("weight") and name != "bias_ih" and affine:
            vector = random(*shape) * 0.2 + (1 if name.startswith("gain") else 0)
            vectors["gain_ih" if name == "gain" else name] = vector.to(dtype)
    tensors = {name: t if t is None else t.to(dtype) for name, t in tensors.items()}
    tensors["resets"] = torch.rand(rows, generator=generator) < 0.3 if resets else None
    return Case(plan, cell, variant, lengths, packed, reverse, tensors, vectors)


def called(case, *, keep=True):
    """The arguments of ``persistent.forward``, with NaN in what it writes."""
    plan, variant = case.plan, case.variant
    rows, batch, groups = sum(case.lengths), len(case.lengths), persistent.groups_of(case.cell, variant.scope)
    summed, lstm = variant.inputs == "summed", plan.cell == "lstm"

    def empty(*shape, dtype=DTYPES[plan.dtype]):
        return torch.full(shape, float("nan"), dtype=dtype)

    given = dict(case.tensors) | {
        "x": case.tensors["x"].clone(),
        "batch_sizes": None,
        "step_offsets": None,
        "output": empty(rows, plan.hidden),
        "hn": empty(batch, plan.hidden),
        "cn": empty(batch, plan.hidden) if lstm else None,
        "saved_c": empty(rows, plan.hidden) if lstm and keep else None,
        "stats": empty(rows, groups * (1 if summed else 2), dtype=torch.float32) if keep else None,
    }
    if case.packed:
        sizes = torch.tensor(case.batch_sizes)
        given |= {"batch_sizes": sizes, "step_offsets": sizes.cumsum(0) - sizes}
    fields = (case.cell, variant.kind, variant.inputs, variant.scope, variant.cell, variant.eps, case.reverse)
    saved_h = empty(rows, plan.gates * plan.hidden) if keep and not summed else None
    return fields, len(case.batch_sizes), saved_h, given


def written(case, saved_h, given):
    """What the kernel has written, by name."""
    found = {name: given[name] for name in ("output", "hn", "cn", "saved_c")}
    if given["stats"] is not None:
        summed, groups = case.variant.inputs == "summed", persistent.groups_of(case.cell, case.variant.scope)
        found["normalized"] = given["x"] if summed else saved_h
        found["stats"] = given["stats"][:, 0 if summed else groups :]
    return {name: t for name, t in found.items() if t is not None}


def emulate(emulator, case, *, keep=True, plan=None, **options):
    fields, steps, saved_h, given = called(case, keep=keep)
    tensors = given | {name: case.vectors.get(name) for name in persistent.VECTORS}
    arguments = persistent.make_arguments(*fields, steps, saved_h=saved_h, tensors=tensors)
    emulator(plan or case.plan).run(arguments, **options)
    return written(case, saved_h, given)


def scan(case, cell, *, grad=False):
    """The reference's loop over a case in float64: the initial state, output and final state.

    ``cell(step, x, state, weights)`` has the reference's step.
    """
    plan, variant = case.plan, case.variant
    weights = {name: t.double() for name, t in case.vectors.items()}
    weights |= {"weight_hh": case.tensors["weight_hh"].double()}
    if variant.inputs == "summed":
        weights["gain"] = weights.pop("gain_ih", torch.ones(()).double())
    weights.setdefault("gain_cell", torch.ones(()).double())
    step = getattr(reference, f"_{plan.cell}_step")
    if plan.cell == "rnn":
        step = partial(step, nonlinearity=case.cell.removeprefix("rnn_"))
    step = partial(step, weights=weights, variant=variant)
    state = [case.tensors[name] for name in ("h0", "c0") if case.tensors[name] is not None]
    state = tuple(s.double().requires_grad_(grad) for s in state)
    x, resets, sizes = case.tensors["x"].double(), case.tensors["resets"], None
    if variant.inputs == "separate":  # the reference has this gain in its projection
        x = x * weights.get("gain_ih", 1)
    if case.packed:
        sizes = case.batch_sizes
    else:
        x = x.unflatten(0, (-1, len(case.lengths)))
        resets = resets if resets is None else resets.unflatten(0, (-1, len(case.lengths)))

    def of_weights(x, state):
        return cell(step, x, state, weights)

    output, final = reference._scan(of_weights, x, state, case.reverse, sizes, resets)
    return state, output.reshape(-1, plan.hidden), final


def expected(case):
    """The same by the reference in float64, with states rounded where the kernel rounds them."""
    variant, dtype = case.variant, DTYPES[case.plan.dtype]
    kept = {name: [] for name in ("saved_c", "normalized", "stats")}
    groups = reference._groups(case.plan.cell, variant, case.plan.hidden)

    def cell(step, x, state, weights):
        product = torch.nn.functional.linear(state[0], weights["weight_hh"], weights.get("bias_hh"))
        parts = (product + x if variant.inputs == "summed" else product).split(groups, -1)
        kept["normalized"].append(
            torch.cat([reference._normalized(p, [p.size(-1)], None, None, variant) for p in parts], -1)
        )
        moments = [p.var(-1, correction=0) if variant.kind == "layer" else p.square().mean(-1) for p in parts]
        kept["stats"].append(torch.stack([(m + variant.eps).rsqrt() for m in moments], -1))
        new = tuple(s.to(dtype).double() for s in step(x, state))
        kept["saved_c"].append(new[-1])
        return new

    _, output, final = scan(case, cell)
    order = reversed if case.reverse else list
    found = {name: torch.cat(list(order(steps))) for name, steps in kept.items()}
    return found | {"output": output, "hn": final[0], "cn": final[-1]}


def check(found, case):
    exact = expected(case)
    # A step rounds h and c to the dtype, in whose last bit the kernel's float32 and float64 may differ where
    # a value lies between two; the norms pass such a difference on about as it is, for rstd is of order 1 but
    # for the cell's, with at most 2 here. What is kept has one rounding more.
    unit = torch.finfo(DTYPES[case.plan.dtype]).eps
    tolerance = (2 + 2 * len(case.batch_sizes)) * unit
    for name, actual in found.items():
        torch.testing.assert_close(
            actual.double(), exact[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def served(cell):
    """The variants that the kernel has for a cell of a plan, with the operator's name of the cell."""
    for kind, inputs, scope in itertools.product(
        ("layer", "rms"), ("separate", "summed"), ("matrix", "all", "gate")
    ):
        for norm in ("output", "carried", "none") if cell == "lstm" else ("output",):
            if cell == "gru" and inputs == "summed" and scope != "all":
                continue
            bias = scope == "all" or norm == "carried"
            yield Variant(kind=kind, inputs=inputs, scope=scope, cell=norm, projection_bias=bias, eps=0.01)


@pytest.mark.parametrize("plan", ALL, ids=name_of)
def test_every_variant_agrees_with_the_reference(emulator, plan):
    # Shapes and options come round in fives and sevens, so that the variants meet them all.
    shapes = itertools.cycle([(5, 2), (1, 7), (19, 2), (5, 1), (19, 7)])
    options = itertools.cycle(
        {"packed": packed, "reverse": reverse, "resets": resets}
        for packed, reverse, resets in itertools.product((False, True), repeat=3)
        if not (packed and reverse and not resets)
    )
    for seed, variant in enumerate(served(plan.cell)):
        for cell in ("rnn_tanh", "rnn_relu") if plan.cell == "rnn" else (plan.cell,):
            batch, steps = next(shapes)
            case = make(plan, cell, variant, batch, steps, **next(options))
            check(emulate(emulator, case, seed=seed), case)


@pytest.mark.parametrize("plan", ALL, ids=name_of)
def test_no_accesses_to_shared_memory_race(emulator, plan):
    # What orders them: the barriers of warp, block and cluster, not that threads happen to run so.
    summed = Variant(inputs="summed", scope="all", cell="none")
    for seed, variant in enumerate((Variant(), Variant(cell="carried", scope="gate"), summed)):
        cell = "rnn_tanh" if plan.cell == "rnn" else plan.cell
        case = make(plan, cell, variant, plan.rows + 1, 3, packed=seed == 1, resets=True)
        check(emulate(emulator, case, seed=seed, races=True), case)


@pytest.mark.parametrize("plan", ALL[::2], ids=name_of)
def test_what_is_not_kept_and_vectors_that_are_not_there(emulator, plan):
    cell = "rnn_relu" if plan.cell == "rnn" else plan.cell
    for inputs in ("separate", "summed"):
        variant = Variant(inputs=inputs, scope="all")
        case = make(plan, cell, variant, 3, 2, affine=False)
        whole = emulate(emulator, case)
        check(whole, case)
        for name, tensor in emulate(emulator, case, keep=False).items():
            assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("cell", PLANS)
def test_a_row_has_the_same_bits_in_any_batch_plan_and_cut(emulator, cell):
    plan = PLANS[cell][0]
    name = "rnn_tanh" if cell == "rnn" else cell
    case = make(plan, name, Variant(), 19, 4)
    whole = emulate(emulator, case)
    # One block where there were more, more rows, weights elsewhere; only k_split is as it was.
    blocks, rows = 1, 24 - plan.rows
    other = dataclasses.replace(plan, blocks=blocks, units=plan.hidden, rows=rows, register_pairs=1)
    for key, tensor in emulate(emulator, case, plan=other).items():
        assert torch.equal(tensor, whole[key]), key
    x, output = (t.unflatten(0, (4, 19)) for t in (case.tensors["x"], whole["output"]))
    for begin, end in ((0, 1), (11, 19)):  # some rows
        part = dict(case.tensors) | {"x": x[:, begin:end].reshape(-1, x.size(-1))}
        part |= {k: t[begin:end] for k, t in part.items() if k in ("h0", "c0") and t is not None}
        some = dataclasses.replace(case, tensors=part, lengths=[4] * (end - begin))
        found = emulate(emulator, some)
        assert torch.equal(found["output"].unflatten(0, (4, -1)), output[:, begin:end])
        assert torch.equal(found["hn"], whole["hn"][begin:end])
    state = {key: case.tensors[key] for key in ("h0", "c0")}
    for t in range(4):  # step by step
        tensors = case.tensors | {"x": x[t].contiguous()} | state
        found = emulate(emulator, dataclasses.replace(case, tensors=tensors, lengths=[1] * 19))
        assert torch.equal(found["output"], output[t])
        state = {"h0": found["hn"], "c0": found.get("cn")}


@pytest.mark.parametrize("cell_norm", ["none", "output", "carried"])
def test_a_step_rounds_c_before_anything_is_made_of_it(emulator, cell_norm):
    # As csrc/recurrent/cells.hpp does: then what is kept for backward is what h was made of.
    plan, variant = PLANS["lstm"][0], Variant(cell=cell_norm)
    case = make(plan, "lstm", variant, 19, 1)
    found = emulate(emulator, case)
    weights = {name: t.double() for name, t in (case.vectors | case.tensors).items() if t is not None}
    x = weights["x"] * weights["gain_ih"]
    hidden = weights["h0"] @ weights["weight_hh"].T
    gates = reference._gates(x, hidden, weights, variant, [4 * plan.hidden])
    seen = found["saved_c"].double()
    if cell_norm == "output":
        seen = reference._normalized_cell(seen, weights, variant)
    exact = gates.chunk(4, -1)[3].sigmoid() * seen.tanh()
    # One rounding, and float32's: from a c that is not rounded it would be two.
    unit = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found["output"].double(), exact, rtol=unit / 2 + 1e-6, atol=1e-6)


@pytest.mark.parametrize("plan", ALL[::2], ids=name_of)
def test_nan_and_infinity_stay_in_their_rows(emulator, plan):
    cells = ("rnn_tanh", "rnn_relu") if plan.cell == "rnn" else (plan.cell, plan.cell)
    for cell, variant in zip(
        cells, (Variant(), Variant(inputs="summed", scope="all", cell="none")), strict=True
    ):
        case = make(plan, cell, variant, 9, 3)
        clean = emulate(emulator, case)
        case.tensors["x"][9 + 2, 5] = float("nan")
        case.tensors["x"][9 + 4, 5] = float("inf")
        case.tensors["h0"][7, 3] = float("nan")
        found = emulate(emulator, case)
        dirty = [n in (2, 4, 7) for n in range(9)]
        for name, tensor in found.items():
            for index, row in enumerate(tensor):
                if not dirty[index % 9]:
                    assert torch.equal(row, clean[name][index]), name
        assert found["hn"][[2, 7]].isnan().any(-1).all()


def test_numbers_whose_squares_float32_cannot_hold_make_nan(emulator):
    plan = PLANS["lstm"][0]
    case = make(plan, "lstm", Variant(), 2, 1)
    case.tensors["weight_hh"].mul_(1e25)
    assert emulate(emulator, case)["output"].isnan().all()


def test_a_reset_lets_no_nan_through(emulator):
    plan = PLANS["lstm"][0]
    case = make(plan, "lstm", Variant(), 3, 3)
    case.tensors["h0"][1], case.tensors["c0"][2] = float("nan"), float("nan")
    case.tensors["resets"] = torch.tensor([False, True, True] + 6 * [False])
    found = emulate(emulator, case)
    assert not any(tensor.isnan().any() for tensor in found.values())
    check(found, case)


@pytest.mark.parametrize("cell", PLANS)
def test_a_lost_arrival_stops_the_kernel(emulator, cell):
    plan = PLANS[cell][0]
    case = make(plan, "rnn_tanh" if cell == "rnn" else cell, Variant(), 3, 3)
    for dropped in (0, 1, 2 * plan.blocks**2 + 1, 5 * plan.blocks**2):
        with pytest.raises(RuntimeError, match="trap"):
            emulate(emulator, case, dropped=dropped)


def test_mma_has_the_fragments_of_the_isa(emulator):
    for plan in PLANS["lstm"]:
        dtype, library = DTYPES[plan.dtype], emulator(plan).library
        a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
        c = torch.randn(16, 8)
        result = c.clone()
        library.multiply(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, result)))
        exact = c.double() + a.double() @ b.double()
        torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6)


def test_conversions_of_the_emulator_are_those_of_pytorch(emulator):
    floats = torch.cat((torch.randn(2000) * 10.0 ** torch.randint(-9, 9, (2000,)), torch.tensor([0.0])))
    floats = torch.cat((floats, torch.tensor([65519.99, 65520.0, 1e-8, 3e-8, float("inf"), -float("inf")])))
    for plan in PLANS["lstm"]:
        library, dtype = emulator(plan).library, DTYPES[plan.dtype]
        library.narrowed.argtypes, library.narrowed.restype = (ctypes.c_float,), ctypes.c_uint16
        library.widened.argtypes, library.widened.restype = (ctypes.c_uint16,), ctypes.c_float
        bits = floats.to(dtype).view(torch.int16).tolist()
        assert [library.narrowed(a) for a in floats.tolist()] == [b % 65536 for b in bits]
        wide = torch.tensor([library.widened(b % 65536) for b in bits])
        assert torch.equal(wide, floats.to(dtype).float())


def test_activations_are_accurate(emulator):
    library = emulator(ALL[0]).library
    x = torch.cat(
        (torch.randn(3000) * 0.3, torch.randn(3000) * 4, torch.tensor([0.0, 1e-30, 88, -88, 200, -200]))
    )
    for name, exact in (("tangent", x.double().tanh()), ("logistic", x.double().sigmoid())):
        function = getattr(library, name)
        function.argtypes, function.restype = (ctypes.c_float,), ctypes.c_float
        found = torch.tensor([function(a) for a in x.tolist()]).double()
        # Roundings of values below 2 in float32, of which tanh at 1/4 has lost two bits.
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-37)
        assert function(float("nan")) != function(float("nan"))


def test_forward_launches_its_plan(emulator, monkeypatch):
    runs = []

    def launch(loaded, plan, clusters, arguments, device):
        runs.append((plan, clusters, loaded, device))
        emulator(plan).run(arguments)

    monkeypatch.setattr(persistent, "_architecture", lambda index: 90)
    monkeypatch.setattr(persistent_compile, "load", lambda plan, device, groups: groups)
    monkeypatch.setattr(persistent_compile, "launch", launch)
    plan = persistent_plan.plan("gru", 32, "float16", 90, 9, 2)
    assert isinstance(plan, Plan)
    case = make(plan, "gru", Variant(), 9, 2, packed=True, resets=True)
    fields, steps, saved_h, given = called(case)
    persistent.forward(*fields, steps=steps, saved_h=saved_h, vectors=case.vectors, **given)
    assert runs == [(plan, 2, 2, 0)]
    check(written(case, saved_h, given), case)
    given["h0"] = torch.zeros(9 * 32 + 1, dtype=torch.float16)[1:].view(9, 32)
    with pytest.raises(ValueError, match="h0 must begin at a multiple of 16 bytes"):
        persistent.forward(*fields, steps=steps, saved_h=saved_h, vectors=case.vectors, **given)
    fields, _, _, given = called(make(plan, "gru", Variant(), 2, 1))
    given |= {
        name: t[:0] for name, t in given.items() if t is not None and name not in ("h0", "hn", "weight_hh")
    }
    persistent.forward(*fields, steps=0, saved_h=None, vectors={}, **given)
    assert torch.equal(given["hn"], given["h0"])
    assert len(runs) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the driver library has another name")
def test_the_driver_is_called_as_it_wants(compiler, tmp_path):
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    stub = [compiler, "-shared", "-fPIC", str(EMULATOR / "driver.cpp"), "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run([*stub, "-ldl"], check=True)
    script = """
import contextlib, types, torch
from layernorm.gpu.persistent import launches as persistent
from layernorm.gpu.persistent import compiling as persistent_compile
from layernorm.gpu.persistent import plan as persistent_plan
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.device = contextlib.nullcontext
torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=17)
persistent_compile.compile = lambda plan, architecture: b"a cubin for %d" % architecture
plan = persistent_plan.plan("lstm", 512, "bfloat16", 90)
arguments = persistent.Arguments()
arguments.x = 42
persistent_compile.launch(persistent_compile.load(plan, 3, 1), plan, 5, arguments, 3)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plan = persistent_plan.plan("lstm", 512, "bfloat16", 90)
    shared = plan.shared_bytes(1)
    # By cuda.h 8 is the most shared memory of a block, and 14 whether a cluster may be of more than 8.
    assert done.stdout.splitlines() == [
        "context 7300",
        "load a cubin for 90",
        "function layernorm_persistent",
        f"attribute 8 {shared}",
        "attribute 14 1",
        "context 7300",
        f"launch {5 * 16} 1 1, {plan.threads} 1 1, {shared} bytes, stream 17, first argument 42, extra 0",
    ]


def test_what_is_not_served(monkeypatch):
    monkeypatch.setattr(persistent_compile, "problem", lambda architecture: None)
    fields = ("lstm", "layer", "separate", "matrix", "output", 512, False, torch.bfloat16, 90)
    assert persistent.problem(*fields) is None
    for index, value, reason in (
        (1, "none", "no norm"),
        (5, 500, "not a multiple of 16"),
        (5, 4096, "do not fit into 16 multiprocessors"),
        (6, True, "projected"),
        (7, torch.float32, "float32 is not served"),
        (8, 80, "8.0 has no thread block clusters"),
        (8, 120, "12.0 has too little shared memory"),
    ):
        changed = [*fields[:index], value, *fields[index + 1 :]]
        assert reason in persistent.problem(*changed)
    late = ("gru", "layer", "summed", "gate", "none", 512, False, torch.float16, 90)
    assert "after the reset" in persistent.problem(*late)
    assert persistent.problem("gru", "layer", "summed", "all", *late[4:]) is None


def plans(sizes, batches, architecture=90):
    for cell, hidden, batch in itertools.product(PLANS, sizes, batches):
        for groups in (1, persistent_plan.GATES[cell]):
            yield persistent_plan.plan(cell, hidden, "bfloat16", architecture, batch, groups), groups


def test_plans_keep_to_what_a_device_has():
    sizes = (*range(16, 700, 48), 768, 1024, 1536)
    found = {pair for pair in plans(sizes, (1, 128, 256, 4096)) if isinstance(pair[0], Plan)}
    for plan, groups in found:
        assert plan.shared_bytes(groups) <= 227 * 1024
        assert plan.threads <= 512
        assert plan.blocks <= 16
        assert plan.blocks * plan.units >= plan.hidden
        assert plan.registers * plan.threads <= 65536
        assert 0 <= plan.register_pairs <= plan.pairs
    # The bits of a row do not depend on its batch.
    for cell, hidden, groups in {(p.cell, p.hidden, groups) for p, groups in found}:
        one = [p for p, of in found if (p.cell, p.hidden, of) == (cell, hidden, groups)]
        assert len({p.k_split for p in one}) == 1
        assert len({p.rows for p in one}) == len(one)


def test_the_cache_of_compiled_kernels(monkeypatch, tmp_path):
    compiled = []

    def compile_(text, options):
        compiled.append(options)
        return b"cubin of " + repr(options).encode()

    monkeypatch.setattr(persistent_compile, "problem", lambda architecture: None)
    monkeypatch.setattr(persistent_compile, "_nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(persistent_compile, "_compile", compile_)
    monkeypatch.setenv(persistent_compile.CACHE_VARIABLE, str(tmp_path / "cache"))
    plan = ALL[0]
    first = persistent_compile.compile(plan, 90)
    assert persistent_compile.compile(plan, 90) == first
    assert len(compiled) == 1
    assert persistent_compile.compile(plan, 100) != first
    (path,) = (p for p in (tmp_path / "cache").iterdir() if p.read_bytes().endswith(first))
    for damage in (lambda b: b[:-1], lambda b: b"x" + b[1:], lambda b: b[:-1] + b"x", lambda b: b""):
        path.write_bytes(damage(path.read_bytes()))
        assert persistent_compile.compile(plan, 90) == first
        assert persistent_compile.compile(plan, 90) == first
    assert len(compiled) == 6
    monkeypatch.setattr(persistent_compile, "_nvrtc_version", lambda: (13, 1))
    assert persistent_compile.compile(plan, 90) == first
    assert len(compiled) == 7
    assert len(list((tmp_path / "cache").iterdir())) == 3  # and nothing temporary
    (tmp_path / "file").touch()
    monkeypatch.setenv(persistent_compile.CACHE_VARIABLE, str(tmp_path / "file"))
    assert persistent_compile.compile(plan, 90) == first
    assert len(compiled) == 8


@pytest.mark.parametrize("architecture", [90, 100])
def test_the_kernel_compiles_without_spills(architecture, monkeypatch, tmp_path, record_property):
    why_not = persistent_compile.problem(architecture)
    if why_not is not None:
        pytest.skip(why_not)
    resources = pytest.importorskip("tools.resources")
    pytest.importorskip("triton", reason="its cuobjdump reads the resources")
    monkeypatch.setenv(persistent_compile.CACHE_VARIABLE, str(tmp_path))
    found = plans((128, 256, 512), (1, 256), architecture)
    for plan in dict.fromkeys(plan for plan, _ in found):
        registers, stack = resources.usage(persistent_compile.compile(plan, architecture))
        record_property(name_of(plan), f"{registers} registers, {plan.shared_bytes()} bytes of shared memory")
        assert stack == 0, plan
        assert registers <= plan.registers, plan
