"""Hidden states and gradients over time, with and without layer norm, from 10 to 10,000 steps.

The paper (abstract and §3.1): without normalization the summed inputs of the recurrent units grow or shrink
at every step, and gradients explode or vanish; layer norm is invariant to the scale of all the summed inputs
of a layer, so that the dynamics from hidden state to hidden state are much more stable.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

import layernorm
from layernorm.experiments.errors import DamagedFile, ExperimentError
from layernorm.experiments.results import study_tables
from layernorm.experiments.section import Card, Chart, Line, Panel, Section, Table, Verdict
from layernorm.experiments.task import Study

#: By what the orthogonal weights are multiplied, of the inputs and of the hidden states alike.
SCALES: Final = (0.5, 1.0, 2.0)
NORMS: Final = ("none", "layer")
_RESULTS: Final = "dynamics.csv"
_CASE: Final = ["cell", "norm", "scale", "steps"]
_POINTS: Final = 60  # of a line
# Below this numbers of float64 have fewer digits, down to none.
_LEAST: Final = sys.float_info.min
# The steps over which gradients are judged: the longest length at which none has vanished from float64.
_JUDGED: Final = 100

_MODULES: Final[dict[tuple[str, str], Callable[..., nn.Module]]] = {
    ("RNN (relu)", "none"): partial(nn.RNN, nonlinearity="relu"),
    ("RNN (relu)", "layer"): partial(layernorm.LayerNormRNN, nonlinearity="relu"),
    ("RNN (tanh)", "none"): nn.RNN,
    ("RNN (tanh)", "layer"): layernorm.LayerNormRNN,
    ("LSTM", "none"): nn.LSTM,
    ("LSTM", "layer"): layernorm.LayerNormLSTM,
    ("GRU", "none"): nn.GRU,
    ("GRU", "layer"): layernorm.LayerNormGRU,
}
#: The cells that are traced.
CELLS: Final = tuple(dict.fromkeys(cell for cell, _ in _MODULES))


class Trace(NamedTuple):
    """Norms over time: of the hidden states, and of the last one's gradient by the inputs."""

    hidden: Tensor
    gradient: Tensor


def trace(cell: str, norm: str, scale: float, steps: int, hidden_size: int, seed: int) -> Trace:
    """Run a fresh network in float64 over standard normal inputs.

    Its weights are orthogonal matrices, two a gate, multiplied by ``scale``; its other parameters are as
    ``torch.nn`` and ``layernorm`` make them.

    Args:
        cell: one of ``CELLS``.
        norm: one of ``NORMS``.
        scale: of the weights.
        steps: T.
        hidden_size: H.
        seed: of weights and inputs.

    Returns:
        ``hidden`` (T): the root mean square of the hidden states over a batch of 4 and H; infinite or NaN
        from the step on at which they overflow. ``gradient`` (T): the norm of the gradient of a random
        projection of the last hidden state by the input of each step; NaN where that state has overflowed.

    Raises:
        ValueError: there is no such cell or norm.

    Examples:
        >>> from layernorm.experiments.studies.dynamics import trace
        >>> grown = trace("RNN (relu)", "none", 2.0, 20, 16, seed=0).hidden
        >>> bool(grown[-1] > 1e4), bool(trace("RNN (relu)", "layer", 2.0, 20, 16, seed=0).hidden[-1] < 10)
        (True, True)
    """
    for name, value, known in (("cell", cell, CELLS), ("norm", norm, NORMS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _MODULES[cell, norm](hidden_size, hidden_size).double()
        with torch.no_grad():
            for name in ("weight_ih_l0", "weight_hh_l0"):
                for gate in network.get_parameter(name).split(hidden_size):
                    gate.copy_(scale * nn.init.orthogonal_(torch.empty_like(gate)))
        inputs = torch.randn(steps, 4, hidden_size, dtype=torch.float64, requires_grad=True)
        projection = torch.randn(4, hidden_size, dtype=torch.float64)
    output, _ = network(inputs)
    (gradient,) = torch.autograd.grad((output[-1] * projection).sum(), inputs)
    hidden = _norms(output.detach()) / math.sqrt(4 * hidden_size)
    # Of what has overflowed autograd makes a gradient too, which is none.
    return Trace(hidden, _norms(gradient) if hidden[-1].isfinite() else torch.full_like(hidden, math.nan))


def _norms(sequence: Tensor) -> Tensor:
    """Return the norm of each step of (T, N, H), within the range of float64 even where squares are not."""
    limits = torch.finfo(sequence.dtype)
    largest = sequence.abs().amax((1, 2), keepdim=True).clamp(limits.tiny, limits.max)
    return largest.flatten() * (sequence / largest).square().sum((1, 2)).sqrt()


def run(
    folder: Path, say: Callable[[str], None], *, lengths: Sequence[int], hidden_size: int, seeds: int
) -> None:
    """Trace every cell, norm, scale and length; write ``dynamics.csv`` after each.

    Args:
        folder: where the file goes; what it holds already is not traced again.
        say: shows a line of progress.
        lengths: numbers of steps.
        hidden_size: H.
        seeds: repetitions, whose geometric means are kept.

    Raises:
        ExperimentError: the file is damaged.
    """
    path = folder / _RESULTS
    about = f"dynamics hidden_size={hidden_size} seeds={seeds}"
    measured = []
    if path.exists():
        try:
            measured.append(_load(path, about))
        except DamagedFile as error:
            say(study_tables.will_be_repeated(error))
    done = {case for table in measured for case in table[_CASE].itertuples(index=False, name=None)}
    for case in _cases(lengths):
        if case in done:
            continue
        cell, norm, scale, steps = case
        say(f"{cell}, norm {norm}, weights × {scale:g}, {steps:,} steps")
        traces = [trace(cell, norm, scale, steps, hidden_size, seed) for seed in range(seeds)]
        rows = pd.DataFrame(_rows(traces, steps))
        measured.append(rows.assign(cell=cell, norm=norm, scale=scale, steps=steps))
        study_tables.write(path, pd.concat(measured, ignore_index=True), about)


def read(folder: Path) -> Section:
    """Return cards, tables and charts of the lengths of ``dynamics.csv`` that are finished.

    Raises:
        ExperimentError: the file is missing or damaged, or no length is finished.
    """
    path = folder / _RESULTS
    table = _load(path)
    finished = [
        steps
        for steps, rows in table.groupby("steps")
        if len(rows[_CASE].drop_duplicates()) == len(_MODULES) * len(SCALES)
    ]
    if not finished:
        raise ExperimentError(f"{path} has no length finished yet; the same command goes on with it")
    table = table[table.steps.isin(finished)]
    summary = _summary(table)
    return Section(
        name=STUDY.name,
        title=STUDY.title,
        summary=STUDY.summary,
        command="layernorm dynamics",
        cards=_cards(summary),
        tables=(
            _table(summary, "growth", "The hidden state after so many steps, as a multiple of the first"),
            _table(
                summary, "kept", "The gradient so many steps back, as a multiple of that of the last step"
            ),
        ),
        charts=[_chart(table, cell) for cell in CELLS],
    )


def _load(path: Path, about: str | None = None) -> pd.DataFrame:
    def parse(table: pd.DataFrame) -> pd.DataFrame:
        types = {"step": int, "hidden": float, "gradient": float}
        return table.astype({**types, "cell": str, "norm": str, "scale": float, "steps": int})

    return study_tables.read(path, parse, "delete it, and the same command measures it again", about)


def _cases(lengths: Sequence[int]) -> Iterator[tuple[str, str, float, int]]:
    for steps in sorted(lengths):
        for cell, norm in _MODULES:
            for scale in SCALES:
                yield cell, norm, scale, steps


def _rows(traces: Sequence[Trace], steps: int) -> list[dict[str, Any]]:
    """Return the traces at steps evenly spaced on a logarithmic axis, as geometric means over the seeds."""
    spaced = torch.logspace(0, math.log10(steps), _POINTS, dtype=torch.float64).round().long()
    chosen = spaced.unique().clamp(1, steps)
    hidden = torch.stack([t.hidden for t in traces]).log().mean(0).exp()
    # By the number of steps back, from the last one, which is 1.
    back = torch.stack([t.gradient.flip(0) for t in traces]).log().mean(0).exp()
    return [
        {"step": int(step), "hidden": float(hidden[step - 1]), "gradient": float(back[step - 1])}
        for step in chosen
    ]


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return for each case the last hidden norm over the first, and the first gradient over the last."""
    ordered = table.sort_values("step", kind="stable").groupby(_CASE, sort=False)
    # Not first() and last(), which skip NaN.
    first, last = (ordered.nth(place).set_index(_CASE) for place in (0, -1))
    return pd.DataFrame(
        {
            "last_hidden": last.hidden,
            "growth": last.hidden / first.hidden,
            "kept": last.gradient / first.gradient,
        }
    ).reset_index()


def _cards(summary: pd.DataFrame) -> list[Card]:
    return [_steadiness(summary), _invariance(summary), _gradients(summary)]


def _steadiness(summary: pd.DataFrame) -> Card:
    longest = int(summary.steps.max())
    relu = summary[(summary.cell == "RNN (relu)") & (summary.steps == longest)]
    growth = {norm: relu[relu.norm == norm].growth for norm in NORMS}
    steady = {norm: bool(values.between(0.1, 10.0).all()) for norm, values in growth.items()}
    return Card(
        "Without normalization the summed inputs tend to grow or shrink at every step; with layer norm they "
        "do not.",
        "§3.1",
        f"After {longest:,} steps of an RNN (relu) the hidden state is this many times the first, for "
        f"weights × {_scales()}: without norm {_each(growth['none'])}; with layer norm "
        f"{_each(growth['layer'])}",
        "agrees" if steady["layer"] and not steady["none"] else "differs",
    )


def _invariance(summary: pd.DataFrame) -> Card:
    groups = summary.groupby(["norm", "cell", "steps"]).last_hidden
    spread = groups.agg(lambda values: values.max(skipna=False) / values.min(skipna=False)).groupby("norm")
    least, greatest = spread.min(), spread.agg(lambda values: values.max(skipna=False))
    return Card(
        "A recurrent layer with layer norm is invariant to the scale of all its summed inputs.",
        "§3.1",
        f"Last hidden states for weights × {_scales()} differ in size by at most "
        f"{100 * (greatest['layer'] - 1):.2g} % with layer norm in every cell and length, as eps alone "
        f"sees the scale; and by at least {100 * (least['none'] - 1):.2g} % without",
        "agrees" if greatest["layer"] < 1.05 < least["none"] else "differs",
    )


def _gradients(summary: pd.DataFrame) -> Card:
    steps = max((n for n in summary.steps.unique() if n <= _JUDGED), default=int(summary.steps.min()))
    chosen = summary[summary.steps == steps]
    factors = (chosen.kept ** (1 / max(steps - 1, 1))).groupby([chosen.norm, chosen.cell], sort=False)
    least, greatest = factors.min(), factors.agg(lambda values: values.max(skipna=False))
    texts = {
        norm: "; ".join(
            f"{cell} {_range(least[norm, cell], greatest[norm, cell], '{:.2f}')}" for cell in CELLS
        )
        for norm in NORMS
    }
    ratio = (greatest / least).groupby("norm").agg(lambda values: values.max(skipna=False))
    verdict: Verdict = "differs"
    if ratio["layer"] < 1.02 and not ratio["none"] < 1.02:
        preserved = least["layer"].min() > 0.9 and greatest["layer"].max() < 1.1
        verdict = "agrees" if preserved else "partly"
    return Card(
        "Summed inputs that grow or shrink make gradients explode or vanish; with layer norm the dynamics "
        "are much more stable.",
        "§3.1",
        f"In the mean over {steps} steps, for weights × {_scales()}, a step back multiplies the gradient "
        f"without norm by {texts['none']}; with layer norm by {texts['layer']}",
        verdict,
        "The scale of the weights no longer matters to the gradient, but what a cell forgets at each step "
        "is forgotten with layer norm too."
        if verdict == "partly"
        else "",
    )


def _table(summary: pd.DataFrame, measure: str, caption: str) -> Table:
    lengths = sorted(summary.steps.unique())
    rows = []
    for (cell, norm, scale), cases in summary.groupby(["cell", "norm", "scale"], sort=False):
        by_length = cases.set_index("steps")[measure]
        rows.append([str(cell), str(norm), str(scale), *(_number(by_length[steps]) for steps in lengths)])
    return Table(
        caption,
        ("cell", "norm", "weights ×", *(f"{steps:,} steps" for steps in lengths)),
        rows,
        "Geometric means over the seeds, in float64. Overflow: the hidden state is beyond 1e308. 0: below "
        "1e-308.",
    )


def _chart(table: pd.DataFrame, cell: str) -> Chart:
    own = table[table.cell == cell]
    longest = int(own.steps.max())
    last = own[own.step == own.steps]
    # Without a last hidden state there is no gradient.
    overflown = set(last[last.gradient.isna()].steps)
    told = max((n for n in own.steps.unique() if n not in overflown), default=longest)
    rows = []
    for measure, steps, y_label, x_label in (
        ("hidden", longest, "hidden state (root mean square)", "step"),
        ("gradient", told, "gradient by the input (norm)", "steps back (1: the last)"),
    ):
        panels = []
        for scale in SCALES:
            lines = []
            for norm in NORMS:
                points = own[(own.steps == steps) & (own.norm == norm) & (own.scale == scale)]
                # What has overflowed or vanished has no place on a logarithmic axis.
                shown = points[measure].between(_LEAST, sys.float_info.max)
                points = points[shown].sort_values("step")
                lines.append(Line(norm, points.step.tolist(), points[measure].tolist()))
            panels.append(Panel(f"weights × {scale:g}", x_label, y_label, lines, x_log=True, y_log=True))
        rows.append(panels)
    name = "dynamics-" + cell.lower().replace(" (", "-").rstrip(")")
    caption = (
        f"{cell}: hidden states over {longest:,} steps, gradients over {told:,}; a line ends where its "
        "numbers overflow or vanish."
    )
    return Chart(name, caption, rows)


def _scales() -> str:
    return ", ".join(f"{scale:g}" for scale in SCALES)


def _each(values: pd.Series) -> str:
    return ", ".join(_number(value) for value in values)


def _range(low: float, high: float, form: str) -> str:
    texts = [form.format(value) for value in (low, high)]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _number(value: float) -> str:
    if math.isnan(value) or math.isinf(value):
        return "overflow"
    return f"{value:.3g}" if value >= _LEAST else "0"


STUDY: Final = Study(
    name="dynamics",
    title="Hidden-state dynamics",
    section="abstract, §3.1",
    summary=(
        "Fresh RNNs, LSTMs and GRUs in float64 over standard normal inputs, their weights orthogonal times "
        "0.5, 1 and 2: size of the hidden states, and of the gradient of the last one by the input of each "
        "step."
    ),
    run=run,
    read=read,
    presets={
        "small": {"lengths": (10, 100, 1000, 10_000), "hidden_size": 32, "seeds": 2},
        "paper": {"lengths": (10, 100, 1000, 10_000), "hidden_size": 256, "seeds": 5},
    },
)
