"""Recurrent layers over whole sequences; as a program, the worker that measures them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.core import limits
from benchmarks.core.benchmark import OURS, Benchmark, Work
from benchmarks.core.measuring import BASE, Row, each_point, peer_rows, sample
from benchmarks.core.memory import kept_for_backward
from benchmarks.core.subjects import Subject, difference, prepare
from benchmarks.core.table import MEASURES, significant
from benchmarks.core.timing import Samples, quartiles, ratios
from benchmarks.core.workers import Emit, serve
from benchmarks.recurrent.peers import ONLY_IN, PEERS, PLAIN, Case, make_case
from layernorm import backends, machine
from layernorm.arguments import positive, positives, seconds, some_of
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
_TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
_JUDGES: Final = {True: "torch", False: "loop"}  # by whether the cell is un-normalized
#: By whether the cell is un-normalized, the results that are right.
Expected = Mapping[bool, list[Tensor]]


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

    def case(self, device: str = "cpu") -> Case:
        """Its numbers in float32."""
        return make_case(self.cell, self.batch, self.hidden, self.steps, self.mode == "training", device)

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
    right = known()
    each_point(job, emit, Point, lambda point: _measure(point, right(point), job, emit))


def known(device: str = "cpu") -> Callable[[Point], Expected]:
    """Tells what peers must give in float32; for one point after another, whatever their dtypes are."""
    found: dict[Point, Expected] = {}

    def expected(point: Point) -> Expected:
        # The numbers are the same in every dtype, and so are the results that are right.
        same = replace(point, dtype="float32")
        if same not in found:
            found.clear()
            with torch.set_grad_enabled(point.mode == "training"):
                case = same.case(device)
                found[same] = {plain: PEERS[judge](case).results() for plain, judge in _JUDGES.items()}
        return found[same]

    return expected


class NoBaseError(RuntimeError):
    """PyTorch's own layer, which ratios are to, cannot be measured."""


def checked(
    point: Point,
    case: Case,
    expected: Expected,
    peers: Mapping[str, Callable[[Case], Subject]],
    plain: Collection[str],
    emit: Emit,
) -> tuple[dict[str, Subject], dict[str, str], dict[str, float]]:
    """The peers that can be measured, what is the matter with the others, and how far off results are.

    Args:
        point: of the grid.
        case: its tensors, in its dtype.
        expected: what is right.
        peers: what makes each ready.
        plain: those that compute PyTorch's un-normalized cell.
        emit: is told why a peer has no figures.

    Raises:
        NoBaseError: PyTorch's own cannot.
    """
    differences: dict[str, float] = {}

    def check(name: str, subject: Subject) -> None:
        right = expected[name in plain]
        differences[name] = off = difference(subject.results(), right)
        if off <= _TOLERANCE[point.dtype]:
            return
        judge = PEERS[_JUDGES[name in plain]](case).results()
        if not off <= 2 * difference(judge, right):
            raise RuntimeError(f"its results are off by {off:.1e}")

    def note(text: str) -> None:
        emit({"note": f"{point.name}: {text}"})

    subjects, problems = prepare(list(peers), lambda name: peers[name](case), check, note)
    if BASE not in subjects:
        raise NoBaseError(f"{BASE} itself cannot be measured at {point.name}")
    return subjects, problems, differences


def _measure(point: Point, expected: Expected, job: Mapping[str, Any], emit: Emit) -> list[Row]:
    training = point.mode == "training"
    names = in_mode(job["peers"], point.mode)
    if point.gflop > job["large"]:
        names = [name for name in names if name in LARGE_PEERS]
    with torch.inference_mode(not training):
        case = point.case().to(getattr(torch, point.dtype))
        peers = {name: PEERS[name] for name in names}
        subjects, problems, differences = checked(point, case, expected, peers, PLAIN, emit)
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
            row |= figures(subjects[name], differences[name], samples[name], samples["products"])
            row["saved_bytes"] = kept.get(name, "")
            if "read" in samples:
                row["weights_us"] = significant(point.steps * limits.read_us(samples))
        table.append(row)
    return table


def in_mode(names: Sequence[str], mode: str) -> list[str]:
    """The peers that there are in a mode."""
    return [name for name in names if ONLY_IN.get(name, mode) == mode]


def figures(subject: Subject, off: float, own: Samples, products: Samples) -> Row:
    """What a peer's row has of the check, of compiling and of the limit."""
    row: Row = {
        "difference": float(f"{off:.1e}"),
        "products_us": significant(1e6 * quartiles(products.seconds).median),
        "over_products": significant(quartiles(ratios(own, products)).median),
    }
    if subject.compile_s is not None:
        row["compile_s"] = significant(subject.compile_s)
    return row


def add_shapes(
    parser: argparse.ArgumentParser, batches: Sequence[int], hidden: Sequence[int], steps: int
) -> None:
    """The options that choose points by their sizes; these are the defaults."""
    add = parser.add_argument
    add("--batches", type=positives, metavar="N,…", help=f"(default: {','.join(map(str, batches))})")
    add(
        "--hidden",
        type=positives,
        metavar="H,…",
        help=f"features of input and state (default: {','.join(map(str, hidden))})",
    )
    add("--steps", type=positive, default=steps, metavar="T", help=f"of time (default: {steps})")


def add_limits(parser: argparse.ArgumentParser, alone: str) -> None:
    """The options for how long peers are sampled, and those with processes of their own compile."""
    add = parser.add_argument
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
        help=f"seconds for a point of {alone} (default: {_COMPILE_LIMIT:g})",
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cells", type=some_of(CELLS), metavar="A,B,…", help=f"some of {', '.join(CELLS)} (default: all)")
    add_shapes(parser, BATCHES, HIDDEN, STEPS)
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
    add_limits(parser, "the peer compile")
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


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """What a job says of how long peers are sampled."""
    return {
        "rounds": options.rounds or (_QUICK_ROUNDS if options.quick else ROUNDS),
        "each": options.time or (_QUICK_EACH if options.quick else EACH),
        "budget": float("inf"),
    }


def in_own_workers(peer: str, works: Sequence[Work], limit: float) -> list[Work]:
    """For each point a worker that measures this peer too, and keeps its rows only."""
    alone = {"peers": [OURS, BASE, peer]}
    return [
        Work([point], dict(work.job) | alone, work.threads, peer, limit)
        for work in works
        for point in work.points
    ]


def _works(options: argparse.Namespace) -> list[Work]:
    chosen = RECURRENT.chosen(options.peers)
    job = sampling(options) | {
        "peers": [name for name in chosen if name != "compile"],
        "large": LARGE if options.peers is None and not options.full else float("inf"),
    }
    most = max(options.threads)  # memory is the same with any number
    works = [
        Work(list(_points(options, threads)), job | {"memory": threads == most}, threads)
        for threads in options.threads
    ]
    if "compile" in chosen:
        works += in_own_workers("compile", list(works), options.compile_limit)
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
