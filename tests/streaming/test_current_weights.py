"""Weights that are no parameters, and the weights of a stream: those of a call of its module at that time."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import layernorm
from tests.recurrent.cases import flat, same

MODULES = {
    "lstm": functools.partial(layernorm.LayerNormLSTM, 3, 5, 2, bidirectional=True, proj_size=4),
    "gru": functools.partial(layernorm.LayerNormGRU, 3, 5, 2),
    "rnn": functools.partial(layernorm.LayerNormRNN, 3, 5),
    "lstm cell": functools.partial(layernorm.LayerNormLSTMCell, 3, 5),
    "gru cell": functools.partial(layernorm.LayerNormGRUCell, 3, 5),
    "rnn cell": functools.partial(layernorm.LayerNormRNNCell, 3, 5),
    "torch's": functools.partial(layernorm.LayerNormGRU, 3, 5, variant="none"),
    "layer norm": functools.partial(layernorm.LayerNorm, 3),
    "rms norm": functools.partial(layernorm.RMSNorm, 3),
}


def as_replica(module):
    """Return the module as ``DataParallel`` and FSDP leave it: tensors that are no leaves, as attributes."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(replica, name, parameter * 1.0)
    return replica


def with_buffers(module):
    frozen = copy.deepcopy(module)
    for name, parameter in list(frozen._parameters.items()):
        del frozen._parameters[name]
        frozen.register_buffer(name, parameter.detach().clone())
    return frozen


def with_attributes(module):
    changed = copy.deepcopy(module)
    for name, parameter in list(changed._parameters.items()):
        del changed._parameters[name]
        setattr(changed, name, parameter.detach())
    return changed


class Same(nn.Module):
    """A parametrization that counts how often it is computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, weight):
        self.count += 1
        return weight * 1.0


def parametrized(module):
    changed = copy.deepcopy(module)
    for name in list(changed._parameters):
        parametrize.register_parametrization(changed, name, Same())
    return changed


WAYS = pytest.mark.parametrize("way", [as_replica, with_buffers, with_attributes, parametrized])


@WAYS
@pytest.mark.parametrize("name", MODULES)
def test_weights_that_are_no_parameters(name, way):
    module = MODULES[name]()
    changed = way(module)
    x = torch.randn(2, 3) if "cell" in name else torch.randn(4, 2, 3)
    given = [x]
    if name in ("lstm", "gru", "rnn", "torch's"):
        given.append(pack_sequence([x[:, 0], x[:2, 1]]))
    for one in given:
        for actual, expected in zip(flat(changed(one)), flat(module(one)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    if way is as_replica:  # the gradients reach the module's own parameters
        sum(tensor.sum() for tensor in flat(changed(x))).backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
    if way is parametrized:
        counts = [part.count for part in changed.modules() if isinstance(part, Same)]
        assert set(counts) == {1 + len(given)}, "once when it is registered, once in each call"


@WAYS
def test_streams_of_weights_that_are_no_parameters(way):
    module = layernorm.LayerNormLSTM(3, 5, 2)
    x = torch.randn(4, 1, 3)
    expected, _ = module(x)
    stream = way(module).stream()
    for _ in range(2):
        steps = torch.stack([stream.step(x_t) for x_t in x])
        torch.testing.assert_close(steps, expected, rtol=1e-5, atol=1e-6)
        stream.refresh()
        stream.reset()


def test_functional_weights_reach_layers_and_streams_of_them():
    module = layernorm.LayerNormGRU(3, 5)
    x = torch.randn(4, 2, 3)
    weights = {name: parameter.detach() * 1.5 for name, parameter in module.named_parameters()}
    changed = copy.deepcopy(module)
    changed.load_state_dict(module.state_dict() | weights)
    found = torch.func.functional_call(module, weights, (x,))
    assert same(flat(found), flat(changed(x)))


def test_replaced_norms_read_their_weights_by_attribute():
    for norm in (nn.LayerNorm(3), nn.RMSNorm(3)):
        x = torch.randn(2, 3)
        for changed in (with_buffers(norm), with_attributes(norm), as_replica(norm)):
            changed.weight = changed.weight * 2
            expected = changed(x)
            assert "" in layernorm.replace_norms(changed).replaced
            torch.testing.assert_close(changed(x), expected, rtol=1e-5, atol=1e-6)


def hooked(function):
    """Return a change of a module by one of ``torch.nn.utils``'s hooks, which are deprecated."""

    def change(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(module, "weight_hh_l0")

    return change


def pruned_and_normalized(module):
    hooked(nn.utils.weight_norm)(module)
    prune.random_unstructured(module, "weight_hh_l0_v", amount=0.3)


def pruned_twice(module):
    prune.random_unstructured(module, "weight_hh_l0", amount=0.3)
    prune.l1_unstructured(module, "weight_hh_l0", amount=0.3)
    prune.random_unstructured(module, "gain_hh_l0", amount=0.3)


COMPUTED = {
    "pruning": pruned_twice,
    "weight norm by a hook": hooked(nn.utils.weight_norm),
    "spectral norm by a hook": hooked(nn.utils.spectral_norm),
    "pruning of what weight norm reads": pruned_and_normalized,
    "weight norm": lambda module: parametrizations.weight_norm(module, "weight_hh_l0"),
    "spectral norm": lambda module: parametrizations.spectral_norm(module, "weight_hh_l0"),
    "orthogonal": lambda module: parametrizations.orthogonal(module, "weight_hh_l0"),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("way", COMPUTED)
def test_a_stream_has_the_weights_of_a_call_now(kernel, way, training):
    module = layernorm.LayerNormGRU(3, 8, dtype=torch.float64).train(training)
    COMPUTED[way](module)
    x = torch.randn(6, 1, 3, dtype=torch.float64)
    before, _ = module(x)
    before.square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()  # and no call between this and the stream
    held = {**vars(module), **module._buffers}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    streams = [module.stream()]
    streams[0].refresh()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        streams.append(module.stream())
    with torch.inference_mode():
        streams.append(module.stream())
    # Nothing of it stays on the module, whose own call would otherwise find another weight.
    assert all(vars(module).get(name, module._buffers.get(name)) is value for name, value in held.items())
    assert all(torch.equal(buffer, value) for buffer, value in buffers)
    now, _ = module(x)
    assert not torch.allclose(now, before, atol=1e-3)
    for stream in streams:
        steps = torch.stack([stream.step(x_t) for x_t in x])
        torch.testing.assert_close(steps, now.detach(), rtol=0, atol=1e-12)
    now.sum().backward()


def test_a_stream_leaves_no_weight_without_gradient_in_a_cache():
    module = layernorm.LayerNormGRU(3, 8)
    parametrizations.weight_norm(module, "weight_hh_l0")
    with parametrize.cached():
        module.stream()
        module(torch.randn(2, 1, 3))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def scales_the_weight(module, args):
    module.weight_hh_l0.data.mul_(2)


class Hook:
    def __call__(self, module, args, kwargs):
        return None


@pytest.mark.parametrize(
    ("hook", "options", "name"),
    [
        (scales_the_weight, {}, "scales_the_weight"),
        (lambda module, args: None, {"prepend": True}, "<lambda>"),
        (Hook(), {"with_kwargs": True}, "Hook"),
        (functools.partial(scales_the_weight), {}, "scales_the_weight"),
    ],
)
def test_a_hook_that_may_compute_a_weight_is_refused_by_name(hook, options, name):
    module = layernorm.LayerNormGRU(3, 8)
    stream = module.stream()
    handle = module.register_forward_pre_hook(hook, **options)
    message = f"LayerNormGRU.stream: the forward pre-hook {name} may compute a weight.*remove the hook"
    for make in (module.stream, stream.refresh):
        with pytest.raises(RuntimeError, match=message):
            make()
    handle.remove()
    stream.refresh()
    if not options:
        handle = nn.modules.module.register_module_forward_pre_hook(hook)
        try:
            with pytest.raises(RuntimeError, match=message):
                module.stream()
        finally:
            handle.remove()


def test_hooks_that_cannot_compute_a_weight_are_none_of_its_concern():
    module = layernorm.LayerNormGRU(3, 8)
    module.register_forward_hook(lambda module, args, output: None)
    module.register_full_backward_pre_hook(lambda module, grads: None)
    x = torch.randn(1, 3)
    expected = module.stream().step(x)
    with FlopCounterMode(display=False):  # it tracks modules by a hook of all
        assert torch.equal(module.stream().step(x), expected)


def test_weights_that_are_not_here_are_refused():
    with pytest.raises(
        RuntimeError, match="weight_ih_l0 is on the meta device, without numbers; load it first"
    ):
        layernorm.LayerNormLSTM(3, 8, device="meta").stream()
    module = layernorm.LayerNormLSTM(3, 8)
    flat_shard = with_attributes(module)
    flat_shard.weight_hh_l0 = flat_shard.weight_hh_l0.flatten()[:100]
    with pytest.raises(
        RuntimeError, match=r"weight_hh_l0 must have shape \[32, 8\], got shape \[100\].*gather"
    ):
        flat_shard.stream()
    freed = with_attributes(module)
    freed.weight_hh_l0 = freed.weight_hh_l0.clone()
    freed.weight_hh_l0.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"weight_hh_l0 must .* got memory that was freed"):
        freed.stream()
