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


@pytest.mark.parametrize(
    ("kernel", "text"), [("native", "rnn has none for torch.float32 on cpu"), ("reference", "asks for it")]
)
def test_info_shows_the_override(kernel, text, capsys):
    with backends.use(kernel):
        assert main(["info"]) == 0
    assert text in capsys.readouterr().out


def test_an_override_that_names_no_kernel_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(backends, "_override", "fast")
    assert main(["compare"]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err == "layernorm: LAYERNORM_BACKEND must be one of native, torch, reference; got 'fast'\n"
    )
