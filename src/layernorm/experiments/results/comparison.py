"""The description of a comparison, and what a folder already has of it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd
import torch

from layernorm.experiments import registry
from layernorm.experiments.errors import DamagedFile, ExperimentError
from layernorm.experiments.results import results_table
from layernorm.experiments.run.training import Precision, Run
from layernorm.experiments.task import Preset, Task

#: What a folder holds one value of; norms, batch sizes, learning rates, warm-ups and seeds can be added.
FIXED: Final = (
    "task", "epochs", "optimizer", "schedule", "clip", "clip_each", "evaluate_every", "sizes",
    "device", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Describe a comparison.

    Attributes:
        task: the task's name.
        preset: its size, with what the command line changed.
        out: the folder for everything.
        preset_name: of the preset, before changes.
        device: where to train, as ``torch.device`` takes it; "cuda" is each process's own GPU.
        precision: of the forward pass.
        save_weights: whether the trained networks' state dicts are kept in ``runs/``.
        tensorboard: whether the records also go to ``tensorboard/``.
        command: what was typed.
    """

    task: str
    preset: Preset
    out: Path
    preset_name: str = "small"
    device: str = "cpu"
    precision: Precision = "float32"
    save_weights: bool = False
    tensorboard: bool = False
    command: str = ""

    @property
    def runs(self) -> list[Run]:
        """All runs: seed by seed, so that an unfinished comparison is even."""
        return [
            Run(norm, batch_size, learning_rate, seed, warmup)
            for seed in self.preset.seeds
            for batch_size in self.preset.batch_sizes
            for warmup in self.preset.warmups
            for learning_rate in self.preset.learning_rates
            for norm in self.preset.norms
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as ``config.json`` holds them."""
        preset = {field.name: getattr(self.preset, field.name) for field in dataclasses.fields(Preset)}
        return {
            "task": self.task,
            "preset": self.preset_name,
            **preset | {"sizes": dict(self.preset.sizes)},
            "device": torch.device(self.device).type,
            "precision": self.precision,
        }

    @property
    def identity(self) -> str:
        """The settings that a file of a run must agree with, in one line."""
        return identity(self.settings)

    def path(self, run: Run, suffix: str) -> Path:
        """Return a file of a run."""
        return self.out / "runs" / f"{run.name}{suffix}"

    def about(self, run: Run) -> str:
        """Return the description of a run's table, as its checksum file states it."""
        return f"{self.identity} {run.name}"


def identity(settings: Mapping[str, Any]) -> str:
    """Return the settings that a folder holds one value of, as ``config.json`` has them, in one line."""
    in_json = json.loads(json.dumps({name: settings[name] for name in FIXED}))
    return " ".join(f"{name}={value}" for name, value in in_json.items())


def finished(
    out: Path,
    settings: Mapping[str, Any],
    task: Task,
    asked: Container[Run] = (),
    say: Callable[[str], None] | None = None,
) -> dict[Run, pd.DataFrame]:
    """Return the records of all runs in a folder that are finished, in the order of its settings.

    Args:
        out: the folder.
        settings: as in ``config.json``.
        task: what was trained.
        asked: the runs that will be trained where they are not finished.
        say: shows what is damaged and left out.

    Raises:
        DamagedFile: a file is damaged, and ``say`` is None.
        ExperimentError: a file is of something else.
    """
    found = {}
    for path in (out / "runs").glob("*.csv"):
        run = Run.named(path.stem)
        if run is None or run.norm not in task.norms:
            continue
        try:
            found[run] = results_table.read(path, task, f"{identity(settings)} {run.name}")
        except ExperimentError as error:
            retried = run in asked and isinstance(error, DamagedFile)
            if say is None or (run in asked and not retried):
                raise
            what = str(error).partition("; delete it")[0]
            say(f"{what}; this run is {'trained again' if retried else 'left out until a command names it'}")
    return {run: found[run] for run in sorted(found, key=lambda run: _place(run, settings))}


def together(comparison: Comparison, there: Iterable[Run]) -> Comparison:
    """Return the comparison with what else a folder has: norms, batch sizes, rates, warm-ups and seeds."""
    there = list(there)
    preset = comparison.preset
    norms = dict.fromkeys((*preset.norms, *(run.norm for run in there)))
    sizes = dict.fromkeys((*preset.batch_sizes, *(run.batch_size for run in there)))
    rates = sorted({*preset.learning_rates, *(run.learning_rate for run in there)})
    warmups = sorted({*preset.warmups, *(run.warmup for run in there)})
    seeds = sorted({*preset.seeds, *(run.seed for run in there)})
    known = registry.find(comparison.task).norms
    if len(norms) > len(set(preset.norms)):
        norms = dict.fromkeys(norm for norm in known if norm in norms)
    if len(sizes) > len(set(preset.batch_sizes)):
        sizes = dict.fromkeys(sorted(sizes, reverse=True))
    if len(rates) == len(set(preset.learning_rates)):
        rates = list(preset.learning_rates)
    if len(warmups) == len(set(preset.warmups)):
        warmups = list(preset.warmups)
    if len(seeds) == len(set(preset.seeds)):
        seeds = list(preset.seeds)
    changed = dataclasses.replace(
        preset,
        norms=tuple(norms),
        batch_sizes=tuple(sizes),
        learning_rates=tuple(rates),
        warmups=tuple(warmups),
        seeds=tuple(seeds),
    )
    return comparison if changed == preset else dataclasses.replace(comparison, preset=changed, command="")


def command(comparison: Comparison) -> str:
    """Return the command that makes a comparison: what was typed, or what could have been."""
    if comparison.command:
        return comparison.command
    preset = registry.find(comparison.task).presets.get(comparison.preset_name)
    words = ["layernorm", "compare", comparison.task, "--preset", comparison.preset_name]
    for field in dataclasses.fields(Preset):
        value = getattr(comparison.preset, field.name)
        if preset is None or value == getattr(preset, field.name):
            continue
        if field.name == "sizes":
            for name, size in value.items():
                words += ["--size", f"{name}={size}"] if preset.sizes.get(name) != size else []
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        option = field.name.replace("_", "-")
        if field.name == "seeds":
            several = value == tuple(range(len(value)))
            option, text = ("seeds", str(len(value))) if several else ("seed-list", text)
        words += [f"--{option}", *([] if value is True else [text])]
    for name, usual in (("device", "cpu"), ("precision", "float32")):
        value = getattr(comparison, name)
        words += [] if value == usual else [f"--{name}", value]
    return shlex.join(words)


def _place(run: Run, settings: Mapping[str, Any]) -> tuple[int, int, int, int, float, int, str]:
    """Return where a run stands: by seed, as the settings have batch sizes, by warm-up, rate and norm."""
    sizes, norms = list(settings["batch_sizes"]), list(settings["norms"])
    size = sizes.index(run.batch_size) if run.batch_size in sizes else len(sizes)
    norm = norms.index(run.norm) if run.norm in norms else len(norms)
    return run.seed, size, -run.batch_size, run.warmup, run.learning_rate, norm, run.norm
