"""The norms on a GPU: what the page of all benchmarks says, from the table alone; and what is expected."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.core import pages, plots
from benchmarks.core.benchmark import OURS, Outputs
from benchmarks.core.measuring import BASE
from benchmarks.core.table import MEASURES
from benchmarks.gpu_norms import measure as gpu
from benchmarks.gpu_norms.peers import PEERS
from benchmarks.norms import measure as norms
from layernorm import backends

_NUMBERS: Final = ("rows", "width", "threads", *MEASURES, *gpu.LIMITS)
_POINT: Final = ["dtype", "rows", "width", "mode"]
_PACKAGES: Final = {
    "driver": "driver",
    "cuda": "CUDA",
    "triton": "Triton",
    "liger-kernel": "Liger",
    "quack-kernels": "quack",
    "apex": "apex",
    "flash-attn": "flash-attention",
}
#: Bytes a second that the makers name for the memory.
BANDWIDTHS: Final = {"H100 SXM": 3.35e12, "H200": 4.8e12}

_METHOD: Final = """\
### How the norms are measured on a GPU

- `layernorm` is `layernorm.functional`'s operator served by the Triton kernels, whatever the choice would be;
  `torch` is PyTorch's own, called eagerly, `torch.compile` the same compiled by Inductor for the one shape.
  The others' functions are called with their own defaults; "not installed" and "not supported" stand where
  there is nothing to measure. An operator that adds a residual is an addition and a norm where a peer has no
  operator for both.
- Times are the GPU's, between CUDA events around as many calls as take 3 ms, medians over the rounds, every
  peer once in each round in an order that changes. Inputs and given gradients rotate through copies of
  together 256 MiB or more, so that no cache holds them. Where a call's kernels are shorter than what issuing
  them takes the CPU, the GPU waits, and the time is the CPU's: `host_us` in the table.
- A ratio is `torch`'s time divided by the peer's in the same round; above 1 is faster.
- The limit is the time of `x.clone()` in the same rounds, by the bytes that must be read and written at
  least: for norms those of two tensors forward and five in training, with a residual four and nine.
- `graph_us` is the time of a call in a CUDA graph, forward.
- {rounds}
"""


def load(path: Path) -> pd.DataFrame:
    """The table, with a column ``label`` that names a point's dtype and size.

    Raises:
        TableError: it is missing or damaged, or has no rows.
    """
    orders = {"operator": backends.NORMS, "dtype": norms.DTYPES, "mode": norms.MODES, "peer": tuple(PEERS)}
    data = pages.load(path, gpu.COLUMNS, _NUMBERS, orders)
    data["label"] = data.dtype + " " + data.rows.astype(str) + "×" + data.width.astype(str)
    keys = ["operator_place", "dtype_place", "width", "rows", "mode_place", "peer_place"]
    return data.sort_values(keys, kind="stable", ignore_index=True)


def pictures(data: pd.DataFrame, outputs: Outputs) -> Iterator[tuple[Path, Figure]]:
    """A picture for each operator, and where it goes."""
    for operator, rows in data.groupby("operator", sort=False):
        yield outputs.image("gpu", str(operator)), plots.ratios(rows, BASE, by_threads=False)


def section(data: pd.DataFrame, outputs: Outputs) -> Iterator[str]:
    """The part of the page, in Markdown."""
    yield "## Norm operators on a GPU\n"
    for operator, rows in data.groupby("operator", sort=False):
        image = os.path.relpath(outputs.image("gpu", str(operator)), outputs.page.parent)
        yield f"### {operator} on a GPU\n"
        yield from (f"{line}\n" for line in pages.environments(rows, "gpu", _PACKAGES))
        text = f"Speed of {operator} relative to PyTorch's eager operator on a GPU"
        yield f"![{text}]({Path(image).as_posix()})\n"
        yield "Times in µs; ratio, part of the limit, CPU and graph are `layernorm`'s.\n"
        yield _points(rows, [peer for peer in PEERS if peer in set(rows.peer)])
    yield _METHOD.format(rounds=pages.rounds(data))


def _points(rows: pd.DataFrame, peers: Sequence[str]) -> str:
    body = []
    for _, part in rows.groupby(_POINT, sort=False):
        by_peer = {row["peer"]: row for row in part.to_dict("records")}
        ours = by_peer[OURS]

        def figure(name: str, row: Any = ours) -> str:
            return "–" if pd.isna(row[name]) else pages.microseconds(row[name])

        body.append(
            [
                ours["dtype"],
                f"{ours['rows']}×{ours['width']}",
                ours["mode"],
                *(pages.time(by_peer[peer]) if peer in by_peer else "–" for peer in peers),
                pages.ratio(ours),
                "–" if pd.isna(ours["fraction_of_limit"]) else f"{ours['fraction_of_limit']:.2f}",
                figure("host_us"),
                figure("graph_us"),
            ]
        )
    heads = ["dtype", "rows × width", "mode", *peers, "ratio", "of the limit", "CPU", "in a graph"]
    return pages.markdown(heads, "lrl" + "r" * (len(peers) + 4), body)


def summary(data: pd.DataFrame) -> list[str]:
    """For each operator and mode the ratios to PyTorch and to the fastest peer, and the part of the limit."""
    lines = []
    for (operator, mode), part in data.groupby(["operator", "mode"], sort=False):
        times = pages.by_peer(part, _POINT, "median_us")
        others = [peer for peer in PEERS if peer != OURS and peer in times]
        ours = part[part.peer == OURS]
        fastest = times[others].min(axis=1) / times[OURS] if OURS in times else pd.Series(dtype=float)
        lines.append(
            f"{operator}, {mode}: {pages.mean_and_worst(ours.ratio_to_torch)} times PyTorch's speed, "
            f"{pages.mean_and_worst(fastest)} times the fastest peer's, "
            f"{pages.mean_and_worst(ours.fraction_of_limit)} of the copy's: geometric mean (the least)"
        )
    return lines


def options(data: pd.DataFrame) -> list[str]:
    """The options that measure these points again, where they are not the defaults."""
    sizes = dict.fromkeys(zip(data.rows, data.width, strict=True))
    # The command measures recurrent layers too, unless operators are named.
    found = [f"--operator {pages.joined(data.operator)}"]
    found += pages.options(data, {"dtype": ("dtypes", norms.DEFAULT_DTYPES)})
    if set(sizes) != set(gpu.DEFAULTS.sizes):
        found.append("--sizes " + ",".join(f"{rows}x{width}" for rows, width in sizes))
    found += pages.options(data, {"mode": ("modes", norms.MODES)})
    found += pages.options(data, {"peer": ("peers", tuple(PEERS))})
    if data.rounds.notna().any() and data.rounds.max() != gpu.DEFAULTS.rounds:
        found.append(f"--rounds {data.rounds.max():.0f}")
    return found


def predictions() -> str:
    """What the default grid is expected to take, in Markdown: bytes over the maker's bandwidth.

    Forward reads and writes each tensor once. So does training, but for rows that no block holds: there
    backward reads the output's gradient and the input a second time. The sums over rows come on top.
    """
    from layernorm.gpu import settings

    heads = ["operator", "dtype", "rows × width", "mode", "MiB", *(f"{name}, µs" for name in BANDWIDTHS)]
    body = []
    for operator in gpu.DEFAULTS.operators:
        for point in norms.grid((operator,), norms.DEFAULT_DTYPES, gpu.DEFAULTS.sizes, norms.MODES):
            size = point.rows * point.width * (4 if point.dtype == "float32" else 2)
            traffic = 2 * point.clones * size
            if point.mode == "training":
                tile = settings.backward_tile(settings.DEFAULT, point.width)
                traffic += 0 if tile.whole else 2 * size
                parts = -(
                    -point.rows // settings.rows_per_part(settings.DEFAULT, tile, point.rows, point.width)
                )
                traffic += 2 * (2 if operator.endswith("layer_norm") else 1) * parts * point.width * 4
            times = (f"{1e6 * traffic / bandwidth:,.1f}" for bandwidth in BANDWIDTHS.values())
            where = f"{point.rows}×{point.width}"
            body.append([operator, point.dtype, where, point.mode, f"{traffic / 2**20:,.1f}", *times])
    return pages.markdown(heads, "llrl" + "r" * (1 + len(BANDWIDTHS)), body)


__all__ = ["load", "options", "pictures", "predictions", "section", "summary"]
