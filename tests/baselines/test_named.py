"""Norms by name, for both layouts, against their formulas; and in a model in the place of batch norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import layernorm
from layernorm.baselines import BatchNorm, Norm

C, EPS = 6, 1e-5


def normalized(x: torch.Tensor, dims: tuple[int, ...], centred: bool = True) -> torch.Tensor:
    mean = x.mean(dims, keepdim=True) if centred else 0.0
    return (x - mean) / ((x - mean).square().mean(dims, keepdim=True) + EPS).sqrt()


def grouped(x: torch.Tensor, groups: int, place: int, dims: tuple[int, ...]) -> torch.Tensor:
    parts = x.unflatten(place, (groups, -1))
    return normalized(parts, dims).reshape(x.shape)


# Features last, (N, T, C): what is averaged over.
LAST = {
    "none": lambda x: x,
    "batch": lambda x: normalized(x, (0, 1)),
    "layer": lambda x: normalized(x, (2,)),
    "rms": lambda x: normalized(x, (2,), centred=False),
    "instance": lambda x: normalized(x, (1,)),
    "group:3": lambda x: grouped(x, 3, 2, (3,)),
}
# Channels second, (N, C, H, W).
SECOND = {
    "none": lambda x: x,
    "batch": lambda x: normalized(x, (0, 2, 3)),
    "layer": lambda x: normalized(x, (1, 2, 3)),
    "rms": lambda x: normalized(x, (1, 2, 3), centred=False),
    "instance": lambda x: normalized(x, (2, 3)),
    "group:3": lambda x: grouped(x, 3, 1, (2, 3, 4)),
}


@pytest.mark.parametrize("name", LAST)
def test_of_features_in_the_last_dimension(name):
    x = torch.randn(4, 5, C, dtype=torch.float64) * 3 + 1
    found = Norm(name)(C).double()(x)
    # RMS norm's own eps is the machine epsilon: 1e-5 next to a mean square of about 10.
    torch.testing.assert_close(found, LAST[name](x), rtol=1e-5 if name == "rms" else 1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize("places", [(), (7,), (3, 5)])
def test_of_channels_in_the_second_dimension(name, places):
    if name == "instance" and not places:
        pytest.skip("there is one value to a channel")
    x = torch.randn(4, C, *places, dtype=torch.float64) * 3 + 1
    found = Norm(name)(C, dim=1).double()(x)
    expected = SECOND[name](x.reshape(4, C, -1, 1)).reshape(x.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("name", [name for name in LAST if name != "none"])
def test_gains_are_learned(name, dim):
    norm = Norm(name)(C, dim)
    shape = (4, 5, C) if dim == -1 else (4, C, 5)
    norm(torch.randn(shape)).square().sum().backward()
    parameters = dict(norm.named_parameters())
    assert {p.shape for p in parameters.values()} == {(C,)}
    assert all(p.grad is not None for p in parameters.values())


def test_a_norm_of_ones_own_is_called_by_its_name():
    class Scale(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

    norm = Norm(Scale)
    assert (norm.name, type(norm(3)), repr(norm)) == ("Scale", Scale, "Norm('Scale')")
    assert Norm(norm).name == "Scale"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Norm("lyer"), ValueError, "unknown norm 'lyer'; expected one of none, batch, layer, rms"),
        (lambda: Norm("group:0"), ValueError, "unknown norm 'group:0'"),
        (lambda: Norm(3), TypeError, "or a class of a module, got int"),
        (lambda: Norm("group:4")(6), ValueError, "group:4 must divide the width, got 6"),
        (lambda: Norm("layer")(6, dim=2), ValueError, "dim must be -1, .* or 1, .*; got 2"),
        (lambda: Norm(lambda width: width)(6), TypeError, "must make a torch.nn.Module, got int"),
        (lambda: Norm("instance")(6)(torch.randn(2, 6)), ValueError, r"an input \[2, 6\] has none"),
        (lambda: layernorm.swap_norms(nn.Linear(2, 2)), ValueError, "Linear has no batch norm to replace"),
        (lambda: layernorm.swap_norms(nn.BatchNorm1d(2)), ValueError, "has no batch norm to replace"),
        (lambda: layernorm.swap_norms(nn.Sequential(nn.BatchNorm1d(2)), "x"), ValueError, "unknown norm 'x'"),
    ],
)
def test_what_is_no_norm_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_batch_norms_of_a_model_are_swapped():
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), shared, nn.Sequential(nn.Conv2d(4, 4, 1), shared), nn.Flatten(), nn.LazyLinear(6)
    )
    model.append(nn.BatchNorm1d(6)).append(BatchNorm(6)).append(nn.LayerNorm(6)).double().eval()
    images = torch.randn(3, 1, 5, 5, dtype=torch.float64)
    model(images)
    assert layernorm.swap_norms(model, to="layer") is model
    assert model[1] is model[2][1]
    assert [type(model[i]).__name__ for i in (1, 5, 6, 7)] == ["GroupNorm"] * 3 + ["LayerNorm"]
    assert (model[1].weight.dtype, model[1].training) == (torch.float64, False)
    features = model[:5](images)
    torch.testing.assert_close(model[5](features), normalized(features, (1,)), rtol=0, atol=1e-12)
    again = nn.Sequential(nn.BatchNorm1d(3))
    assert isinstance(layernorm.swap_norms(again, to="batch")[0], nn.BatchNorm1d)
    assert isinstance(layernorm.swap_norms(again, to=Norm("rms"))[0], nn.Module)
