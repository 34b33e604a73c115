"""What the Triton kernels take of a GPU: registers, spills and shared memory, found without one.

Compiles every kernel that the settings can ask for, and reads what NVIDIA's assembler made of it::

    python -m layernorm.kernels.resources --arch 90
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

ARCHITECTURES: Final = (80, 90, 100)
_POINTERS: Final = ("bf16", "fp32")
#: A width for each kind of tile, the last ones wider than any.
WIDTHS: Final = (64, 768, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


class Resources(NamedTuple):
    """What one compiled kernel takes.

    Attributes:
        kernel: its name.
        dtype: of input, output and their gradients.
        width: of the rows it is for.
        warps: of a program.
        registers: of a thread.
        stack: bytes of memory that a thread uses for want of registers.
        shared: bytes of shared memory of a program.
    """

    kernel: str
    dtype: str
    width: int
    warps: int
    registers: int
    stack: int
    shared: int


def table(architecture: int, widths: tuple[int, ...] = WIDTHS) -> Iterator[Resources]:
    """The resources of layer norm with gain, bias, statistics and all gradients.

    Args:
        architecture: as in ``sm_90``.
        widths: of rows.

    Raises:
        RuntimeError: Triton interprets its kernels in this process.
    """
    from layernorm.kernels import norm, norm_kernels, settings

    chosen = settings.for_architecture(divmod(architecture, 10))
    for dtype in _POINTERS:
        for width in widths:
            forward, backward = settings.forward_tile(chosen, width), settings.backward_tile(chosen, width)
            floats = ("stats", "sums", "part_gain", "part_bias")
            pointers = {"input", "gain", "bias", "output", "stats", "grad", "sums", "grad_input"}
            jobs: list[tuple[Any, dict[str, Any], int, set[str]]] = [
                (
                    norm_kernels.forward,
                    {
                        "CENTRED": True,
                        "NESTED": False,
                        "WHOLE": forward.whole,
                        "ROWS": forward.rows,
                        "BLOCK": forward.block,
                        "CHUNK": norm.chunk(forward),
                    },
                    forward.warps,
                    pointers,
                ),
                (
                    norm_kernels.backward,
                    {
                        "CENTRED": True,
                        "NESTED": False,
                        "WHOLE": backward.whole,
                        "ROWS": backward.rows,
                        "BLOCK": backward.block,
                    },
                    backward.warps,
                    (pointers | {"part_gain", "part_bias"}) - ({"sums"} if backward.whole else set()),
                ),
            ]
            if not backward.whole:
                block, warps = chosen.looped_sums
                jobs.append(
                    (
                        norm_kernels.row_sums,
                        {"CENTRED": True, "NESTED": False, "BLOCK": block},
                        warps,
                        pointers,
                    )
                )
            for kernel, constants, warps, present in jobs:
                types = {name: "fp32" if name in floats else dtype for name in present}
                yield _resources(kernel, constants, types, architecture, dtype, width, warps)


def _resources(
    kernel: Any,
    constants: dict[str, Any],
    types: dict[str, str],
    architecture: int,
    dtype: str,
    width: int,
    warps: int,
) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("Triton interprets its kernels in this process: unset TRITON_INTERPRET")
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(index,)] = "constexpr", constants[name]
        elif name in types:
            signature[name] = f"*{types[name]}"
        elif name == "eps":
            signature[name] = "fp32"
        elif name in ("rows", "width", "rows_per_part") or name.endswith(("_inner", "_outer", "_stride")):
            signature[name] = "i32"
        else:  # a tensor that is None
            signature[name], constexprs[(index,)] = "constexpr", None
        if signature[name].startswith("*") or name == "width" or name.endswith(("_outer", "_stride")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": warps})
    registers, stack = _usage(compiled.asm["cubin"])
    return Resources(kernel.__name__, dtype, width, warps, registers, stack, compiled.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(  # noqa: S603 - a tool that Triton came with
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
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m layernorm.kernels.resources", description=__doc__)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90)
    options = parser.parse_args()
    heads = ("kernel", "dtype", "width", "warps", "registers", "stack, bytes", "shared, bytes")
    write = sys.stdout.write
    write(f"| {' | '.join(heads)} |\n|---|---|{'---:|' * 5}\n")
    for row in table(options.arch):
        write(f"| {' | '.join(map(str, row))} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
