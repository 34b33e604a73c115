"""ONNX Runtime on bound tensors, and models made of nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from benchmarks.core.subjects import NotSupportedError, Subject, module

#: One run: the tensors of inputs and outputs by name.
Binding = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


def element_type(dtype: torch.dtype) -> int:
    """Return ONNX's number for a dtype."""
    types = module("onnx").TensorProto
    numbers: dict[torch.dtype, int] = {
        torch.float32: types.FLOAT,
        torch.float16: types.FLOAT16,
        torch.bfloat16: types.BFLOAT16,
        torch.int64: types.INT64,
    }
    return numbers[dtype]


def constant(name: str, value: Tensor) -> Any:
    """Return a constant of a model."""
    data = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return module("onnx.helper").make_tensor(
        name, element_type(value.dtype), list(value.shape), data, raw=True
    )


def value(name: str, dtype: torch.dtype, shape: Sequence[int]) -> Any:
    """Return the name, dtype and shape of an input or output."""
    return module("onnx.helper").make_tensor_value_info(name, element_type(dtype), list(shape))


def model(graph: Any, opset: int, version: int) -> bytes:
    """Return the file of a graph, for a version of the operators and one of the format."""
    helper = module("onnx.helper")
    opsets = [helper.make_opsetid("", opset)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=version).SerializeToString()
    return data


def subject(
    file: bytes,
    bindings: Sequence[Binding],
    results: Callable[[Callable[[], None]], list[Tensor]],
    *,
    fresh: bool,
) -> Subject:
    """Return a model as a peer.

    Args:
        file: the model.
        bindings: calls take them in turn.
        results: is given a call that writes into the bindings' outputs, and returns what they hold then.
        fresh: whether calls that are timed make their outputs anew, as other peers do.

    Raises:
        NotInstalledError: ONNX Runtime or ONNX is missing.
        NotSupportedError: ONNX Runtime has no such operator for this dtype.
    """
    runtime = module("onnxruntime")
    options = _options(runtime)
    names = list(bindings[0][1])
    held: list[Any] = []

    @contextmanager
    def session() -> Iterator[None]:
        """Hold a session: its threads, which spin after a call, end before another peer's sample."""
        if not held:
            run = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            bound = [_bound(run, binding) for binding in bindings]
            held.extend((run.run_with_iobinding, bound, cycle(bound)))
        yield
        if options.intra_op_num_threads > 1:  # without threads one session serves all samples
            held.clear()

    def into_outputs() -> None:
        run, _, turns = held
        run(next(turns))

    def into_fresh_outputs() -> None:
        run, (binding, *_), _ = held
        binding.clear_binding_outputs()
        for name in names:
            binding.bind_output(name)
        run(binding)

    def found() -> list[Tensor]:
        held.clear()
        with session():
            return results(into_outputs)

    try:
        with session():
            pass
    except Exception as error:
        if type(error).__name__ in ("NotImplemented", "InvalidGraph"):
            raise NotSupportedError(str(error)) from error
        raise
    return Subject(into_fresh_outputs if fresh else into_outputs, found, session)


def _options(runtime: Any) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return options


def _bound(run: Any, binding: Binding) -> Any:
    io = run.io_binding()
    inputs, outputs = binding
    for bind, tensors in ((io.bind_input, inputs), (io.bind_output, outputs)):
        for name, t in tensors.items():
            bind(name, "cpu", 0, element_type(t.dtype), list(t.shape), t.data_ptr())
    return io
