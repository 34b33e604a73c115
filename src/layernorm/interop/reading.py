"""Reading weights from what people have them in: modules, mappings, lists, files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

#: What ``layernorm.interop.load`` takes: a module, tensors or arrays by name (nested or not), a list of
#: arrays in the source's order, or the path of a file.
Weights = torch.nn.Module | Mapping[str, Any] | Sequence[Any] | str | os.PathLike[str]

_FILES: Final = (".safetensors", ".npz", ".pt", ".pth")


def tensors_by_name(weights: Weights) -> dict[str, Tensor]:
    """Return a module's, a mapping's or a file's tensors by name; names within a nested mapping join with /.

    Raises:
        TypeError: ``weights`` is none of these, or one of its values no array.
        ValueError: the file is of an unknown kind.
    """
    if isinstance(weights, torch.nn.Module):
        return {name: value for name, value in weights.state_dict().items() if isinstance(value, Tensor)}
    if isinstance(weights, (str, os.PathLike)):
        return _from_file(Path(weights))
    if not isinstance(weights, Mapping):
        raise TypeError(
            "weights must be a module, a mapping of arrays by name, a list of arrays, or the path of a "
            f"file, got {type(weights).__name__}"
        )
    return {name: as_tensor(name, value) for name, value in _flat(weights)}


def as_tensor(name: str, value: Any) -> Tensor:
    """Return an array of whatever library as a tensor that may share its memory.

    Raises:
        TypeError: it is no array of numbers.
    """
    if isinstance(value, Tensor):
        return value.detach()
    import numpy

    try:
        array = numpy.asarray(value)
        return torch.from_numpy(numpy.array(array, copy=not array.flags.writeable, order="C"))
    except (TypeError, ValueError, AttributeError) as error:
        raise TypeError(f"weights[{name!r}] must be an array, got {type(value).__name__}: {error}") from None


def _flat(weights: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in weights.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}/")
        else:
            yield f"{before}{name}".removesuffix(":0"), value  # which TensorFlow puts behind its names


def _from_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(
                "a .safetensors file needs the package safetensors: pip install 'layernorm[interop]'"
            ) from None
        return dict(load_file(path))
    if path.suffix == ".npz":
        import numpy

        with numpy.load(path, allow_pickle=False) as arrays:
            return {name: as_tensor(name, arrays[name]) for name in arrays.files}
    if path.suffix in (".pt", ".pth"):
        return tensors_by_name(torch.load(path, map_location="cpu", weights_only=True))
    raise ValueError(f"weights: a file must be one of {', '.join(_FILES)}, got {str(path)!r}")


__all__ = ["Weights", "as_tensor", "tensors_by_name"]
