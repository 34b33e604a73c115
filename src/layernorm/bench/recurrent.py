"""Recurrent layers over whole sequences; as a program, the worker that measures them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from layernorm import backends, machine
from layernorm.arguments import positive, positives, seconds, some_of
from layernorm.bench import limits
from layernorm.bench.benchmark import OURS, Benchmark, Work
from layernorm.bench.measuring import BASE, Row, each_point, peer_rows, sample
from layernorm.bench.memory import kept_for_backward
from layernorm.bench.recurrent_peers import ONLY_IN, PEERS, PLAIN, Case, make_case
from layernorm.bench.subjects import Subject, difference, prepare
from layernorm.bench.table import MEASURES, significant
from layernorm.bench.timing import quartiles, ratios
from layernorm.bench.workers import Emit, serve
from layernorm.variants import GATES

CELLS: Final = ("lstm", "gru", "rnn")
DTYPES: Final = ("float32", "bfloat16")
MODES: Final = ("inference", "training")
BATCHES: Final = (1, 8, 32, 128)
HIDDEN: Final = (128, 256, 512, 1024)
STEPS: Final = 100
ROUNDS: Final = 15
LEAST_ROUNDS: Final = 3
#: Seconds of samples after which a peer, once it has the least rounds, is sampled no more at a point.
EACH: Final = 0.1
#: Work in GFLOP of a point's products: above the first with all threads and a few peers only, above the
#: second not at all, unless asked for.
LARGE, LARGEST = 30.0, 200.0
#: The peers of large points, and the batches and sizes of cells other than the LSTM.
LARGE_PEERS: Final = ("layernorm", "torch")
OTHER_BATCHES: Final = (1, 32)
OTHER_HIDDEN: Final = (128, 512)
KEYS: Final = ("cell", "dtype", "batch", "hidden", "steps", "mode", "threads")
FIGURES: Final = ("difference", "saved_bytes", "compile_s", "products_us", "over_products", "weights_us")
COLUMNS: Final = (
    *KEYS, "peer", "status", "kernel", *MEASURES, *FIGURES, "other_cpus", *machine.COLUMNS
)  # fmt: skip

_QUICK: Final = (("lstm",), (1, 32), (128, 256))
_QUICK_ROUNDS, _QUICK_EACH = 5, 0.05
_COMPILE_LIMIT: Final = 600.0
# Results may differ from those of PyTorch's functions in float32 by this much, relative to their norm, or by
# twice what PyTorch's own in that dtype do: a hundred steps of rounding in another order, and bfloat16 keeps
# 8 bits in each of them. A wrong formula is off by far more.
_TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 5e-2}
_JUDGES: Final = {True: "torch", False: "loop"}  # by whether the cell is un-normalized


@dataclass(frozen=True)
class Point:
    """One point of the grid.

    Attributes:
        cell: "lstm", "gru" or "rnn".
        dtype: of all tensors.
        batch: sequences, N.
        hidden: features of the input and of the state, H.
        steps: of time, T.
        mode: "inference", or "training" for forward and backward.
    """

    cell: Any
    dtype: str
    batch: int
    hidden: int
    steps: int
    mode: str

    @property
    def name(self) -> str:
        """The point in words."""
        return f"{self.cell} {self.dtype} batch {self.batch} hidden {self.hidden} {self.mode}"

    @property
    def gflop(self) -> float:
        """The work of the matrix products."""
        forward = 2e-9 * self.steps * self.batch * 2 * self.hidden * GATES[self.cell] * self.hidden
        return 3 * forward if self.mode == "training" else forward


def grid(
    cells: Sequence[str],
    dtypes: Sequence[str],
    batches: Sequence[int],
    hidden: Sequence[int],
    steps: int,
    modes: Sequence[str],
) -> Iterator[Point]:
    """All points, those with the same numbers together."""
    for cell in cells:
        for batch in batches:
            for size in hidden:
                for mode in modes:
                    for dtype in dtypes:
                        yield Point(cell, dtype, batch, size, steps, mode)


def measure(job: dict[str, Any], emit: Emit) -> None:
    """The worker."""
    known: dict[Point, dict[bool, list[Tensor]]] = {}

    def rows_of(point: Point) -> list[Row]:
        # The numbers are the same in every dtype, and so are the results that are right.
        same = replace(point, dtype="float32")
        if same not in known:
            known.clear()
            known[same] = _expected(same)
        return _measure(point, known[same], job, emit)

    each_point(job, emit, Point, rows_of)


def _case(point: Point) -> Case:
    return make_case(point.cell, point.batch, point.hidden, point.steps, point.mode == "training")


def _expected(point: Point) -> dict[bool, list[Tensor]]:
    """What peers of the un-normalized cell (True) and of the normalized one (False) must give, in float32."""
    with torch.set_grad_enabled(point.mode == "training"):
        case = _case(point)
        return {plain: PEERS[judge](case).results() for plain, judge in _JUDGES.items()}


def _measure(
    point: Point, expected: Mapping[bool, list[Tensor]], job: Mapping[str, Any], emit: Emit
) -> list[Row]:
    training = point.mode == "training"
    names = [name for name in job["peers"] if ONLY_IN.get(name, point.mode) == point.mode]
    if point.gflop > job["large"]:
        names = [name for name in names if name in LARGE_PEERS]
    differences: dict[str, float] = {}

    def check(name: str, subject: Subject) -> None:
        right = expected[name in PLAIN]
        differences[name] = off = difference(subject.results(), right)
        if off <= _TOLERANCE[point.dtype]:
            return
        judge = PEERS[_JUDGES[name in PLAIN]](case).results()
        if not off <= 2 * difference(judge, right):
            raise RuntimeError(f"its results are off by {off:.1e}")

    def note(text: str) -> None:
        emit({"note": f"{point.name}: {text}"})

    with torch.inference_mode(not training):
        case = _case(point).to(getattr(torch, point.dtype))
        subjects, problems = prepare(names, lambda name: PEERS[name](case), check, note)
        if BASE not in subjects:
            raise RuntimeError(f"{BASE} itself cannot be measured at {point.name}")
        kept = {}
        if job["memory"]:
            kept = {name: kept_for_backward(s.forward) for name, s in subjects.items() if s.forward}
        matrices = case.normalized["weight_ih"], case.normalized["weight_hh"]
        bounds = {"products": limits.products(case.x, *matrices, training)}
        if point.batch == 1:
            bounds |= limits.reads(matrices[1].nbytes)
        samples, others = sample(subjects, bounds, job, least_rounds=LEAST_ROUNDS, each=job["each"])
    table = []
    for row, measured in peer_rows(point, names, problems, samples, others):
        name = row["peer"]
        if name.startswith(OURS):
            device = torch.device("cpu")
            row["kernel"] = backends.choose(point.cell, device, getattr(torch, point.dtype)).kernel
        if measured:
            over = ratios(samples[name], samples["products"])
            row["products_us"] = significant(1e6 * quartiles(samples["products"].seconds).median)
            row["over_products"] = significant(quartiles(over).median)
            row["difference"] = float(f"{differences[name]:.1e}")
            row["saved_bytes"] = kept.get(name, "")
            if subjects[name].compile_s is not None:
                row["compile_s"] = significant(subjects[name].compile_s or 0.0)
            if "read" in samples:
                row["weights_us"] = significant(point.steps * limits.read_us(samples))
        table.append(row)
    return table


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cells", type=some_of(CELLS), metavar="A,B,…", help=f"some of {', '.join(CELLS)} (default: all)")
    add("--batches", type=positives, metavar="N,…", help=f"(default: {','.join(map(str, BATCHES))})")
    add(
        "--hidden",
        type=positives,
        metavar="H,…",
        help=f"features of input and state (default: {','.join(map(str, HIDDEN))})",
    )
    add("--steps", type=positive, default=STEPS, metavar="T", help=f"of time (default: {STEPS})")
    add(
        "--dtypes",
        type=some_of(DTYPES),
        default=DTYPES,
        metavar="A,B",
        help=f"some of {', '.join(DTYPES)} (default: all)",
    )
    add(
        "--modes",
        type=some_of(MODES),
        default=MODES,
        metavar="A,B",
        help="inference, training (forward, and backward to input and parameters); default: both",
    )
    add("--rounds", type=positive, metavar="N", help=f"samples of each peer, at most (default: {ROUNDS})")
    add(
        "--time",
        type=seconds,
        metavar="S",
        help=f"seconds of samples of each peer at a point; {LEAST_ROUNDS} are taken even if they take longer "
        f"(default: {EACH})",
    )
    add(
        "--compile-limit",
        type=seconds,
        default=_COMPILE_LIMIT,
        metavar="S",
        help=f"seconds for a point of the peer compile (default: {_COMPILE_LIMIT:g})",
    )
    add("--full", action="store_true", help="the whole grid with all peers; takes hours")
    add("--quick", action="store_true", help="a small grid and few rounds; takes about 2 minutes")


_EPILOG: Final = f"""\
peers:
  layernorm             LayerNormLSTM, LayerNormGRU, LayerNormRNN
  layernorm-recompute   the same with recompute=True, in training
  layernorm-none        the same with variant="none", un-normalized
  torch                 torch.nn.LSTM, GRU, RNN, un-normalized: what ratios are to
  loop, script          the layer-normalized cell in a Python loop, and that under TorchScript
  compile               that under torch.compile; takes minutes a point, so it is measured only where
                        it is named, in a process of its own
  jax                   the layer-normalized cell in a jitted lax.scan
  onnxruntime           the layer-normalized cell in ONNX's Scan, in inference
  onnxruntime-none      ONNX's LSTM, GRU, RNN, un-normalized, in inference

The default grid takes about 13 minutes on two CPUs. It is not the whole product:
  - of GRU and RNN it has the batches {" and ".join(map(str, OTHER_BATCHES))} with the sizes {
    " and ".join(map(str, OTHER_HIDDEN))
} only;
  - points with more than {LARGE:g} GFLOP of matrix products are measured with all threads only, and of
    the peers {" and ".join(LARGE_PEERS)} only; those with more than {LARGEST:g} not at all.
Naming --batches or --hidden gives all points of their product, naming --peers those at every point.

examples:
  layernorm bench recurrent --quick
  layernorm bench recurrent --cells lstm --batches 1,32 --hidden 512 --dtypes float32
  layernorm bench recurrent --cells lstm --batches 32 --hidden 256 --peers compile

"""


def _works(options: argparse.Namespace) -> list[Work]:
    chosen = RECURRENT.chosen(options.peers)
    job = {
        "peers": [name for name in chosen if name != "compile"],
        "rounds": options.rounds or (_QUICK_ROUNDS if options.quick else ROUNDS),
        "each": options.time or (_QUICK_EACH if options.quick else EACH),
        "budget": float("inf"),
        "large": LARGE if options.peers is None and not options.full else float("inf"),
    }
    most = max(options.threads)  # memory is the same with any number
    works = [
        Work(list(_points(options, threads)), job | {"memory": threads == most}, threads)
        for threads in options.threads
    ]
    if "compile" in chosen:
        alone = {"peers": [OURS, BASE, "compile"]}
        works += [
            Work([point], dict(work.job) | alone, work.threads, "compile", options.compile_limit)
            for work in list(works)
            for point in work.points
        ]
    return works


def _points(options: argparse.Namespace, threads: int) -> Iterator[Point]:
    """The points of a number of threads."""
    cells, batches, hidden = _QUICK if options.quick else (CELLS, BATCHES, HIDDEN)
    named = options.batches or options.hidden or options.full
    points = grid(
        options.cells or cells,
        options.dtypes,
        options.batches or batches,
        options.hidden or hidden,
        options.steps,
        options.modes,
    )
    for point in points:
        usual = point.batch in OTHER_BATCHES and point.hidden in OTHER_HIDDEN
        thin = point.cell != "lstm" and not usual and not options.quick
        many = point.gflop > LARGE and threads < max(options.threads)
        if named or not (thin or many or point.gflop > LARGEST):
            yield point


RECURRENT: Final = Benchmark(
    name="recurrent",
    title="recurrent layers over whole sequences",
    description="Measures LayerNormLSTM, LayerNormGRU and LayerNormRNN beside PyTorch's un-normalized "
    "layers,\nhand-written layer-normalized ones, JAX and ONNX Runtime, interleaved in one process for each\n"
    "number of threads; writes a table, pictures and a page.",
    keys=KEYS,
    columns=COLUMNS,
    peers=tuple(PEERS),
    add_options=_add_options,
    works=_works,
    unasked=("compile",),
    epilog=_EPILOG,
)

if __name__ == "__main__":
    serve(measure)
