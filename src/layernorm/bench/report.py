"""What a benchmark of the norm operators found: the picture and the Markdown page, from the table alone."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd

from layernorm import backends
from layernorm.bench import command, norms, plots
from layernorm.bench.peers import PEERS
from layernorm.bench.table import MEASURES, TableError, read
from layernorm.bench.timing import geometric_mean
from layernorm.experiments.files import replacing

_NUMBERS: Final = ("rows", "width", "threads", *MEASURES, *norms.LIMITS)
_POINT: Final = ["threads", "dtype", "rows", "width", "mode"]
_OURS: Final = "layernorm"

_HEAD: Final = """\
# Benchmarks

The norm operators of this package beside PyTorch's and others', on a CPU. The program that measures
writes this page:

```console
pip install 'layernorm[bench]'
{commands}
```

`python -m benchmarks` is for a checkout and writes the page itself; `layernorm bench` works everywhere and
writes a table, a picture and a page to `runs/bench-norms`. `--quick` is a short run, `--report-only` writes
the page again without measuring, `--help` has the rest. All figures are in `{table}`.
"""

_METHOD: Final = """\
## How it is measured

- `layernorm` is `layernorm.functional`'s operator, served by the kernel in the column "kernel"; `torch`
  is PyTorch's own, called eagerly, and `torch.compile` the same compiled by Inductor for the one shape.
  `jax` is the formula under `jax.jit` with float32 statistics and the variance as E[x²] − E[x]², as in
  Flax; `onnxruntime` is the ONNX operator with bound inputs, forward only. Operators that add a residual
  are an addition and a norm where the peer has no operator for both.
- Forward runs without gradients and returns a fresh output. Training is forward and backward with a given
  gradient; gradients of the input, the weight and the bias are fresh tensors too. Weight and bias have
  the input's dtype.
- All peers of a point run in one process: a sample is as many calls as take 3 ms (at least one), and each
  round samples every peer once, in an order that changes from round to round. One call that is not timed
  comes before each sample where calls take less than 30 ms. ONNX Runtime's session is made anew for each of
  its samples, not timed, because its threads would go on spinning during the next peer's.
- {rounds}
- Times are medians over the rounds. A ratio is `torch`'s time divided by the peer's in the same round, as
  the median over the rounds with its quartiles in brackets: above 1 is faster than PyTorch.
- The limit is the time that copying takes for as many bytes as must be read and written at least: for
  `layer_norm` and `rms_norm` those of two tensors of the input's size forward and five in training, with
  a residual four and nine. The copy is `x.clone()`, which reads one and writes one, allocates its result
  as the operators do and is sampled in the same rounds. The last column is the limit divided by
  `layernorm`'s time. With small inputs the overhead of a call decides both; it can be above 1 where an
  operator's result lies in larger pages than a copy's.
- There is a process for each number of threads. With one thread it may run on one CPU only, so that no
  library has more.
- Before a peer is measured, its results are compared with PyTorch's in float32. One that is off is listed
  as failed.
"""


def write(outputs: command.Outputs) -> None:
    """Writes the pictures and the page.

    Raises:
        TableError: the table is missing or damaged or has no rows, or a file cannot be written.
    """
    data = load(outputs.table)
    try:
        for path in (outputs.image, outputs.page):
            path.parent.mkdir(parents=True, exist_ok=True)
        for operator, rows in data.groupby("operator", sort=False):
            picture = plots.ratios(rows, norms.BASE)
            with replacing(image_of(outputs, str(operator))) as fresh:
                picture.savefig(fresh, format="png", dpi=130, metadata={"Software": None})
        with replacing(outputs.page) as fresh:
            fresh.write_text(page(data, outputs), "utf-8")
    except OSError as error:
        raise TableError(f"cannot write into {outputs.page.parent}: {error.strerror or error}") from error


def load(path: Path) -> pd.DataFrame:
    """The table, with a column ``label`` that names a point's dtype and size.

    Raises:
        TableError: it is missing or damaged, or has no rows.
    """
    data = pd.DataFrame(read(path, norms.COLUMNS), columns=list(norms.COLUMNS))
    if data.empty:
        raise TableError(f"{path} has no rows; measure first")
    try:
        for name in _NUMBERS:
            data[name] = pd.to_numeric(data[name].replace("", None))
    except (ValueError, TypeError) as error:
        raise TableError(f"{path} is damaged: {error}") from error
    data["label"] = data.dtype + " " + _size(data.rows, data.width)
    # Small first; everything that has a name in its own order.
    orders = {"operator": backends.NORMS, "dtype": norms.DTYPES, "mode": norms.MODES, "peer": tuple(PEERS)}
    try:
        places = {f"{name}_place": data[name].map(order.index) for name, order in orders.items()}
    except ValueError as error:
        raise TableError(f"{path} is damaged: {error}") from error
    data = data.assign(**places, elements=data.rows * data.width)
    keys = ["operator_place", "threads", "dtype_place", "elements", "rows", "mode_place", "peer_place"]
    return data.sort_values(keys, kind="stable", ignore_index=True)


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """The geometric means of the ratios to PyTorch.

    Args:
        rows: of one operator.

    Returns:
        One row for each number of threads and mode, then for each number of threads, then for all; the
        columns ``threads`` and ``mode``, which are "all" where they are not told apart, and for each peer
        one with the mean and one with the suffix ``_points``.
    """
    groups = [((threads, mode), part) for (threads, mode), part in rows.groupby(["threads", "mode"])]
    groups += [((threads, "all"), part) for threads, part in rows.groupby("threads")]
    if rows.threads.nunique() > 1:
        groups.append((("all", "all"), rows))
    table = []
    for (threads, mode), part in groups:
        row: dict[Hashable, Any] = {"threads": threads, "mode": mode}
        for peer, ratios in part.groupby("peer").ratio_to_torch:
            found = ratios.dropna()
            row[str(peer)], row[f"{peer}_points"] = geometric_mean(found), len(found)
        table.append(row)
    return pd.DataFrame(table)


def page(data: pd.DataFrame, outputs: command.Outputs) -> str:
    """The page in Markdown."""
    options = _options(data)
    commands = "\n".join(
        f"{start}{options}" for start in ("python -m benchmarks norms", "layernorm bench norms")
    )
    parts = [_HEAD.format(commands=commands, table=outputs.table_name)]
    for operator, rows in data.groupby("operator", sort=False):
        parts.extend(_section(str(operator), rows, outputs))
    fewest, most = int(data.rounds.min()), int(data.rounds.max())
    rounds = f"There are {most} rounds" + (
        f", down to {fewest} where they take long." if fewest < most else "."
    )
    if data.other_cpus.notna().any():
        rounds += f" Other work on the machine took at most {data.other_cpus.max():.2f} CPUs during a point."
    parts.append(_METHOD.format(rounds=rounds))
    return "\n".join(parts)


def image_of(outputs: command.Outputs, operator: str) -> Path:
    """Where the operator's picture is."""
    image = outputs.image
    return image if operator == "layer_norm" else image.with_stem(f"{image.stem}-{operator}")


def _section(operator: str, rows: pd.DataFrame, outputs: command.Outputs) -> Iterator[str]:
    peers = [peer for peer in PEERS if peer in set(rows.peer)]
    image = Path(os.path.relpath(image_of(outputs, operator), outputs.page.parent)).as_posix()
    yield f"## {operator}\n"
    yield from (f"{line}\n" for line in _environments(rows))
    yield "Speed relative to PyTorch's eager operator, geometric means (above 1 is faster):\n"
    yield _means_table(rows, peers)
    yield from _slower(rows)
    yield from _overtaken(rows, peers)
    yield f"![Speed of {operator} relative to PyTorch's eager operator at every point]({image})\n"
    for threads in sorted(rows.threads.unique()):
        yield f"### {operator}, {command.plural(threads, 'thread')}\n"
        yield "Times in µs; ratio and fraction of the limit are `layernorm`'s.\n"
        yield _points_table(rows[rows.threads == threads], peers)


def _environments(rows: pd.DataFrame) -> Iterator[str]:
    """What was measured where, once for each run that the rows come from."""
    for _, part in rows.groupby("date"):
        row = part.iloc[0]
        commit = f" ({_commit(row.commit)})" if row.commit else ""
        versions = [f"Python {row.python}", f"PyTorch {row.torch}", f"layernorm {row.layernorm}{commit}"]
        for name, column in (("JAX", "jax"), ("ONNX Runtime", "onnxruntime")):
            versions.append(f"{name} {row[column]}")
        yield f"{row.machine}. {', '.join(versions)}. Measured on {row.date[:10]}."


def _commit(commit: str) -> str:
    return f"commit {commit[:-1]} with changes" if commit.endswith("+") else f"commit {commit}"


def _means_table(rows: pd.DataFrame, peers: Sequence[str]) -> str:
    others = [peer for peer in peers if peer != norms.BASE]
    table = means(rows)
    body = []
    for row in table.to_dict("records"):
        cells = []
        for peer in others:
            count = row[f"{peer}_points"]
            fewer = f" ({count} points)" if count < row[f"{_OURS}_points"] else ""
            cells.append(f"{row[peer]:.2f}{fewer}" if count else _status(rows, peer, row))
        body.append([str(row["threads"]), str(row["mode"]), str(row[f"{_OURS}_points"]), *cells])
    return _markdown(["threads", "mode", "points", *others], "rlr" + "r" * len(others), body)


def _status(rows: pd.DataFrame, peer: str, row: Mapping[Hashable, Any]) -> str:
    """Why a peer has no figure in a row of the means."""
    part = rows[rows.peer == peer]
    for name in ("threads", "mode"):
        if row[name] != "all":
            part = part[part[name] == row[name]]
    return ", ".join(dict.fromkeys(part.status))


def _slower(rows: pd.DataFrame) -> Iterator[str]:
    """Names the points at which PyTorch is faster."""
    ours = rows[(rows.peer == _OURS) & rows.ratio_to_torch.notna()]
    slow = ours[ours.ratio_to_torch < 1].sort_values("ratio_to_torch", kind="stable")
    if slow.empty:
        yield f"`{_OURS}` is at no point of {len(ours)} slower than PyTorch's eager operator.\n"
        return
    yield (
        f"`{_OURS}` is slower than PyTorch's eager operator at {len(slow)} of {len(ours)} points, here from "
        "the slowest on; where the quartiles reach 1 the two may be equal:\n"
    )
    body = [
        [str(row["threads"]), row["dtype"], _size(row["rows"], row["width"]), row["mode"], _ratio(row)]
        for row in slow.to_dict("records")
    ]
    yield _markdown(["threads", "dtype", "rows × width", "mode", "ratio"], "rlrlr", body)


def _overtaken(rows: pd.DataFrame, peers: Sequence[str]) -> Iterator[str]:
    """Counts the points at which other peers are faster than this package."""
    times = rows.pivot_table(index=_POINT, columns="peer", values="median_us")
    counts = []
    for peer in peers:
        if peer not in (_OURS, norms.BASE) and {peer, _OURS} <= set(times.columns):
            both = times[[_OURS, peer]].dropna()
            counts.append(f"`{peer}` at {(both[peer] < both[_OURS]).sum()} of {len(both)}")
    if counts:
        yield f"Points at which another peer is faster than `{_OURS}`: {', '.join(counts)}.\n"


def _points_table(rows: pd.DataFrame, peers: Sequence[str]) -> str:
    body = []
    for _, part in rows.groupby(_POINT, sort=False):
        by_peer = {row["peer"]: row for row in part.to_dict("records")}
        ours = by_peer[_OURS]
        times = [_time(by_peer[peer]) if peer in by_peer else "–" for peer in peers]
        known = not pd.isna(ours["ratio_to_torch"])
        body.append(
            [
                ours["dtype"],
                _size(ours["rows"], ours["width"]),
                ours["mode"],
                ours["kernel"],
                *times,
                _ratio(ours) if known else "–",
                f"{ours['fraction_of_limit']:.2f}" if known else "–",
            ]
        )
    heads = ["dtype", "rows × width", "mode", "kernel", *peers, "ratio", "of the limit"]
    return _markdown(heads, "lrll" + "r" * (len(peers) + 2), body)


def _options(data: pd.DataFrame) -> str:
    """The options that measure these points again, where they are not the defaults."""

    def joined(column: str) -> str:
        return ",".join(dict.fromkeys(data[column].astype(str)))

    sizes = dict.fromkeys(zip(data.rows, data.width, strict=True))
    options = []
    if joined("operator") != "layer_norm":
        options.append(f"--operator {joined('operator')}")
    if set(data.dtype) != set(command.DEFAULT_DTYPES):
        options.append(f"--dtypes {joined('dtype')}")
    if set(sizes) != set(command.DEFAULT_SIZES):
        options.append("--sizes " + ",".join(f"{rows}x{width}" for rows, width in sizes))
    if set(data["mode"]) != set(norms.MODES):
        options.append(f"--modes {joined('mode')}")
    if data.threads.nunique() == 1:
        options.append(f"--threads {joined('threads')}")
    if set(data.peer) != set(PEERS):
        options.append(f"--peers {joined('peer')}")
    if data.rounds.max() != command.DEFAULT_ROUNDS:
        options.append(f"--rounds {data.rounds.max():.0f}")
    return "".join(f" {option}" for option in options)


def _size(rows: Any, width: Any) -> Any:
    if isinstance(rows, pd.Series):
        return rows.astype(str) + "×" + width.astype(str)
    return f"{rows}×{width}"


def _time(row: Mapping[Hashable, Any]) -> str:
    """Three digits, or why there are none."""
    time = row["median_us"]
    if pd.isna(time):
        return str(row["status"])
    return f"{time:,.0f}" if time >= 100 else f"{time:.1f}" if time >= 10 else f"{time:.2f}"


def _ratio(row: Mapping[Hashable, Any]) -> str:
    return f"{row['ratio_to_torch']:.2f} ({row['ratio_q25']:.2f}–{row['ratio_q75']:.2f})"


def _markdown(heads: Sequence[str], align: str, body: Sequence[Sequence[str]]) -> str:
    marks = ["---:" if side == "r" else "---" for side in align]
    rows = [" | ".join(cells) for cells in (heads, *body)]
    return "\n".join([f"| {rows[0]} |", f"|{'|'.join(marks)}|", *(f"| {row} |" for row in rows[1:])]) + "\n"


__all__ = ["image_of", "load", "means", "page", "write"]
