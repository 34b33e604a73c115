"""The recurrent layers on a GPU: what the page says, from the table alone; and what is expected."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks.core import pages, plots
from benchmarks.core.benchmark import OURS, Outputs
from benchmarks.core.measuring import BASE
from benchmarks.core.table import MEASURES
from benchmarks.gpu_recurrent import measure as gpu_recurrent
from benchmarks.gpu_recurrent.peers import BY_HAND, KERNELS, PEERS
from benchmarks.recurrent import measure as recurrent
from benchmarks.recurrent import report as recurrent_report
from benchmarks.recurrent.measure import Point
from layernorm import machine
from layernorm.variants import resolve

_NUMBERS: Final = ("batch", "hidden", "steps", "threads", *MEASURES, *gpu_recurrent.FIGURES, "other_cpus")
_POINT: Final = ["cell", "dtype", "mode", "batch", "hidden", "steps"]
_GROUPS: Final = {"by hand": BY_HAND, "kernels": KERNELS}
#: What this package is compared with, and the heads of those columns.
_AGAINST: Final = {
    BASE: "torch.nn, un-normalized",
    "by hand": "best by hand",
    "kernels": "others' kernels, un-normalized",
    "products": "share of the products' limit",
}
_PACKAGES: Final = {
    column: name
    for column, name in {
        "driver": "driver",
        "cuda": "CUDA",
        "triton": "Triton",
        "flashrnn": "FlashRNN",
        "torchrl": "TorchRL",
    }.items()
    if column in machine.GPU_COLUMNS
}


def _triton(point: Point) -> float | None:
    """By the Triton kernels."""
    from layernorm.gpu.recurrent import predicted_time as recurrent_time

    sizes = (point.hidden, point.batch, point.steps, getattr(torch, point.dtype))
    return recurrent_time.seconds(point.cell, *sizes, training=point.mode == "training")


def _persistent(point: Point) -> float | None:
    """By the persistent kernel, forward and backward."""
    from layernorm.gpu.persistent import backward_plan as persistent_backward_plan
    from layernorm.gpu.persistent import launches as persistent
    from layernorm.gpu.persistent import plan as persistent_plan
    from layernorm.gpu.recurrent import predicted_time as recurrent_time

    groups = persistent.groups_of(point.cell, resolve("paper", point.cell).scope)
    sizes = (point.cell, point.hidden, point.dtype, 90, point.batch, groups)
    found = persistent_plan.plan(*sizes)
    if isinstance(found, str):
        return None
    step = persistent_plan.waves(found, point.batch) * sum(
        persistent_plan.seconds_per_step(found, groups=groups)
    )
    product = recurrent_time.product_seconds(
        point.cell, point.hidden, point.batch, getattr(torch, point.dtype)
    )
    if point.mode == "inference":
        return point.steps * (step + product)
    back = persistent_backward_plan.plan(*sizes)
    if isinstance(back, str):
        return None
    step += persistent_plan.waves(back, point.batch) * sum(
        persistent_backward_plan.seconds_per_step(back, groups=groups)
    )
    return point.steps * (step + 4 * product)


#: Seconds that a point is expected to take, by the heads of the columns of ``predictions``; None where
#: nothing is known. The kernels' own models of their times go here.
PREDICTED: Final[dict[str, Callable[[Point], float | None]]] = {"Triton": _triton, "persistent": _persistent}

_METHOD: Final = """\
### How the recurrent layers are measured on a GPU

- One layer and direction over {steps} steps, as many features in as out, from a state of zeros. Inference
  runs under `torch.inference_mode()`; training is forward and backward with a given gradient of the output,
  to fresh gradients of the input and all parameters. Everything has the same dtype, and PyTorch's settings
  are its defaults: cuDNN may compute float32 in TF32, `torch.mm` does not.
- `layernorm` is `LayerNormLSTM`, `LayerNormGRU` or `LayerNormRNN`, served by the kernel in the table whatever
  the choice would be; `layernorm-persistent` by the one that keeps the weights on the chip, at the sizes
  that fit there; `layernorm-recompute` has `recompute=True`, and `layernorm-none` is the un-normalized
  variant. `torch` is `torch.nn.LSTM`, `GRU` or `RNN`, cuDNN's, which normalizes nothing; ratios are to it.
- By hand: `loop` is the layer-normalized cell of `F.linear` and `F.layer_norm` in a Python loop, the product
  with the input taken out of it; `compile-step` is that with the step and what is outside the loop under
  `torch.compile`, and `scan` has PyTorch's operator of that name for the loop, all of it compiled.
- `flashrnn` is FlashRNN's fused kernels (for the GRU those that alternate with products), `torchrl` TorchRL's
  Triton kernels; both normalize nothing, and get their input with the sequences first in memory.
- Unless peers are named, `{everywhere}` are measured at every point and the others at {few} only.
  Those that compile have a process of their own at each point, beside `layernorm` and `torch`.
- Before a peer is measured, its output and gradients are compared with those of the loop in float32, for
  un-normalized ones with those of `torch.nn` without TF32. One that is off is listed as failed; column
  `difference` has by how much they differ.
- Times are between CUDA events around as many calls as take 3 ms, medians over the rounds, the peers of a
  point in turn and in an order that changes. A peer is sampled in every round until its samples have taken
  {each} seconds, but at least {least} times. {rounds}
- A ratio is `torch`'s time divided by the peer's in the same round, with its quartiles in brackets: above 1
  is faster than un-normalized PyTorch.
- The limit is the bare matrix products of the same sizes with `torch.mm` in a CUDA graph, into memory that is
  there: one of all steps' inputs and one for each step; in training those of the gradients too. The share is
  the limit divided by `layernorm`'s time; kernels that keep the weights on the chip from step to step can be
  above 1.
- Memory is the most that a call of forward and backward has allocated at a time beyond what was allocated
  before it: results, gradients and what is kept between.
- The first call is timed at {few}, in training, in a fresh process whose GPU has been started; it holds
  making the module, and compiling what no cache on disk has.
"""


def load(path: Path) -> pd.DataFrame:
    """The table, small points first.

    Raises:
        TableError: it is missing or damaged, or has no rows.
    """
    orders = {
        "cell": recurrent.CELLS,
        "dtype": (*recurrent.DTYPES, "float16"),
        "mode": recurrent.MODES,
        "peer": tuple(PEERS),
    }
    data = pages.load(path, gpu_recurrent.COLUMNS, _NUMBERS, orders)
    keys = ["cell_place", "dtype_place", "mode_place", "batch", "hidden", "steps", "peer_place"]
    return data.sort_values(keys, kind="stable", ignore_index=True)


def pictures(data: pd.DataFrame, outputs: Outputs) -> Iterator[tuple[Path, Figure]]:
    """The picture, and where it goes."""
    ours = data[(data.peer == OURS) & data.ratio_to_torch.notna()]
    if len(ours):
        yield _image(outputs), plots.ratio_curves(ours)


def _image(outputs: Outputs) -> Path:
    return outputs.image("gpu", "recurrent")


def section(data: pd.DataFrame, outputs: Outputs) -> Iterator[str]:
    """The part of the page, in Markdown."""
    yield "## Recurrent networks on a GPU\n"
    yield from (f"{line}\n" for line in pages.environments(data, "gpu", _PACKAGES))
    yield "Speed of `layernorm` relative to others': geometric means, the least of all points in brackets:\n"
    yield _summary_table(recurrent_report.compared(data, _GROUPS))
    yield from recurrent_report.slower(data, ["cell", "dtype", "mode", "batch", "hidden"])
    if data[data.peer == OURS].ratio_to_torch.notna().any():
        image = Path(os.path.relpath(_image(outputs), outputs.page.parent)).as_posix()
        yield f"![Speed relative to torch.nn's un-normalized layers on a GPU]({image})\n"
    heads = (
        "### Memory of a training step on a GPU",
        "MB that are allocated at a time in forward and backward, beyond what was before:",
    )
    yield from recurrent_report.memory(data, "peak_bytes", tuple(PEERS), heads)
    for cell, rows in data.groupby("cell", sort=False):
        yield f"### {str(cell).upper()} on a GPU\n"
        yield "Times in µs; limit, step (its time over their number) and ratio are `layernorm`'s.\n"
        yield _points_table(rows)
    yield from _starting(data)
    dtype, batch, hidden = gpu_recurrent.FEW
    yield _METHOD.format(
        steps=pages.joined(data.steps),
        everywhere="`, `".join(gpu_recurrent.EVERYWHERE),
        few=f"{dtype}, batch {batch}, size {hidden}",
        each=recurrent.EACH,
        least=recurrent.LEAST_ROUNDS,
        rounds=pages.rounds(data),
    )


def _summary_table(table: pd.DataFrame) -> str:
    body = [
        [*map(str, key), str(len(part)), *(pages.mean_and_worst(part[name]) for name in _AGAINST)]
        for key, part in table.groupby(["cell", "mode", "dtype"], sort=False)
    ]
    return pages.markdown(["cell", "mode", "dtype", "points", *_AGAINST.values()], "lllrrrrr", body)


def _points_table(rows: pd.DataFrame) -> str:
    peers = [peer for peer in PEERS if peer in set(rows.peer)]
    body = []
    for _, part in rows.groupby(_POINT, sort=False):
        found = {row["peer"]: row for row in part.to_dict("records")}
        ours = found.get(OURS, found[next(iter(found))])
        measured = pd.notna(ours["over_products"])
        body.append(
            [
                *(str(ours[name]) for name in ("dtype", "mode", "batch", "hidden", "kernel")),
                *(pages.time(found[peer]) if peer in found else "–" for peer in peers),
                recurrent_report.known(part.products_us),
                pages.microseconds(ours["median_us"] / ours["steps"]) if measured else "–",
                f"{1 / ours['over_products']:.2f}" if measured else "–",
                pages.ratio(ours),
            ]
        )
    heads = ["dtype", "mode", "batch", "hidden", "kernel", *peers]
    heads += ["products", "a step", "of the limit", "ratio"]
    return pages.markdown(heads, "llrrl" + "r" * (len(peers) + 4), body)


def _starting(data: pd.DataFrame) -> Iterator[str]:
    """How long first calls take, and compiling."""
    rows = data[data.first_s.notna() | data.compile_s.notna()]
    if rows.empty:
        return
    yield "### Seconds of first calls on a GPU\n"
    columns = ["cell", "dtype", "mode", "batch", "hidden", "peer"]
    body = [
        [*(str(row[name]) for name in columns), *(_seconds(row[name]) for name in ("first_s", "compile_s"))]
        for row in rows.to_dict("records")
    ]
    yield pages.markdown([*columns, "fresh process", "compiling"], "lllrrlrr", body)


def _seconds(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3g}"


def summary(data: pd.DataFrame) -> list[str]:
    """For each cell, mode and dtype a line: means and the worst."""
    table = recurrent_report.compared(data, _GROUPS)
    lines = []
    for (cell, mode, dtype), part in table.groupby(["cell", "mode", "dtype"], sort=False):
        found = [f"{head} {pages.mean_and_worst(part[name])}" for name, head in _AGAINST.items()]
        lines.append(f"{cell}, {mode}, {dtype}: speed over {', '.join(found)}: geometric mean (the least)")
    return lines


def options(data: pd.DataFrame) -> list[str]:
    """The options that measure these points again, where they are not the defaults."""
    # The command measures the norms too, unless operators are named.
    found = [f"--operator {pages.joined(data.cell)}"]
    found += pages.options(
        data,
        {
            "dtype": ("dtypes", gpu_recurrent.DTYPES),
            "batch": ("batches", gpu_recurrent.BATCHES),
            "hidden": ("hidden", gpu_recurrent.HIDDEN),
            "steps": ("steps", (gpu_recurrent.STEPS,)),
            "mode": ("modes", recurrent.MODES),
        },
    )
    # A run that names peers has the same ones at all of its points.
    dtype, batch, hidden = gpu_recurrent.FEW
    few = (data.dtype == dtype) & (data.batch == batch) & (data.hidden == hidden)
    usual, found_peers = set(gpu_recurrent.EVERYWHERE), set(data.peer)
    more = set(data[~few].peer) - usual
    fewer = not usual <= found_peers or (few.any() and found_peers <= usual)
    if more or fewer:
        found.append(f"--peers {','.join(name for name in PEERS if name in found_peers)}")
    if data.rounds.notna().any() and data.rounds.max() != recurrent.ROUNDS:
        found.append(f"--rounds {data.rounds.max():.0f}")
    return found


def predictions() -> str:
    """The default grid: the work of its products, and what a step is expected to take by ``PREDICTED``."""
    models = [f"{name}, µs a step" for name in PREDICTED]
    heads = ["cell", "dtype", "mode", "batch", "hidden", "GFLOP", *models]
    body = []
    sizes = (gpu_recurrent.BATCHES, gpu_recurrent.HIDDEN, gpu_recurrent.STEPS)
    for point in recurrent.grid(gpu_recurrent.CELLS, gpu_recurrent.DTYPES, *sizes, recurrent.MODES):
        expected = [predict(point) for predict in PREDICTED.values()]
        times = ["–" if found is None else f"{1e6 * found / point.steps:.1f}" for found in expected]
        where = [point.cell, point.dtype, point.mode, str(point.batch), str(point.hidden)]
        body.append([*where, f"{point.gflop:,.1f}", *times])
    return pages.markdown(heads, "lllrrr" + "r" * len(PREDICTED), body)


__all__ = ["PREDICTED", "load", "options", "pictures", "predictions", "section", "summary"]
