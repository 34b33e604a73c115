"""The ``layernorm`` command."""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

import layernorm
from layernorm import backends, ops
from layernorm.arguments import Parser, names, positive, positives
from layernorm.bench import command as bench
from layernorm.variants import resolve

_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HIDDEN_SIZES: Final = (128, 256, 512, 1024, 2048)
_TASKS_HELP: Final = """\
tasks:
  digits       scikit-learn's handwritten digits by a feed-forward network
               norms: none, batch, layer, rms, weight
  digits-rows  the same read row by row by an LSTM
               norms: none (torch.nn.LSTM), layer (LayerNormLSTM), or a variant by name
  mnist        permutation-invariant MNIST, 784-1000-1000-10 (section 6.6 of the paper)
               norms: none, batch, layer, rms, weight

Data is looked for in the folder that LAYERNORM_DATA names, then in a cache folder, then
downloaded. The same command goes on where an earlier one was stopped.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    Examples:
        >>> from layernorm.cli import main
        >>> main(["info"])  # doctest: +ELLIPSIS
        layernorm ...
        0
    """
    options = _parser().parse_args(arguments)
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
        return bench.run(options, None, "layernorm")
    return _compare(options)


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
    for operator in (*backends.NORMS, *backends.RECURRENT):
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
    compare = commands.add_parser(
        "compare",
        help="train the same network with different norms; tables, curves, a report",
        description="Trains the same network once per norm, batch size and seed.",
        epilog=_TASKS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = compare.add_argument
    add(
        "task",
        nargs="?",
        default="digits",
        metavar="TASK",
        help="digits (default), digits-rows or mnist",
    )
    add("--norms", type=names, metavar="A,B,…", help="norms to compare (default: the task's)")
    add("--batch-sizes", type=positives, metavar="N,M,…", help="cases per update (default: 128,4)")
    add("--epochs", type=positive, metavar="N", help="passes over the data (default: the task's)")
    add("--seeds", type=positive, metavar="K", help="repetitions (default: the task's)")
    add("--learning-rate", type=_rate, metavar="R", help="of Adam (default: the task's)")
    add("--out", type=Path, metavar="DIR", help="folder for the results (default: runs/TASK)")
    add("--device", default="cpu", metavar="DEVICE", help="where to train (default: cpu)")
    bench.add_to(commands)
    commands.add_parser("info", help="versions, and which kernel serves which operator here and why")
    return parser


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number greater than 0, got {text!r}")
    return value


def _compare(options: argparse.Namespace) -> int:
    try:
        from rich.console import Console

        from layernorm.experiments import task as tasks
        from layernorm.experiments.compare import Comparison, Interrupted, compare
    except ModuleNotFoundError as error:
        return _fail(f"this command needs {error.name}: pip install 'layernorm[experiments]'", code=2)
    console = Console()
    try:
        task = tasks.find(options.task)
        comparison = Comparison(
            task=task.name,
            norms=options.norms or task.default_norms,
            batch_sizes=options.batch_sizes or task.default_batch_sizes,
            epochs=options.epochs or task.default_epochs,
            seeds=options.seeds or task.default_seeds,
            learning_rate=options.learning_rate or task.learning_rate,
            out=options.out or Path("runs") / task.name,
            device=options.device,
        )
        compare(comparison, console)
    except tasks.ExperimentError as error:
        return _fail(str(error), code=2)
    except (Interrupted, KeyboardInterrupt):
        return _fail(
            "interrupted; what is finished is kept, and the same command goes on from there",
            code=130,
        )
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"layernorm: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
