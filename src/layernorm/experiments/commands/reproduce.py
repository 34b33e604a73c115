"""All of the paper: every experiment into a folder of its own, and one report over them.

``DIR/NAME/`` is the folder of an experiment as its own command makes it; ``DIR/results.csv`` and
``results.parquet`` hold the records of all comparisons, ``DIR/report.html`` shows everything. The same
command continues where an earlier one was stopped. An experiment whose data cannot be had is left out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd
from rich.console import Console

from layernorm.arguments import say
from layernorm.experiments import registry
from layernorm.experiments.commands import compare, study
from layernorm.experiments.commands.compare import Comparison, Sweep
from layernorm.experiments.commands.progress import duration
from layernorm.experiments.errors import DamagedFile, ExperimentError, MissingData, NothingRun, reason
from layernorm.experiments.report import norms, page
from layernorm.experiments.results import folder, results_table, terminal
from layernorm.experiments.section import Card, Section
from layernorm.experiments.storage import files

#: All experiments in the order of the report.
EXPERIMENTS: Final = (*registry.STUDIES, *registry.TASKS)
_LEFT_OUT: Final = "left-out.json"


def reproduce(
    names: Sequence[str],
    out: Path,
    console: Console,
    preset: str = "small",
    device: str = "cpu",
    sweep: Sweep | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Run experiments one after another and write the report over all that are in the folder.

    Args:
        names: of tasks and studies; none for all that are of the paper's report.
        out: the folder for everything.
        console: where progress and the cards go.
        preset: the size of all.
        device: where the tasks train.
        sweep: trains the runs of a task elsewhere; see ``compare``.
        changes: of the presets of all tasks: seeds and learning rates.

    Returns:
        The path of the report.

    Raises:
        ExperimentError: something that the user can mend; the experiments before it are kept.
        NothingRun: the data of every experiment is missing.
        OSError: a file cannot be written.
        Interrupted: by Ctrl-C or SIGTERM; what was reached is kept.
    """
    left_out = {}
    with folder.opened(out):
        try:
            before = _left_out(out)
        except DamagedFile as error:
            say(console, f"{str(error).partition('; ')[0]}; it is written anew")
            before = {}
        names = names or [name for name in EXPERIMENTS if name not in registry.NAMED_ONLY]
        for index, name in enumerate(names, 1):
            console.rule(f"{index}/{len(names)} {name}", align="left")
            began = time.monotonic()
            try:
                _run(name, out / name, console, preset, device, sweep, changes or {})
            except MissingData as error:
                left_out[name] = str(error)
                say(console, f"left out: {error}")
            say(console, f"{name}: {duration(time.monotonic() - began)}")
        kept = {name: why for name, why in before.items() if name not in names} | left_out
        files.write_json(out / _LEFT_OUT, kept)
        path = write(out)
        console.rule("claims", align="left")
        terminal.show_cards(console, [card for section in read(out) for card in section.cards])
    say(console, f"Report: {path}")
    if len(left_out) == len(names):
        raise NothingRun(
            "nothing was run: the data of every experiment that was asked for is missing; see above"
        )
    return path


def write(out: Path, path: Path | None = None) -> Path:
    """Write the report of a folder, of one experiment or of many; return its path.

    The tables that the folder itself keeps are made again where they are not what its runs say.

    Args:
        out: the folder.
        path: of the page; ``report.html`` in the folder if None. A page elsewhere leaves the folder as it is.

    Raises:
        ExperimentError: there is nothing to report, or something is damaged.
        OSError: a table cannot be written.
    """
    sections = read(out)
    several = not (out / folder.CONFIG).is_file()
    if path is None:
        places = [place for place in (_folders(out) if several else [out]) if "task" in folder.read(place)]
        if places:
            found = [_records(place) if several else compare.records(place) for place in places]
            results_table.write(pd.concat(found, ignore_index=True), out)
    title = "Layer normalization, reproduced" if several else sections[0].title
    # The page of many experiments has the study that explains the norms.
    background = None if several or "study" in folder.read(out) else norms.background()
    return page.write(path or out / "report.html", title, sections, background)


def read(out: Path) -> list[Section]:
    """Return what the report shows of a folder, of one experiment or of many.

    Raises:
        ExperimentError: there is nothing to report, or something is damaged.
    """
    if not out.is_dir():
        raise ExperimentError(f"DIR: there is no folder {out}")
    if (out / folder.CONFIG).is_file():
        return [_section(out)]
    left_out = _left_out(out)
    sections = {place.name: _section(place) for place in _folders(out)}
    for name, why in left_out.items():
        sections.setdefault(name, _not_run(name, why))
    if not sections:
        raise ExperimentError(
            f"DIR: neither {out} nor a folder in it holds an experiment; make one with layernorm reproduce"
        )
    order = {name: index for index, name in enumerate(EXPERIMENTS)}
    return [sections[name] for name in sorted(sections, key=lambda name: order.get(name, len(order)))]


def _run(
    name: str,
    out: Path,
    console: Console,
    preset: str,
    device: str,
    sweep: Sweep | None,
    changes: Mapping[str, Any],
) -> None:
    if name in registry.STUDIES:
        study.run(name, out, console, preset)
        return
    task = registry.find(name)
    size = dataclasses.replace(task.presets[preset], **changes)
    comparison = Comparison(name, size, out, preset, device)
    compare.compare(comparison, console, sweep)


def _folders(out: Path) -> list[Path]:
    """Return the folders in a folder that hold experiments."""
    return sorted(path.parent for path in out.glob(f"*/{folder.CONFIG}"))


def _section(place: Path) -> Section:
    return study.read(place) if "study" in folder.read(place) else compare.read(place)


def _records(place: Path) -> pd.DataFrame:
    """Return the records of a comparison with its task and preset."""
    config = folder.read(place)
    table = compare.records(place)
    table.insert(0, "task", config["task"])
    table.insert(1, "preset", config["preset"])
    return table


def _left_out(out: Path) -> dict[str, str]:
    path = out / _LEFT_OUT
    try:
        found, whole = files.read_json(path)
        if not whole:
            raise ValueError("its content does not have its SHA-256")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path} is damaged ({reason(error)}); delete it") from error
    return {str(name): str(why) for name, why in found.items()}


def _not_run(name: str, why: str) -> Section:
    """Return the section of an experiment whose data is missing."""
    experiment = registry.find_study(name) if name in registry.STUDIES else registry.find(name)
    card = Card(f"{experiment.title}.", experiment.section, "its data is not here", "not run", why)
    return Section(name, experiment.title, experiment.summary, f"layernorm reproduce {name}", (card,))
