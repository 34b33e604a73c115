"""The command itself; `compare` is tested in test_compare.py."""

from __future__ import annotations

import pytest

import layernorm
from layernorm import backends, ops
from layernorm.cli import main


def test_info_names_every_operator_its_kernel_and_why(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"layernorm {layernorm.__version__}" in text
    for operator in (*backends.NORMS, *backends.RECURRENT):
        assert sum(line.startswith(operator + " ") for line in text.splitlines()) >= 1
    served = f"{backends.capability()} instructions" if ops.native else f"none: {ops.NATIVE_PROBLEM}"
    assert f"\ncompiled  {served}\n" in text


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["info", "--help"], ["--version"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["compair"]])
def test_an_unknown_command_is_refused_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kernel", ["native", "reference"])
def test_info_shows_the_override(kernel, capsys):
    with backends.use(kernel):
        assert main(["info"]) == 0
    rows = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row[3:] for row in rows if row[1:3] == ["cpu", "every"]}
    refused = f"the override asks for the native kernel, but {ops.NATIVE_PROBLEM}"
    there = kernel == "reference" or ops.NATIVE_PROBLEM is None
    expected = [kernel, "the override asks for it"] if there else ["none", refused]
    for operator in (*backends.NORMS, *backends.RECURRENT):
        assert found[operator] == expected


def test_an_override_that_names_no_kernel_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(backends, "_override", "fast")
    assert main(["compare"]) == 2
    captured = capsys.readouterr()
    kernels = "native, triton, persistent, torch, reference"
    assert captured.err == f"layernorm: LAYERNORM_BACKEND must be one of {kernels}; got 'fast'\n"
