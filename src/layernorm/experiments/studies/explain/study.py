"""Show what each norm averages, in pictures and numbers, and what follows for batches and for time steps.

The paper's own statements: which summed inputs share a mean (§2, §3), that batch norm needs large batches and
running statistics (§2), those of each time step in a recurrent network (§3.1), and that layer norm needs
none of that (§3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from layernorm.experiments.report import drawing, norms
from layernorm.experiments.section import Picture, Section
from layernorm.experiments.storage import files
from layernorm.experiments.studies.explain import batches, lengths
from layernorm.experiments.task import Study


def run(
    folder: Path,
    say: Callable[[str], None],
    *,
    batch_sizes: Sequence[int],
    learning_rates: Sequence[float],
    seeds: int,
    epochs: int,
    times: Sequence[float],
    reader_epochs: int,
) -> None:
    """Train the digits at every batch size, and as sequences; write the tables and the picture.

    Args:
        folder: where the files go; what they hold already is not trained again.
        say: shows a line of progress.
        batch_sizes: cases per update.
        learning_rates: of which each norm has its best at each batch size, by the validation cases.
        seeds: repetitions.
        epochs: passes over the training cases.
        times: how many times as long as in training the sequences of a test are.
        reader_epochs: passes over the training sequences.

    Raises:
        ExperimentError: a file is of something else.
    """
    files.write(folder / "axes.png", drawing.png(norms.axes_picture(), dpi=110))
    batches.measure(folder, say, batch_sizes, learning_rates, seeds, epochs)
    lengths.measure(folder, say, times, seeds, reader_epochs)


def read(folder: Path) -> Section:
    """Return what the report shows of a folder.

    Raises:
        ExperimentError: a file is missing or damaged.
    """
    parts = batches.read(folder), lengths.read(folder)
    return Section(
        name=STUDY.name,
        title=STUDY.title,
        summary=STUDY.summary,
        command="layernorm explain",
        cards=[card for part in parts for card in part.cards],
        tables=[*norms.steps_tables(), *(table for part in parts for table in part.tables)],
        charts=[chart for part in parts for chart in part.charts],
        pictures=[Picture(folder / "axes.png", norms.AXES_CAPTION)],
    )


STUDY: Final = Study(
    name="explain",
    title="What each norm averages",
    section="§1 to §3",
    summary=(
        "Which inputs share a mean, the steps in numbers, the digits' test error over batch sizes and over "
        "the momentum of running statistics, and on longer sequences than in training"
    ),
    run=run,
    read=read,
    presets={
        "small": {
            "batch_sizes": (2, 4, 8, 32, 128),
            "learning_rates": (3e-4, 3e-3),
            "seeds": 5,
            "epochs": 5,
            "times": (1, 1.5, 2, 3, 4),
            "reader_epochs": 15,
        },
        "paper": {
            "batch_sizes": (1, 2, 4, 8, 16, 32, 64, 128, 256),
            "learning_rates": (3e-4, 1e-3, 3e-3, 1e-2),
            "seeds": 5,
            "epochs": 15,
            "times": (1, 1.5, 2, 3, 4, 8),
            "reader_epochs": 40,
        },
    },
)
