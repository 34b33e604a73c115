"""Replacing the recurrent modules of a model by this package's, and back."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize

from layernorm import checks
from layernorm.cells import LayerNormGRUCell, LayerNormLSTMCell, LayerNormRNNCell, LayerNormRNNCellBase
from layernorm.interop.loading import Recurrent, load
from layernorm.interop.sources import SOURCES
from layernorm.parameters import RecurrentParameters
from layernorm.pytorch_internals import init_flat_weights
from layernorm.recurrent import LayerNormGRU, LayerNormLSTM, LayerNormRNN, LayerNormRNNBase

_TWINS: Final[dict[type[Module], type[LayerNormRNNBase | LayerNormRNNCellBase]]] = {
    torch.nn.LSTM: LayerNormLSTM,
    torch.nn.GRU: LayerNormGRU,
    torch.nn.RNN: LayerNormRNN,
    torch.nn.LSTMCell: LayerNormLSTMCell,
    torch.nn.GRUCell: LayerNormGRUCell,
    torch.nn.RNNCell: LayerNormRNNCell,
}
_BACK: Final = {ours: theirs for theirs, ours in _TWINS.items()}
# The names of other code's classes, and the sources of each.
_CLASSES: Final[dict[str, list[str]]] = {}
for _source, _cells in SOURCES.items():
    for _name in sorted({name for found in _cells.values() for name in found.classes}):
        _CLASSES.setdefault(_name, []).append(_source)
_INTERNALS: Final = frozenset(vars(Module()))  # what every module has


class Conversion(NamedTuple):
    """The report of ``convert``; ``print`` shows it line by line.

    Attributes:
        replaced: the qualified name of each module that was replaced, as in ``model.named_modules()``
            (the model itself is ``""``), and what it is now.
        left: the qualified name of each recurrent module that was left alone, and why.
        speedup: how many times as fast the model is on the example; None without an example.
    """

    replaced: Mapping[str, str]
    left: Mapping[str, str]
    speedup: float | None = None

    def __str__(self) -> str:
        lines = []
        for title, found in (("replaced", self.replaced), ("left alone", self.left)):
            lines.append(f"{len(found)} recurrent {'module' if len(found) == 1 else 'modules'} {title}")
            lines += [f"  {name or '(the model itself)'}: {what}" for name, what in found.items()]
        if self.speedup is not None:
            lines.append(f"{self.speedup:.2f} times as fast on the example")
        return "\n".join(lines)


def convert(
    model: Module,
    to: Literal["layernorm", "torch.nn"] = "layernorm",
    *,
    example: Sequence[Any] | None = None,
) -> Conversion:
    """Make the recurrent modules of a model this package's, in place, with the weights that they have.

    ``torch.nn.LSTM``, ``GRU``, ``RNN`` and their cells become the modules of this package with
    ``variant="none"``, which compute the same. They remain the same objects with the same parameters: hooks,
    state dicts, optimizers and every reference stay good. Modules of the sources of ``layernorm.interop``,
    known by the name of their class, become modules of the source's variant: but only where they give the
    same numbers when they are called with the same random input and state. Their parameters are laid out
    anew, so make the optimizer after.

    ``to="torch.nn"`` is the way back, for modules without a norm.

    Args:
        model: any module; it is changed.
        to: ``"layernorm"`` or ``"torch.nn"``.
        example: arguments of ``model``; when given, the model is timed with them before and after, in turns,
            without gradients, on a copy.

    Returns:
        Which modules were replaced, which were left alone and why, and how much faster the model is. A module
            that occurs several times is listed under its first name.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: ``to`` is neither.

    Examples:
        >>> import torch, layernorm
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(8, 16), "head": torch.nn.Linear(16, 2)})
        >>> print(layernorm.convert(model))
        1 recurrent module replaced
          encoder: LayerNormLSTM
        0 recurrent modules left alone
        >>> isinstance(model["encoder"], layernorm.LayerNormLSTM)
        True
    """
    checks.module_argument("convert", model)
    if to not in ("layernorm", "torch.nn"):
        raise ValueError(f"to must be 'layernorm' or 'torch.nn', got {to!r}")
    before = None if example is None else copy.deepcopy(model)
    replace = _from_torch if to == "layernorm" else _to_torch
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    inside: list[str] = []  # of what was replaced whole
    for name, module in list(model.named_modules()):
        if any(name.startswith(outer) for outer in inside):
            continue
        made = replace(module)
        if made is None:
            continue
        if isinstance(made, str):
            left[name] = made
            continue
        children = [child for child, _ in module.named_children()]
        _become(module, made)
        replaced[name] = type(module).__name__
        if children:
            inside.append(f"{name}." if name else "")
    speedup = None
    if example is not None and before is not None:
        speedup = _speedup(before, model, example)
    return Conversion(replaced, left, speedup)


def _from_torch(module: Module) -> Module | str | None:
    """Return the module to take another's place; or why there is none; or None for what is not recurrent."""
    if isinstance(module, RecurrentParameters):
        return None
    theirs = next((cls for cls in _TWINS if isinstance(module, cls)), None)
    sources = _CLASSES.get(type(module).__name__, [])
    if sources:
        return _from_sources(module, sources)
    if theirs is None:
        return None
    if (reason := _reason_to_leave(module, theirs)) is not None:
        return reason
    made = _TWINS[theirs](**_arguments(module), variant="none", device="meta")
    made._parameters = module._parameters
    return made


def _to_torch(module: Module) -> Module | str | None:
    ours = next((cls for cls in _BACK if isinstance(module, cls)), None)
    if ours is None or not isinstance(module, RecurrentParameters):
        return None
    if (reason := _reason_to_leave(module, ours)) is not None:
        return reason
    if module.spec.operation in ("lstm_relu", "gru_relu"):
        return f"torch.nn has no {module.spec.cell.upper()} with a relu"
    if not module.variant.reset_after:
        return "torch.nn has no GRU whose reset gate comes before the product"
    if module.learn_initial_state:
        return f"torch.nn has no {type(module).__name__} that learns its initial state"
    if module.variant.kind != "none":
        return f"torch.nn has no {type(module).__name__} of variant {module.variant}"
    made: Module = _BACK[ours](**_arguments(module), device="meta")
    made._parameters = module._parameters
    if isinstance(made, torch.nn.RNNBase):
        init_flat_weights(made)
    return made


def _arguments(module: Any) -> dict[str, Any]:
    """Return what a recurrent module was made with, in the words of ``torch.nn``."""
    names = ["input_size", "hidden_size"]
    arguments: dict[str, Any] = {}
    if isinstance(module, torch.nn.RNNBase):
        names += ["num_layers", "bias", "batch_first", "dropout", "bidirectional"]
        if module.proj_size:
            names.append("proj_size")
        if module.mode.startswith("RNN"):
            arguments["nonlinearity"] = module.mode.removeprefix("RNN_").lower()
    else:
        arguments["bias"] = "bias_ih" in module._parameters and module._parameters["bias_ih"] is not None
        if isinstance(module, torch.nn.RNNCell):
            names.append("nonlinearity")
    return arguments | {name: getattr(module, name) for name in names}


def _reason_to_leave(module: Module, known: type[Module]) -> str | None:
    cls = type(module)
    if parametrize.is_parametrized(module):
        return "parametrized: its class is torch.nn.utils.parametrize's; convert before parametrizing"
    if cls is not known:
        return f"{cls.__name__} is a subclass of {known.__name__}, which may compute something else"
    if "forward" in vars(module):
        return "this instance has its own forward"
    return None


def _from_sources(module: Module, sources: Sequence[str]) -> Recurrent | str:
    found = [_from_source(module, source) for source in sources]
    made = next((made for made in found if not isinstance(made, str)), None)
    if made is not None:
        return made
    if len(sources) == 1:
        return found[0]
    return (
        f"{type(module).__name__} of {type(module).__module__} is that of none of {', '.join(sources)}, or "
        "is called in another way; take its weights with layernorm.interop.load"
    )


def _from_source(module: Module, source: str) -> Recurrent | str:
    """Return a module with the weights of another code's, which gives the same numbers."""
    name = f"{type(module).__name__} of {type(module).__module__}"
    try:
        made = load(module, source)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{name} is not the one of {source}: {error}"
    if (difference := _difference(module, made)) is not None:
        return f"{name} {difference}; take its weights with layernorm.interop.load(module, {source!r})"
    wanted = {parameter.requires_grad for parameter in module.parameters()}
    if len(wanted) > 1:
        return f"{name} has parameters that require gradients beside ones that do not"
    made.requires_grad_(wanted.pop())
    return made


@torch.no_grad()
def _difference(theirs: Module, ours: Recurrent) -> str | None:
    """Return how two modules differ that are called with the same input and state."""
    weight = next(ours.parameters())
    theirs, ours = copy.deepcopy(theirs).eval().double(), copy.deepcopy(ours).eval().double()
    batch = (3, 2) if isinstance(ours, LayerNormRNNBase) else (2,)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device)

    x = draw(*batch, ours.input_size)
    layers: tuple[int, ...] = ()
    if isinstance(ours, LayerNormRNNBase):
        layers = (ours.num_layers * (2 if ours.bidirectional else 1),)
    state: Any = draw(*layers, 2, ours.proj_size or ours.hidden_size)
    if ours.spec.cell == "lstm":
        state = (state, draw(*layers, 2, ours.hidden_size))
    expected = ours(x, state)
    try:
        actual = theirs(x, state)
    except Exception as error:
        return f"is called in another way than {type(ours).__name__} ({type(error).__name__}: {error})"
    theirs_flat, ours_flat = _tensors(actual), _tensors(expected)
    if [t.shape for t in theirs_flat] != [t.shape for t in ours_flat]:
        return f"returns something else than {type(ours).__name__}"
    if not all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(theirs_flat, ours_flat, strict=True)
    ):
        return "computes something else"
    return None


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return (
        [tensor for part in result for tensor in _tensors(part)] if isinstance(result, (tuple, list)) else []
    )


def _become(module: Module, made: Module) -> None:
    """Make a module what another is, and leave it the same object, with its hooks and its training mode."""
    before = vars(module)
    training = module.training
    kept = {name: before[name] for name in _INTERNALS if name in before}
    kept |= {name: vars(made)[name] for name in ("_parameters", "_buffers", "_modules")}
    fresh = {name: value for name, value in vars(made).items() if name not in _INTERNALS}
    module.__class__ = type(made)
    before.clear()
    before.update(kept | fresh)
    module.training = training


def _speedup(before: Module, after: Module, example: Sequence[Any]) -> float:
    """Return how many times as fast the second is: the median of 15 pairs of calls after two to warm up."""

    def seconds(call: Callable[..., Any]) -> float:
        started = time.perf_counter()
        call(*example)
        return time.perf_counter() - started

    with torch.no_grad():
        pairs = [(seconds(before), seconds(after)) for _ in range(17)][2:]
    return statistics.median(old / new for old, new in pairs)


__all__ = ["Conversion", "convert"]
