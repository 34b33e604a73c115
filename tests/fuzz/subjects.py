"""Valid calls of everything public and of every raw operator, for ``arguments`` to spoil."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import layernorm
from layernorm import Variant, backends
from layernorm import functional as LF
from layernorm.spec import GATES_PARAMETERS, layer_spec
from layernorm.variants import GATES, PRESETS, resolve
from tests.recurrent import cases
from tests.recurrent.cases import CELLS, SEQUENCES, as_hx, backward_arguments, operator_arguments, state_sizes

from .draws import Draw

Call = tuple[Callable[..., Any], dict[str, Any]]
STEPS, ROWS, FEATURES, HIDDEN = 3, 2, 4, 5


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function under a name for messages; it differentiates its result where possible."""

    def call(**arguments: Any) -> Any:
        result = function(**arguments)
        outputs = result if isinstance(result, tuple | list) else (result,)
        wanted = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad and o.grad_fn is not None]
        if wanted:
            torch.autograd.backward(wanted, [torch.ones_like(o) for o in wanted])
        return result

    call.subject = name  # type: ignore[attr-defined]
    return call


def variant_of(draw: Draw, cell: str) -> Variant:
    """Draw a public variant."""
    return resolve(draw.choice([name for name, cells in PRESETS.items() if cell in cells]), cell)  # type: ignore[arg-type]


def weights_of(draw: Draw, cell: str, variant: Variant, proj: int = 0) -> dict[str, Tensor]:
    """Return parameters, which need a gradient half of the time."""
    return cases.weights_of(cell, variant, FEATURES, HIDDEN, proj, torch.float32, needs_grad=draw.chance(0.5))


def norm_function(draw: Draw) -> Call:
    name = draw.choice(backends.NORMS)
    arguments: dict[str, Any] = {"input": torch.randn(3, FEATURES), "normalized_shape": (FEATURES,)}
    if name.startswith("add"):
        arguments["residual"] = torch.randn(3, FEATURES)
    arguments["weight"] = torch.randn(FEATURES).requires_grad_(draw.chance(0.5))
    if "layer" in name:
        arguments["bias"] = torch.randn(FEATURES)
    arguments["eps"] = 1e-5
    return named(name, getattr(LF, name)), arguments


def norm_module(draw: Draw) -> Call:
    kind = draw.choice((layernorm.LayerNorm, layernorm.RMSNorm))
    return named(kind.__name__, kind(FEATURES)), {"input": torch.randn(3, FEATURES)}


def norm_operator(draw: Draw) -> Call:
    name = draw.choice((*backends.NORMS, "norm_forward", "norm_backward"))
    centred = draw.chance(0.5)
    x, weight = torch.randn(3, FEATURES), torch.randn(FEATURES).requires_grad_(draw.chance(0.5))
    arguments: dict[str, Any] = {"input": x, "normalized_shape": [FEATURES], "weight": weight}
    operator = getattr(torch.ops.layernorm, name)
    if name == "norm_backward":
        stats = torch.ops.layernorm.norm_forward(x, None, [FEATURES], weight.detach(), None, 1e-5, centred)[2]
        arguments |= {"grad": torch.randn(3, FEATURES), "grad_sum": torch.randn(3, FEATURES), "stats": stats}
        arguments |= {"bias": None, "centred": centred, "wanted": [True, True, centred]}
        return named(name, operator), arguments
    arguments["eps"] = 1e-5
    if name.startswith("add") or name == "norm_forward":
        arguments["residual"] = torch.randn(3, FEATURES)
    if "layer" in name or name == "norm_forward":
        arguments["bias"] = torch.randn(FEATURES) if "layer" in name or centred else None
    if name == "norm_forward":
        arguments["centred"] = centred
    return named(name, operator), arguments


def sequence_function(draw: Draw) -> Call:
    cell = draw.choice(tuple(GATES))
    variant = variant_of(draw, cell)
    proj = 3 if cell == "lstm" and draw.chance(0.3) else 0
    arguments: dict[str, Any] = {
        "input": torch.randn(STEPS, ROWS, FEATURES),
        "state": as_hx([torch.zeros(ROWS, n) for n in state_sizes(cell, HIDDEN, proj).values()]),
        "weights": weights_of(draw, cell, variant, proj),
        "variant": variant,
        "reverse": draw.chance(0.3),
        "batch_sizes": None,
        "resets": torch.rand(STEPS, ROWS) < 0.3,
        "recompute": draw.chance(0.3),
    }
    if draw.chance(0.4):
        arguments |= {"batch_sizes": [2, 2, 1], "input": torch.randn(5, FEATURES)}
        arguments["resets"] = torch.rand(5) < 0.3
    if cell == "rnn":
        arguments["nonlinearity"] = "tanh"
    return named(cell, getattr(LF, cell)), arguments


def gates_function(draw: Draw) -> Call:
    cell = draw.choice(cases.GATES_CELLS)
    variant = variant_of(draw, cell)
    weights = {n: t for n, t in weights_of(draw, cell, variant).items() if not n.startswith("weight")}
    arguments = {**inputs_of_gates(cell), "weights": weights, "variant": variant}
    return named(f"{cell}_gates", getattr(LF, f"{cell}_gates")), arguments


def inputs_of_gates(cell: str) -> dict[str, Tensor]:
    """Return the products and the state of a step after its products."""
    products = torch.randn(2, ROWS, GATES[cell] * HIDDEN)  # type: ignore[index]
    state = {"c" if cell == "lstm" else "h": torch.randn(ROWS, HIDDEN)}
    return {"input_gates": products[0], "hidden_gates": products[1], **state}


def sequence_module(draw: Draw) -> Call:
    cell = draw.choice(tuple(SEQUENCES))
    module = SEQUENCES[cell](FEATURES, HIDDEN, variant=variant_of(draw, cell), num_layers=draw.choice((1, 2)))
    state = torch.zeros(module.num_layers, ROWS, HIDDEN)
    x, resets = torch.randn(STEPS, ROWS, FEATURES), torch.rand(STEPS, ROWS) < 0.3
    if draw.chance(0.3):
        x, resets = (nn.utils.rnn.pack_padded_sequence(t, torch.tensor([3, 2])) for t in (x, resets))
    hx = as_hx([state] * len(state_sizes(cell, HIDDEN)))
    return named(f"{cell} module", module), {"input": x, "hx": hx, "resets": resets}


def cell_module(draw: Draw) -> Call:
    cell = draw.choice(tuple(CELLS))
    module, state = CELLS[cell](FEATURES, HIDDEN, variant=variant_of(draw, cell)), torch.zeros(ROWS, HIDDEN)
    hx, x = as_hx([state] * len(state_sizes(cell, HIDDEN))), torch.randn(ROWS, FEATURES)
    return named(f"{cell} cell", module), {"input": x, "hx": hx, "resets": torch.rand(ROWS) < 0.5}


def constructor(draw: Draw) -> Call:
    cell, of_cell = draw.choice(tuple(SEQUENCES)), draw.chance(0.3)
    arguments: dict[str, Any] = {
        "input_size": FEATURES,
        "hidden_size": HIDDEN,
        "bias": True,
        "variant": "paper",
    }
    if cell == "rnn":
        arguments["nonlinearity"] = "tanh"
    if not of_cell:
        arguments |= {"num_layers": 2, "batch_first": False, "dropout": 0.0, "bidirectional": True}
        arguments |= {"recompute": False, **({"proj_size": 2} if cell == "lstm" else {})}
    kind = (CELLS if of_cell else SEQUENCES)[cell]

    def make(**arguments: Any) -> Any:
        if isinstance(layers := arguments.get("num_layers"), int) and layers > 1000:
            raise ValueError("nobody waits for that many layers")
        return kind(**arguments)

    return named(cell, make), arguments


def variant_or_resolve(draw: Draw) -> Call:
    if draw.chance(0.3):
        return named("resolve", resolve), {"variant": "paper", "cell": "lstm"}
    fields = {"kind": "layer", "inputs": "separate", "scope": "gate", "cell": "output"}
    return named("Variant", Variant), fields | {"projection_bias": True, "eps": 1e-5}


def stream(draw: Draw) -> Call:
    cell = draw.choice(tuple(SEQUENCES))
    module = SEQUENCES[cell](FEATURES, HIDDEN, variant=variant_of(draw, cell))
    hx = as_hx([torch.zeros(1, ROWS, HIDDEN) for _ in state_sizes(cell, HIDDEN)])
    made = module.stream(ROWS)

    def set_state(state: Any) -> None:
        made.state = state
        made.step(torch.randn(ROWS, FEATURES))

    step = named("step", made.step), {"x_t": torch.randn(ROWS, FEATURES), "out": torch.empty(ROWS, HIDDEN)}
    return draw.choice(
        (
            (named("stream", module.stream), {"batch_size": ROWS, "state": hx}),
            *(step, step),
            (named("state", set_state), {"state": hx}),
            (named("reset", made.reset), {"mask": torch.tensor([True, False])}),
        )
    )


def recurrent_operators(draw: Draw) -> Call:
    cell, packed = draw.choice(tuple(GATES)), draw.chance(0.4)
    variant, proj = variant_of(draw, cell), 3 if cell == "lstm" and draw.chance(0.3) else 0
    arguments = operator_arguments(
        cell, variant, proj, packed=packed, reverse=draw.chance(0.3), recompute=draw.chance(0.3)
    )
    if draw.chance(0.5):
        arguments = cases.detached(arguments)
    name = draw.choice(("recurrent", "recurrent_forward", "recurrent_backward", "recurrent_backward"))
    if draw.chance(0.2):
        name = "recurrent_composite_backward"
    operator = getattr(torch.ops.layernorm, name)
    if not name.endswith("backward"):
        return named(name, operator), arguments
    with torch.no_grad():
        arguments = backward_arguments(arguments, torch.ops.layernorm.recurrent_forward(**arguments))
    if name == "recurrent_composite_backward":
        for kept in ("output", "saved_x", "saved_h", "saved_c", "saved_stats"):
            del arguments[kept]
    return named(name, operator), arguments


def gates_operators(draw: Draw) -> Call:
    cell = draw.choice(cases.GATES_CELLS)
    spec = layer_spec(cell, variant_of(draw, cell))  # type: ignore[arg-type]
    listed = spec.listed_for_gates(weights_of(draw, cell, spec.variant))
    arguments: dict[str, Any] = inputs_of_gates(cell) | dict(zip(GATES_PARAMETERS, listed, strict=True))
    arguments |= {"spec": list(spec.codes), "eps": spec.eps}
    name = cell + draw.choice(("_gates", "_gates_backward", "_gates_composite_backward"))
    if name.endswith("backward"):
        arguments["grads"] = [torch.randn(ROWS, HIDDEN) for _ in range(2 if cell == "lstm" else 1)]
        arguments["wanted"] = [True] * 3 + [t is not None for t in listed]
    return named(name, getattr(torch.ops.layernorm, name)), arguments


def others(draw: Draw) -> Call:
    def use(kernel: Any) -> None:
        with backends.use(kernel):
            LF.layer_norm(torch.randn(3, FEATURES), (FEATURES,))

    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    choice = {"operator": "rms_norm", "device": torch.device("cpu"), "dtype": torch.float32, "width": 8}
    return draw.choice(
        (
            (named("use", use), {"kernel": "reference"}),
            (named("replace_norms", layernorm.replace_norms), {"model": model}),
            (named("choose", backends.choose), choice),
        )
    )


#: The subjects, repeated according to how often they are drawn.
SUBJECTS = (
    *(norm_function, norm_module, cell_module, gates_function, constructor, variant_or_resolve, others),
    *(norm_operator, sequence_function, sequence_module, stream, gates_operators) * 2,
    *(recurrent_operators,) * 3,
)
