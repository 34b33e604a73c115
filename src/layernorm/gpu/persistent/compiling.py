"""The compilation of the persistent kernels by NVRTC, its cache on disk, and their launch by the driver.

``cuda-bindings`` is imported by the first call that needs it. A compiled kernel is kept in the folder that
``LAYERNORM_CACHE`` names, or in the user's cache folder; where that cannot be written there is no cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

import torch

from layernorm.gpu.launching import refuse_capture
from layernorm.gpu.persistent.backward_plan import BackwardPlan
from layernorm.gpu.persistent.plan import SHARED_BYTES, THREADS, Layout, Plan

CACHE_VARIABLE: Final = "LAYERNORM_CACHE"
KERNEL: Final = b"layernorm_persistent"
_COMMON: Final = ("device.cuh", "layout.cuh", "exchange.cuh", "gates.cuh")
#: Of each direction, in the order in which they are compiled as one.
SOURCES: Final[Mapping[type[Layout], tuple[str, ...]]] = {
    Plan: (*_COMMON, "forward.cuh", "cells.cuh", "forward.cu"),
    BackwardPlan: (*_COMMON, "backward.cuh", "backward_cells.cuh", "backward.cu"),
}
_DIGEST_BYTES: Final = 32
_PORTABLE_BLOCKS: Final = 8


@functools.cache
def _binding(name: str) -> ModuleType:
    return importlib.import_module(f"cuda.bindings.{name}")


def problem(architecture: int) -> str | None:
    """Return why nothing can be compiled for this architecture here, or None."""
    known = _nvrtc_architectures()
    if isinstance(known, str):
        return known
    if architecture in known:
        return None
    major, minor = _nvrtc_version()
    return f"NVRTC {major}.{minor} does not know compute capability {architecture // 10}.{architecture % 10}"


@functools.cache
def _nvrtc_architectures() -> frozenset[int] | str:
    try:
        nvrtc = _binding("nvrtc")
    except ImportError:
        return "the package cuda-bindings is not installed: pip install 'layernorm[cuda]'"
    try:
        error, known = nvrtc.nvrtcGetSupportedArchs()
    except (RuntimeError, OSError) as failure:
        return f"NVRTC cannot be loaded: {' '.join(str(failure).split())}"
    return f"NVRTC fails: {error}" if int(error) != 0 else frozenset(int(a) for a in known)


def _nvrtc_version() -> tuple[int, int]:
    nvrtc = _binding("nvrtc")
    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def source(plan: Layout) -> str:
    """Return all files of the plan's direction as one."""
    folder, names = Path(__file__).parent, SOURCES[type(plan)]
    return "".join(f'#line 1 "{name}"\n{(folder / name).read_text(encoding="utf-8")}' for name in names)


def compile(plan: Layout, architecture: int) -> bytes:
    """Return a kernel's machine code (a cubin), from the cache where it is there.

    Raises:
        RuntimeError: NVRTC is missing, or failed.
    """
    why_not = problem(architecture)
    if why_not is not None:
        raise RuntimeError(f"the persistent recurrent kernel cannot be compiled: {why_not}")
    options = [
        f"--gpu-architecture=sm_{architecture}",
        "--std=c++17",
        "--device-as-default-execution-space",
        # What is fused is written so, for a row's bits must not depend on what a plan's compiler sees.
        "--fmad=false",
        *(f"-D{name}={value}" for name, value in plan.macros().items()),
    ]
    text = source(plan)
    key = hashlib.sha256(repr((text, options, _nvrtc_version())).encode()).hexdigest()
    folder = _cache_folder()
    cached = None if folder is None else _read(folder / f"{key}.cubin")
    if cached is not None:
        return cached
    cubin = _compile(text, options)
    if folder is not None:
        _write(folder, f"{key}.cubin", cubin)
    return cubin


def _compile(text: str, options: list[str]) -> bytes:
    nvrtc = _binding("nvrtc")

    def checked(result: tuple[Any, ...], program: Any = None) -> Any:
        error, *values = result
        if int(error) == 0:
            return values[0] if values else None
        log = b""
        if program is not None:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size
            nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC failed: {error}\n{log.decode(errors='replace')}")

    program = checked(nvrtc.nvrtcCreateProgram(text.encode(), b"forward.cu", 0, [], []))
    try:
        checked(nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options]), program)
        cubin: bytes = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin


def _cache_folder() -> Path | None:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "layernorm"


def _read(path: Path) -> bytes | None:
    """Return what was written there, if it is whole: the file begins with the digest of the rest."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def _write(folder: Path, name: str, cubin: bytes) -> None:
    """Write the file whole or not at all; that it cannot be written is no error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(cubin).digest() + cubin)
            os.replace(temporary, folder / name)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError:
        return


def _checked(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"the CUDA driver failed: {error.name}")
    return values[0] if values else None


class Loaded(NamedTuple):
    """A kernel on a device.

    Attributes:
        function: the driver's handle.
        shared_bytes: of a block.
    """

    function: Any
    shared_bytes: int


@functools.cache
def _context(device: int) -> Any:
    """Return PyTorch's context of a device, which is the device's own."""
    driver = _binding("driver")
    return _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))


@contextmanager
def _current(device: int) -> Iterator[ModuleType]:
    """Return the driver, for calls in a device's context; the thread's own is current again after them."""
    driver = _binding("driver")
    with torch.cuda.device(device):
        _checked(driver.cuCtxPushCurrent(_context(device)))
        try:
            yield driver
        finally:
            _checked(driver.cuCtxPopCurrent())


@functools.cache
def device_problem(device: int, blocks: int) -> str | None:
    """Return why the device of that index cannot run clusters of so many blocks, or None.

    A kernel that does nothing is loaded there, with as much shared memory as any plan has. It may be that the
    driver is too old for NVRTC's code, or that a part of a device (MIG), or one with multiprocessors switched
    off, has no such cluster.
    """
    major, minor = torch.cuda.get_device_capability(device)
    text = f'extern "C" __global__ void __cluster_dims__({blocks}, 1, 1) {KERNEL.decode()}() {{}}'
    refuse_capture()
    try:
        cubin = _compile(text, [f"--gpu-architecture=sm_{10 * major + minor}"])
        _loaded(cubin, device, blocks, THREADS, SHARED_BYTES)
    except RuntimeError as error:
        return " ".join(str(error).split())
    return None


@functools.cache
def load(plan: Layout, device: int, groups: int) -> Loaded:
    """Return the plan's kernel on the device of that index, with shared memory for its groups of features.

    Raises:
        RuntimeError: it cannot be compiled, the device has no room for the cluster, or a CUDA graph is
            captured.
    """
    refuse_capture()
    major, minor = torch.cuda.get_device_capability(device)
    # A module for each number of groups, for the bytes are a function's.
    shared = plan.shared_bytes(groups)
    return _loaded(compile(plan, 10 * major + minor), device, plan.blocks, plan.threads, shared)


def _loaded(cubin: bytes, device: int, blocks: int, threads: int, shared: int) -> Loaded:
    """Return a kernel whose clusters of so many blocks the device has room for; raise if it has none."""
    with _current(device) as driver:
        attribute = driver.CUfunction_attribute
        function = _checked(driver.cuModuleGetFunction(_checked(driver.cuModuleLoadData(cubin)), KERNEL))
        size = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, size, shared))
        if blocks > _PORTABLE_BLOCKS:
            larger = attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            _checked(driver.cuFuncSetAttribute(function, larger, 1))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.blockDimX, config.sharedMemBytes = blocks, threads, shared
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        if _checked(driver.cuOccupancyMaxActiveClusters(function, config)) == 0:
            raise RuntimeError(f"the device has no room for a cluster of {blocks} blocks")
    return Loaded(function, shared)


def launch(loaded: Loaded, plan: Layout, clusters: int, arguments: ctypes.Structure, device: int) -> None:
    """Launch a kernel on the device's current stream; the arguments are copied."""
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    with _current(device) as driver:
        stream = torch.cuda.current_stream(device).cuda_stream
        _checked(
            driver.cuLaunchKernel(
                *(loaded.function, clusters * plan.blocks, 1, 1, plan.threads, 1, 1, loaded.shared_bytes),
                *(stream, ctypes.addressof(pointers), 0),
            )
        )
