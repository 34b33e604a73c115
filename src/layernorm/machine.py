"""The machine and the versions that a result belongs to, without host names and paths."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Final

import torch

import layernorm

#: The columns of ``environment``, which every table of benchmarks has.
COLUMNS: Final = ("machine", "python", "torch", "layernorm", "jax", "onnxruntime", "commit", "date")
_GPU_PACKAGES: Final = (
    "triton",
    "cuda-bindings",
    "liger-kernel",
    "quack-kernels",
    "apex",
    "flash-attn",
    "flashrnn",
    "torchrl",
)
#: The columns of ``gpu``.
GPU_COLUMNS: Final = ("gpu", "capability", "driver", "cuda", *_GPU_PACKAGES)
_CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")


def processor() -> str:
    """Return the processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cpus() -> int:
    """Return how many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> str:
    """Describe the machine in one line: processor, CPUs, caches, instructions."""
    count = cpus()
    parts = [processor(), f"{count} CPU" if count == 1 else f"{count} CPUs"]
    parts += [f"L{level} {size}" for level, size in _caches().items() if level > 1]
    return ", ".join([*parts, torch.backends.cpu.get_cpu_capability()])


def busy_seconds() -> float | None:
    """Return the seconds of CPU time that all work on the machine has taken; None if Linux does not tell."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _, _, interrupts, soft, stolen = (int(field) for field in first[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def environment() -> dict[str, str]:
    """Return what a row of results carries, by the names in ``COLUMNS``.

    Examples:
        >>> from layernorm import machine
        >>> tuple(machine.environment()) == machine.COLUMNS
        True
    """
    return {
        "machine": describe(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "layernorm": layernorm.__version__,
        "jax": _version("jax"),
        "onnxruntime": _version("onnxruntime"),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def gpu() -> dict[str, str]:
    """Return the GPU, its driver and packages for it, by ``GPU_COLUMNS``; nothing where there is none."""
    found = dict.fromkeys(GPU_COLUMNS, "")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["driver"] = _driver()
        found["cuda"] = torch.version.cuda or ""
        found |= {name: _version(name) for name in _GPU_PACKAGES}
    return found


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split("\n")[0].strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _caches() -> dict[int, str]:
    """Return the size of each level's data cache, as the first CPU sees it; empty where unknown."""
    sizes: dict[int, str] = {}
    try:
        for folder in sorted(_CACHES.glob("index*")):
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction" and re.fullmatch(r"\d+K", size):
                kilobytes = int(size[:-1])
                mega = kilobytes >= 1024
                sizes[int(level)] = f"{kilobytes / 1024:g} MiB" if mega else f"{kilobytes} KiB"
    except (OSError, ValueError):
        pass
    return sizes


def _commit() -> str:
    """Return the checkout's commit, with a plus sign where the sources differ from it; else nothing."""
    package = Path(layernorm.__file__).parent
    # An installation may lie inside a checkout of something else.
    if _git(package, "ls-files", "--", "__init__.py") in (None, ""):
        return ""
    commit = _git(package, "rev-parse", "--short", "HEAD") or ""
    return commit + ("+" if _git(package, "status", "--porcelain", "--", ".", ":/csrc") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments
            ["git", "-C", str(folder), *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
