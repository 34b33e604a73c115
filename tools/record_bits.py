"""Record what the kernels compute, bit by bit: ``python -m tools.record_bits FILE``.

Writes hashes of outputs and gradients of every cell, preset and dtype, over sequences, packed, with resets,
a step at a time, and of the norms. Two files are the same where nothing has changed: before and after a
refactoring, on another PyTorch, by another way of reaching it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import layernorm
from layernorm import Variant
from layernorm import functional as LF
from layernorm.variants import GATES, PRESETS, parameter_shapes

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
F, H, P, STEPS, ROWS = 5, 7, 3, 6, 3


def digest(*tensors: Tensor | None) -> str:
    """Return a hash of dtypes, shapes and bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            found.update(b"none")
            continue
        held = tensor.detach().contiguous()
        found.update(str((held.dtype, tuple(held.shape))).encode())
        if held.numel() > 0:
            found.update(held.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


class Draw:
    """Numbers that depend on a seed alone."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def tensor(self, *shape: int) -> Tensor:
        """Return normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def leaf(self, *shape: int) -> Tensor:
        """Return normal numbers that need a gradient."""
        return self.tensor(*shape).requires_grad_()

    @torch.no_grad()
    def fill(self, module: torch.nn.Module) -> None:
        """Fill a module's parameters, gains near 1."""
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=self.generator, dtype=torch.float64) * 0.3
            parameter.copy_(drawn + (1 if parameter.dim() == 1 else 0))


def differentiated(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> str:
    """Return a hash of the outputs and the gradients of the inputs."""
    draw = Draw(2, torch.float64)
    grads = [draw.tensor(*output.shape).to(output.dtype) for output in outputs]
    return digest(*outputs, *torch.autograd.grad(outputs, list(inputs), grads, allow_unused=True))


def flat(result: Any) -> list[Tensor]:
    """Return the tensors of a result, in order."""
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flat(part)]


def layers(cell: str, variant: Variant, dtype: torch.dtype, **options: Any) -> Iterator[tuple[str, str]]:
    """Yield what a layer, its cell and its stream compute."""
    name, proj = f"LayerNorm{cell.upper()}", options.get("proj_size", 0)
    draw = Draw(1, dtype)
    options = {"variant": variant, "dtype": dtype} | options
    module = getattr(layernorm, name)(F, H, num_layers=2, bidirectional=True, **options)
    draw.fill(module)
    x, h, c = draw.leaf(STEPS, ROWS, F), draw.leaf(4, ROWS, proj or H), draw.leaf(4, ROWS, H)
    state = (h, c) if cell == "lstm" else h
    leaves = [x, *flat(state), *module.parameters()]
    resets = torch.rand(STEPS, ROWS, generator=draw.generator) < 0.3
    packed = pack_padded_sequence(x, torch.tensor([6, 4, 1]))
    yield "sequence", differentiated(flat(module(x, state)), leaves)
    yield "resets", differentiated(flat(module(x, state, resets=resets)), leaves)
    output, final = module(packed, state)
    yield "packed", differentiated([output.data, *flat(final)], leaves)
    online = getattr(layernorm, name)(F, H, num_layers=2, **options)
    draw.fill(online)
    stream = online.stream(ROWS)
    yield "stream", digest(*(stream.step(x_t.detach()) for x_t in x))
    if not proj:
        one = getattr(layernorm, f"{name}Cell")(F, H, **options)
        draw.fill(one)
        first = (h[0], c[0]) if cell == "lstm" else h[0]
        yield (
            "cell",
            differentiated(flat(one(x[0], first)), [*leaves[: 1 + len(flat(state))], *one.parameters()]),
        )
    if cell != "rnn" and not proj:
        shapes = parameter_shapes(cell, variant, F, H)
        vectors = {n: draw.leaf(*shape) for n, shape in shapes.items() if not n.startswith("weight")}
        a, b = (draw.leaf(ROWS, GATES[cell] * H) for _ in range(2))
        state_after = flat(getattr(LF, f"{cell}_gates")(a, b, c[0], vectors, variant=variant))
        yield "gates", differentiated(state_after, [a, b, c, *vectors.values()])


def functions() -> Iterator[tuple[str, str, Variant, Sequence[torch.dtype]]]:
    """Yield a name, a cell, a variant, and dtypes: all presets, and all other variants with a norm."""
    for preset, cells in PRESETS.items():
        for cell, variant in cells.items():
            yield preset, cell, variant, DTYPES
    fields = (("layer", "rms"), ("separate", "summed"), ("matrix", "all", "gate"), (False, True))
    for cell in ("lstm", "gru", "rnn"):
        for kind, inputs, scope, bias in itertools.product(*fields):
            for norm in ("output", "carried", "none") if cell == "lstm" else ("output",):
                variant = Variant(kind=kind, inputs=inputs, scope=scope, cell=norm, projection_bias=bias)  # type: ignore[arg-type]
                yield f"{kind} {inputs} {scope} {norm} {bias}", cell, variant, DTYPES[::2]


def norms() -> Iterator[tuple[str, str]]:
    """Yield what the norms compute."""
    for name, dtype, shape in itertools.product(
        ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"),
        DTYPES,
        ((3, 7), (64, 200), (2, 3, 1025)),
    ):
        draw, width = Draw(3, dtype), shape[-1]
        rows = [draw.leaf(*shape) for _ in range(2 if name.startswith("add") else 1)]
        parameters = [draw.leaf(width) for _ in range(2 if name.endswith("layer_norm") else 1)]
        result = getattr(LF, name)(*rows, (width,), *parameters)
        yield f"{name} {dtype} {shape}", differentiated(flat(result), [*rows, *parameters])


def record() -> dict[str, str]:
    """Return a hash for each thing that is computed."""
    found = dict(norms())
    for name, cell, variant, dtypes in functions():
        for dtype in dtypes:
            for options in (
                *([{"nonlinearity": n} for n in ("tanh", "relu")] if cell == "rnn" else [{}]),
                *([{"proj_size": P}] if cell == "lstm" else []),
            ):
                key = f"{cell} {name} {dtype} {options}"
                found |= {f"{key} {what}": value for what, value in layers(cell, variant, dtype, **options)}
    return found


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("file", type=Path, help="where to write the hashes, as JSON")
    found = record()
    parser.parse_args().file.write_text(json.dumps(found, indent=0, sort_keys=True), encoding="utf-8")
    total = hashlib.sha256("".join(value for _, value in sorted(found.items())).encode()).hexdigest()
    print(f"{len(found)} hashes, together {total[:16]}")


if __name__ == "__main__":
    main()
