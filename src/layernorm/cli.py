"""The ``layernorm`` command: a list of commands, each imported when it runs or tells its options."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch

import layernorm
from layernorm import backends
from layernorm.arguments import Parser, printable

_EXPERIMENTS: Final = "layernorm.experiments.commands.options"


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        name: what users type.
        help: one line.
        module: has ``add_options(parser, name, arguments)``, where arguments are what was typed, and
            ``run(options)``, which returns the exit code.
    """

    name: str
    help: str
    module: str


COMMANDS: Final = (
    Command("compare", "train the same network with different norms", _EXPERIMENTS),
    Command("explain", "what each norm averages, in pictures and numbers", _EXPERIMENTS),
    Command("theory", "the paper's invariances and its geometry, checked numerically", _EXPERIMENTS),
    Command(
        "dynamics",
        "norms of hidden states and gradients over time, with and without normalization",
        _EXPERIMENTS,
    ),
    Command(
        "online",
        "the same network on any batch and step by step: the same bits with layer norm",
        _EXPERIMENTS,
    ),
    Command("reproduce", "all experiments, and one report over them", _EXPERIMENTS),
    Command("report", "one HTML page from a folder of results", _EXPERIMENTS),
    Command("info", "versions, and which kernel computes which operator here and why", "layernorm.info"),
)
#: Commands that are gone, and what to say of them.
GONE: Final = {
    "bench": "the benchmarks are no longer installed; in a checkout of the source: python -m benchmarks NAME"
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code.

    Examples:
        >>> from layernorm.cli import main
        >>> main(["info"])  # doctest: +ELLIPSIS
        layernorm ...
        0
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that is not text must not end the command
        sys.stdout.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else list(arguments)
    code = 0
    try:
        code = _run(given)
        sys.stdout.flush()
    except OSError as error:
        # What is left in its buffer goes nowhere, and must not raise again at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):  # as by ``layernorm info | head -1``
            return code or 1
        return code or _fail(f"cannot print: {error.strerror or error}", code=2)
    return code


def _run(arguments: Sequence[str]) -> int:
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name in GONE:
        return _fail(f"{name}: {GONE[name]}", code=2)
    module: Any = next((importlib.import_module(c.module) for c in COMMANDS if c.name == name), None)
    options = _parser(module, name, arguments).parse_args(arguments)
    try:
        backends.choose("lstm", torch.device("cpu"), torch.float32)
    except ValueError as error:  # LAYERNORM_BACKEND names no kernel
        return _fail(str(error), code=2)
    except RuntimeError:
        pass  # it names one that not every operator has; `info` says so
    code: int = module.run(options)
    return code


def _parser(module: Any, name: str | None, arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of all commands, with the options of one."""
    parser = Parser(prog="layernorm", description="Layer normalization for PyTorch.")
    parser.add_argument("--version", action="version", version=layernorm.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        description = f"{command.help[0].upper()}{command.help[1:]}."
        found = commands.add_parser(command.name, help=command.help, description=description)
        if command.name == name:
            module.add_options(found, name, arguments)
    return parser


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"layernorm: {printable(message)}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
