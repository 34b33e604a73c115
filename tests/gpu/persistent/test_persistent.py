"""The persistent kernels' forward without a GPU: the same source, compiled for a CPU.

``emulator`` runs a cluster's threads there, in a random order.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch

from layernorm.gpu.persistent import launches as persistent
from layernorm.gpu.persistent import plan as persistent_plan
from layernorm.gpu.persistent.plan import Plan
from layernorm.reference import recurrent as reference
from layernorm.variants import Variant
from tests.gpu.persistent.cases import DTYPES, EMULATOR, cells_of, make, name_of, scan, served

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


def forward_tensors(case, *, keep=True):
    """Return the tensors for ``persistent.forward``, with NaN in what it writes."""
    plan, spec = case.plan, case.spec
    rows, batch = sum(case.lengths), len(case.lengths)
    summed, lstm = spec.products == "summed", plan.cell == "lstm"

    def empty(*shape, dtype=DTYPES[plan.dtype]):
        return torch.full(shape, float("nan"), dtype=dtype)

    given = (
        case.vectors
        | case.tensors
        | {
            "x": case.tensors["x"].clone(),
            "batch_sizes": None,
            "step_offsets": None,
            "output": empty(rows, plan.hidden),
            "hn": empty(batch, plan.hidden),
            "cn": empty(batch, plan.hidden) if lstm else None,
            "saved_c": empty(rows, plan.hidden) if lstm and keep else None,
            "saved_h": empty(rows, plan.gates * plan.hidden) if keep and not summed else None,
            "stats": empty(rows, spec.statistics, dtype=torch.float32) if keep else None,
        }
    )
    if case.packed:
        sizes = torch.tensor(case.batch_sizes)
        given |= {"batch_sizes": sizes, "step_offsets": sizes.cumsum(0) - sizes}
    return given


def written(case, given):
    """Return what the kernel has written, by name."""
    found = {name: given[name] for name in ("output", "hn", "cn", "saved_c")}
    if given["stats"] is not None:
        summed = case.spec.products == "summed"
        found["normalized"] = given["x"] if summed else given["saved_h"]
        found["stats"] = given["stats"][:, 0 if summed else len(case.spec.groups) :]
    return {name: t for name, t in found.items() if t is not None}


def emulate(emulator, case, *, keep=True, plan=None, **options):
    """Return what the kernel writes, run by the emulator."""
    given = forward_tensors(case, keep=keep)
    steps = len(case.batch_sizes)
    arguments = persistent.make_arguments(case.spec, given, steps=steps, reverse=case.reverse)
    emulator(plan or case.plan).run(arguments, **options)
    return written(case, given)


def expected(case):
    """Return what the reference finds in float64, with states rounded where the kernel rounds them."""
    spec, dtype = case.spec, DTYPES[case.plan.dtype]
    kept = {name: [] for name in ("saved_c", "normalized", "stats")}
    groups = [count * case.plan.hidden for count in spec.groups]

    def cell(step, x, state, weights):
        product = torch.nn.functional.linear(state[0], weights["weight_hh"], weights.get("bias_hh"))
        parts = (product + x if spec.products == "summed" else product).split(groups, -1)
        kept["normalized"].append(
            torch.cat([reference._normalized(p, (1,), None, None, spec) for p in parts], -1)
        )
        centred = spec.variant.kind == "layer"
        moments = [p.var(-1, correction=0) if centred else p.square().mean(-1) for p in parts]
        kept["stats"].append(torch.stack([(m + spec.eps).rsqrt() for m in moments], -1))
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
        for cell in cells_of(plan):
            batch, steps = next(shapes)
            case = make(plan, cell, variant, batch, steps, **next(options))
            check(emulate(emulator, case, seed=seed), case)


@pytest.mark.parametrize("plan", ALL, ids=name_of)
def test_no_accesses_to_shared_memory_race(emulator, plan):
    # What orders them: the barriers of warp, block and cluster, not that threads happen to run so.
    summed = Variant(inputs="summed", scope="all", cell="none")
    for seed, variant in enumerate((Variant(), Variant(cell="carried", scope="gate"), summed)):
        case = make(plan, cells_of(plan)[0], variant, plan.rows + 1, 3, packed=seed == 1, resets=True)
        check(emulate(emulator, case, seed=seed, races=True), case)


@pytest.mark.parametrize("plan", ALL[::2], ids=name_of)
def test_what_is_not_kept_and_vectors_that_are_not_there(emulator, plan):
    cell = cells_of(plan)[-1]
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
    case = make(plan, cells_of(plan)[0], Variant(), 19, 4)
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
    gates = reference._gates(x, hidden, weights, case.spec)
    seen = found["saved_c"].double()
    if cell_norm == "output":
        seen = reference._normalized_cell(seen, weights, case.spec)
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
    case = make(plan, cells_of(plan)[0], Variant(), 3, 3)
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


def test_forward_launches_its_plan(emulated):
    plan = persistent_plan.plan("gru", 32, "float16", 90, 9, 2)
    assert isinstance(plan, Plan)
    case = make(plan, "gru", Variant(), 9, 2, packed=True, resets=True)
    given = forward_tensors(case)
    persistent.forward(case.spec, given, steps=2, reverse=False)
    assert emulated == [(plan, 2, 2, 0)]
    check(written(case, given), case)
    given["h0"] = torch.zeros(9 * 32 + 1, dtype=torch.float16)[1:].view(9, 32)
    with pytest.raises(ValueError, match="h0 must begin at a multiple of 16 bytes"):
        persistent.forward(case.spec, given, steps=2, reverse=False)
    given = forward_tensors(make(plan, "gru", Variant(), 2, 1))
    given |= {
        name: t[:0] for name, t in given.items() if t is not None and name not in ("h0", "hn", "weight_hh")
    }
    persistent.forward(case.spec, given, steps=0, reverse=False)
    assert torch.equal(given["hn"], given["h0"])
    assert len(emulated) == 1


@pytest.fixture
def with_driver(compiler, tmp_path):
    """Return what runs a script with a driver in which so many clusters fit, and returns what it prints."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    if sys.platform != "linux":
        pytest.skip("the driver library has another name")
    stub = [compiler, "-shared", "-fPIC", str(EMULATOR / "driver.cpp"), "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run([*stub, "-ldl"], check=True)
    before = """
import contextlib, types, torch
from layernorm import backends
from layernorm.gpu.persistent import launches as persistent
from layernorm.gpu.persistent import compiling as persistent_compile
from layernorm.gpu.persistent import plan as persistent_plan
from layernorm.variants import Variant
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.device = contextlib.nullcontext
torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=17)
torch.cuda.is_current_stream_capturing = lambda: False
persistent_compile.problem = lambda architecture: None
persistent_compile.compile = lambda plan, architecture: b"a cubin for %d" % architecture
persistent_compile._compile = lambda text, options: f"{text} {options}".encode()
"""

    def run(script, clusters):
        done = subprocess.run(
            [sys.executable, "-c", before + script],
            env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "CLUSTERS": str(clusters)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_the_driver_is_called_as_it_wants(with_driver):
    found = with_driver(
        """
plan = persistent_plan.plan("lstm", 512, "bfloat16", 90)
arguments = persistent.Arguments()
arguments.x = 42
persistent_compile.launch(persistent_compile.load(plan, 3, 1), plan, 5, arguments, 3)
""",
        clusters=7,
    )
    plan = persistent_plan.plan("lstm", 512, "bfloat16", 90)
    shared = plan.shared_bytes(1)
    # By cuda.h 8 is the most shared memory of a block, and 14 whether a cluster may be of more than 8.
    assert found == [
        "enter context 7300",
        "load a cubin for 90",
        "function layernorm_persistent",
        f"attribute 8 {shared}",
        "attribute 14 1",
        f"clusters of 16 1 1, {plan.threads} 1 1, {shared} bytes",
        "leave context",
        "enter context 7300",
        f"launch {5 * 16} 1 1, {plan.threads} 1 1, {shared} bytes, stream 17, first argument 42, extra 0",
        "leave context",
    ]


@pytest.mark.parametrize(
    ("clusters", "kernel", "reason"),
    [
        (1, "persistent", "the override asks for it"),
        (0, "triton", "the device has no room for a cluster of 16 blocks"),
        (-1, "triton", "the CUDA driver failed: CUDA_ERROR_INVALID_CLUSTER_SIZE"),
    ],
)
def test_a_device_without_room_for_the_cluster_is_left_to_triton(with_driver, clusters, kernel, reason):
    found = with_driver(
        """
with backends.use("persistent"):
    for backward in (False, False, True):
        device = torch.device("cuda", 2)
        choice = backends.tier("lstm", Variant(), 512, torch.bfloat16, device, backward=backward)
        print(*choice, sep=": ")
""",
        clusters,
    )
    shared, threads = persistent_plan.SHARED_BYTES, persistent_plan.THREADS
    assert found == [
        "enter context 7200",
        'load extern "C" __global__ void __cluster_dims__(16, 1, 1) layernorm_persistent() {} '
        "['--gpu-architecture=sm_90']",
        "function layernorm_persistent",
        f"attribute 8 {shared}",
        "attribute 14 1",
        f"clusters of 16 1 1, {threads} 1 1, {shared} bytes",
        "leave context",
        *3 * [f"{kernel}: {reason}"],
    ]


def test_the_time_limit_is_the_environments(monkeypatch):
    from layernorm.gpu.persistent import arguments

    def limit(value):
        monkeypatch.setenv(arguments.TIME_LIMIT_VARIABLE, value)
        return arguments._time_limit.__wrapped__()

    assert limit("") == 5_000_000_000
    assert limit("0.25") == 250_000_000
    for bad in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(ValueError, match=f"LAYERNORM_TIME_LIMIT must be a positive number .*'{bad}'"):
            limit(bad)
