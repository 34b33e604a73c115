"""The benchmark of norms on a GPU: its worker on the CPU, its report, its command without a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.core import cuda, report
from benchmarks.core.outputs import in_folder
from benchmarks.gpu_norms import measure, peers
from benchmarks.gpu_norms.measure import BENCHMARK
from benchmarks.norms.peers import make_case
from layernorm import machine
from tests.benchmarks.cases import failure, measured, write_table

PEERS = ("layernorm", "torch", "liger", "quack", "apex", "flash-attention")


def test_the_worker_and_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ROTATED_BYTES", 2**14)
    outputs, table = in_folder(tmp_path), []
    for operator, mode in (("layer_norm", "forward"), ("add_rms_norm", "training")):
        chosen = {"operator": [operator], "dtypes": ["float32"], "sizes": [(8, 64)], "modes": [mode]}
        rows, _ = measured(measure.measure, BENCHMARK.grid(**chosen), PEERS, rounds=2, device="cpu")
        assert [row["peer"] for row in rows] == list(PEERS)
        assert [row["status"] for row in rows[:2]] == ["measured"] * 2
        assert {row["status"] for row in rows[2:]} <= {"not installed", "not supported", "failed"}
        assert rows[1]["ratio_to_torch"] == 1.0
        assert all(row["copy_us"] > 0 and row["host_us"] > 0 for row in rows[:2])
        table += [row | {"gpu": "A GPU"} for row in rows]
    write_table(BENCHMARK, outputs.table("gpu"), table, **dict.fromkeys(machine.GPU_COLUMNS, "x"))
    lines = report.write(BENCHMARK, [BENCHMARK], outputs)
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
    cases = peers.rotation(case)
    size = sum(t.nbytes for t in (*case.inputs[:2], *case.grads))
    assert len(cases) * size >= peers.ROTATED_BYTES > 4 * 50 * 2**20
    assert len({c.inputs[0].data_ptr() for c in cases}) == len(cases)
    assert all(c.inputs[2] is case.inputs[2] for c in cases)  # weights stay in the cache, as in a network


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys, tmp_path):
    text = failure(capsys, "gpu", "--out", str(tmp_path))
    assert "this benchmark needs a GPU, and PyTorch finds none" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_times_are_the_gpus():
    x = torch.ones(2**26, device="cuda")
    began = cuda.Instant()
    x.clone()
    assert 2e-5 < cuda.Instant() - began < 1e-1
