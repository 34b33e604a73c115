"""The benchmark of recurrent layers on a GPU: worker on the CPU, peers' layouts, command, page."""

from __future__ import annotations

import itertools
import sys
from dataclasses import asdict, replace
from functools import partial
from types import ModuleType

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.core import command, cuda
from benchmarks.core.subjects import Subject, difference
from benchmarks.gpu_norms.measure import BENCHMARK as GPU_NORMS
from benchmarks.gpu_norms.measure import COMMAND
from benchmarks.gpu_recurrent import measure as gpu_recurrent
from benchmarks.gpu_recurrent import peers
from benchmarks.gpu_recurrent.measure import BENCHMARK
from benchmarks.recurrent import loops
from benchmarks.recurrent import measure as recurrent
from benchmarks.recurrent import peers as recurrent_peers
from benchmarks.recurrent.case import make_case
from layernorm import machine
from tests.benchmarks.cases import measured, options_of, rows_of_point, table_of, write_table

pytestmark = pytest.mark.usefixtures("one_thread")
EVERYWHERE = list(gpu_recurrent.EVERYWHERE)
TINY = ("gpu", "--batches", "2", "--steps", "4", "--rounds", "2", "--time", "0.01")
TINY += ("--peers", "layernorm-looped,layernorm-persistent,loop")
ON_CPU = {"device": "cpu", "firsts": False}
measured_here = partial(measured, gpu_recurrent.measure, **ON_CPU)


def grid(cell, **chosen):
    """Return points of a cell, in float32 inference unless something else is chosen."""
    values = {"dtypes": ["float32"], "batches": [2], "hidden": [8], "steps": [3], "modes": ["inference"]}
    return list(replace(BENCHMARK, axes=recurrent.BENCHMARK.axes).grid(cells=[cell], **values | chosen))


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.parametrize("cell", recurrent.CELLS)
def test_peers_compute_the_same_function(cell, no_compiler):
    others = {*peers.KERNELS, peers.LOOPED, peers.PERSISTENT}
    names = [name for name in peers.PEERS if name not in others]
    dtypes = ["float32", "bfloat16"] if cell == "lstm" else ["float32"]
    points = grid(cell, dtypes=dtypes, batches=[3], hidden=[16], steps=[5], modes=recurrent.MODES)
    rows, notes = measured_here(points, names)
    assert notes == []
    for row in rows:
        assert row["status"] == "measured"
        # Some units in the last place, 1.2e-7 and 7.8e-3, over five steps.
        assert row["difference"] < {"float32": 1e-5, "bfloat16": 8e-2}[row["dtype"]], row
        assert row["over_products"] > 0
        assert row["peak_bytes"] == ""  # the CPU has no such counter
        assert ("compile_s" in row) == (row["peer"] in ("compile-step", "scan"))
    shown = [row["peer"] for row in rows if (row["mode"], row["dtype"]) == ("inference", "float32")]
    assert shown == [name for name in names if name != "layernorm-recompute"]


def test_the_parts_of_a_cell_have_all_its_weights():
    for cell, parts in loops.PARTS.items():
        case = make_case(cell, 1, 4, 1, training=False)
        assert sorted(case.normalized) == sorted((*parts.project_weights, *parts.step_weights))


def flashrnn_like(Wx, R, b, states=None, function="lstm", backend="", dtype=""):  # noqa: N803
    """FlashRNN's function, written after its documentation; its shapes are BTGHD, GHDP, GHD and SBTHD."""
    rows, steps, _, heads, size = Wx.shape
    assert (heads, backend, dtype) == (1, "vanilla", str(Wx.dtype).removeprefix("torch."))
    h = c = Wx.new_zeros(rows, size)
    outputs = []
    for t in range(steps):
        w, r = Wx[:, t, :, 0], torch.einsum("gdp,np->ngd", R[:, 0], h)
        if function == "lstm":
            i, f, z, o = (w + r + b[:, 0]).unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * z.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            reset, update = (w[:, k] + r[:, k + 1] + b[k + 1, 0] for k in (0, 1))
            new = w[:, 2] + b[3, 0] + reset.sigmoid() * (r[:, 0] + b[0, 0])
            h = update.sigmoid() * h + (1 - update.sigmoid()) * new.tanh()
        outputs.append(h)
    return torch.stack(outputs, 1)[None, :, :, None], None


def torchrl_like(cell, x, *arguments, compute_dtype):
    """TorchRL's functions: sequences first, the state to begin with at each step, where sequences begin."""
    *states, w_ih, w_hh, b_ih, b_hh, is_init = arguments
    assert x.is_contiguous()
    assert (compute_dtype, len(states)) == (x.dtype, {"lstm": 2, "gru": 1}[cell])
    assert is_init.dtype == torch.bool
    assert is_init.sum() == len(x)
    assert is_init[:, 0].all()
    start = tuple(s[:, 0].contiguous()[None] for s in states)
    function = {"lstm": torch.lstm, "gru": torch.gru}[cell]
    hx = start if cell == "lstm" else start[0]
    return function(x, hx, [w_ih, w_hh, b_ih, b_hh], True, 1, 0.0, True, False, True)


@pytest.mark.parametrize("peer", peers.KERNELS)
@pytest.mark.parametrize("mode", recurrent.MODES)
@pytest.mark.parametrize("cell", recurrent.CELLS)
def test_the_kernels_of_others_get_the_layouts_they_want(cell, mode, peer, monkeypatch):
    flashrnn, kernels = ModuleType("flashrnn"), ModuleType("kernels")
    flashrnn.flashrnn = flashrnn_like
    kernels.lstm_triton, kernels.gru_triton = partial(torchrl_like, "lstm"), partial(torchrl_like, "gru")
    name = "torchrl.modules.tensordict_module._rnn_triton"
    for key, value in (("flashrnn", flashrnn), (name, kernels)):
        monkeypatch.setitem(sys.modules, key, value)
    for parent in ("torchrl", "torchrl.modules", "torchrl.modules.tensordict_module"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    rows, notes = measured_here(
        grid(cell, batches=[3], hidden=[16], steps=[5], modes=[mode]), ["torch", peer]
    )
    assert notes == []
    assert rows[1]["status"] == ("not supported" if cell == "rnn" else "measured")
    assert cell == "rnn" or rows[1]["difference"] < 1e-5


def test_peers_whose_packages_are_missing_are_listed(monkeypatch):
    for name in peers.KERNELS:
        monkeypatch.setitem(sys.modules, name, None)
    rows, _ = measured_here(grid("lstm"), ["layernorm", "torch", *peers.KERNELS])
    assert [row["status"] for row in rows] == ["measured", "measured", "not installed", "not installed"]


def test_a_point_without_enough_memory_is_listed_and_the_next_is_measured(monkeypatch):
    def known(device):
        def expected(point):
            if point.hidden == 16:
                raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")
            return right(point)

        right = original(device)
        return expected

    original = recurrent.right_results
    monkeypatch.setattr(recurrent, "right_results", known)
    rows, notes = measured_here(grid("gru", hidden=[16, 8]), EVERYWHERE)
    assert [row["status"] for row in rows] == [
        *["out of memory"] * 5,
        *("measured", "not supported", "not supported", "measured", "measured"),
    ]
    assert notes == ["gru float32 batch 2 hidden 16 inference: CUDA out of memory."]


def test_peers_are_judged_under_the_precision_that_is_measured(monkeypatch):
    """A peer in TF32 is off by more than float32's tolerance, and by no more than twice the judge in TF32."""
    matmul, seen = torch.backends.cuda.matmul, []
    right = recurrent_peers.PEERS["loop"]
    monkeypatch.setitem(recurrent.TOLERANCE, "float32", 0.0)

    def judge(case):
        made = right(case)

        def results():
            seen.append(matmul.allow_tf32)
            scale = 1.0 + 1e-4 * matmul.allow_tf32
            return [scale * result for result in made.results()]

        return replace(made, results=results)

    def off(by):
        made = replace(right(case := point.case()), results=None)
        return replace(made, results=lambda: [by * result for result in right(case).results()])

    monkeypatch.setitem(recurrent_peers.PEERS, "loop", judge)
    (point,) = grid("lstm")
    expected = recurrent.right_results()(point)
    check = recurrent.check_of(point, point.case(), expected, (), cuda.as_cudnn)
    check("layernorm", off(1.0 + 1.9e-4))
    with pytest.raises(RuntimeError, match=r"its results are off by 2\.1e-04"):
        check("layernorm", off(1.0 + 2.1e-4))
    assert seen == [False, True, True]  # what is right, and twice the judge
    assert not matmul.allow_tf32


def test_a_point_that_pytorch_cannot_compute_is_listed(monkeypatch):
    def unsupported(case):
        raise RuntimeError("cuDNN has no bfloat16")

    monkeypatch.setitem(peers.PEERS, "torch", unsupported)
    rows, notes = measured_here(grid("gru", dtypes=["bfloat16"]), EVERYWHERE)
    assert [row["status"] for row in rows] == ["not measured"] * 5
    assert [note.partition(": ")[2] for note in notes] == [
        "torch failed: cuDNN has no bfloat16",
        "torch itself cannot be measured at gru bfloat16 batch 2 hidden 8 inference",
    ]


def test_the_first_call_is_timed_in_a_fresh_process(monkeypatch):
    monkeypatch.setattr(gpu_recurrent, "FEW", ("float32", 2, 8))
    points = grid("lstm", hidden=[8, 16], modes=["training"])
    rows, notes = measured_here(points, EVERYWHERE, firsts=True)
    assert notes == []
    timed = {(row["mode"], row["hidden"], row["peer"]): row["first_s"] for row in rows if "first_s" in row}
    assert list(timed) == [("training", 8, "layernorm"), ("training", 8, "torch")]
    assert all(0 < seconds < 60 for seconds in timed.values())


def test_a_first_call_that_fails_is_noted(monkeypatch):
    def events(*arguments):
        raise gpu_recurrent.WorkerError("the worker failed")
        yield

    monkeypatch.setattr(gpu_recurrent.workers, "events", events)
    monkeypatch.setattr(gpu_recurrent, "FEW", ("float32", 2, 8))
    rows, notes = measured_here(grid("gru", modes=["training"]), EVERYWHERE, firsts=True)
    assert [row.get("first_s") for row in rows] == ["", None, None, "", None]
    assert notes[0].endswith("training: the first call of layernorm: the worker failed")


def works(*arguments, benchmark=BENCHMARK):
    return benchmark.works(options_of("gpu", *arguments))


def test_the_default_grid_is_what_the_help_says():
    found = works()
    shared = [work for work in found if work.only is None]
    points = [point for work in shared for point in work.points]
    assert len(points) == len(set(points)) == 2 * 4 * 5 * 2 * 3
    assert {point.steps for point in points} == {512}
    assert {work.job["device"] for work in found} == {"cuda"}
    missing = [name for name in peers.KERNELS if peers.is_missing(name)]
    for work in shared:
        few = {(point.dtype, point.batch, point.hidden) for point in work.points} == {gpu_recurrent.FEW}
        names = [name for name in EVERYWHERE if name != peers.PERSISTENT]
        # Those that are missing are listed, and those that compile have workers of their own.
        more = ["layernorm-recompute", "layernorm-none", *missing] if few else []
        assert set(work.job["peers"]) == {*names, *more}
        assert work.job["firsts"]
    persistent = [work for work in found if work.only == peers.PERSISTENT]
    assert {point for work in persistent for point in work.points} == set(points)
    assert all(work.job["peers"] == ["layernorm", "torch", work.only] for work in persistent)
    own = [work for work in found if work.only in peers.ALONE]
    assert [work.only for work in own].count("scan") == 4
    assert {work.only for work in own} == set(peers.ALONE) - set(missing)
    assert all((p.dtype, p.batch, p.hidden) == gpu_recurrent.FEW for work in own for p in work.points)
    assert not own[0].job["firsts"]


def test_named_peers_are_measured_at_every_point():
    named = works("--peers", "scan", "--batches", "1", "--hidden", "8", "--compile-limit", "7")
    assert [(len(work.points), work.only, work.limit) for work in named if work.points][1:] == [
        (1, "scan", 7.0)
    ] * 12
    assert {work.only for work in works("--quick")} >= {None, peers.PERSISTENT}


def test_the_most_valuable_comes_first():
    every = [
        (work, point)
        for each in COMMAND.benchmarks
        for work in works(benchmark=each)
        for point in work.points
    ]
    every.sort(key=lambda pair: pair[0].rank)
    order = dict.fromkeys(
        (getattr(point, "cell", None) or "norms", point.dtype, work.only in peers.ALONE)
        for work, point in every
        if getattr(point, "batch", 16) in (16, 64)
    )
    compiled = [(cell, "bfloat16", True) for cell in ("lstm", "gru")]
    assert list(order)[:7] == [
        *(("lstm", "bfloat16", False), ("gru", "bfloat16", False), ("lstm", "float16", False)),
        *(("norms", "bfloat16", False), ("norms", "float32", False), *compiled),
    ]
    first = [point.hidden for work, point in every if (work.rank, work.only) == (0, None)]
    assert set(first) == {128, 256, 512, 1024, 2048}


def test_the_options_choose_norms_or_recurrent_layers():
    def counts(*arguments):
        return [
            len({point for work in works(*arguments, benchmark=each) for point in work.points})
            for each in COMMAND.benchmarks
        ]

    assert counts() == [2 * 2 * 2 * 8, 240]
    assert counts("--operator", "rms_norm") == [32, 0]
    assert counts("--operator", "rnn") == [0, 120]
    assert counts("--operator", "rnn,rms_norm", "--modes", "inference") == [0, 60]
    assert counts("--operator", "rnn,rms_norm", "--modes", "training", "--quick") == [4, 6]


def on_cpu(benchmark):
    """Return a benchmark that measures on the CPU."""

    def plan(works, options):
        found = benchmark.plan(works, options)
        return [replace(work, threads=1, job=dict(work.job) | ON_CPU) for work in found]

    return replace(benchmark, plan=plan, problem=lambda: None)


def main_on_cpu(*arguments):
    return command.main([replace(COMMAND, benchmarks=tuple(map(on_cpu, COMMAND.benchmarks)))], arguments)


def test_the_command_writes_table_picture_and_page_and_goes_on(tmp_path, capsys):
    arguments = [*TINY, "--operator", "lstm", "--out", str(tmp_path), "--dtypes", "bfloat16,float32"]
    assert main_on_cpu(*arguments, "--hidden", "8") == 0
    image = "bench-gpu-recurrent.png"
    assert {p.name for p in tmp_path.iterdir()} == {"gpu_recurrent.csv", image, "benchmarks.md"}
    path = tmp_path / "gpu_recurrent.csv"
    rows = table_of(BENCHMARK, tmp_path)
    found = [(row["mode"], row["dtype"], row["peer"]) for row in rows]
    dtypes = ("bfloat16", "float32")
    assert sorted(found) == sorted(itertools.product(recurrent.MODES, dtypes, EVERYWHERE))
    timed = {row["peer"] for row in rows if row["mode"] == "training" and row["forward_us"]}
    assert timed == {"layernorm"}
    assert {row["status"] for row in rows} == {"measured", "not supported"}
    text = capsys.readouterr().out
    assert "[8/8] lstm float32 batch 2 hidden 8 training, 1 thread: layernorm-persistent not sup" in text
    assert "\nlstm, training, bfloat16: speed over torch.nn, un-normalized " in text
    page = (tmp_path / "benchmarks.md").read_text()
    start = "python -m benchmarks gpu --operator lstm --batches 2 --hidden 8 --steps 4 "
    assert (
        f"{start}--dtypes bfloat16,float32 --rounds 2\n" in page
    )  # peers that every point has need not be named
    assert "## Recurrent networks on a GPU" in page
    assert f"]({image})" in page
    before = path.read_text().splitlines()
    assert main_on_cpu(*arguments, "--hidden", "8,16", "--modes", "inference", "--resume") == 0
    after = path.read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == len(before) + 2 * len(EVERYWHERE)


def test_one_command_measures_norms_and_recurrent_layers(tmp_path):
    arguments = [*TINY, "--operator", "layer_norm,gru", "--hidden", "8", "--sizes", "4x8"]
    arguments += ["--dtypes", "float32", "--modes", "forward,inference", "--out", str(tmp_path)]
    assert main_on_cpu(*arguments) == 0
    assert len(table_of(GPU_NORMS, tmp_path)) == 2
    assert len(table_of(BENCHMARK, tmp_path)) == len(EVERYWHERE)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "python -m benchmarks gpu --operator layer_norm --dtypes float32" in page
    assert "python -m benchmarks gpu --operator gru --batches 2" in page
    assert page.index("## Norm operators on a GPU") < page.index("## Recurrent networks on a GPU")
    (tmp_path / "gpu.csv").unlink()
    (tmp_path / "bench-gpu-recurrent.png").unlink()
    assert main(["gpu", "--report-only", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "bench-gpu-recurrent.png").is_file()
    assert "## Norm operators on a GPU" not in (tmp_path / "benchmarks.md").read_text()


def test_the_page_sums_up(tmp_path, capsys):
    """Ours is twice and half as fast as PyTorch's; by hand and others' are slower."""
    rows = []
    for hidden, ratio in ((256, 2.0), (512, 0.5)):
        times = {"layernorm": 1024.0, "torch": 1024.0 * ratio, "loop": 4096.0}
        if hidden == 512:
            times |= {"scan": 3072.0, "flashrnn": 2048.0, "torchrl": "not installed"}
        times |= dict.fromkeys((peers.LOOPED, peers.PERSISTENT), "not supported")
        figures = {"products_us": 512.0, "over_products": 2.0, "peak_bytes": 2.5e6, "kernel": "triton"}
        rows += rows_of_point(times, figures, hidden=hidden)
    for row in rows:
        if row["peer"] == "scan":
            row["compile_s"] = 21.5
        elif row["hidden"] == 512 and row["peer"] in ("layernorm", "torch", "loop"):
            row["first_s"] = 0.25
    common = {"cell": "lstm", "dtype": "bfloat16", "batch": 64, "steps": 512, "mode": "training"}
    write_table(BENCHMARK, tmp_path / "gpu_recurrent.csv", rows, gpu="A GPU, 141 GiB", **common)
    assert main(["gpu", "--report-only", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(
        "lstm, training, bfloat16: speed over torch.nn, un-normalized 1.00 (0.50), best by hand 3.46 (3.00), "
        "others' kernels, un-normalized 2.00 (2.00), share of the products' limit 0.50 (0.50): geometric mean"
    )
    page = (tmp_path / "benchmarks.md").read_text()
    for text in (
        "A GPU, 141 GiB. Python",
        "| lstm | training | bfloat16 | 2 | 1.00 (0.50) | 3.46 (3.00) | 2.00 (2.00) | 0.50 (0.50) |",
        "slower than `torch.nn`'s un-normalized layer at 1 of 2 points, the slowest first;",
        "| lstm | bfloat16 | training | 64 | 512 | 0.50 (0.50–0.50) |",
        "| lstm | bfloat16 | 64 | 256 | 2.5 | 2.5 | 2.5 | – | – |",
        "| bfloat16 | training | 64 | 512 | triton | 1,024 | not supported | not supported | 512 | 4,096 "
        "| 3,072 | 2,048 | not installed | 512 | 2.00 | 0.50 | 0.50 (0.50–0.50) |",
        "| lstm | bfloat16 | training | 64 | 512 | scan | – | 21.5 |",
        "| lstm | bfloat16 | training | 64 | 512 | layernorm | 0.25 | – |",
        "benchmarks gpu --operator lstm --batches 64 --hidden 256,512 --modes training --dtypes bfloat16\n",
        "`layernorm`, `layernorm-looped`, `layernorm-persistent`, `torch`, `loop` are measured at every",
    ):
        assert text in page


def test_nothing_measured_is_a_page_too(tmp_path):
    (point,) = grid("lstm", modes=["training"])
    rows = rows_of_point(dict.fromkeys(("layernorm", "torch"), "out of memory"), **asdict(point))
    write_table(BENCHMARK, tmp_path / "gpu_recurrent.csv", rows)
    assert main(["gpu", "--report-only", "--out", str(tmp_path)]) == 0
    assert "| out of memory | out of memory | – |" in (tmp_path / "benchmarks.md").read_text()
    assert not (tmp_path / "bench-gpu-recurrent.png").exists()


def test_columns_of_the_machine_are_in_the_table():
    assert set(machine.GPU_COLUMNS) | set(machine.COLUMNS) <= set(BENCHMARK.columns)


def test_releasing_frees_the_gradients():
    case = make_case("gru", 2, 4, 3, training=True)
    made = recurrent_peers.PEERS["torch"](case)
    assert len(made.results()) == 2 + len(case.unnormalized)
    made.release()
    assert difference(made.results(), made.results()) == 0
    assert cuda.peak_bytes(made, "cpu") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_graphs_and_peaks_are_the_gpus():
    x, y = torch.ones(2**20, device="cuda"), torch.zeros(2**20, device="cuda")
    replay = cuda.in_graph(lambda: y.add_(x), "cuda")
    y.zero_()
    replay()
    assert float(y.sum()) == 2**20
    made = Subject(lambda: x.exp().neg(), list)
    assert cuda.peak_bytes(made, "cuda") == 2 * x.nbytes
