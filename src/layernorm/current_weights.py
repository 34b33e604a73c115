"""The weights that a module would use if it were called now, for streams, which do not call it.

``torch.nn``'s calls run forward pre-hooks first, and some of these compute a weight: pruning, and weight and
spectral norm in their older form. Those of PyTorch are run here too, without a trace on the module. What any
other hook does cannot be known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from layernorm.checks import as_list
from layernorm.parameters import RecurrentParameters
from layernorm.pytorch_internals import are_transforms_active, global_forward_pre_hooks

# PyTorch's hooks that compute a weight, by module and class; nobody has one who did not import it.
_COMPUTING: Final = (
    ("torch.nn.utils.prune", "BasePruningMethod"),
    ("torch.nn.utils.weight_norm", "WeightNorm"),
    ("torch.nn.utils.spectral_norm", "SpectralNorm"),
)
# PyTorch's that compute none: trackers of calls, and those that gather shards, of which _check tells.
_HARMLESS: Final = ("torch.distributed.", "torch.utils.", "torch.profiler.")


def current_weights(module: RecurrentParameters, operator: str) -> list[dict[str, Tensor]]:
    """Return the weights of each layer by their names without suffix, detached.

    Args:
        module: of one direction.
        operator: who asks, for messages.

    Raises:
        RuntimeError: a forward pre-hook may compute a weight, or a weight is sharded or on the meta device.
    """
    hooks = _hooks(module, operator)
    # The mode of the caller: torch.nn.utils.parametrize may keep what is computed here for others to use.
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad), _unchanged(module):
        for hook in hooks:
            hook(module, ())
        found = module.layer_weights()
    layers = [{name: weight.detach() for name, weight in weights.items()} for weights in found]
    for layer, weights in enumerate(layers):
        _check(operator, layer, weights, module.layer_shapes()[layer])
    return layers


def _hooks(module: RecurrentParameters, operator: str) -> list[Callable[..., Any]]:
    """Return the forward pre-hooks that compute weights, in their order; raise for those that may."""
    computing = tuple(
        getattr(sys.modules[name], hook) for name, hook in _COMPUTING if hasattr(sys.modules.get(name), hook)
    )
    found = []
    for hook in (*global_forward_pre_hooks().values(), *module._forward_pre_hooks.values()):
        if isinstance(hook, computing):
            found.append(hook)
            continue
        function = getattr(hook, "func", hook)  # of a functools.partial
        if not (getattr(function, "__module__", None) or "").startswith(_HARMLESS):
            name = getattr(function, "__qualname__", type(function).__name__)
            raise RuntimeError(
                f"{operator}: the forward pre-hook {name} may compute a weight or change the input, which a "
                "stream, whose steps run no hooks, cannot know; remove the hook while the stream is made or "
                "refreshed (the handle's remove()), or make what it computes a parametrization "
                "(torch.nn.utils.parametrize)"
            )
    return found


@contextmanager
def _unchanged(module: RecurrentParameters) -> Iterator[None]:
    """Undo what computing weights leaves on a module: attributes, and the vectors of power iterations."""
    attributes = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    computes = attributes or parametrize.is_parametrized(module)
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()] if computes else []
    try:
        yield
    finally:
        vars(module).update(attributes)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _check(
    operator: str, layer: int, weights: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise for weights that are not whole."""
    tensors = sys.modules.get("torch.distributed.tensor")  # nobody has a DTensor who did not import it
    for name, weight in weights.items():
        if tensors is not None and isinstance(weight, tensors.DTensor):
            raise RuntimeError(
                f"{operator}: {name}_l{layer} is a DTensor over {weight.device_mesh}, and a stream "
                "is of one process; call the module's unshard() first where fully_shard made it, or load "
                "its full_tensor() values into a module of plain parameters, and make the stream of that"
            )
        if weight.is_meta:
            raise RuntimeError(
                f"{operator}: {name}_l{layer} is on the meta device, without numbers; load it first, or keep "
                "it in memory where a tool offloads it between calls"
            )
        if weight.shape != shapes[name] or not _has_memory(weight):
            got = (
                f"shape {as_list(weight.shape)}" if weight.shape != shapes[name] else "memory that was freed"
            )
            raise RuntimeError(
                f"{operator}: {name}_l{layer} must have shape {as_list(shapes[name])}, got {got}, as of "
                "parameters that are sharded between calls; gather them first, for example with "
                "FullyShardedDataParallel.summon_full_params, and make the stream there"
            )


def _has_memory(weight: Tensor) -> bool:
    """Return whether a tensor's elements exist: FSDP frees them between calls, and keeps the tensor."""
    if type(weight) is not Tensor or weight.layout != torch.strided or weight.numel() == 0:
        return True
    if are_transforms_active():
        return True
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    needed = (weight.storage_offset() + last + 1) * weight.element_size()
    return weight.untyped_storage().nbytes() >= needed
