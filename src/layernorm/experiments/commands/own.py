"""Norms compared on a model of one's own, from Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack, get_args

import pandas as pd
from rich.console import Console
from torch import nn

from layernorm.baselines import Norm
from layernorm.experiments import registry
from layernorm.experiments.commands import compare as runner
from layernorm.experiments.commands import reproduce
from layernorm.experiments.own_task import Data, Measure, Options, task
from layernorm.experiments.results import results_table
from layernorm.experiments.results.comparison import Comparison
from layernorm.experiments.run.training import Precision
from layernorm.experiments.task import Task


@dataclass(frozen=True)
class Result:
    """A finished comparison.

    Attributes:
        out: its folder.
        task: what was trained.
    """

    out: Path
    task: Task

    @property
    def records(self) -> pd.DataFrame:
        """Every evaluation of every run, as in ``results.csv``."""
        return runner.records(self.out)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each batch size and norm, at the norm's best learning rate.

        ``final`` is the mean over the seeds of the metric that decides, on the test cases at the end of
        training, and ``final_std`` its standard deviation; ``difference`` with ``difference_low`` and
        ``difference_high`` what it is more than the baseline's, paired by seed, and the 95 % interval of
        that.
        """
        return results_table.summarize(self.records, self.task.norms, self.task)

    def best(self, batch_size: int | None = None) -> str:
        """Return the name of the norm with the best mean, at a batch size or else at the greatest.

        Raises:
            ValueError: there are no runs of that batch size.
        """
        table = self.table
        size = table.batch_size.max() if batch_size is None else batch_size
        rows = table[table.batch_size == size].dropna(subset="final")
        if rows.empty:
            sizes = ", ".join(map(str, table.batch_size.unique()))
            raise ValueError(f"batch_size must be one of {sizes}; got {batch_size}")
        order = rows.sort_values("final", ascending=not self.task.final.higher)
        return str(order.norm.iloc[0])

    def report(self) -> Path:
        """Write ``report.html`` anew and return its path."""
        return reproduce.write(self.out)


def compare(
    *,
    model: Callable[[Norm], nn.Module],
    train: Data,
    valid: Data,
    loss: Measure,
    out: str | Path | None = None,
    device: str = "cpu",
    precision: Precision = "float32",
    quiet: bool = False,
    **options: Unpack[Options],
) -> Result:
    """Compare norms on a model of one's own: each at its best learning rate, over several seeds.

    Every norm is trained at every batch size, learning rate and seed. The validation cases choose the
    learning rate of each norm; the test cases tell how good it is, at the end of training. All is kept in a
    folder as it goes: the same call goes on where an earlier one was stopped, and one with more norms or
    seeds adds them.

    Args:
        model: makes the network from a ``layernorm.baselines.Norm``: ``norm(64)`` is a norm of 64 features.
        train: inputs and targets, or a dataset of such pairs.
        valid: likewise, the cases by which learning rates are chosen.
        loss: the mean over a batch, from the network's outputs and the targets.
        out: the folder; None for ``runs/NAME``.
        device: where to train.
        precision: of the forward pass: "float32", or autocast to "bfloat16" or "float16".
        quiet: whether to print nothing.
        options: ``test``, ``metrics``, ``norms``, ``batch_sizes``, ``learning_rates``, ``seeds``, ``epochs``
            and all others of ``layernorm.task``, which says more of the ones above too.

    Returns:
        The result: its ``table``, ``records``, ``best()`` and ``report()``.

    Raises:
        ValueError: an argument has no sense, or data has unequal lengths.
        TypeError: an argument is of the wrong type.
        ExperimentError: loss or a metric gives no number, or the folder holds something else.

    Examples:
        >>> import tempfile, torch, layernorm
        >>> x = torch.randn(60, 5)
        >>> y = (x.sum(1) > 0).long()
        >>> from torch import nn
        >>> def model(norm):
        ...     return nn.Sequential(nn.Linear(5, 8), norm(8), nn.ReLU(), nn.Linear(8, 2))
        >>> result = layernorm.compare(
        ...     model=model, train=(x[:40], y[:40]), valid=(x[40:50], y[40:50]), test=(x[50:], y[50:]),
        ...     loss=nn.functional.cross_entropy, norms=["none", "layer"], batch_sizes=[8],
        ...     learning_rates=[0.01], seeds=2, epochs=1, out=tempfile.mkdtemp(), quiet=True,
        ... )
        >>> result.table[["norm", "seeds"]].values.tolist()
        [['none', 2], ['layer', 2]]
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}; got {precision!r}")
    made = task(model=model, train=train, valid=valid, loss=loss, **options)
    folder = Path("runs") / made.name if out is None else Path(out)
    comparison = Comparison(
        made.name,
        made.presets["small"],
        folder,
        device=device,
        precision=precision,
        command="layernorm.compare(…)",
    )
    with registry.given(made):
        runner.compare(comparison, Console(quiet=quiet))
    return Result(folder, made)


__all__ = ["Result", "compare"]
