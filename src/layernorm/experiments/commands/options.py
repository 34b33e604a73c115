"""The commands ``compare``, ``reproduce``, ``report`` and those of the studies.

Their parsers need nothing but the standard library; what they run is imported when it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from layernorm.arguments import from_0, names, number, positive, positives, printable, rates, say
from layernorm.experiments import registry

_PRESETS: Final = ("small", "paper")
_OPTIMIZERS: Final = ("adam", "adam-uncorrected", "sgd", "rmsprop")
_DATA: Final = """\
Data is looked for in the folder that LAYERNORM_DATA names, then in a cache folder, then
downloaded where its licence allows. The same command goes on where an earlier one was stopped.
"""
_NOTES: Final = """\
norms: none, layer and others by task; an unknown one is answered with the task's list.

With several processes, on one machine or many:
  torchrun --nproc-per-node 2 -m layernorm compare TASK …
"""


def add_options(parser: argparse.ArgumentParser, command: str, arguments: Sequence[str]) -> None:
    """Add the options of a command; ``arguments`` are what was typed, for help that depends on it."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    if command in registry.STUDIES:
        parser.epilog = _DATA
        parser.add_argument(
            "--out", type=Path, metavar="DIR", help=f"folder for the results (default: runs/{command})"
        )
        _add_preset(parser)
    elif command == "compare":
        _add_compare(parser, _defaults(arguments))
    else:
        {"reproduce": _add_reproduce, "report": _add_report}[command](parser)


def _list_of_tasks() -> str:
    """Return the tasks with a line each, this package's and others'."""
    lines = [f"  {name:<17} {registry.TASKS.get(name, 'of another package')}" for name in registry.names()]
    return "\n".join(["tasks:", *lines])


def _defaults(arguments: Sequence[str]) -> dict[str, str]:
    """Return the defaults of a task's options, where help is asked for: those of its preset.

    Args:
        arguments: what was typed, perhaps a task and a preset among it.
    """
    if not {"-h", "--help"} & {*arguments}:
        return {}
    name = next((argument for argument in arguments if argument in registry.names()), "digits")
    wanted = next((preset for preset in _PRESETS if preset in arguments), _PRESETS[0])
    try:
        presets = registry.find(name).presets
    except Exception:  # the help must come, whatever another package's task or a missing library does
        return {}
    found = dataclasses.asdict(presets.get(wanted, next(iter(presets.values()))))
    sizes = found.pop("sizes")
    texts = {
        option: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for option, value in found.items()
    }
    texts |= {"clip": "no limit"} if found["clip"] is None else {}
    texts |= {"evaluate_every": "four evaluations an epoch"} if found["evaluate_every"] is None else {}
    texts["sizes"] = ", ".join(f"{size}={value}" for size, value in sizes.items()) or "it has none"
    return {"of": f"{name} with --preset {wanted}", **texts}


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    studies = f"studies: {', '.join(registry.STUDIES)}, each a command too\n"
    parser.epilog = "\n".join([_list_of_tasks(), studies, _DATA])
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"tasks and studies (default: all but {', '.join(registry.NAMED_ONLY)})",
    )
    add("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="folder (default: runs/paper)")
    add("--device", default="cpu", metavar="DEVICE", help="where to train (default: cpu)")
    _add_preset(parser)
    _add_seeds(parser)
    _add_rates(add)
    _add_ray(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="as compare, reproduce or a study wrote it")
    add("--out", type=Path, metavar="FILE", help="the page (default: DIR/report.html)")


def _add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=_PRESETS,
        default="small",
        help="small: minutes on two cores; paper: as published (default: small)",
    )


def _add_seeds(parser: argparse.ArgumentParser, default: str = "") -> None:
    add = parser.add_mutually_exclusive_group().add_argument
    add("--seeds", type=_first_seeds, metavar="K", help=f"repetitions, with the seeds 0 to K - 1{default}")
    add("--seed-list", type=from_0, metavar="A,B,…", dest="seeds", help="these seeds instead")


def _add_rates(add: Callable[..., object]) -> None:
    add(
        "--learning-rates",
        type=rates,
        metavar="R,S,…",
        help="the greatest of the schedule; each norm has its best, by the validation cases",
    )


def _first_seeds(text: str) -> tuple[int, ...]:
    return tuple(range(positive(text)))


def _add_ray(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="runs side by side on a Ray cluster; without ADDRESS on one started here",
    )
    add(
        "--jobs", type=positive, default=1, metavar="N", help="runs side by side on this machine (default: 1)"
    )
    add("--cpus-per-run", type=positive, metavar="N", help="with --ray (default: 1)")
    add("--gpus-per-run", type=number(0.0), metavar="X", help="with --ray (default: 0)")


def _add_compare(parser: argparse.ArgumentParser, defaults: Mapping[str, str]) -> None:
    parser.epilog = "\n".join([_list_of_tasks(), _NOTES, _DATA])
    if defaults:
        parser.epilog = f"The defaults above are those of {defaults['of']}.\n\n{parser.epilog}"

    def add(*names: str, **options: Any) -> None:
        option = options.get("dest") or names[0].removeprefix("--").replace("-", "_")
        if option in defaults:
            options["help"] += f" (default: {defaults[option]})".replace("%", "%%")
        parser.add_argument(*names, **options)

    add(
        "task",
        nargs="?",
        default="digits",
        metavar="TASK",
        help="a name of those below, FILE.py[:TASK] or MODULE:TASK (default: digits)",
    )
    _add_preset(parser)
    add("--norms", type=names, metavar="A,B,…", help="norms to compare")
    add("--batch-sizes", type=positives, metavar="N,M,…", help="cases per update")
    add("--epochs", type=positive, metavar="N", help="passes over the data")
    _add_seeds(parser, f" (default: {defaults['seeds']})" if defaults else "")
    _add_rates(add)
    add("--optimizer", choices=_OPTIMIZERS, help="adam-uncorrected: as the authors have it")
    add("--schedule", choices=("constant", "cosine", "linear"), help="of the learning rate")
    add(
        "--warmups",
        type=from_0,
        metavar="N,M,…",
        help="updates over which the learning rate rises from 0; each norm has its best, likewise",
    )
    add("--clip", type=number(0.0, above=True), metavar="X", help="greatest norm of all gradients together")
    add("--clip-each", action="store_true", default=None, help="limit each parameter's gradient by itself")
    add("--evaluate-every", type=positive, metavar="N", help="updates between evaluations")
    add(
        "--size",
        action="append",
        default=[],
        type=_size,
        metavar="NAME=VALUE",
        dest="sizes",
        help="one of the task's own sizes; may be given several times",
    )
    add(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="by autocast (default: float32)",
    )
    add("--device", default="cpu", metavar="DEVICE", help="where to train (default: cpu)")
    add("--out", type=Path, metavar="DIR", help="folder for the results (default: runs/TASK)")
    add("--save-weights", action="store_true", help="keep the trained networks' state dicts")
    add("--tensorboard", action="store_true", help="log for TensorBoard too")
    _add_ray(parser)


def run(options: argparse.Namespace) -> int:
    """Run a command; return its exit code."""
    try:
        from layernorm.experiments.errors import ExperimentError, reason
        from layernorm.experiments.run.training import Interrupted

        start = {"compare": _compare, "reproduce": _reproduce, "report": _report}.get(options.command, _study)
        try:
            start(options)
        except ExperimentError as error:
            return _fail(str(error), code=error.code)
        except (Interrupted, KeyboardInterrupt):
            return _fail(
                "interrupted; what is finished is kept, and the same command goes on from there", code=130
            )
        except OSError as error:
            where = f" {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
            return _fail(
                f"cannot read or write{where}: {reason(error)}; what is finished is kept, and once that is "
                "mended the same command goes on from there",
                code=2,
            )
    except ModuleNotFoundError as error:
        return _fail(f"this command needs {error.name}: pip install 'layernorm[experiments]'", code=2)
    return 0


def _compare(options: argparse.Namespace) -> None:
    from layernorm.experiments.commands.compare import Comparison, compare
    from layernorm.experiments.errors import ExperimentError
    from layernorm.experiments.run import processes

    task = registry.find(options.task)
    if options.preset not in task.presets:
        raise ExperimentError(
            f"--preset: {task.name} has no preset {options.preset!r}, only {', '.join(task.presets)}"
        )
    is_place = options.task not in registry.names()
    comparison = Comparison(
        task=registry.place_of(options.task) if is_place else task.name,
        preset=_changed(options, task.presets[options.preset]),
        preset_name=options.preset,
        out=options.out or Path("runs") / task.name,
        device=options.device,
        precision=options.precision,
        save_weights=options.save_weights,
        tensorboard=options.tensorboard,
        command=_typed(),
    )
    with processes.joined(options.device) as device:
        comparison = dataclasses.replace(comparison, device=str(device))
        compare(comparison, _console(processes.rank() == 0), _sweep(options))


def _changed(options: argparse.Namespace, preset: Any) -> Any:
    """Return a preset with what the command line says."""
    changes = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(preset)
        if field.name != "sizes" and getattr(options, field.name, None) is not None
    }
    sizes = dict(preset.sizes)
    for name, text in options.sizes:
        sizes[name] = _converted(name, text, sizes)
    return dataclasses.replace(preset, **changes, sizes=sizes)


def _converted(name: str, text: str, sizes: Mapping[str, Any]) -> Any:
    """Return the value of a size, of the type of the one it replaces."""
    from layernorm.experiments.errors import ExperimentError

    if name not in sizes:
        known = ", ".join(sizes) or "none"
        raise ExperimentError(f"--size: unknown size {name!r}; this task has: {known}")
    kind = type(sizes[name])
    try:
        return kind(text) if kind is not bool else {"true": True, "false": False}[text.lower()]
    except (ValueError, KeyError) as error:
        raise ExperimentError(f"--size: {name} must be of type {kind.__name__}, got {text!r}") from error


def _study(options: argparse.Namespace) -> None:
    from layernorm.experiments.commands import study

    out = options.out or Path("runs") / options.command
    study.run(options.command, out, _console(), options.preset)


def _reproduce(options: argparse.Namespace) -> None:
    from layernorm.experiments.commands import reproduce
    from layernorm.experiments.errors import ExperimentError

    for name in options.names:
        if name not in reproduce.EXPERIMENTS:
            known = ", ".join(reproduce.EXPERIMENTS)
            raise ExperimentError(f"unknown experiment {name!r}; expected some of {known}")
    reproduce.reproduce(
        options.names,
        options.out,
        _console(),
        options.preset,
        options.device,
        _sweep(options),
        {
            name: value
            for name in ("seeds", "learning_rates")
            if (value := getattr(options, name)) is not None
        },
    )


def _report(options: argparse.Namespace) -> None:
    from layernorm.experiments.commands import reproduce

    path = reproduce.write(options.folder, options.out)
    say(_console(), f"Report: {path}")


def _sweep(options: argparse.Namespace) -> Callable[..., None] | None:
    from layernorm.experiments.errors import ExperimentError
    from layernorm.experiments.run import processes

    if options.ray is None:
        for name in ("cpus_per_run", "gpus_per_run"):
            if getattr(options, name) is not None:
                raise ExperimentError(f"--{name.replace('_', '-')} is for --ray, which is not given")
        if options.jobs == 1:
            return None
        if processes.count() > 1:
            raise ExperimentError("--jobs: torchrun's processes share every batch; leave one of the two out")
        from layernorm.experiments.commands.jobs import Jobs

        return Jobs(options.jobs)
    if options.jobs > 1:
        raise ExperimentError("--jobs: Ray has its own number of runs, by --cpus-per-run; leave one out")
    if processes.count() > 1:
        raise ExperimentError(
            "--ray: either Ray trains the runs side by side or torchrun shares their batches"
        )
    from layernorm.experiments.commands.sweep import RaySweep

    address = None if options.ray == "local" else options.ray
    return RaySweep(address, options.cpus_per_run or 1, options.gpus_per_run or 0.0)


def _console(speaks: bool = True) -> Any:
    from rich.console import Console

    return Console(quiet=not speaks)


def _typed() -> str:
    """Return what was typed, as the README writes it."""
    return (
        shlex.join(("layernorm", *sys.argv[1:]))
        if Path(sys.argv[0]).stem in ("layernorm", "__main__")
        else ""
    )


def _size(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _fail(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"layernorm: {printable(message)}\n")
    return code
