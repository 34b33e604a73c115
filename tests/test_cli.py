"""The command itself; `compare` is tested in test_compare.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

import layernorm
from layernorm import backends, ops, override
from layernorm.cli import COMMANDS, main
from layernorm.experiments import registry


def test_info_names_every_operator_its_kernel_and_why(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"layernorm {layernorm.__version__}" in text
    for operator in (*backends.NORMS, *backends.RECURRENT):
        assert sum(line.startswith(operator + " ") for line in text.splitlines()) >= 1
    served = f"{backends.capability()} instructions" if ops.native else f"none: {ops.NATIVE_PROBLEM}"
    assert f"\ncompiled  {served}\n" in text


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([command.name, "--help"] for command in COMMANDS)]
)
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
    monkeypatch.setattr(override, "process", "fast")
    assert main(["compare"]) == 2
    captured = capsys.readouterr()
    kernels = "native, triton, looped, persistent, torch, reference"
    assert captured.err == f"layernorm: LAYERNORM_BACKEND must be one of {kernels}; got 'fast'\n"


@pytest.mark.parametrize("arguments", [[], ["norms", "--quick"], ["--help"]], ids=str)
def test_bench_says_where_it_went(arguments, capsys):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "python -m benchmarks" in captured.err
    assert not captured.out


@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["--version"], ["bench"]], ids=str)
def test_a_light_command_imports_no_experiment_and_no_benchmark(arguments):
    script = f"""
import sys
from layernorm.cli import main
try:
    main({arguments})
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stderr.splitlines()[-1].split()
    assert "layernorm.cli" in loaded
    heavy = (
        "layernorm.experiments",
        "benchmarks",
        "pandas",
        "matplotlib",
        "rich",
        "sklearn",
        "triton",
        "jax",
        "onnx",
    )
    assert not [name for name in loaded if name.startswith(heavy)]


def test_a_list_of_options_imports_no_task():
    script = """
import sys
from layernorm.cli import main
try:
    main(["reproduce", "--help"])
except SystemExit:
    print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(f"\n  {name} " in done.stdout for name in registry.TASKS)
    assert all(name in done.stdout for name in registry.STUDIES)
    heavy = ("layernorm.experiments.tasks", "layernorm.experiments.task", "pandas", "matplotlib", "rich")
    assert not [name for name in done.stderr.split() if name.startswith(heavy)]


def test_help_shows_the_defaults_of_the_task(capsys):
    for arguments, expected in (
        (["--help"], "(default: none,batch,layer)"),
        (["draw", "--preset", "paper", "--help"], "glimpses=64"),
    ):
        with pytest.raises(SystemExit):
            main(["compare", *arguments])
        shown = " ".join(capsys.readouterr().out.split())
        assert expected in shown
        assert "those of" in shown


def test_every_study_is_a_command():
    assert set(registry.STUDIES) < {command.name for command in COMMANDS}
