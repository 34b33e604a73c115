"""Layers for the persistent kernels, and the emulator that runs the kernels' source on a CPU."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from layernorm.gpu.persistent import launches as persistent
from layernorm.gpu.persistent.plan import Layout, Plan
from layernorm.reference import recurrent as reference
from layernorm.spec import LayerSpec
from layernorm.variants import Variant

EMULATOR = Path(__file__).parent / "emulator"
KERNELS = Path(persistent.__file__).parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def name_of(plan: Layout) -> str:
    return "-".join(str(value) for value in dataclasses.astuple(plan))


class Emulator:
    """The kernel of a plan on the CPU."""

    def __init__(self, plan: Layout, library: Path) -> None:
        self.plan = plan
        self.library = ctypes.CDLL(str(library))
        self.library.emulate.restype = ctypes.c_char_p
        self.library.emulate.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int),
        )
        arguments = persistent.Arguments if isinstance(plan, Plan) else persistent.BackwardArguments
        assert self.library.argument_bytes() == ctypes.sizeof(arguments)

    def run(self, arguments: ctypes.Structure, seed: int = 0, races: bool = False, dropped: int = -1):
        clusters = -(-arguments.batch // self.plan.rows)
        error = self.library.emulate(ctypes.addressof(arguments), clusters, seed, races, dropped)
        if error is not None:
            raise RuntimeError(error.decode())


def builder(compiler, folder):
    """Return what builds the emulator of a plan, each once."""
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-w"]
    if sys.platform == "darwin":  # its <ucontext.h> wants this
        command += ["-D_XOPEN_SOURCE=700", "-D_DARWIN_C_SOURCE"]

    @functools.cache
    def build(plan: Layout) -> Emulator:
        library = folder / f"{type(plan).__name__}-{name_of(plan)}.so"
        macros = [f"-D{name}={value}" for name, value in plan.macros().items()]
        done = subprocess.run(
            [*command, f"-I{KERNELS}", *macros, str(EMULATOR / "emulator.cpp"), "-o", str(library)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return Emulator(plan, library)

    return build


@dataclasses.dataclass
class Case:
    """Inputs of one layer, in the plan's dtype."""

    plan: Layout
    spec: LayerSpec
    lengths: list[int]  # of the rows, not increasing
    packed: bool
    reverse: bool
    tensors: dict[str, torch.Tensor | None]
    vectors: dict[str, torch.Tensor | None]

    @property
    def batch_sizes(self) -> list[int]:
        return [sum(length > t for length in self.lengths) for t in range(max(self.lengths, default=0))]


def make(plan, cell, variant, batch, steps, *, packed=False, reverse=False, resets=False, affine=True):
    """Return a random case; the cell is that of the operator."""
    dtype = DTYPES[plan.dtype]
    generator = torch.Generator().manual_seed(batch * 100 + steps)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    lengths = [max(1, steps - n // 2) if packed else steps for n in range(batch)]
    rows, width, hidden = sum(lengths), plan.gates * plan.hidden, plan.hidden
    tensors = {
        "x": random(rows, width),
        "h0": random(batch, hidden),
        "c0": random(batch, hidden) if plan.cell == "lstm" else None,
        "weight_hh": random(width, hidden) * hidden**-0.5,
    }
    spec = LayerSpec(plan.cell, variant, cell.partition("_")[2] or "tanh")
    vectors = {}
    for name, shape in spec.parameter_shapes(1, hidden).items():
        if not name.startswith("weight") and name != "bias_ih" and affine:
            vector = random(*shape) * 0.2 + (1 if name.startswith("gain") else 0)
            vectors["gain_ih" if name == "gain" else name] = vector.to(dtype)
    tensors = {name: t if t is None else t.to(dtype) for name, t in tensors.items()}
    tensors["resets"] = torch.rand(rows, generator=generator) < 0.3 if resets else None
    return Case(plan, spec, lengths, packed, reverse, tensors, vectors)


def scan(case, cell, *, grad=False):
    """Run the reference's loop over a case in float64; return the initial state, output and final state.

    ``cell(step, x, state, weights)`` has the reference's step.
    """
    plan, spec = case.plan, case.spec
    weights = {name: t.double() for name, t in case.vectors.items()}
    weights |= {"weight_hh": case.tensors["weight_hh"].double()}
    if spec.variant.inputs == "summed":
        weights["gain"] = weights.pop("gain_ih", torch.ones(()).double())
    weights.setdefault("gain_cell", torch.ones(()).double())
    step = partial(reference._STEPS[spec.cell], masks=reference.Masks(), weights=weights, spec=spec)
    state = [case.tensors[name] for name in ("h0", "c0") if case.tensors[name] is not None]
    state = tuple(s.double().requires_grad_(grad) for s in state)
    x, resets, sizes = case.tensors["x"].double(), case.tensors["resets"], None
    if spec.variant.inputs == "separate":  # the reference has this gain in its projection
        x = x * weights.get("gain_ih", 1)
    if case.packed:
        sizes = case.batch_sizes
    else:
        x = x.unflatten(0, (-1, len(case.lengths)))
        resets = resets if resets is None else resets.unflatten(0, (-1, len(case.lengths)))

    def of_weights(x, state, _masks):
        return cell(step, x, state, weights)

    output, final = reference._scan(of_weights, x, state, case.reverse, sizes, resets)
    return state, output.reshape(-1, plan.hidden), final


def served(cell):
    """Yield the variants that the kernel has for a cell."""
    for kind, inputs, scope in itertools.product(
        ("layer", "rms"), ("separate", "summed"), ("matrix", "all", "gate")
    ):
        for norm in ("output", "carried", "none") if cell == "lstm" else ("output",):
            if cell == "gru" and inputs == "summed" and scope != "all":
                continue
            bias = scope == "all" or norm == "carried"
            yield Variant(kind=kind, inputs=inputs, scope=scope, cell=norm, projection_bias=bias, eps=0.01)


def cells_of(plan):
    """Return the operator's names of a plan's cell."""
    return ("rnn_tanh", "rnn_relu") if plan.cell == "rnn" else (plan.cell,)
