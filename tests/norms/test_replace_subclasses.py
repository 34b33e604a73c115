"""Replacing subclasses of norms: what they keep, how they are copied, which are left alone."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from layernorm import backends, replace_norms

from .replaced import TWINS, ByMixin, Extended, ExtendedRMS, is_replaced


class ChannelsFirst(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class OwnReduce(nn.LayerNorm):
    def __reduce__(self):
        return OwnReduce, (4,)


class OwnNew(nn.LayerNorm):
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)


class NoHeirs(nn.LayerNorm):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("no heirs wanted")


@pytest.mark.parametrize("cls", [Extended, ExtendedRMS])
def test_a_subclass_keeps_all_but_the_kernel(cls):
    a, b = cls(4), cls(4, eps=1e-3)
    shown = repr(a)
    report = replace_norms(nn.ModuleList([a, b]))
    assert report.replaced == dict.fromkeys("01", cls.__base__.__name__)
    assert is_replaced(a)
    assert is_replaced(a.doubled)  # super().forward
    assert isinstance(a, cls)
    assert isinstance(a, TWINS[cls.__base__])
    assert type(a) is type(b)
    assert repr(a) == shown
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(a), attribute) == getattr(cls, attribute)
    assert type(cls(4)) is cls


@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.RMSNorm, Extended, ExtendedRMS])
def test_copies_pickles_and_saved_models_stay_replaced(cls):
    model = nn.Sequential(cls(4))
    nn.init.normal_(model[0].weight)
    model.note = model[0]
    replace_norms(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [
        copy.copy(model),
        copy.deepcopy(model),
        torch.load(stored, weights_only=False),
        *(pickle.loads(pickle.dumps(model, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)),
    ]
    for other in copies:
        assert type(other[0]) is type(model[0])
        assert other.note is other[0]
        assert torch.equal(other[0].weight, model[0].weight)
        assert is_replaced(other[0])
    assert copies[0][0] is model[0]
    assert all(other[0].weight is not model[0].weight for other in copies[1:])


def test_a_pickled_subclass_outlives_its_class():
    model = Extended(4)
    replace_norms(model)
    data = pickle.dumps(model)
    del model
    gc.collect()  # as in another process, the class has to be made again
    assert is_replaced(pickle.loads(data).doubled)


def test_what_a_tool_derives_from_a_replaced_subclass_is_copied_as_such():
    model = Extended(4)
    replace_norms(model)
    model.__class__ = type("Tooled", (type(model),), {})
    assert type(copy.deepcopy(model)) is type(model)


def test_a_subclass_may_change_the_call_and_its_attributes():
    class ZeroCentred(nn.LayerNorm):
        """Its gain is 1 + scale, as in some published models; its call also takes a residual."""

        def __init__(self, size):
            nn.Module.__init__(self)
            self.normalized_shape, self.eps, self.elementwise_affine = (size,), 1e-5, True
            self.scale, self.bias = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))

        @property
        def weight(self):
            return 1 + self.scale

        def __call__(self, input, residual=0):
            return super().__call__(input + residual)

    model = ZeroCentred(4)
    x = torch.randn(2, 4)
    with backends.use("torch"):
        expected = model(x, 1.0)
        replace_norms(model)
        assert torch.equal(model(x, 1.0), expected)
    assert is_replaced(model)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (ChannelsFirst, "ChannelsFirst has its own forward"),
        (ByMixin, "ByMixin has its own forward"),
        (OwnReduce, "OwnReduce has its own __reduce__"),
        (OwnNew, "OwnNew has its own __new__"),
        (NoHeirs, "NoHeirs cannot be derived from: no heirs wanted"),
    ],
)
def test_subclasses_left_alone(cls, reason):
    model = nn.Sequential(nn.LayerNorm(4), cls(4))
    report = replace_norms(model)
    assert report == ({"0": "LayerNorm"}, {"1": reason})
    assert type(model[1]) is cls
    assert not is_replaced(model[1])
    assert f"1 norm left alone\n  1: {reason}" in str(report)
