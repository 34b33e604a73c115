"""The data-dependent initialization of weight norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from layernorm.pytorch_internals import WeightNormParametrization

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def start_weight_norm(network: nn.Module, *inputs: Any) -> None:
    """Set gains and biases so that each feature has mean 0 and variance 1 over a batch, layer after layer.

    A layer with ``torch.nn.utils.parametrizations.weight_norm`` has the weight g·v/‖v‖. Its features
    t = v·x/‖v‖ have a mean and a standard deviation over the batch (and over the positions of an image);
    g becomes 1/std and the bias -mean/std (Salimans and Kingma 2016, arXiv 1602.07868, §3, eq. 5 and 6).
    This takes one forward pass in the current mode of the network; v is not changed.

    Args:
        network: a module that contains linear layers or convolutions with weight norm and a bias.
        inputs: the inputs of the network, a batch large enough for a mean and a standard deviation.

    Raises:
        TypeError: ``network`` is not a module.
        ValueError: no layer has weight norm; one has no bias or is of another kind; or a feature is the
            same for all cases.

    Examples:
        >>> import torch
        >>> from torch.nn.utils.parametrizations import weight_norm
        >>> from layernorm.baselines import start_weight_norm
        >>> x = torch.randn(100, 3) + 7
        >>> network = weight_norm(torch.nn.Linear(3, 5))
        >>> start_weight_norm(network, x)
        >>> y = network(x)
        >>> bool(y.mean(0).abs().max() < 1e-4), bool((y.std(0, correction=0) - 1).abs().max() < 1e-4)
        (True, True)
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    layers = {name: module for name, module in network.named_modules() if _is_weight_normalized(module)}
    if not layers:
        raise ValueError(
            "network must have layers with weight norm, got none; "
            "apply torch.nn.utils.parametrizations.weight_norm to them first"
        )
    for name, layer in layers.items():
        if not isinstance(layer, _LAYERS) or layer.bias is None:
            raise ValueError(
                f"network: layer {name!r} must be a linear layer or a convolution with a bias, got {layer}"
            )
    handles = [layer.register_forward_hook(_initialize) for layer in layers.values()]
    try:
        network(*inputs)
    finally:
        for handle in handles:
            handle.remove()


def _is_weight_normalized(module: nn.Module) -> bool:
    if not parametrize.is_parametrized(module, "weight"):
        return False
    parametrizations = module.get_submodule("parametrizations.weight").children()
    return any(isinstance(parametrization, WeightNormParametrization) for parametrization in parametrizations)


def _initialize(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Set the gain and bias of a layer from its output, and return the output that it has then."""
    bias, gain = layer.get_parameter("bias"), layer.get_parameter("parametrizations.weight.original0")
    features = output.dim() - 1 if isinstance(layer, nn.Linear) else 1
    others = [dim for dim in range(output.dim()) if dim != features]
    std, mean = torch.std_mean(output, others, correction=0, keepdim=True)
    if not (std > 0).all():
        raise ValueError(f"inputs: a feature of {layer} is the same in all cases; give more cases")
    gain.div_(std.reshape(gain.shape))
    bias.copy_((bias - mean.flatten()) / std.flatten())
    return (output - mean) / std


__all__ = ["start_weight_norm"]
