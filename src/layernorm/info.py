"""``layernorm info``: versions, instruction sets, and which kernel computes which operator here and why."""

from __future__ import annotations

import argparse
import itertools
import platform
from collections.abc import Sequence
from typing import Final

import torch

import layernorm
from layernorm import backends, ops, override
from layernorm.variants import resolve

_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HIDDEN_SIZES: Final = (64, 128, 256, 512, 1024, 2048)


def add_options(parser: argparse.ArgumentParser, command: str, arguments: Sequence[str]) -> None:
    """Add no options: the command has none."""


def run(options: argparse.Namespace) -> int:
    """Print the text."""
    print(text())  # noqa: T201
    return 0


def text() -> str:
    """Return versions, instruction sets, and which kernel computes which operator here and why."""
    problem = ops.NATIVE_PROBLEM
    lines = [
        f"layernorm {layernorm.__version__}",
        f"python    {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch     {torch.__version__}, {torch.get_num_threads()} threads",
        f"CPU       {torch.backends.cpu.get_cpu_capability()} instructions",
        f"CUDA      {_cuda()}",
        f"compiled  {f'none: {problem}' if problem else f'{backends.capability()} instructions'}",
        "",
        f"{'operator':<16}{'device':<8}{'dtype':<28}{'kernel':<11}why",
    ]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for operator in (*backends.NORMS, *backends.RECURRENT, *backends.GATES):
        for device in devices:
            served: dict[backends.Choice, list[str]] = {}
            for dtype in _DTYPES:
                try:
                    choice = backends.choose(operator, torch.device(device), dtype)
                except RuntimeError as error:
                    choice = backends.Choice("none", str(error))
                served.setdefault(choice, []).append(str(dtype).removeprefix("torch."))
            for (kernel, reason), dtypes in served.items():
                names = "every" if len(served) == 1 else ", ".join(dtypes)
                lines.append(f"{operator:<16}{device:<8}{names:<28}{kernel:<11}{reason}")
    if torch.cuda.is_available():
        gpu = torch.device("cuda", torch.cuda.current_device())
        lines += ["", *tiers(gpu)]
        kernel = backends.choose("lstm", gpu, torch.float32).kernel
        notice = backends.notice_on_gpu(kernel, gpu, torch.float32)
        if notice is not None and override.asked_for() is None:
            lines += ["", f"{notice}."]
    return "\n".join(lines)


def tiers(device: torch.device) -> list[str]:
    """Return which kernel computes the paper's layers on a GPU, by hidden size and dtype, and why."""
    lines = [f"{'on the GPU':<16}{'hidden':<13}{'dtype':<10}{'':<10}{'kernel':<11}why"]
    for cell in backends.RECURRENT:
        for dtype, backward in itertools.product(backends.TRITON_DTYPES, (False, True)):
            served: dict[backends.Choice, list[str]] = {}
            for size in _HIDDEN_SIZES:
                found = backends.tier(cell, resolve("paper", cell), size, dtype, device, backward=backward)
                served.setdefault(found, []).append(str(size))
            name, way = str(dtype).removeprefix("torch."), "backward" if backward else "forward"
            for (kernel, reason), sizes in served.items():
                of = sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
                lines.append(f"{cell:<16}{of:<13}{name:<10}{way:<10}{kernel:<11}{reason}")
    return lines


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "not available"
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()}"
