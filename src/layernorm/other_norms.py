"""The norms of model libraries, which are no ``torch.nn`` norms: they are tried to find what they compute."""

from __future__ import annotations

import copy
import re
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize

from layernorm import functional, reference
from layernorm.pytorch_internals import is_any_autocast_enabled

# What they are called, and what they call their gain and eps.
_NAMED_LIKE_A_NORM: Final = re.compile(r"(layer|rms)_?norm", re.IGNORECASE)
_GAINS: Final = ("weight", "scale")
_EPS: Final = ("variance_epsilon", "eps", "epsilon", "norm_eps")


class Form(NamedTuple):
    """What a norm of other code computes: one of this package's norms, of attributes of the module.

    Attributes:
        kind: ``"rms_norm"`` or ``"layer_norm"``.
        gain: the name of its gain (H).
        eps: the name of its eps.
        offset: what is added to the gain, 0 or 1.
    """

    kind: str
    gain: str
    eps: str
    offset: int

    @property
    def name(self) -> str:
        """The module of this package that computes the same."""
        return {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}[self.kind]


def looks_like_a_norm(module: Module) -> bool:
    """Tell whether a module without children is called a layer or RMS norm."""
    return bool(_NAMED_LIKE_A_NORM.search(type(module).__name__)) and next(module.children(), None) is None


def is_replaced(module: Module) -> bool:
    """Tell whether a module has been replaced already."""
    return getattr(type(module), "_layernorm_form", None) is not None


def form_of(module: Module) -> Form | str:
    """Return what a norm of other code computes, or why it is left alone.

    It is tried on random rows, in float32 on a copy: with a mean of their own, so that the two kinds of norm
    differ, and of sizes at which the eps counts, in three and four dimensions.
    """
    cls = type(module)
    name = f"{cls.__name__} of {cls.__module__}"
    gains = [found for found in _GAINS if found in module._parameters]
    eps = [found for found in _EPS if isinstance(getattr(module, found, None), float)]
    parameters = dict(module.named_parameters(recurse=False))
    if parametrize.is_parametrized(module) or "forward" in vars(module) or len(eps) != 1:
        return f"{name} is no torch.nn norm, and has no eps by which its formula could be tried"
    if len(gains) != 1 or len(parameters) != 1 or parameters[gains[0]].dim() != 1:
        return f"{name} is no torch.nn norm, and has other parameters than a gain of one dimension"
    if parameters[gains[0]].is_meta:
        return f"{name} is on the meta device, where its formula cannot be tried"
    for kind in ("rms_norm", "layer_norm"):
        for offset in (0, 1):
            form = Form(kind, gains[0], eps[0], offset)
            if _is_computed(module, form):
                return form
    return (
        f"{name} is no torch.nn norm, and computes something else than layernorm.RMSNorm and LayerNorm of "
        f"its {gains[0]}"
    )


@torch.no_grad()
def _is_computed(module: Module, form: Form) -> bool:
    tried = copy.deepcopy(module).eval().float()
    generator = torch.Generator().manual_seed(0)
    gain = getattr(tried, form.gain)
    gain.copy_(torch.rand(gain.shape, generator=generator) + 0.5)
    norm = getattr(reference, form.kind)
    for shape in ((2, 3), (2, 3, 4)):
        for size in (1.0, 1e-3):
            rows = torch.randn(*shape, gain.size(0), generator=generator).add(0.5).mul(size).to(gain.device)
            try:
                actual = tried(rows)
            except Exception:  # whatever a module of other code raises
                return False
            wide = (gain + form.offset).double()
            expected = norm(rows.double(), gain.shape, wide, eps=getattr(module, form.eps))
            if not isinstance(actual, Tensor) or actual.dtype != torch.float32 or actual.shape != rows.shape:
                return False
            # Rounding is below; a variance with n - 1, or an eps outside of the root, is far above.
            if not torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-6):
                return False
    return True


# The class of each, so that two modules of one class stay of one class.
_derived: Final[WeakValueDictionary[tuple[type[Module], Form], type[Module]]] = WeakValueDictionary()


def replacement_class(cls: type[Module], form: Form) -> type[Module]:
    """Return a class that derives from a norm of other code and computes the same with this package's."""
    known = _derived.get((cls, form))
    if known is not None:
        return known
    norm = getattr(functional, form.kind)

    def forward(self: Any, input: Tensor, *arguments: Any, **named: Any) -> Any:
        gain = getattr(self, form.gain)
        # Where dtypes meet, libraries differ in which is whose: theirs decides.
        if arguments or named or input.dtype != gain.dtype or is_any_autocast_enabled():
            return cls.forward(self, input, *arguments, **named)
        return norm(input, gain.shape, gain + 1 if form.offset else gain, eps=getattr(self, form.eps))

    def reduce(self: Any, protocol: int) -> Any:
        if type(self) is not replacement:  # a class derived in turn, which pickles itself
            return object.__reduce_ex__(self, protocol)
        return _empty, (cls, form), self.__getstate__()

    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce,
        "_layernorm_form": form,
        "forward": forward,
    }
    replacement = _derived[cls, form] = type(cls.__name__, (cls,), body)
    return replacement


def _empty(cls: type[Module], form: Form) -> Any:
    """Return a replaced norm without its state; pickles refer to this function."""
    replacement = replacement_class(cls, form)
    return replacement.__new__(replacement)


__all__ = ["Form", "form_of", "is_replaced", "looks_like_a_norm", "replacement_class"]
