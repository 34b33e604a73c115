"""The benchmark of norms on a GPU: its worker on the CPU, its report, its command without a GPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

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


def test_quack_gets_its_weights_in_float32(monkeypatch):
    def layernorm_fwd(x, weight, bias, eps, return_rstd=False, return_mean=False):
        assert (weight.dtype, bias.dtype) == (torch.float32, torch.float32)
        a = x.float()
        mean, rstd = a.mean(-1), (a.var(-1, correction=0) + eps).rsqrt()
        output = F.layer_norm(a, weight.shape, weight, bias, eps).to(x.dtype)
        return (output, rstd, mean) if return_rstd and return_mean else output

    def layernorm_bwd(x, weight, grad, rstd, mean):
        y = (x.float() - mean[:, None]) * rstd[:, None]
        a = grad.float() * weight
        of_x = rstd[:, None] * (a - a.mean(-1, keepdim=True) - y * (a * y).mean(-1, keepdim=True))
        return of_x.to(x.dtype), (grad.float() * y).sum(0), grad.float().sum(0)

    quack = ModuleType("quack.rmsnorm")
    quack.layernorm_fwd, quack.layernorm_bwd = layernorm_fwd, layernorm_bwd
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.rmsnorm", quack)
    monkeypatch.setattr(peers, "ROTATED_BYTES", 2**14)
    chosen = {"operator": ["layer_norm"], "dtypes": ["bfloat16"], "sizes": [(8, 64)]}
    rows, notes = measured(
        measure.measure, BENCHMARK.grid(**chosen), ["layernorm", "torch", "quack"], rounds=1, device="cpu"
    )
    assert notes == []
    assert [row["status"] for row in rows] == ["measured"] * 6


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
