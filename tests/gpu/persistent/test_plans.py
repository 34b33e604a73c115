"""The persistent kernels' plans: what is served, what a device has room for, and how they compile."""

from __future__ import annotations

import itertools

import pytest
import torch

from layernorm.gpu.persistent import backward_plan as persistent_backward_plan
from layernorm.gpu.persistent import compiling as persistent_compile
from layernorm.gpu.persistent import launches as persistent
from layernorm.gpu.persistent import plan as persistent_plan
from layernorm.gpu.persistent.backward_plan import BackwardPlan
from layernorm.gpu.persistent.plan import Plan
from layernorm.spec import LayerSpec
from layernorm.variants import GATES, Variant
from tests.gpu.persistent.cases import name_of

PLANNERS = {False: persistent_plan.plan, True: persistent_backward_plan.plan}  # by whether it is backward
both_directions = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@both_directions
def test_what_is_not_served(monkeypatch, backward):
    monkeypatch.setattr(persistent_compile, "problem", lambda architecture: None)

    def problem(
        cell="lstm", variant=None, hidden=512, dtype=torch.bfloat16, architecture=90, relu=False, **options
    ):
        spec = LayerSpec(cell, variant or Variant(), "relu" if relu else "tanh")
        return persistent.problem(spec, hidden, dtype, architecture, backward=backward, **options)

    assert problem() is None
    for changed, reason in (
        ({"variant": Variant(kind="none")}, "no norm"),
        ({"hidden": 500}, "not a multiple of 16"),
        ({"hidden": 1024 if backward else 4096}, "do not fit into 16 multiprocessors"),
        ({"projected": True}, "projected"),
        ({"dtype": torch.float32}, "float32 is not served"),
        ({"architecture": 80}, "8.0 has no thread block clusters"),
        ({"architecture": 120}, "12.0 has too little shared memory"),
        ({"cell": "gru", "variant": Variant(inputs="summed", scope="gate")}, "after the reset"),
        ({"cell": "gru", "relu": True}, "a relu in place of the tanh"),
        ({"relu": True}, "a relu in place of the tanh"),
        ({"variant": Variant(cell_clip=1.0)}, "clipped"),
        ({"variant": Variant(cell_eps=0.1)}, "an eps of its own"),
    ):
        assert reason in problem(**changed)
    assert problem("rnn", relu=True) is None
    assert problem("gru", Variant(inputs="summed", scope="all"), dtype=torch.float16) is None


def plans(backward, sizes, batches, architecture=90):
    for cell, hidden, batch in itertools.product(GATES, sizes, batches):
        for groups in sorted({1, GATES[cell]}):
            yield PLANNERS[backward](cell, hidden, "bfloat16", architecture, batch, groups), groups


@both_directions
def test_plans_keep_to_what_a_device_has(backward):
    sizes = (*range(16, 700, 48), 768, 1024, 1536)
    found = {
        pair
        for pair in plans(backward, sizes, (1, 128, 256, 4096))
        if isinstance(pair[0], Plan | BackwardPlan)
    }
    for plan, groups in found:
        assert plan.shared_bytes(groups) <= 227 * 1024
        assert plan.threads <= 512
        assert plan.blocks <= 16
        assert plan.blocks * plan.units >= plan.hidden
        assert plan.registers * plan.threads <= 65536
        if backward:
            assert plan.warps >= plan.unit_warps * plan.split
            assert 0 <= plan.register_steps <= plan.steps
        else:
            assert 0 <= plan.register_pairs <= plan.pairs
    # The bits of a row do not depend on its batch.
    for cell, hidden, groups in {(p.cell, p.hidden, groups) for p, groups in found}:
        one = [p for p, of in found if (p.cell, p.hidden, of) == (cell, hidden, groups)]
        assert len({p.units if backward else p.k_split for p in one}) == 1
        if not backward:
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
    plan = persistent_plan.plan("lstm", 32, "bfloat16", 90)
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


@pytest.mark.parametrize(
    ("backward", "architecture", "batches"), [(False, 90, (1, 256)), (False, 100, (1, 256)), (True, 90, (1,))]
)
def test_the_kernels_compile_without_spills(
    backward, architecture, batches, monkeypatch, tmp_path, record_property
):
    why_not = persistent_compile.problem(architecture)
    if why_not is not None:
        pytest.skip(why_not)
    resources = pytest.importorskip("tools.resources")
    pytest.importorskip("triton", reason="its cuobjdump reads the resources")
    monkeypatch.setenv(persistent_compile.CACHE_VARIABLE, str(tmp_path))
    found = [
        plan
        for plan, groups in plans(backward, (128, 256, 512), batches, architecture)
        if groups == 1 or not backward
    ]
    if backward:
        found.append(persistent_backward_plan.plan("lstm", 512, "bfloat16", 90, 256))
    for plan in dict.fromkeys(found):
        registers, stack = resources.usage(persistent_compile.compile(plan, architecture))
        record_property(name_of(plan), f"{registers} registers, {plan.shared_bytes()} bytes of shared memory")
        assert stack == 0, plan
        assert registers <= plan.registers, plan
