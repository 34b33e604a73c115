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
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

import torch

from layernorm.gpu.persistent.backward_plan import BackwardPlan
from layernorm.gpu.persistent.plan import Layout, Plan

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
        raise RuntimeError(f"the CUDA driver failed: {error}")
    return values[0] if values else None


class Loaded(NamedTuple):
    """A kernel on a device.

    Attributes:
        function: the driver's handle.
        context: that it was loaded in, PyTorch's.
        shared_bytes: of a block.
    """

    function: Any
    context: Any
    shared_bytes: int


@functools.cache
def load(plan: Layout, device: int, groups: int) -> Loaded:
    """Return the plan's kernel on the device of that index, with shared memory for its groups of features.

    Raises:
        RuntimeError: it cannot be compiled, or the device has no room for the cluster.
    """
    driver = _binding("driver")
    attribute = driver.CUfunction_attribute
    context = _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))
    _checked(driver.cuCtxSetCurrent(context))
    major, minor = torch.cuda.get_device_capability(device)
    # A module for each number of groups, for the bytes below are a function's.
    module = _checked(driver.cuModuleLoadData(compile(plan, 10 * major + minor)))
    function = _checked(driver.cuModuleGetFunction(module, KERNEL))
    shared = plan.shared_bytes(groups)
    _checked(
        driver.cuFuncSetAttribute(function, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
    )
    if plan.blocks > _PORTABLE_BLOCKS:
        _checked(
            driver.cuFuncSetAttribute(
                function, attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1
            )
        )
    return Loaded(function, context, shared)


def launch(loaded: Loaded, plan: Layout, clusters: int, arguments: ctypes.Structure, device: int) -> None:
    """Launch a kernel on the device's current stream; the arguments are copied."""
    driver = _binding("driver")
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    with torch.cuda.device(device):
        # A thread that has not used the device has no context; PyTorch's is the device's own.
        _checked(driver.cuCtxSetCurrent(loaded.context))
        stream = torch.cuda.current_stream(device).cuda_stream
        _checked(
            driver.cuLaunchKernel(
                *(loaded.function, clusters * plan.blocks, 1, 1, plan.threads, 1, 1, loaded.shared_bytes),
                *(stream, ctypes.addressof(pointers), 0),
            )
        )
