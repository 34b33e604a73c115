"""The persistent kernels' backward without a GPU, as ``test_persistent`` tests forward."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from layernorm.gpu.persistent import backward_plan as persistent_backward_plan
from layernorm.gpu.persistent import launches as persistent
from layernorm.gpu.persistent import plan as persistent_plan
from layernorm.gpu.persistent.arguments import ChunkPlace
from layernorm.gpu.persistent.backward_plan import BackwardPlan
from layernorm.variants import Variant
from tests.gpu.persistent.backward_cases import Backward, prepare
from tests.gpu.persistent.cases import DTYPES, cells_of, make, name_of, served
from tests.recurrent.cases import Layer, seeds_like

# Each of the ways in which a plan can differ: blocks, the last one with fewer units, or none, or not; warps
# with the same units, or without any; weights in shared memory, in registers or in both; a warp's units of
# the product; eights of rows.
PLANS = {
    "lstm": (
        BackwardPlan("lstm", 32, "bfloat16", 2, 16, 1, 2, 1, 8),
        BackwardPlan("lstm", 48, "float16", 2, 32, 1, 4, 8, 16),
    ),
    "gru": (
        BackwardPlan("gru", 64, "bfloat16", 4, 16, 2, 4, 2, 8),
        BackwardPlan("gru", 16, "float16", 1, 16, 1, 3, 0, 16),
    ),
    "rnn": (
        BackwardPlan("rnn", 48, "bfloat16", 2, 32, 2, 4, 1, 16),
        BackwardPlan("rnn", 48, "float16", 4, 16, 2, 2, 0, 8),
    ),
}
ALL = [plan for plans in PLANS.values() for plan in plans]


def chunk_tensors(problem: Backward, done: int, count: int, recomputed: bool, carried):
    """Return a chunk's rows, its place, and the tensors for ``backward``, with NaN in what it writes.

    ``recomputed``: x, saved_h and stats begin with the chunk, as those that backward computes anew do.
    """
    case, plan, given = problem.case, problem.case.plan, dict(problem.given)
    sizes = torch.tensor(case.batch_sizes)
    offsets = sizes.cumsum(0) - sizes
    first = done if case.reverse else len(sizes) - done - count
    begin, rows = int(offsets[first]), int(sizes[first : first + count].sum())

    def part(tensor):  # a copy, so that nobody reads beyond
        return None if tensor is None else tensor[begin : begin + rows].clone()

    def empty(name, width):
        return (
            torch.full((rows, width), float("nan"), dtype=DTYPES[plan.dtype])
            if name in problem.exact
            else None
        )

    given |= {name: part(given[name]) for name in ("h_before", "cell_stats")}
    if recomputed:
        given |= {name: part(given[name]) for name in ("x", "saved_h", "stats")}
    given |= {name: empty(name, plan.gates * plan.hidden) for name in ("grad_gates", "grad_wh")}
    given |= {name: empty(name, plan.hidden) for name in ("grad_own", "grad_cell", "normalized_cell")}
    given |= {"batch_sizes": sizes, "step_offsets": offsets} if case.packed else {}
    given |= carried
    return slice(begin, begin + rows), ChunkPlace(done, count, begin, begin if recomputed else 0), given


def emulate(emulator, problem: Backward, *, chunks=None, recomputed=False, plan=None, **options):
    """Return what the kernel finds, in chunks of these numbers of steps."""
    case = problem.case
    steps, done = len(case.batch_sizes), 0
    found = {name: torch.empty(t.shape, dtype=DTYPES[case.plan.dtype]) for name, t in problem.exact.items()}
    carried = {name: problem.given[name] for name in ("grad_h", "grad_c")}
    carried = {name: None if t is None else t.clone() for name, t in carried.items()}
    for count in chunks or [steps]:
        rows, chunk, given = chunk_tensors(problem, done, count, recomputed, carried)
        options_of_call = {"steps": steps, "reverse": case.reverse, "chunk": chunk}
        arguments = persistent.make_backward_arguments(case.spec, given, **options_of_call)
        emulator(plan or case.plan).run(arguments, **options)
        for name in found.keys() - carried.keys():
            found[name][rows] = given[name]
        done += count
    found |= {name: t for name, t in carried.items() if t is not None}
    if case.tensors["resets"] is not None and not case.reverse:  # as the caller does
        for name in carried.keys() & found.keys():
            found[name][case.tensors["resets"][: len(case.lengths)]] = 0
    return found


def check(found, problem: Backward):
    assert found.keys() == problem.exact.keys()
    # A value is kept with one rounding; and each step rounds grad_wh before the product and reads n with a
    # rounding, by which the carried gradient is off by about as much of the largest value, for the sums over
    # gates add up in no direction.
    unit = torch.finfo(DTYPES[problem.case.plan.dtype]).eps
    tolerance = (1 + len(problem.case.batch_sizes)) * unit / 2
    for name, actual in found.items():
        exact = problem.exact[name]
        torch.testing.assert_close(
            actual.double(),
            exact,
            rtol=0,
            atol=tolerance * max(1, exact.abs().max().item()),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("plan", ALL, ids=name_of)
def test_every_variant_agrees_with_the_reference(emulator, plan):
    # Shapes and options come round in fives and sevens, so that the variants meet them all; those of an LSTM,
    # and an RNN's cells, in turns by the two plans.
    shapes = itertools.cycle([(5, 2), (1, 7), (19, 2), (5, 1), (19, 7)])
    options = itertools.cycle(
        {"packed": packed, "reverse": reverse, "resets": resets}
        for packed, reverse, resets in itertools.product((False, True), repeat=3)
        if not (packed and reverse and not resets)
    )
    turn = PLANS[plan.cell].index(plan)
    variants = list(served(plan.cell))[turn if plan.cell == "lstm" else 0 :: 1 + (plan.cell == "lstm")]
    cells = itertools.islice(itertools.cycle(cells_of(plan)), turn, None)
    for seed, (variant, cell) in enumerate(zip(variants, cells, strict=False)):
        batch, steps = next(shapes)
        problem = prepare(make(plan, cell, variant, batch, steps, **next(options)))
        check(emulate(emulator, problem, seed=seed), problem)


@pytest.mark.parametrize("plan", ALL, ids=name_of)
def test_no_accesses_to_shared_memory_race(emulator, plan):
    summed = Variant(inputs="summed", scope="all", cell="none")
    for seed, variant in enumerate((Variant(), Variant(cell="carried", scope="gate"), summed)):
        case = make(plan, cells_of(plan)[0], variant, plan.rows + 1, 3, packed=seed == 1, resets=True)
        problem = prepare(case)
        check(emulate(emulator, problem, seed=seed, races=True), problem)


@pytest.mark.parametrize("cell_norm", ["none", "output", "carried"])
def test_the_cell_is_seen_as_forward_has_rounded_it(emulator, cell_norm):
    plan, hidden = PLANS["lstm"][0], PLANS["lstm"][0].hidden
    problem = prepare(make(plan, "lstm", Variant(cell=cell_norm), 19, 1))
    found, given = emulate(emulator, problem), problem.given
    vectors = {name: t.double() for name, t in problem.case.vectors.items()}
    gate = given["x"].double() * vectors["gain_ih"] + given["saved_h"].double() * vectors["gain_hh"]
    opened = (gate + vectors["bias"]).chunk(4, -1)[3].sigmoid()
    seen = given["saved_c"].double()  # already normalized where it is so carried
    if cell_norm == "output":
        mean, rstd = given["cell_stats"].double().unsqueeze(1).unbind(-1)
        seen = (seen - mean) * rstd * vectors["gain_cell"] + vectors["bias_cell"]
    grad = given["grad_output"].double() + given["grad_h"].double()
    exact = grad * seen.tanh() * opened * (1 - opened)
    # One rounding, and float32's; from a c that is not rounded it would be two.
    unit = torch.finfo(torch.bfloat16).eps
    actual = found["grad_gates"][:, 3 * hidden :].double()
    torch.testing.assert_close(actual, exact, rtol=unit / 2 + 1e-5, atol=1e-6)


@pytest.mark.parametrize("plan", ALL[::2], ids=name_of)
def test_vectors_and_gradients_that_are_not_there(emulator, plan):
    for inputs in ("separate", "summed"):
        case = make(plan, cells_of(plan)[-1], Variant(inputs=inputs, scope="all"), 3, 2, affine=False)
        problem = prepare(case)
        check(emulate(emulator, problem), problem)
        zeros = dataclasses.replace(problem, given=dict(problem.given))
        zeros.given["grad_output"] = torch.zeros_like(problem.given["grad_output"])
        found = emulate(emulator, zeros)
        zeros.given["grad_output"] = None
        for name, tensor in emulate(emulator, zeros).items():
            assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("plan", [PLANS["lstm"][1], PLANS["gru"][0]], ids=name_of)
def test_chunks_have_the_bits_of_the_whole(emulator, plan):
    for packed, reverse in itertools.product((False, True), repeat=2):
        options = {"packed": packed, "reverse": reverse}
        problem = prepare(make(plan, cells_of(plan)[0], Variant(), plan.rows + 1, 5, resets=True, **options))
        whole = emulate(emulator, problem)
        for chunks, recomputed in (([2, 1, 2], True), ([1, 4], False)):
            for name, tensor in emulate(emulator, problem, chunks=chunks, recomputed=recomputed).items():
                assert torch.equal(tensor, whole[name]), (name, options)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_row_has_the_same_bits_in_any_batch_and_plan(emulator, cell):
    plan = PLANS[cell][0]
    problem = prepare(make(plan, cell, Variant(), 19, 3))
    whole = emulate(emulator, problem)
    # Blocks and their units are as they were.
    other = dataclasses.replace(
        plan, rows=24 - plan.rows, row_split=1, warps=plan.warps + 1, register_steps=0
    )
    for name, tensor in emulate(emulator, problem, plan=other).items():
        assert torch.equal(tensor, whole[name]), name

    def rows(tensor, part):  # of a tensor of the batch or of all steps
        if tensor is None:
            return None
        if len(tensor) == 19:
            return tensor[part].contiguous()
        return tensor.unflatten(0, (3, 19))[:, part].flatten(0, 1).contiguous()

    for part in (slice(0, 1), slice(11, 19)):
        shared = {"weight_hh", "resets", *problem.case.vectors}
        given = {name: t if name in shared else rows(t, part) for name, t in problem.given.items()}
        case = dataclasses.replace(problem.case, lengths=[3] * (part.stop - part.start))
        exact = {name: rows(t, part) for name, t in problem.exact.items()}
        for name, tensor in emulate(emulator, Backward(case, given, exact)).items():
            assert torch.equal(tensor, rows(whole[name], part)), name


@pytest.mark.parametrize("plan", ALL[::2], ids=name_of)
def test_nan_and_infinity_stay_in_their_rows(emulator, plan):
    for variant in (Variant(), Variant(inputs="summed", scope="all", cell="none")):
        problem = prepare(make(plan, cells_of(plan)[0], variant, 9, 3))
        clean = emulate(emulator, problem)
        problem.given["grad_output"][9 + 2, 5] = float("nan")
        problem.given["x"][9 + 4, 5] = float("inf")
        problem.given["grad_h"][7, 3] = float("nan")
        found = emulate(emulator, problem)
        for name, tensor in found.items():
            for index, row in enumerate(tensor):
                if index % 9 not in (2, 4, 7):
                    assert torch.equal(row, clean[name][index]), name
        assert found["grad_h"][[2, 7]].isnan().any(-1).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_reset_lets_no_nan_through(emulator, reverse):
    plan = PLANS["lstm"][0]
    case = make(plan, "lstm", Variant(), 3, 3, reverse=reverse)
    # Between the last two steps of the loop.
    case.tensors["resets"] = torch.tensor([False] * 9)
    case.tensors["resets"][3 if reverse else 6 :][:2] = True
    problem = prepare(case)
    problem.given["grad_h"][0], problem.given["grad_c"][1] = float("nan"), float("nan")
    found = emulate(emulator, problem)
    passed = slice(3, 9) if reverse else slice(0, 6)
    for name, exact in problem.exact.items():
        rows = slice(None) if len(exact) == 3 else passed
        assert not found[name][rows].isnan().any(), name


@pytest.mark.parametrize("cell", PLANS)
def test_a_lost_arrival_stops_the_kernel(emulator, cell):
    plan = PLANS[cell][0]
    problem = prepare(make(plan, cells_of(plan)[0], Variant(), 3, 3))
    for dropped in (0, 1, 2 * plan.blocks**2 + 1, 5 * plan.blocks**2):
        with pytest.raises(RuntimeError, match="trap"):
            emulate(emulator, problem, dropped=dropped)


def test_backward_launches_its_plan(emulator, emulated, monkeypatch):
    plan = persistent_backward_plan.plan("gru", 16, "float16", 90, 9, 2)
    assert isinstance(plan, BackwardPlan)
    problem = prepare(make(PLANS["gru"][1], "gru", Variant(), 9, 2, packed=True, resets=True))
    grad_h, spec = problem.given["grad_h"].clone(), problem.case.spec
    _, chunk, given = chunk_tensors(problem, 0, 2, False, {"grad_h": grad_h})
    persistent.backward(spec, given, steps=2, reverse=False, chunk=chunk)
    assert emulated == [(plan, -(-9 // plan.rows), 2, 0)]
    whole = emulate(emulator, problem)
    given["grad_h"][problem.case.tensors["resets"][:9]] = 0
    for name, tensor in whole.items():
        assert torch.equal(given[name], tensor), name
    persistent.backward(spec, given, steps=2, reverse=False, chunk=chunk._replace(steps=0))
    assert len(emulated) == 1
    wrong = given | {"grad_wh": given["grad_wh"].t().contiguous().t()}
    with pytest.raises(ValueError, match="grad_wh must be contiguous"):
        persistent.backward(spec, wrong, steps=2, reverse=False, chunk=chunk)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("cell", "variant", "packed"),
    [
        ("lstm", Variant(), False),
        ("lstm", Variant(kind="rms", inputs="summed", scope="gate", cell="carried"), True),
        ("gru", Variant(), True),
        ("rnn", Variant(), False),
    ],
)
def test_the_operators_by_both_directions(emulated, monkeypatch, cell, variant, packed):
    # All that a module calls, with Triton's interpreter for what is around the persistent kernel.
    from layernorm.gpu.recurrent import operators as recurrent

    monkeypatch.setattr(recurrent, "CHUNK_BYTES", 5000)  # two steps or so
    layer = Layer(cell, variant, 5, 32, torch.bfloat16)
    x, state = torch.randn(5, 3, 5).bfloat16(), layer.state(3, torch.bfloat16)
    seeds, resets = seeds_like(layer, 5, 3, torch.bfloat16), torch.rand(5, 3) < 0.2
    options = {}
    if packed:
        kept = torch.tensor([[t < length for length in (5, 3, 2)] for t in range(5)])
        x, resets, seeds[0], options = x[kept], resets[kept], seeds[0][kept], {"batch_sizes": [3, 3, 2, 1, 1]}
    for recompute in (False, True):
        options |= {"resets": resets, "recompute": recompute, "reverse": recompute}
        expected = layer(x, state, seeds, **options)
        assert not emulated
        with monkeypatch.context() as patch:
            patch.setattr(recurrent, "_kernel", lambda layer, *, backward: "persistent")
            found = layer(x, state, seeds, **options)
        kinds = [type(plan) for plan, *_ in emulated]
        assert kinds[0] is persistent_plan.Plan
        assert set(kinds[1:]) == {BackwardPlan}
        assert len(kinds) > 2
        emulated.clear()
        # Another order of sums may round a state the other way, which the steps after it pass on.
        for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            error = (a.float() - b.float()).abs().max()
            assert error <= 4 * torch.finfo(torch.bfloat16).eps * (1 + b.float().abs().max())
