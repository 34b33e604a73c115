"""The time loop's launches: one after another, or captured in CUDA graphs and replayed.

A graph holds the launches of some steps, a power of four; longer sequences are put together from them, so
a few graphs are enough for sequences of any length. They read their tensors' addresses from a table (see
``table_kernels``). The first call for a layer and batch size launches directly, which also compiles the
kernels; graphs are captured after that.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from layernorm.gpu import tiers
from layernorm.gpu.launching import launch, precision
from layernorm.gpu.recurrent import table_kernels as table
from layernorm.gpu.recurrent.layer import Layer

#: The numbers of steps of the graphs. What is left over is launched step by step.
SIZES: Final = (64, 16, 4)
#: Layers and batch sizes whose graphs are kept, those that were used last.
KEPT: Final = 32

#: Launches one step: given the table, the number of the step behind those that are done, and PRESENT.
Step = Callable[[Tensor, int, int], None]


def present(tensors: Mapping[str, Tensor | None]) -> int:
    """Return PRESENT of ``row_kernels``: a bit for each slot that has a tensor."""
    return sum(1 << table.SLOTS.index(name) for name, t in tensors.items() if t is not None)


@contextmanager
def loop(
    layer: Layer, name: str, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, int]
) -> Iterator[Loop]:
    """Return a loop over steps whose table holds the addresses of these tensors within the ``with`` block.

    Args:
        layer: what its steps are of.
        name: of the loop.
        tensors: by the table's slots.
        numbers: those of the table; ``done`` is among them.
    """
    bits = present(tensors)
    if not layer.input.is_cuda or torch.cuda.is_current_stream_capturing():
        launched = Loop(layer.input, bits)
        launched.fill(tensors, numbers)
        yield launched
        return
    stream = torch.cuda.current_stream(layer.input.device)
    how = (precision(), tiers.is_dependent(layer.input.device))
    key = (name, *layer.key, layer.batch, bits, *how, stream.device_index, stream.cuda_stream)
    captured = _CACHE.get(key, lambda: Captured(layer.input, bits, stream))
    with captured.lock:
        captured.fill(tensors, numbers)
        yield captured


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


class Loop:
    """The steps of a loop, launched one by one, and the table on a tensor's device that they read."""

    def __init__(self, like: Tensor, bits: int) -> None:
        self.table = torch.empty(len(table.SLOTS), dtype=torch.int64, device=like.device)
        self.bits = bits
        self._held: list[int] = []  # what the table holds, as far as that is known

    def fill(self, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, int]) -> None:
        """Write addresses and numbers into the table where it holds others; 0 where there is neither."""
        addresses = {name: t.data_ptr() for name, t in tensors.items() if t is not None}
        values = [{**addresses, **numbers}.get(name, 0) for name in table.SLOTS]
        values += [0] * (-len(values) % table.WRITTEN)
        for start in range(0, len(table.SLOTS), table.WRITTEN):
            part = values[start : start + table.WRITTEN]
            if part != self._held[start : start + table.WRITTEN]:
                size = len(table.SLOTS)
                launch(table.write, (1,), self.table, self.table, start, *part, SIZE=size, num_warps=1)
        self._held = values

    def run(self, count: int, step: Step) -> None:
        """Launch ``count`` steps, beginning with the one that the table names."""
        for i in range(count):
            step(self.table, i, self.bits)


class Captured(Loop):
    """The graphs of one loop of one layer and batch size, on one stream.

    The lock keeps the table from being written while another thread still queues replays.
    """

    def __init__(self, like: Tensor, bits: int, stream: Any) -> None:
        super().__init__(like, bits)
        self.lock = threading.Lock()
        self._stream = stream
        self._graphs: dict[int, Any] = {}
        self._compiled = False

    def run(self, count: int, step: Step) -> None:
        """Do so with graphs; the table counts the steps as done."""
        held, self._held = self._held, []
        for size in sizes(count):
            graph = self._graphs.get(size)
            if graph is None and self._compiled and size > 1:
                graph = self._graphs[size] = self._capture(partial(self._launch, size, step))
            if graph is None:
                self._launch(size, step)
            else:
                graph.replay()
        self._compiled = True
        held[table.SLOTS.index("done")] += count
        self._held = held

    def _launch(self, size: int, step: Step) -> None:
        super().run(size, step)
        launch(table.advance, (1,), self.table, self.table, size, num_warps=1)

    def _capture(self, launches: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph()
        with _CAPTURING, torch.cuda.stream(_capture_stream(self.table.device)):
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


_CAPTURING: Final = threading.Lock()


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    """Return the stream of a device that all graphs are captured on.

    PyTorch hands out the same 32 streams again and again: a fresh one for each capture would at last be one
    that another thread launches to. Of those of high priority a program uses few.
    """
    return torch.cuda.Stream(device, priority=-1)


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
