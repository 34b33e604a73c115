"""The GPU benchmark: its worker on the CPU, its report from made-up figures, its command without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.core import cuda, report
from benchmarks.core.benchmark import in_folder
from benchmarks.core.table import Table
from benchmarks.gpu_norms import measure as gpu
from benchmarks.gpu_norms import peers as gpu_peers
from benchmarks.gpu_norms import report as gpu_report
from benchmarks.norms.peers import make_case
from layernorm import machine
from layernorm.cli import main

PEERS = ["layernorm", "torch", "liger", "quack", "apex", "flash-attention"]


def rows_of(operator: str, mode: str, dtype: str = "float32") -> list[dict]:
    found: list[dict] = []
    job = {"peers": PEERS, "rounds": 2, "budget": 0.1, "device": "cpu", "threads": 1}
    point = {"operator": operator, "dtype": dtype, "rows": 8, "width": 64, "mode": mode}
    gpu.measure(job | {"points": [point]}, lambda event: found.extend(event.get("rows", ())))
    return found


@pytest.fixture
def few_copies(monkeypatch):
    monkeypatch.setattr(gpu_peers, "ROTATED_BYTES", 2**14)


@pytest.mark.usefixtures("few_copies")
def test_the_worker_and_the_report(tmp_path: Path):
    outputs = in_folder(tmp_path)
    with Table(outputs.table("gpu"), gpu.COLUMNS, lambda row: True) as table:
        for operator, mode in (("layer_norm", "forward"), ("add_rms_norm", "training")):
            rows = rows_of(operator, mode)
            assert [row["peer"] for row in rows] == PEERS
            assert [row["status"] for row in rows[:2]] == ["measured"] * 2
            assert {row["status"] for row in rows[2:]} <= {"not installed", "not supported", "failed"}
            assert rows[1]["ratio_to_torch"] == 1.0
            assert all(row["copy_us"] > 0 and row["host_us"] > 0 for row in rows[:2])
            figures = dict.fromkeys((*machine.GPU_COLUMNS, *machine.COLUMNS), "x")
            table.add(figures | {"date": "2000-01-02T00:00:00Z"} | row | {"gpu": "A GPU"} for row in rows)
    lines = report.write("gpu", outputs)
    assert len(lines) == 2
    assert lines[0].startswith("layer_norm, forward: ")
    page = outputs.page.read_text()
    for text in (
        "## Norm operators on a GPU",
        "A GPU. Python",
        "add_rms_norm",
        "8×64",
        "bench-gpu-layer_norm.png",
    ):
        assert text in page
    assert (tmp_path / "bench-gpu-add_rms_norm.png").stat().st_size > 1000
    assert "--sizes 8x64" in page


def test_inputs_rotate_through_more_than_a_cache_holds():
    case = make_case("add_layer_norm", torch.bfloat16, 128, 768, True)
    cases = gpu_peers.rotation(case)
    size = sum(t.nbytes for t in (*case.inputs[:2], *case.grads))
    assert len(cases) * size >= gpu_peers.ROTATED_BYTES > 4 * 50 * 2**20
    assert len({c.inputs[0].data_ptr() for c in cases}) == len(cases)
    assert all(c.inputs[2] is case.inputs[2] for c in cases)  # weights stay in the cache, as in a network


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys, tmp_path):
    assert main(["bench", "gpu", "--out", str(tmp_path)]) == 2
    assert "this benchmark needs a GPU, and PyTorch finds none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_documented_predictions_are_the_programs():
    page = (Path(__file__).parents[2] / "docs/gpu.md").read_text("utf-8")
    assert gpu_report.predictions() in page


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_times_are_the_gpus():
    x = torch.ones(2**26, device="cuda")
    began = cuda.Instant()
    x.clone()
    assert 2e-5 < cuda.Instant() - began < 1e-1
