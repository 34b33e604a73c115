"""The time loop's launches: one after another, or captured in CUDA graphs and replayed.

A graph holds the launches of some steps, a power of four; longer sequences are put together from them, so
a few graphs are enough for sequences of any length. They read their tensors' addresses from a table (see
``table_kernels``). The first call for a layer and batch size launches directly, which also compiles the
kernels; graphs are captured after that.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from layernorm.gpu.launching import launch
from layernorm.gpu.recurrent import table_kernels as table
from layernorm.gpu.recurrent.layer import Layer
from layernorm.gpu.recurrent.products import precision

#: The numbers of steps of the graphs. What is left over is launched step by step.
SIZES: Final = (64, 16, 4)
#: Layers and batch sizes whose graphs are kept, those that were used last.
KEPT: Final = 32

#: Launches one step: given the table, the number of the step behind those that are done, and PRESENT.
Step = Callable[[Tensor, int, int], None]


def present(tensors: Mapping[str, Tensor | None]) -> int:
    """Return PRESENT of ``row_kernels``: a bit for each slot that has a tensor."""
    return sum(1 << table.SLOTS.index(name) for name, t in tensors.items() if t is not None)


def new_table(like: Tensor) -> Tensor:
    """Make a table on a tensor's device."""
    return torch.empty(len(table.SLOTS), dtype=torch.int64, device=like.device)


def fill(to: Tensor, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, int]) -> Tensor:
    """Write addresses and numbers into a table; a slot that neither names holds 0."""
    addresses = {name: t.data_ptr() for name, t in tensors.items() if t is not None}
    values = [{**addresses, **numbers}.get(name, 0) for name in table.SLOTS]
    values += [0] * (-len(values) % table.WRITTEN)
    for start in range(0, len(table.SLOTS), table.WRITTEN):
        part = values[start : start + table.WRITTEN]
        launch(table.write, (1,), to, to, start, *part, SIZE=len(table.SLOTS), num_warps=1)
    return to


def run(
    layer: Layer,
    name: str,
    tensors: Mapping[str, Tensor | None],
    numbers: Mapping[str, int],
    count: int,
    step: Step,
) -> None:
    """Launch ``count`` steps of a loop.

    Args:
        layer: what they are of.
        name: of the loop.
        tensors: whose addresses go into the table.
        numbers: those of the table; ``done`` is among them.
        count: of steps.
        step: launches one.
    """
    bits = present(tensors)
    if not layer.input.is_cuda or torch.cuda.is_current_stream_capturing():
        to = fill(new_table(layer.input), tensors, numbers)
        for i in range(count):
            step(to, i, bits)
        return
    stream = torch.cuda.current_stream(layer.input.device)
    key = (name, *layer.key, layer.batch, bits, precision(), stream.device_index, stream.cuda_stream)
    captured = _CACHE.get(key, lambda: Captured(new_table(layer.input), stream))
    with captured.lock:
        fill(captured.table, tensors, numbers)
        captured.run(count, lambda i: step(captured.table, i, bits))


def sizes(count: int) -> Iterator[int]:
    """Yield the parts of a loop, each of the most steps that fit.

    Examples:
        >>> from layernorm.gpu.recurrent.replay import sizes
        >>> list(sizes(150))
        [64, 64, 16, 4, 1, 1]
    """
    for size in (*SIZES, 1):
        yield from [size] * (count // size)
        count %= size


class Captured:
    """The graphs of one loop of one layer and batch size, on one stream, and the table they read.

    The lock keeps the table from being written while another thread still queues replays.
    """

    def __init__(self, of_table: Tensor, stream: Any) -> None:
        self.table = of_table
        self.lock = threading.Lock()
        self._stream = stream
        self._graphs: dict[int, Any] = {}
        self._compiled = False

    def run(self, count: int, step: Callable[[int], None]) -> None:
        """Launch ``count`` steps, beginning with the one that the table names."""
        for size in sizes(count):
            graph = self._graphs.get(size)
            if graph is None and self._compiled and size > 1:
                graph = self._graphs[size] = self._capture(partial(self._launch, size, step))
            if graph is None:
                self._launch(size, step)
            else:
                graph.replay()
        self._compiled = True

    def _launch(self, size: int, step: Callable[[int], None]) -> None:
        for i in range(size):
            step(i)
        launch(table.advance, (1,), self.table, self.table, size, num_warps=1)

    def _capture(self, launches: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream(self.table.device)):
            # Other threads may allocate meanwhile; nothing is allocated here.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                launches()
            finally:
                graph.capture_end()
        return graph

    def close(self) -> None:
        """Wait until nothing runs that this holds."""
        self._stream.synchronize()


class Cache:
    """The loops that were used last, ``KEPT`` of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loops: OrderedDict[tuple[Any, ...], Captured] = OrderedDict()

    def get(self, key: tuple[Any, ...], make: Callable[[], Captured]) -> Captured:
        """Return the loop of this key, made where there is none."""
        with self._lock:
            found = self._loops.pop(key, None) or make()
            self._loops[key] = found
            last = self._loops.popitem(last=False)[1] if len(self._loops) > KEPT else None
        if last is not None:
            with last.lock:
                last.close()
        return found


_CACHE: Final = Cache()
