"""One recurrent step at a time; as a program, the worker that measures it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from benchmarks.core import limits
from benchmarks.core.benchmark import OURS, Benchmark, Work
from benchmarks.core.measuring import BASE, Row, each_point, peer_rows, sample
from benchmarks.core.subjects import Subject, difference, prepare
from benchmarks.core.table import MEASURES, significant
from benchmarks.core.workers import Emit, serve
from benchmarks.recurrent.peers import make_case
from benchmarks.stream.peers import PEERS, PLAIN
from layernorm import backends, machine
from layernorm.arguments import positive, positives, some_of

CELLS: Final = ("lstm", "gru", "rnn")
DTYPES: Final = ("float32", "bfloat16")
BATCHES: Final = (1,)
HIDDEN: Final = (64, 128, 256, 320, 512, 1024)
ROUNDS: Final = 20
KEYS: Final = ("cell", "dtype", "batch", "hidden", "threads")
FIGURES: Final = ("difference", "weights_us", "over_weights")
COLUMNS: Final = (
    *KEYS, "peer", "status", "kernel", *MEASURES, *FIGURES, "other_cpus", *machine.COLUMNS
)  # fmt: skip
_QUICK: Final = (128, 512)
_QUICK_ROUNDS: Final = 5
_BUDGET: Final = 4.0
# Results of these few steps may differ from those in float32 by this much, relative to their norm.
_TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Point:
    """One point of the grid.

    Attributes:
        cell: "lstm", "gru" or "rnn".
        dtype: of all tensors.
        batch: rows, N.
        hidden: features of the input and of the state, H.
    """

    cell: Any
    dtype: str
    batch: int
    hidden: int

    @property
    def name(self) -> str:
        """The point in words."""
        return f"{self.cell} {self.dtype} batch {self.batch} hidden {self.hidden}"


def grid(
    cells: Sequence[str], dtypes: Sequence[str], batches: Sequence[int], hidden: Sequence[int]
) -> Iterator[Point]:
    """All points."""
    for cell in cells:
        for dtype in dtypes:
            for batch in batches:
                for size in hidden:
                    yield Point(cell, dtype, batch, size)


def measure(job: dict[str, Any], emit: Emit) -> None:
    """The worker."""
    with torch.inference_mode():
        each_point(job, emit, Point, lambda point: _measure(point, job, emit))


def _measure(point: Point, job: Mapping[str, Any], emit: Emit) -> list[Row]:
    exact = make_case(point.cell, point.batch, point.hidden, 1, training=False)
    expected = {plain: PEERS["torch" if plain else "eager"](exact).results() for plain in (False, True)}
    differences: dict[str, float] = {}

    def check(name: str, subject: Subject) -> None:
        differences[name] = off = difference(subject.results(), expected[name in PLAIN])
        if not off <= _TOLERANCE[point.dtype]:
            raise RuntimeError(f"its results are off by {off:.1e}")

    dtype: torch.dtype = getattr(torch, point.dtype)
    case = exact.to(dtype)
    subjects, problems = prepare(
        job["peers"],
        lambda name: PEERS[name](case),
        check,
        lambda text: emit({"note": f"{point.name}: {text}"}),
    )
    if BASE not in subjects:
        raise RuntimeError(f"{BASE} itself cannot be measured at {point.name}")
    size = sum(case.normalized[name].nbytes for name in ("weight_ih", "weight_hh"))
    samples, others = sample(subjects, limits.reads(size), job)
    weights = limits.read_us(samples)
    table = []
    for row, measured in peer_rows(point, job["peers"], problems, samples, others):
        if row["peer"].startswith(OURS):
            row["kernel"] = backends.choose(point.cell, torch.device("cpu"), dtype).kernel
        if measured:
            row["difference"] = float(f"{differences[row['peer']]:.1e}")
        if measured and weights:  # a few bytes take no time that can be told
            row["weights_us"] = significant(weights)
            row["over_weights"] = significant(row["median_us"] / weights)
        table.append(row)
    return table


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--cells",
        type=some_of(CELLS),
        default=CELLS,
        metavar="A,B,…",
        help=f"some of {', '.join(CELLS)} (default: all)",
    )
    add("--batches", type=positives, default=BATCHES, metavar="N,…", help="rows of a step (default: 1)")
    add(
        "--hidden",
        type=positives,
        metavar="H,…",
        help=f"features of input and state (default: {','.join(map(str, HIDDEN))})",
    )
    add(
        "--dtypes",
        type=some_of(DTYPES),
        default=DTYPES,
        metavar="A,B",
        help=f"some of {', '.join(DTYPES)} (default: all)",
    )
    add("--rounds", type=positive, metavar="N", help=f"samples of each peer (default: {ROUNDS})")
    add(
        "--quick",
        action="store_true",
        help=f"{_QUICK_ROUNDS} rounds, and the sizes {', '.join(map(str, _QUICK))} only",
    )


def _works(options: argparse.Namespace) -> list[Work]:
    job = {
        "peers": STREAM.chosen(options.peers),
        "rounds": options.rounds or (_QUICK_ROUNDS if options.quick else ROUNDS),
        "budget": _BUDGET,
    }
    hidden = options.hidden or (_QUICK if options.quick else HIDDEN)
    points = list(grid(options.cells, options.dtypes, options.batches, hidden))
    return [Work(points, job, threads) for threads in options.threads]


_EPILOG: Final = """\
peers:
  layernorm        stream() of LayerNormLSTM, LayerNormGRU, LayerNormRNN, and its step()
  layernorm-cell   LayerNormLSTMCell, LayerNormGRUCell, LayerNormRNNCell
  torch            torch.nn.LSTMCell, GRUCell, RNNCell, un-normalized: what ratios are to
  torch-sequence   torch.nn.LSTM, GRU, RNN called for one step, un-normalized
  eager, script    the layer-normalized cell written with PyTorch's functions, and that under TorchScript
  jax              the layer-normalized cell jitted
  onnxruntime      the layer-normalized cell as an ONNX graph, its state in bound memory

The default grid takes about 3 minutes.

examples:
  layernorm bench stream --quick
  layernorm bench stream --cells lstm --hidden 320 --threads 1

"""

STREAM: Final = Benchmark(
    name="stream",
    title="recurrent layers one step at a time",
    description="Measures the time of one step called from Python, with a batch of 1, beside PyTorch's\n"
    "un-normalized cells, hand-written layer-normalized ones, JAX and ONNX Runtime, interleaved in one\n"
    "process for each number of threads; writes a table, pictures and a page.",
    keys=KEYS,
    columns=COLUMNS,
    peers=tuple(PEERS),
    add_options=_add_options,
    works=_works,
    epilog=_EPILOG,
)

if __name__ == "__main__":
    serve(measure)
