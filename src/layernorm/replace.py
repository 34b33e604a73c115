"""Replacing the norms of an existing model by this package's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

from layernorm import checks, other_norms
from layernorm.modules import LayerNorm, RMSNorm

_TWINS: Final[dict[type[Module], type[Module]]] = {torch.nn.LayerNorm: LayerNorm, torch.nn.RMSNorm: RMSNorm}
# The replacement of each subclass, so that two modules of one class stay of one class.
_derived: Final[WeakValueDictionary[type[Module], type[Module]]] = WeakValueDictionary()
# A subclass with its own version of one of these decides itself how instances are made or pickled.
_CONSTRUCTION: Final = ("__new__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")


class Replacement(NamedTuple):
    """The report of ``replace_norms``; ``print`` shows it line by line.

    Attributes:
        replaced: the qualified name of each norm that was replaced, as in ``model.named_modules()``
            (the model itself is ``""``), and what it is now: ``"LayerNorm"`` or ``"RMSNorm"``.
        left: the qualified name of each norm that was left alone, and why.
    """

    replaced: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = []
        for title, found in (("replaced", self.replaced), ("left alone", self.left)):
            lines.append(f"{len(found)} {'norm' if len(found) == 1 else 'norms'} {title}")
            lines += [f"  {name or '(the model itself)'}: {what}" for name, what in found.items()]
        return "\n".join(lines)


def replace_norms(model: Module) -> Replacement:
    """Make every ``torch.nn.LayerNorm`` and ``torch.nn.RMSNorm`` of a model this package's, in place.

    Each norm remains the same object and only changes its class. Its parameters, state dict, hooks and
    training mode stay as they are, and so does every reference to it: optimizers keep working and tied
    parameters stay tied. The model itself may be a norm. A second call replaces nothing.

    A subclass that does not override ``forward`` keeps its methods and its name, and ``isinstance`` still
    holds. Norms of model libraries that are no ``torch.nn`` norms, such as ``LlamaRMSNorm`` and
    ``GemmaRMSNorm``, are replaced where their name says that they are a layer or RMS norm, they have one gain
    and an eps, and random rows show that they compute that. With a gain and an input of different dtypes, and
    under autocast, their own ``forward`` still serves.

    Some norms are left alone: those that compute something else (a subclass or an instance with its own
    ``forward``; a norm of another library with another formula), those that belong to another tool
    (parametrized, prepared for quantization, compiled by TorchScript), and subclasses with their own way of
    making or pickling instances.

    Args:
        model: any module; it is changed.

    Returns:
        Which norms were replaced, and which were left alone and why. A norm that occurs several times in
            the model is listed under its first name. Norms that were this package's already are not listed.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.

    Examples:
        >>> import torch, layernorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.RMSNorm(8))
        >>> print(layernorm.replace_norms(model))
        2 norms replaced
          1: LayerNorm
          2: RMSNorm
        0 norms left alone
        >>> isinstance(model[1], layernorm.LayerNorm)
        True
    """
    checks.module_argument("replace_norms", model)
    classes: list[tuple[Module, type[Module]]] = []
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        norm = _norm_of(type(module))
        if norm is None:
            found = _other_norm(module)
            if isinstance(found, other_norms.Form):
                classes.append((module, other_norms.replacement_class(type(module), found)))
                replaced[name] = found.name
            elif found is not None:
                left[name] = found
            continue
        if isinstance(module, _TWINS[norm]):
            continue
        reason = _reason_to_leave(module, norm)
        if reason is None:
            try:
                classes.append((module, _replacement_class(type(module), norm)))
            except TypeError as error:  # from a metaclass or an __init_subclass__
                reason = f"{type(module).__name__} cannot be derived from: {error}"
        if reason is None:
            replaced[name] = _TWINS[norm].__name__
        else:
            left[name] = reason
    # Only now, so that an error above leaves the model as it was.
    for module, replacement in classes:
        module.__class__ = replacement
    return Replacement(replaced, left)


def _norm_of(cls: type[Module]) -> type[Module] | None:
    """Return the norm of ``torch.nn`` that this class is or extends."""
    return next((norm for norm in _TWINS if issubclass(cls, norm)), None)


def _other_norm(module: Module) -> other_norms.Form | str | None:
    """Return what a norm computes that is none of ``torch.nn``'s, or why it is left; None if it is none."""
    if isinstance(module, torch.jit.ScriptModule):
        names = {norm.__name__ for norm in _TWINS}
        return "compiled by TorchScript" if getattr(module, "original_name", None) in names else None
    ours = isinstance(module, tuple(_TWINS.values())) or other_norms.is_replaced(module)
    return None if ours or not other_norms.looks_like_a_norm(module) else other_norms.form_of(module)


def _reason_to_leave(module: Module, norm: type[Module]) -> str | None:
    cls = type(module)
    if parametrize.is_parametrized(module):
        return "parametrized: its class is torch.nn.utils.parametrize's; replace before parametrizing"
    if "forward" in vars(module):
        return "this instance has its own forward"
    if cls.forward is not norm.forward:
        return f"{cls.__name__} has its own forward"
    if hasattr(module, "activation_post_process"):
        return "prepared for quantization, which finds norms by their class"
    for method in _CONSTRUCTION:
        if getattr(cls, method, None) is not getattr(norm, method, None):
            return f"{cls.__name__} has its own {method}"
    return None


def _replacement_class(cls: type[Module], norm: type[Module]) -> type[Module]:
    """Return the class that replaces ``cls``, which is ``norm`` or a subclass of it.

    A subclass gets a class that derives from it and from this package's norm: its own methods come first,
    and ``forward``, which it does not override, is this package's.
    """
    if cls is norm:
        return _TWINS[norm]
    known = _derived.get(cls)
    if known is not None:
        return known

    def reduce(self: Any, protocol: int) -> Any:
        if type(self) is not replacement:  # a class derived in turn, which pickles itself
            return object.__reduce_ex__(self, protocol)
        # Pickle looks classes up by name, and under this name it would find ``cls``.
        return _empty, (cls, norm), self.__getstate__()

    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce,
    }
    replacement = _derived[cls] = type(cls.__name__, (cls, _TWINS[norm]), body)
    return replacement


def _empty(cls: type[Module], norm: type[Module]) -> Any:
    """Return a replaced norm of the subclass ``cls`` without its state; pickles refer to this function."""
    replacement = _replacement_class(cls, norm)
    return replacement.__new__(replacement)
