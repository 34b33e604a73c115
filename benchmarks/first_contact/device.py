"""The device: its versions and bandwidth, the gap between kernels, and clusters of thread blocks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.first_contact.figures import Setting
from layernorm import machine

_SOURCE: Final = Path(__file__).with_name("exchange_bench.cu")
_KERNELS: Final = 512
_PACKAGES: Final = ("torch", "triton", "numpy", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cudnn-cu13")


def measure(setting: Setting) -> None:
    """Print what the machine is, and what a copy, a product and a kernel of a graph take."""
    versions = {name: _version(name) for name in _PACKAGES}
    setting.emit(python=sys.version.split()[0], versions=versions, machine=machine.describe())
    if setting.rehearse:
        return
    properties = torch.cuda.get_device_properties(0)
    setting.emit(
        **machine.gpu(),
        multiprocessors=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        cudnn=torch.backends.cudnn.version(),
    )
    x = torch.empty(2**30, device="cuda")
    us = setting.microseconds(partial(torch.empty_like(x).copy_, x))
    setting.emit(copy_tb_s=round(2e-6 * x.nbytes / us, 3))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    setting.emit(bfloat16_tflop_s=round(2e-6 * 8192**3 / setting.microseconds(partial(torch.mm, a, b)), 1))
    t = torch.zeros(64, device="cuda")
    t.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_KERNELS):  # each waits for the one before
            t.add_(1)
    setting.emit(graph_kernel_us=round(setting.microseconds(graph.replay) / _KERNELS, 3))
    _clusters(setting)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _clusters(setting: Setting) -> None:
    """Print how many clusters of the persistent kernels' plans the device holds at a time.

    0 is a launch that fails (CUDA_ERROR_INVALID_CLUSTER_SIZE).
    """
    from layernorm.gpu.persistent import backward_plan, compiling, plan

    major, minor = torch.cuda.get_device_capability(0)
    for hidden in (128, 256, 512, 768):
        for direction, of in (("forward", plan.plan), ("backward", backward_plan.plan)):
            found: Any = of("lstm", hidden, "bfloat16", 10 * major + minor, 64, 1)
            at = {"plan": f"lstm {hidden} {direction}"}
            if isinstance(found, str):
                setting.emit(**at, problem=found)
                continue
            began = time.perf_counter()
            try:
                clusters: int | str = _fitting(compiling.load(found, 0, 1), found)
            except Exception as error:  # the next plan may have room
                clusters = f"{type(error).__name__}: {error}"[:300]
            seconds = round(time.perf_counter() - began, 2)
            setting.emit(**at, blocks=found.blocks, clusters=clusters, load_s=seconds)


def _fitting(loaded: Any, plan: Any) -> int | str:
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.blockDimX, config.sharedMemBytes = plan.blocks, plan.threads, loaded.shared_bytes
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    error, count = driver.cuOccupancyMaxActiveClusters(loaded.function, config)
    return int(count) if int(error) == 0 else str(error)


def exchange(setting: Setting) -> None:
    """Compile ``exchange_bench.cu`` and print what an exchange takes; a rehearsal only compiles it."""
    compiler = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if setting.rehearse and not Path(compiler).is_file():
        setting.emit(problem="there is no nvcc")
        return
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "exchange_bench")
        target = "arch=compute_90a,code=sm_90a"
        command = [compiler, "-O3", "-std=c++17", f"-gencode={target}", str(_SOURCE), "-o", program]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        setting.emit(compile_s=round(time.perf_counter() - began, 2))
        if setting.rehearse:
            return
        with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                setting.emit(**json.loads(line))
        if process.returncode:
            raise RuntimeError(f"exchange_bench ended with exit code {process.returncode}")
