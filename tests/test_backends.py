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
    if ops.NATIVE_PROBLEM is None:
        assert backends.choose("layer_norm", CPU, torch.float32).kernel == "native"
    assert backends.choose("layer_norm", CPU, torch.float64).kernel == "torch"
    assert backends.choose("layer_norm", torch.device("meta"), torch.float32).kernel == "torch"
    assert backends.choose("rms_norm", CPU, torch.float32).kernel == "torch"
    for cell in backends.RECURRENT:
        assert backends.choose(cell, CPU, torch.float32) == (
            "reference",
            "no compiled recurrent kernel in this version",
        )


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
        pytest.raises(ValueError, match="kernel must be one of native, torch, reference; got 'cuda'"),
        backends.use("cuda"),
    ):
        pass
    with (
        backends.use("native"),
        pytest.raises(RuntimeError, match=r"layer_norm has none for torch\.float64 on cpu"),
    ):
        LF.layer_norm(torch.ones(2, 3).double(), (3,))
    result = in_a_process(
        "import layernorm, torch; layernorm.LayerNorm(3)(torch.ones(3))", LAYERNORM_BACKEND="fast"
    )
    assert "LAYERNORM_BACKEND must be one of native, torch, reference; got 'fast'" in result.stderr


def test_the_environment_overrides():
    code = """
import layernorm, torch
print(layernorm.backends.choose('layer_norm', torch.device('cpu'), torch.float32))
"""
    result = in_a_process(code, LAYERNORM_BACKEND="reference")
    assert result.stdout.startswith("Choice(kernel='reference'")


def test_without_compiled_kernels_torch_serves_and_it_is_said_once(monkeypatch):
    monkeypatch.setattr(ops, "NATIVE_PROBLEM", "this installation was made without them")
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
