"""The benchmark of the norms: what it measures, and its part of the page."""

from __future__ import annotations

import sys
from functools import partial
from itertools import chain

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.core import filling, report
from benchmarks.core.outputs import in_checkout
from benchmarks.core.subjects import Subject
from benchmarks.norms import measure, peers
from benchmarks.norms.measure import BENCHMARK
from benchmarks.norms.report import REPORT, means
from layernorm import backends, machine
from tests.benchmarks.cases import (
    installed,
    measured,
    measured_by_worker,
    rows_of_point,
    table_of,
    write_table,
)

pytestmark = pytest.mark.usefixtures("one_thread")
OURS_AND_TORCH = ("layernorm", "torch")
measured_here = partial(measured, measure.measure)


def test_the_command_writes_table_picture_and_page(tmp_path, capsys):
    arguments = ("--sizes", "4x8", "--threads", "1", "--peers", "layernorm,torch", "--rounds", "1")
    assert main(["norms", *arguments, "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"norms.csv", "bench-norms.png", "benchmarks.md"}
    rows = table_of(BENCHMARK, tmp_path)
    points = [(row["dtype"], row["mode"], row["peer"]) for row in rows]
    assert points == [
        (dtype, mode, peer)
        for dtype in ("float32", "bfloat16")
        for mode in ("forward", "training")
        for peer in ("layernorm", "torch")
    ]
    for ours, torchs in zip(rows[::2], rows[1::2], strict=True):
        assert (ours["operator"], ours["rows"], ours["width"]) == ("layer_norm", "4", "8")
        assert (ours["status"], ours["threads"]) == ("measured", "1")
        assert ours["kernel"] in backends.KERNELS
        time, base = (float(row["median_us"]) for row in (ours, torchs))
        ratio, limit, copy = (float(ours[name]) for name in ("ratio_to_torch", "limit_us", "copy_us"))
        # Figures have five digits. With one round the median of the ratios is the ratio of the medians.
        assert ratio == pytest.approx(base / time, rel=1e-4)
        assert torchs["ratio_to_torch"] == torchs["ratio_q25"] == torchs["ratio_q75"] == "1.0"
        assert limit == pytest.approx({"forward": 1.0, "training": 2.5}[ours["mode"]] * copy, rel=1e-4)
        assert float(ours["fraction_of_limit"]) == pytest.approx(limit / time, rel=1e-4)
        assert float(ours["other_cpus"] or 0) >= 0
        assert ours["machine"] == machine.describe()
        assert ours["torch"] == torch.__version__
    assert (tmp_path / "bench-norms.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "benchmarks.md").read_text()
    assert "python -m benchmarks norms --sizes 4x8 --peers layernorm,torch --threads 1 --rounds 1\n" in page
    text = capsys.readouterr().out
    assert text.count("times torch's speed") == 4
    assert "[4/4] layer_norm bfloat16 4×8 training, 1 thread: " in text


@pytest.mark.parametrize("operator", backends.NORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_operator_is_measured_in_both_modes(operator, dtype):
    points = BENCHMARK.grid(operator=[operator], dtypes=[dtype], sizes=[(3, 16)])
    rows, notes = measured_here(points, OURS_AND_TORCH)
    assert notes == []
    assert [(row["mode"], row["status"]) for row in rows] == [
        (mode, "measured") for mode in measure.MODES for _ in OURS_AND_TORCH
    ]


def test_a_peer_that_is_missing_cannot_or_fails_is_listed(monkeypatch):
    def wrong(case):
        tensors = [torch.zeros_like(case.inputs[0])]
        return Subject(lambda: None, lambda: tensors)

    for name in ("jax", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(peers.PEERS, "torch.compile", wrong)
    points = BENCHMARK.grid(dtypes=["float32"], sizes=[(3, 16)])
    rows, notes = measured_here(points, peers.PEERS)
    forward, training = ([row for row in rows if row["mode"] == mode] for mode in measure.MODES)
    shared = {
        "layernorm": "measured",
        "torch": "measured",
        "torch.compile": "failed",
        "jax": "not installed",
    }
    assert {row["peer"]: row["status"] for row in forward} == {**shared, "onnxruntime": "not installed"}
    assert {row["peer"]: row["status"] for row in training} == {**shared, "onnxruntime": "not supported"}
    assert notes[0] == "layer_norm float32 3×16 forward: torch.compile failed: its results are off by 1.0e+00"
    assert "1 results, expected 4" in notes[1]
    rows = [{**row, "threads": 1, "other_cpus": 0.25} for row in forward]
    line = filling.latest("here", rows, 1)
    assert line.endswith("; other work took 0.2 CPUs, so these times are off")
    line = filling.latest("here", [{**row, "other_cpus": ""} for row in rows], 1)
    assert line.endswith("torch.compile failed; jax not installed; onnxruntime not installed")


@pytest.mark.parametrize("peer", ["jax", "onnxruntime"])
def test_the_other_peers_give_the_same_results(peer):
    if not installed([peer]):
        pytest.skip(f"{peer} is not installed")
    points = [
        *BENCHMARK.grid(dtypes=["bfloat16"], sizes=[(5, 48)]),
        *BENCHMARK.grid(operator=["add_rms_norm"], dtypes=["float32"], sizes=[(5, 48)]),
    ]
    rows, notes = measured_by_worker("norms", points, [*OURS_AND_TORCH, peer])
    assert [note for note in notes if "is not supported" not in note] == []
    for row in rows[2::3]:
        # Whether ONNX Runtime has bfloat16 depends on its version.
        unsupported = peer == "onnxruntime" and (row["mode"] == "training" or row["dtype"] == "bfloat16")
        assert row["status"] == "measured" or (unsupported and row["status"] == "not supported"), row


def point(time, ratio, ort=None, **fields):
    """Return the rows of a point: time and ratio of ours, and what is the ratio of ONNX Runtime."""
    times = {"layernorm": time, "torch": time * ratio, "jax": "not installed"}
    times["onnxruntime"] = time * ratio / ort if ort else "not supported"
    usual = {"operator": "layer_norm", "dtype": "float32", "rows": 64, "width": 256, "mode": "forward"}
    rows = rows_of_point(times, {"fraction_of_limit": 0.5, "kernel": "native"}, **usual | fields)
    return [rows[0] | {"ratio_q25": ratio - 0.01, "ratio_q75": ratio + 0.01}, *rows[1:]]


@pytest.fixture
def outputs(tmp_path):
    found = in_checkout(tmp_path)
    rows = chain(
        point(10.0, 2.0, ort=4.0),
        point(1000.0, 0.5, ort=0.25, rows=512, width=512),
        point(50.0, 0.995, mode="training"),
        point(8.0, 3.0, threads=2, ort=1.0),
    )
    common = {
        "machine": "A processor, 2 CPUs, AVX2",
        "python": "3.11.7",
        "torch": "2.13.0",
        "layernorm": "0.1.0",
        "jax": "not installed",
        "onnxruntime": "1.20.0",
        "other_cpus": 0.02,
        "commit": "1234e56+",  # looks like a number
    }
    write_table(BENCHMARK, found.table("norms"), rows, **common)
    return found


def test_the_page_has_the_geometric_means(outputs):
    table = means(report.load(REPORT, outputs.table("norms"))).set_index(["threads", "mode"])
    assert table.layernorm[1, "forward"] == pytest.approx(1.0)  # of 2 and 1/2
    assert table.onnxruntime[1, "forward"] == pytest.approx(1.0)
    assert table.layernorm[1, "all"] == pytest.approx(0.995 ** (1 / 3))
    assert table.layernorm["all", "all"] == pytest.approx((3 * 0.995) ** (1 / 4))
    assert table.layernorm_points["all", "all"] == 4
    assert table.onnxruntime_points["all", "all"] == 3
    report.write(BENCHMARK, [BENCHMARK], outputs)
    page = outputs.page.read_text()
    assert "| all | all | 4 | 1.31 | not installed | 1.00 (3 points) |" in page
    assert "| 1 | training | 1 | 0.99 | not installed | not supported |" in page


def test_the_page_names_the_slow_points_and_the_missing_peers(outputs):
    report.write(BENCHMARK, [BENCHMARK], outputs)
    page = outputs.page.read_text()
    assert "slower than PyTorch's eager operator at 2 of 4 points" in page
    slow = page[page.index("the slowest first") :]
    assert slow.index("| 1 | float32 | 512×512 | forward | 0.50 (0.49–0.51) |") < slow.index(
        "| 1 | float32 | 64×256 | training | 0.99 (0.98–1.00) |"
    )
    assert "another peer is faster than `layernorm`: `onnxruntime` at 1 of 3." in page
    assert "| float32 | 64×256 | forward | native | 10.0 | 20.0 | not installed | 5.00 | 2.00 (1.99–2" in page
    assert "| 1,000 | 500 | not installed | 2,000 | 0.50 (0.49–0.51) |" in page
    assert "A processor, 2 CPUs, AVX2. Python 3.11.7, PyTorch 2.13.0, layernorm 0.1.0 " in page
    assert (
        "(commit 1234e56 with changes), JAX not installed, ONNX Runtime 1.20.0. Measured on 2026-01-02."
        in page
    )
    assert "There are 30 rounds. Other work on the machine took at most 0.02 CPUs during a point." in page
    assert "](images/bench-norms.png)" in page
    assert "`benchmarks/results/norms.csv`" in page
    assert str(outputs.page.parent) not in page
    assert outputs.image("norms").is_file()


def test_report_only_writes_the_page_again_without_measuring(tmp_path, capsys):
    write_table(BENCHMARK, tmp_path / "norms.csv", point(10.0, 2.0, ort=4.0))
    before = (tmp_path / "norms.csv").read_bytes()
    assert main(["norms", "--report-only", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "norms.csv").read_bytes() == before
    assert "at no point of 1 slower" in (tmp_path / "benchmarks.md").read_text()
    assert capsys.readouterr().out == (
        "layer_norm, 1 thread, forward: 2.00 (2.00) times PyTorch's speed: the geometric mean (the least)\n"
        f"Page: {tmp_path / 'benchmarks.md'}\n"
    )
