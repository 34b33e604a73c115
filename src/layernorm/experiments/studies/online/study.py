"""One trained network in batches of any size, step by step, and in training mode: is it the same function?

The paper: layer norm "performs exactly the same computation at training and test times" (abstract) and puts
"no constraint on the size of a mini-batch", so that it serves online learning with batch size 1 (§1, §3).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from layernorm import LayerNormLSTM, backends
from layernorm.experiments.classification import TEST_ERROR, Classification, Data
from layernorm.experiments.errors import DamagedFile, ExperimentError
from layernorm.experiments.networks import feedforward
from layernorm.experiments.results import study_tables
from layernorm.experiments.run import checkpoints
from layernorm.experiments.run.training import Run, Trainer
from layernorm.experiments.section import Section
from layernorm.experiments.studies.online import section
from layernorm.experiments.task import Preset, Study
from layernorm.experiments.tasks import digits, digits_rows

NORMS: Final = ("none", "batch", "layer")
# By which a row of training.csv is known.
_TRAINED: Final = ("seed", "network", "norm", "train_batch_size")
# By which a row of inference.csv is known.
_MEASURED: Final = ("seed", "network", "norm", "mode", "steps", "batch_size")
# The files, and the columns of each.
_FILES: Final = {
    "training": (*_TRAINED, "test_error", "problem"),
    "inference": (
        *_MEASURED,
        *("deviation", "bits", "changed", "test_error", "by_mode", "mode_bits", "problem"),
    ),
}
_NUMBERS: Final = ("deviation", "bits", "changed", "test_error", "by_mode", "mode_bits")
# Of each seed: both networks with each norm, layer norm's LSTM on the reference, two norms alone.
_MEASUREMENTS: Final = 2 * len(NORMS) + 1 + 2


class RowReader(digits_rows.RowReader):
    """The reader of ``digits-rows``, which also reads one row at a time.

    Args:
        norm: as ``layernorm.experiments.networks.recurrent.lstm`` takes it.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.studies.online.study import RowReader
        >>> reader, images = RowReader("layer"), torch.rand(3, 8, 8)
        >>> torch.allclose(reader.online(images), reader.states(images))
        True
    """

    def online(self, images: Tensor) -> Tensor:
        """Compute the same, one row at a time: by a stream, or by calls with the state where there is none.

        To batch norm each row is then the first of a sequence, whose statistics it takes.
        """
        if isinstance(self.lstm, LayerNormLSTM):
            stream = self.lstm.stream(batch_size=len(images))
            for row in images.unbind(1):
                last = stream.step(row)
            return last
        rows = images.split(1, dim=1)
        _, state = self.lstm(rows[0])
        for row in rows[1:]:
            _, state = self.lstm(row, state)
        end: Tensor = state[0][0]
        return end

    def told(self, images: Tensor) -> Tensor:
        """Compute batch norm's as ``online`` does, each row with the statistics of its own step."""
        state, readers = None, copy.deepcopy(self)
        statistics = {
            name: buffer.clone()
            for name, buffer in self.lstm.named_buffers()
            if name.startswith(("running", "num_batches"))
        }
        for step, row in enumerate(images.split(1, dim=1)):
            for name, buffer in statistics.items():
                readers.lstm.get_buffer(name).copy_(buffer.roll(-step, 0))
            _, state = readers.lstm(row, state)
        assert state is not None  # noqa: S101 - there is a row
        last: Tensor = state[0][0]
        return last


class Subject(NamedTuple):
    """A network of which the study asks whether it is one function.

    Attributes:
        network: in a copy for each way.
        cases: its inputs, one a row.
        whole: the outputs of some cases.
        online: the same, step by step; None where there are no steps.
        told: the same, where each step must be told which one it is; None where that makes no difference.
        logits: made of the outputs of all cases at once, so that no product's bits depend on the batch; None
            where the outputs are no answer.
    """

    network: nn.Module
    cases: Tensor
    whole: Callable[[Any, Tensor], Tensor]
    online: Callable[[Any, Tensor], Tensor] | None
    told: Callable[[Any, Tensor], Tensor] | None
    logits: Callable[[Any, Tensor], Tensor] | None


class Way(NamedTuple):
    """The way outputs are computed: training or evaluation mode, whole, online or told, the batch size."""

    mode: str
    steps: str
    batch_size: int


def measure(subject: Subject, targets: Tensor, batch_sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Compare every way with one: evaluation mode, all cases in one batch.

    Args:
        subject: what is measured.
        targets: classes (cases).
        batch_sizes: those to try in addition to all cases in one batch.

    Returns:
        A row for each way with its fields and ``deviation``, the greatest difference of a logit (of an
        output where there are no logits); ``bits``, whether all bits of the outputs are equal; ``changed``,
        the number of predictions that are other ones; ``test_error`` in percent; ``by_mode`` and
        ``mode_bits``, the same as the first two against evaluation mode in the same batches; and ``problem``,
        why there is nothing of these.
    """
    everything = len(targets)
    sizes = [*(size for size in batch_sizes if size < everything), everything]
    base = _outputs(subject, Way("evaluation", "whole", everything))
    answers = _answers(subject, base)
    rows = []
    for way in _ways(sizes, subject):
        row: dict[str, Any] = {**way._asdict(), "problem": ""}
        rows.append(row)
        try:
            outputs = _outputs(subject, way)
        except ValueError as error:  # batch norm's, of one case
            row["problem"] = str(error)
            continue
        found = _answers(subject, outputs)
        row["deviation"] = float((found - answers).abs().max())
        row["bits"] = float(torch.equal(outputs, base))
        if way.mode == "training":
            same = _outputs(subject, way._replace(mode="evaluation"))
            row["by_mode"] = float((found - _answers(subject, same)).abs().max())
            row["mode_bits"] = float(torch.equal(outputs, same))
        if subject.logits is not None:
            predicted = found.argmax(1)
            row["changed"] = int((predicted != answers.argmax(1)).sum())
            row["test_error"] = 100 * float((predicted != targets).double().mean())
    return rows


def _ways(batch_sizes: Sequence[int], subject: Subject) -> Iterator[Way]:
    for mode in ("evaluation", "training"):
        for size in batch_sizes:
            yield Way(mode, "whole", size)
    for steps in ("online", "told"):
        if getattr(subject, steps) is not None:
            for size in batch_sizes:
                yield Way("evaluation", steps, size)


def _outputs(subject: Subject, way: Way) -> Tensor:
    """Compute the outputs of all cases by a copy, as training mode moves running statistics."""
    network = copy.deepcopy(subject.network).train(way.mode == "training")
    compute = getattr(subject, way.steps)
    # Training keeps what a derivative needs, which must not change the numbers.
    with torch.set_grad_enabled(way.mode == "training"):
        parts = [compute(network, cases).detach() for cases in subject.cases.split(way.batch_size)]
    return torch.cat(parts)


def _answers(subject: Subject, outputs: Tensor) -> Tensor:
    with torch.no_grad():
        return outputs if subject.logits is None else subject.logits(subject.network, outputs)


def run(
    folder: Path,
    say: Callable[[str], None],
    *,
    epochs: int,
    train_batch_sizes: Sequence[int],
    batch_sizes: Sequence[int],
    seeds: int,
) -> None:
    """Train both networks with each norm and batch size, and measure those of the greatest one.

    Writes ``training.csv`` and ``inference.csv`` after each training; one that was stopped continues from its
    checkpoint.

    Args:
        folder: where the files go.
        say: shows a line of progress.
        epochs: of each training.
        train_batch_sizes: of the trainings.
        batch_sizes: in which the trained network is evaluated.
        seeds: repetitions.

    Raises:
        ExperimentError: a file is damaged.
    """
    data = digits.load()
    about = f"online epochs={epochs} batch_sizes={list(batch_sizes)}"
    done = _done(folder, say, about)
    for case in itertools.product(range(seeds), ("LSTM", "feed-forward"), NORMS, sorted(train_batch_sizes)):
        if case in done:
            continue
        seed, network, norm, size = case
        say(f"{network}, norm {norm}, trained with batch size {size}, seed {seed}")
        checkpoints.drop_damaged(_checkpoint(folder, case), say)
        trained, row = _train(folder, data, network, norm, seed, size, epochs)
        if size == max(train_batch_sizes) and trained is not None:
            rows = _measured(data, network, norm, trained, batch_sizes)
            _add(folder, "inference", [{**measured, "seed": seed} for measured in rows], about)
        _add(folder, "training", [dict(zip(_TRAINED, case, strict=True)) | row], about)
        _checkpoint(folder, case).unlink(missing_ok=True)


def _done(folder: Path, say: Callable[[str], None], about: str) -> set[Any]:
    """Return the trainings that are measured; remove both files where one is damaged."""
    try:
        found = {name: _load(folder, name, about) for name in _FILES if (folder / f"{name}.csv").exists()}
    except DamagedFile as error:
        say(study_tables.will_be_repeated(error))
        for name in _FILES:
            (folder / f"{name}.csv").unlink(missing_ok=True)
        return set()
    if "training" not in found:
        return set()
    return set(found["training"][list(_TRAINED)].itertuples(index=False, name=None))


def _train(
    folder: Path, data: Data, network: str, norm: str, seed: int, batch_size: int, epochs: int
) -> tuple[nn.Module | None, dict[str, Any]]:
    """Train a network; return it and its test error, or None and what batch norm says to a batch of one."""
    problem = (
        Classification(digits_rows.load(), RowReader)
        if network == "LSTM"
        else Classification(data, partial(feedforward.network, (64, 128, 128, 10)))
    )
    preset = Preset(epochs, (batch_size,), (norm,), evaluate_every=len(data.train_targets) * epochs)
    checkpoint = _checkpoint(folder, (seed, network, norm, batch_size))
    trainer = Trainer(
        problem,
        Run(norm, batch_size, preset.learning_rates[0], seed),
        preset,
        checkpoint,
        identity=f"{network} {epochs}",
    )
    try:
        trainer.train()
    except ValueError as error:
        if batch_size > 1:
            raise
        return None, {"problem": str(error)}
    return trainer.network, {"test_error": trainer.records[-1][TEST_ERROR.name], "problem": ""}


def _measured(
    data: Data, network: str, norm: str, trained: nn.Module, batch_sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Measure a trained network; layer norm's LSTM also on the reference, whose bits promise less."""
    rows = []
    for name, label, subject, kernel in _subjects(data, network, norm, trained):
        with backends.use(kernel) if kernel else contextlib.nullcontext():
            measured = measure(subject, data.test_targets, batch_sizes)
        rows += [{"network": name, "norm": label, **row} for row in measured]
    return rows


def _subjects(
    data: Data, network: str, norm: str, trained: nn.Module
) -> Iterator[tuple[str, str, Subject, str | None]]:
    if network == "LSTM":
        cases = digits_rows.load().test_inputs
        told = RowReader.told if norm == "batch" else None
        ways = (RowReader.states, RowReader.online, told)
        reader = Subject(trained, cases, *ways, lambda net, h: net.logits(h))
        yield "LSTM", norm, reader, None
        if norm == "layer":
            yield "LSTM", "layer (reference)", reader, "reference"
        return
    classifier = Subject(trained, data.test_inputs, _called, None, None, lambda net, outputs: outputs)
    yield "feed-forward", norm, classifier, None
    if norm != "none":
        # The norm by itself, on the summed inputs of the first hidden layer as one product made them.
        linear, layer = trained.get_submodule("0"), trained.get_submodule("1")
        with torch.no_grad():
            summed = linear(data.test_inputs)
        yield "norm alone", norm, Subject(layer, summed, _called, None, None, None), None


def _called(network: nn.Module, cases: Tensor) -> Tensor:
    outputs: Tensor = network(cases)
    return outputs


def _checkpoint(folder: Path, case: tuple[int, str, str, int]) -> Path:
    seed, network, norm, size = case
    return folder / f"{network}-{norm}-batch{size}-seed{seed}.checkpoint"


def _add(folder: Path, name: str, rows: list[dict[str, Any]], about: str) -> None:
    """Add rows to a file, in place of earlier ones of the same way that a stop has left behind."""
    path = folder / f"{name}.csv"
    parts = [_load(folder, name, about)] if path.is_file() else []
    parts.append(pd.DataFrame(rows, columns=list(_FILES[name])))
    known = list({"training": _TRAINED, "inference": _MEASURED}[name])
    together = pd.concat([part.astype(object) for part in parts], ignore_index=True)
    study_tables.write(path, together.drop_duplicates(known, keep="last"), about)


def read(folder: Path) -> Section:
    """Return cards, tables and charts from the files that ``run`` wrote.

    Raises:
        ExperimentError: a file is missing, damaged or unfinished.
    """
    results = {name: _load(folder, name) for name in _FILES}
    training, inference = results["training"], results["inference"]
    trainings = 2 * len(NORMS) * training.train_batch_size.nunique()
    finished = set(training.seed) & {
        seed
        for seed, rows in inference.groupby("seed")
        if len(rows[["network", "norm"]].drop_duplicates()) == _MEASUREMENTS
        and (training.seed == seed).sum() == trainings
    }
    if not finished:
        raise ExperimentError(f"{folder} has no seed finished yet; the same command goes on with it")
    results = {name: table[table.seed.isin(finished)] for name, table in results.items()}
    return Section(
        name=STUDY.name,
        title=STUDY.title,
        summary=STUDY.summary,
        command="layernorm online",
        cards=section.cards(results),
        tables=section.tables(results),
        charts=section.charts(results),
    )


def _load(folder: Path, name: str, about: str | None = None) -> pd.DataFrame:
    def parse(table: pd.DataFrame) -> pd.DataFrame:
        missing = [column for column in _FILES[name] if column not in table]
        if missing:
            raise ValueError(f"no column {missing[0]!r}")
        numbers = [column for column in _NUMBERS if column in table]
        return table.astype(dict.fromkeys(numbers, float)).fillna({"problem": ""})

    remedy = "delete training.csv and inference.csv, and the same command measures both again"
    return study_tables.read(folder / f"{name}.csv", parse, remedy, about, dtype={"problem": object})


STUDY: Final = Study(
    name="online",
    title="Any batch, step by step",
    section="abstract, §1, §3",
    summary=(
        "scikit-learn's handwritten digits, row by row by an LSTM of 64 units and at once by 64-128-128-10, "
        "Adam: each trained network evaluated on the 450 test cases in batches of several sizes, step by "
        "step, and in training mode; trainings with several batch sizes"
    ),
    run=run,
    read=read,
    presets={
        "small": {"epochs": 5, "train_batch_sizes": (1, 4, 32), "batch_sizes": (1, 4, 128), "seeds": 1},
        "paper": {"epochs": 20, "train_batch_sizes": (1, 4, 32), "batch_sizes": (1, 4, 128), "seeds": 5},
    },
)
