"""The ``layernorm`` command."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import platform
import sys
from collections.abc import Sequence
from typing import Final

import torch

import layernorm
from layernorm import backends, ops
from layernorm.arguments import Parser, plain
from layernorm.experiments.commands import options as experiments
from layernorm.variants import resolve

_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HIDDEN_SIZES: Final = (128, 256, 512, 1024, 2048)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    Examples:
        >>> from layernorm.cli import main
        >>> main(["info"])  # doctest: +ELLIPSIS
        layernorm ...
        0
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that is not text must not end the command
        sys.stdout.reconfigure(errors="backslashreplace")
    code = 0
    try:
        code = _run(_parser().parse_args(arguments))
        sys.stdout.flush()
    except OSError as error:
        # What is left in its buffer goes nowhere, and must not raise again at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):  # as by ``layernorm info | head -1``
            return code or 1
        return code or _fail(f"cannot print: {error.strerror or error}", code=2)
    return code


def _run(options: argparse.Namespace) -> int:
    try:
        backends.choose("lstm", torch.device("cpu"), torch.float32)
    except ValueError as error:  # LAYERNORM_BACKEND names no kernel
        return _fail(str(error), code=2)
    except RuntimeError:
        pass  # it names one that not every operator has; `info` says so
    if options.command == "info":
        print(info())  # noqa: T201
        return 0
    if options.command == "bench":
        return _fail("the benchmarks moved to a checkout of the source: python -m benchmarks NAME", code=2)
    return experiments.run(options)


def info() -> str:
    """Versions, instruction sets, and which kernel serves which operator here and why."""
    problem = ops.NATIVE_PROBLEM
    lines = [
        f"layernorm {layernorm.__version__}",
        f"python    {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch     {torch.__version__}, {torch.get_num_threads()} threads",
        f"CPU       {torch.backends.cpu.get_cpu_capability()} instructions",
        f"CUDA      {_cuda()}",
        f"compiled  {f'none: {problem}' if problem else f'{backends.capability()} instructions'}",
        "",
        f"{'operator':<16}{'device':<8}{'dtype':<28}{'kernel':<11}why",
    ]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for operator in (*backends.NORMS, *backends.RECURRENT, backends.GATES):
        for device in devices:
            served: dict[backends.Choice, list[str]] = {}
            for dtype in _DTYPES:
                try:
                    choice = backends.choose(operator, torch.device(device), dtype)
                except RuntimeError as error:
                    choice = backends.Choice("none", str(error))
                served.setdefault(choice, []).append(str(dtype).removeprefix("torch."))
            for (kernel, reason), dtypes in served.items():
                names = "every" if len(served) == 1 else ", ".join(dtypes)
                lines.append(f"{operator:<16}{device:<8}{names:<28}{kernel:<11}{reason}")
    if torch.cuda.is_available():
        lines += ["", *_tiers(torch.device("cuda", torch.cuda.current_device()))]
    return "\n".join(lines)


def _tiers(device: torch.device) -> list[str]:
    """Which kernel serves the paper's recurrent layers on a GPU, by hidden size and dtype, and why."""
    lines = [f"{'on the GPU':<16}{'hidden':<13}{'dtype':<10}{'':<10}{'kernel':<11}why"]
    for cell in backends.RECURRENT:
        for dtype, backward in itertools.product(backends.TRITON_DTYPES, (False, True)):
            served: dict[backends.Choice, list[str]] = {}
            for size in _HIDDEN_SIZES:
                found = backends.tier(cell, resolve("paper", cell), size, dtype, device, backward=backward)
                served.setdefault(found, []).append(str(size))
            name, way = str(dtype).removeprefix("torch."), "backward" if backward else "forward"
            for (kernel, reason), sizes in served.items():
                of = sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
                lines.append(f"{cell:<16}{of:<13}{name:<10}{way:<10}{kernel:<11}{reason}")
    return lines


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "not available"
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="layernorm", description="Layer normalization for PyTorch.")
    parser.add_argument("--version", action="version", version=layernorm.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    experiments.add_to(commands)
    commands.add_parser("bench")  # where it went; without help it is not listed
    commands.add_parser("info", help="versions, and which kernel serves which operator here and why")
    return parser


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"layernorm: {plain(message)}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
