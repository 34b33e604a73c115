"""What the Triton kernels take of a GPU: registers, spills and shared memory, found without one.

Compiles every kernel that the norms and the recurrent layers launch, and reads what NVIDIA's assembler made
of it::

    python -m tools.resources --arch 90
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from layernorm.gpu.launching import ALIGNED, Launch, recording
from layernorm.override import use
from layernorm.spec import LayerSpec, layer_spec

ARCHITECTURES: Final = (80, 90, 100)
DTYPES: Final = (torch.bfloat16, torch.float32)
#: Of the norms' rows: a width for each kind of tile, the last ones wider than any.
WIDTHS: Final = (64, 768, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
#: Hidden sizes.
SIZES: Final = (128, 256, 512, 1024, 2048)
CELLS: Final = ("lstm", "gru", "rnn")
#: Bytes of shared memory of a multiprocessor.
_SHARED: Final = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
_LAUNCH_OPTIONS: Final[tuple[str, ...]] = ("num_warps", "num_stages", "launch_pdl")


class Resources(NamedTuple):
    """What one compiled kernel takes.

    Attributes:
        kernel: its name.
        of: what it was compiled for.
        dtype: of the tensors it reads.
        width: of a norm's rows, or the hidden size.
        warps: of a program.
        registers: of a thread.
        stack: bytes of memory that a thread uses for want of registers.
        shared: bytes of shared memory of a program.
        copies: instructions that copy to shared memory while the program computes.
        programs: that a multiprocessor has room for.
    """

    kernel: str
    of: str
    dtype: str
    width: int
    warps: int
    registers: int
    stack: int
    shared: int
    copies: int
    programs: int


def norms(
    architecture: int,
    widths: tuple[int, ...] = WIDTHS,
    *,
    residual: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Iterator[Resources]:
    """Yield the resources of layer norm with gain, bias, statistics and all gradients.

    Args:
        architecture: as in ``sm_90``.
        widths: of rows.
        residual: whether one is added.
        dtypes: of every tensor.

    Raises:
        RuntimeError: Triton interprets its kernels in this process.
    """
    from layernorm.gpu.norm import operators as norm

    for dtype in dtypes:
        for width in widths:
            x, gain = _meta((64, width), dtype), _meta((width,), dtype)
            other = x if residual else None
            with recording() as launches:
                _, _, stats = norm.norm_forward(x, other, [width], gain, gain, 1e-5, True)
                norm.norm_backward(x, other, x, stats, [width], gain, gain, True, [True] * 3)
            of = "add_layer_norm" if residual else "layer_norm"
            yield from _all(launches, of, dtype, width, architecture)


def recurrent(
    architecture: int,
    sizes: tuple[int, ...] = SIZES,
    cells: tuple[str, ...] = CELLS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Iterator[Resources]:
    """Yield the resources of the paper's layers with all gradients, step by step and, where it fits, looped.

    Args:
        architecture: as in ``sm_90``.
        sizes: hidden, and of the input.
        cells: of ``CELLS``.
        dtypes: of every tensor.

    Raises:
        RuntimeError: Triton interprets its kernels in this process.
    """
    for dtype in dtypes:
        for cell in cells:
            for size in sizes:
                launches = launches_of_layer(layer_spec(cell, "paper"), size, dtype)  # type: ignore[arg-type]
                yield from _all(launches, cell, dtype, size, architecture)


def launches_of_layer(spec: LayerSpec, size: int, dtype: torch.dtype) -> list[Launch]:
    """Return what a layer launches with all gradients, step by step and, where it fits, looped.

    Args:
        spec: what it computes.
        size: hidden, and of the input.
        dtype: of every tensor.
    """
    from layernorm.gpu.recurrent import operators as layers

    shapes = spec.parameter_shapes(size, size)
    weights = spec.listed({name: _meta(shape, dtype) for name, shape in shapes.items()})
    x, state = _meta((2, 64, size), dtype), _meta((64, size), dtype)
    c = state if spec.cell == "lstm" else None
    layer = (x, state, c, weights, None, None, None, None, spec.codes, spec.eps, False)
    found = []
    for kernel in ("triton", "looped"):
        with use(kernel), recording() as launches:
            output, hn, cn, *kept = layers.recurrent_forward(*layer, False)
            grads = (output, hn, cn if c is not None else None)
            layers.recurrent_backward(*layer, *grads, output, *kept, [True] * 16)
        found += launches
    return found


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _all(
    launches: list[Launch], of: str, dtype: torch.dtype, width: int, architecture: int
) -> Iterator[Resources]:
    """Yield the resources of each different kernel among the launches."""
    seen = set()
    for launch in launches:
        compiled_for = repr((launch.kernel.__name__, *_specialized(launch)))
        if compiled_for in seen or launch.kernel.__name__ in ("write", "advance"):
            continue
        seen.add(compiled_for)
        found = _resources(compiled(launch, architecture))
        warps: int = launch.options["num_warps"]
        name = str(dtype).removeprefix("torch.")
        yield Resources(
            launch.kernel.__name__, of, name, width, warps, *found, _programs(found, warps, architecture)
        )


def _programs(found: tuple[int, int, int, int], warps: int, architecture: int) -> int:
    """Return how many programs a multiprocessor has room for: 65,536 registers, 64 warps, shared memory.

    A thread has registers in eights, and a program a KiB of shared memory more than it says.
    """
    registers, _, shared, _ = found
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, 64 // warps, _SHARED[architecture] // (shared + 1024))


def _specialized(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any], dict[str, int]]:
    """Return what Triton compiles for a launch: types, constants, what is divisible by 16, and options."""
    import triton

    kernel = launch.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("Triton interprets its kernels in this process: unset TRITON_INTERPRET")
    given = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.options
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", ALIGNED]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % ALIGNED == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", ALIGNED]]
    options: dict[str, int] = {
        name: launch.options[name] for name in _LAUNCH_OPTIONS if name in launch.options
    }
    return signature, constants, attributes, options


_TYPES: Final = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def compiled(launch: Launch, architecture: int) -> Any:
    """Return what Triton makes of a launch's kernel.

    Raises:
        RuntimeError: Triton interprets its kernels in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    *specialized, options = _specialized(launch)
    return triton.compile(
        ASTSource(launch.kernel, *specialized), GPUTarget("cuda", architecture, 32), options
    )


def _resources(kernel: Any) -> tuple[int, int, int, int]:
    """Return registers, bytes of the stack, bytes of shared memory, and copies to there."""
    registers, stack = usage(kernel.asm["cubin"])
    copies = len(re.findall(r"\bcp\.async\.c[ag]\b", kernel.asm["ptx"]))
    return registers, stack, kernel.metadata.shared, copies


def usage(cubin: bytes) -> tuple[int, int]:
    """Return registers of a thread, and bytes of its stack."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {done.stdout}")
    return int(found[1]), int(found[2])


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tools.resources", description=__doc__)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90)
    options = parser.parse_args()
    write = sys.stdout.write
    write(f"| {' | '.join(Resources._fields)} |\n|---|---|---|{'---:|' * 7}\n")
    for rows in (norms(options.arch), recurrent(options.arch)):
        for row in rows:
            write(f"| {' | '.join(map(str, row))} |\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
