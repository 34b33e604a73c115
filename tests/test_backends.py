"""Which kernel serves which call, the override, and an installation without compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import layernorm
from layernorm import backends, ops
from layernorm import functional as LF

CPU = torch.device("cpu")


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_choice_depends_on_operator_device_and_dtype():
    served = "native" if ops.NATIVE_PROBLEM is None else "torch"
    for operator in backends.NORMS:
        for dtype in backends.NATIVE_DTYPES:
            assert backends.choose(operator, CPU, dtype).kernel == served
        assert backends.choose(operator, CPU, torch.complex64).kernel == "torch"
        assert backends.choose(operator, torch.device("meta"), torch.float32).kernel == "torch"
    served = "native" if ops.NATIVE_PROBLEM is None else "reference"
    for cell in backends.RECURRENT:
        for dtype in backends.NATIVE_DTYPES:
            assert backends.choose(cell, CPU, dtype).kernel == served
        assert backends.choose(cell, CPU, torch.complex64).kernel == "reference"
        assert backends.choose(cell, torch.device("meta"), torch.float32).kernel == "reference"


def test_use_overrides_and_gives_back():
    before = backends.choose("layer_norm", CPU, torch.float32)
    with backends.use("reference"):
        assert backends.choose("layer_norm", CPU, torch.float32).kernel == "reference"
        with backends.use("torch"):
            assert backends.choose("rms_norm", CPU, torch.float32).kernel == "torch"
            assert backends.choose("gru", CPU, torch.float32).kernel == "reference"
        assert backends.choose("layer_norm", CPU, torch.float32).kernel == "reference"
    assert backends.choose("layer_norm", CPU, torch.float32) == before


def test_an_override_that_cannot_be_is_refused():
    with (
        pytest.raises(ValueError, match="one of native, triton, persistent, torch, reference; got 'cuda'"),
        backends.use("cuda"),
    ):
        pass
    with (
        backends.use("native"),
        pytest.raises(RuntimeError, match=r"layer_norm has none for torch\.float32 on meta"),
    ):
        LF.layer_norm(torch.ones(2, 3, device="meta"), (3,))
    result = in_a_process(
        "import layernorm, torch; layernorm.LayerNorm(3)(torch.ones(3))", LAYERNORM_BACKEND="fast"
    )
    assert (
        "LAYERNORM_BACKEND must be one of native, triton, persistent, torch, reference; got 'fast'"
        in result.stderr
    )


def test_the_environment_overrides():
    code = """
import layernorm, torch
print(layernorm.backends.choose('layer_norm', torch.device('cpu'), torch.float32))
"""
    result = in_a_process(code, LAYERNORM_BACKEND="reference")
    assert result.stdout.startswith("Choice(kernel='reference'")


def test_without_compiled_kernels_torch_serves_and_it_is_said_once(monkeypatch):
    monkeypatch.setattr(ops, "NATIVE_PROBLEM", "this installation was made without them")
    monkeypatch.setattr(ops, "native", None)
    monkeypatch.setattr(backends, "_said", set())
    x = torch.randn(2, 3)
    with pytest.warns(RuntimeWarning, match="no compiled kernels: this installation was made without them"):
        output = LF.layer_norm(x, (3,))
    assert torch.equal(output, torch.nn.functional.layer_norm(x, (3,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LF.layer_norm(x, (3,))
    with backends.use("native"), pytest.raises(RuntimeError, match="this installation was made without them"):
        LF.layer_norm(x, (3,))
    monkeypatch.setattr(backends, "_said", set())
    with backends.use("torch"), warnings.catch_warnings():
        warnings.simplefilter("error")
        LF.layer_norm(x, (3,))


def test_all_kernels_agree():
    x, module = torch.randn(4, 100), layernorm.LayerNorm(100)
    outputs = [module(x)]
    for kernel in ("torch", "reference"):
        with backends.use(kernel):
            outputs.append(module(x))
    for other in outputs[1:]:
        torch.testing.assert_close(outputs[0], other, rtol=0, atol=32 * torch.finfo(torch.float32).eps)


@pytest.mark.usefixtures("native")
def test_the_environment_chooses_the_instruction_set():
    code = "import layernorm; print(layernorm.backends.capability())"
    for name in ops.native.capabilities():
        assert in_a_process(code, LAYERNORM_CPU_CAPABILITY=name).stdout == f"{name}\n"
    code = "import layernorm, torch; layernorm.LayerNorm(2)(torch.ones(2)); " + code
    result = in_a_process(code, LAYERNORM_CPU_CAPABILITY="mmx")
    assert (
        f"must be one of {', '.join(ops.native.capabilities())} on this machine; got 'mmx'" in result.stderr
    )
    assert result.stdout == "None\n"


def test_kernels_built_for_another_torch_are_not_loaded(monkeypatch):
    built_for = pytest.importorskip("layernorm._built_for", reason="installed without compiled kernels")
    monkeypatch.setattr(built_for, "TORCH", "2.9.1")
    problem = ops._load()
    assert problem.startswith(f"they were built for PyTorch 2.9.1 and this is {torch.__version__}; install")


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_tensors_that_only_torch_knows_are_torchs(name):
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(3, 4)
    output = getattr(LF, name)(x.as_subclass(Tagged), (4,))
    assert type(output) is Tagged
    assert torch.equal(output.as_subclass(torch.Tensor), getattr(torch.nn.functional, name)(x, (4,)))
    total = getattr(LF, f"add_{name}")(x.as_subclass(Tagged), x, (4,))[1]
    assert type(total) is Tagged


def test_import_does_no_work():
    code = """
import sys, time, torch
before = set(sys.modules)
began = time.perf_counter()
import layernorm
spent = time.perf_counter() - began
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "rich", "matplotlib", "pandas", "sklearn", "pooch", "jinja2"}))
print(torch.cuda.is_initialized(), spent)
"""
    result = in_a_process(code)
    assert result.returncode == 0, result.stderr
    heavy, rest = result.stdout.splitlines()
    assert heavy == "[]"
    initialized, spent = rest.split()
    assert initialized == "False"
    # 40 ms here; ten times the promised bound, so that a busy machine does not fail it.
    assert float(spent) < 1.0
