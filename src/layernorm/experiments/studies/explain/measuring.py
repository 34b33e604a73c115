"""Measurements that are kept as they are made: a table that grows, and the training of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from layernorm.experiments.classification import Classification, Data
from layernorm.experiments.errors import DamagedFile
from layernorm.experiments.results import study_tables
from layernorm.experiments.run.training import Run, Trainer
from layernorm.experiments.section import Card, Chart, Table
from layernorm.experiments.task import Preset

# The types of a table's columns.
_TYPES = {"batch_size": int, "seed": int, "place": int, "test_error": float, "value": float}


class Part(NamedTuple):
    """Hold what the report shows of a part of the study."""

    cards: Sequence[Card]
    tables: Sequence[Table]
    charts: Sequence[Chart]


def complete(
    path: Path,
    keys: Sequence[str],
    wanted: Sequence[tuple[Any, ...]],
    measure: Callable[..., Sequence[Mapping[str, Any]]],
    about: str,
    say: Callable[[str], None],
) -> None:
    """Measure the cases that a table does not hold yet, and add the rows of each as it is done.

    Args:
        path: the table; it is measured again where it is damaged.
        keys: the columns that tell the cases apart.
        wanted: the cases.
        measure: returns the other columns of a case's rows.
        about: what the table is of: the study and its sizes.
        say: shows a line of progress.

    Raises:
        ExperimentError: the file is of something else.
    """
    there = pd.DataFrame(columns=list(keys))
    if path.exists():
        try:
            there = load(path, about)
        except DamagedFile as error:
            say(study_tables.will_be_repeated(error))
            path.unlink()
    done = {*there[list(keys)].itertuples(index=False, name=None)}
    for case in wanted:
        if case in done:
            continue
        named: dict[str, Any] = dict(zip(keys, case, strict=True))
        say(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in named.items()))
        rows = pd.DataFrame([{**named, **row} for row in measure(*case)])
        there = pd.concat([there, rows], ignore_index=True) if len(there) else rows
        study_tables.write(path, there, about)


def load(path: Path, about: str | None = None) -> pd.DataFrame:
    """Return a table.

    Raises:
        DamagedFile: it is empty, torn or changed.
        ExperimentError: it is missing, or of something else.
    """

    def parse(table: pd.DataFrame) -> pd.DataFrame:
        return table.astype({name: kind for name, kind in _TYPES.items() if name in table})

    return study_tables.read(path, parse, "delete it, and the same command measures it again", about)


def trained(
    folder: Path, run: Run, epochs: int, data: Data, network: Callable[[str], nn.Module], kind: str = ""
) -> Trainer:
    """Return the trainer of a network at its end; ``kind`` tells apart what else differs between runs."""
    problem = Classification(data, network)
    every = max(1, problem.cases // run.batch_size * epochs)
    preset = Preset(epochs, (run.batch_size,), (run.norm,), evaluate_every=every)
    checkpoint = folder / f"{run.name}{kind}.checkpoint"
    trainer = Trainer(problem, run, preset, checkpoint, identity=f"explain {epochs}{kind}")
    trainer.train()
    checkpoint.unlink(missing_ok=True)
    return trainer
