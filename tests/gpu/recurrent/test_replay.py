"""Steps that are replayed as CUDA graphs: how loops are put together, and on a GPU what they promise."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time

import pytest
import torch

from layernorm import Variant, backends
from layernorm.variants import GATES
from tests.recurrent.cases import Layer, same, seeds_like

pytest.importorskip("triton", reason="Triton is not installed: pip install 'layernorm[triton]'")

from layernorm.gpu.recurrent import table_kernels


class Graph:
    """Stands in for a CUDA graph: remembers what was launched while it was captured."""

    def __init__(self, launches):
        self.launches = launches
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.launches()


def test_a_loop_is_put_together_from_graphs(monkeypatch):
    from layernorm.gpu.recurrent import replay

    assert list(replay.sizes(0)) == []
    for count in (1, 3, 4, 63, 64, 150, 1000):
        assert sum(replay.sizes(count)) == count
    captured, numbers = replay.Captured(torch.zeros(1), 5, None), {"done": 0, "steps": 21, "base": 3}
    graphs, written = [], []

    def capture(launches):
        graphs.append(Graph(launches))
        return graphs[-1]

    def launch(kernel, grid, on, to, *arguments, **options):
        if kernel is table_kernels.write:
            written.append(arguments[0])
        else:
            launched.append(("advance", arguments[0]))

    def step(to, number, bits):
        assert (to is captured.table, bits) == (True, 5)
        launched.append(number)

    launched = []
    monkeypatch.setattr(captured, "_capture", capture)
    monkeypatch.setattr(replay, "launch", launch)
    captured.fill({"h": torch.zeros(2)}, numbers)
    assert written == [*range(0, len(table_kernels.SLOTS), table_kernels.WRITTEN)]
    captured.run(20, step)
    assert graphs == []  # the first time compiles the kernels
    assert launched == [*range(16), ("advance", 16), *range(4), ("advance", 4)]
    launched.clear()
    captured.run(21, step)
    assert [g.replays for g in graphs] == [1, 1]
    assert launched == [*range(16), ("advance", 16), *range(4), ("advance", 4), 0, ("advance", 1)]
    captured.run(36, step)
    assert [g.replays for g in graphs] == [3, 2]


def test_only_what_has_changed_is_written_to_the_table(monkeypatch):
    from layernorm.gpu.recurrent import replay

    tensors, numbers = {"h": torch.zeros(2), "cell": torch.zeros(2)}, {"done": 4, "steps": 21}
    captured = replay.Captured(torch.zeros(1), replay.present(tensors), None)
    written, held = [], [0] * len(table_kernels.SLOTS)

    def launch(kernel, grid, on, to, *arguments, **options):
        if kernel is table_kernels.advance:
            held[0] += arguments[0]
            return
        start, *values = arguments
        assert len(values) == table_kernels.WRITTEN
        written.append(start)
        held[start : start + len(values)] = values

    def fails(to, number, bits):
        raise ZeroDivisionError

    def fill():
        written.clear()
        captured.fill(tensors, numbers)
        addresses = {name: t.data_ptr() for name, t in tensors.items()}
        assert held == [(addresses | numbers).get(name, 0) for name in table_kernels.SLOTS]
        return list(written)

    monkeypatch.setattr(replay, "launch", launch)
    every = [*range(0, len(held), table_kernels.WRITTEN)]
    assert fill() == every
    assert fill() == []
    captured.run(3, lambda to, number, bits: None)
    assert fill() == [0]  # done
    tensors["cell"] = torch.zeros(3)
    assert fill() == every[-1:]
    with pytest.raises(ZeroDivisionError):
        captured.run(3, fails)
    assert fill() == every  # nobody knows what was done


def test_captures_share_a_stream_one_after_another(monkeypatch):
    from layernorm.gpu.recurrent import replay

    streams, used, capturing = [], [], threading.Lock()

    class Graph:
        def capture_begin(self, capture_error_mode):
            assert capture_error_mode == "thread_local"
            assert capturing.acquire(blocking=False)

        def capture_end(self):
            capturing.release()

    def stream(device, priority):
        streams.append(device)
        return len(streams)

    def on_stream(of):
        used.append(of)
        return contextlib.nullcontext()

    replay._capture_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    captured = [replay.Captured(torch.zeros(1), 0, None) for _ in range(4)]
    threads = [threading.Thread(target=c._capture, args=(lambda: time.sleep(0.02),)) for c in captured]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    replay._capture_stream.cache_clear()
    assert (streams, used) == ([torch.device("cpu")], [1] * 4)
    assert not capturing.locked()


class OnGpu:
    """Stands in for a tensor on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)


def test_a_capture_comes_after_the_first_call(monkeypatch):
    from layernorm.gpu import launching
    from layernorm.gpu.recurrent import layer

    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(launching, "_ran", set())
    ran = []

    def call(key):
        with launching.compiled_by(key, OnGpu):
            ran.append(key)

    with pytest.raises(RuntimeError, match="call it once, with these shapes, before capturing"):
        call("a")
    capturing = False
    call("a")
    with pytest.raises(ZeroDivisionError), launching.compiled_by("b", OnGpu):
        1 / 0  # noqa: B018
    capturing = True
    call("a")
    for key in ("b", "c"):
        with pytest.raises(RuntimeError, match="before capturing"):
            call(key)
    assert ran == ["a", "a"]
    with pytest.raises(RuntimeError, match="the lengths of a packed sequence come from the CPU"):
        layer._on_device((2, 1), OnGpu)


def test_inductor_does_not_capture_the_operators():
    for name in ("recurrent", "recurrent_forward", "recurrent_backward"):
        tags = getattr(torch.ops.layernorm, name).default.tags
        assert not hasattr(torch.Tag, "cudagraph_unsafe") or torch.Tag.cudagraph_unsafe in tags


def test_the_cache_of_loops_is_bounded(monkeypatch):
    from layernorm.gpu.recurrent import replay

    class Loop:
        def __init__(self):
            self.lock, self.closed = threading.Lock(), False

        def close(self):
            self.closed = True

    cache, loops = replay.Cache(), [Loop() for _ in range(replay.KEPT + 1)]
    for i, loop in enumerate(loops[: replay.KEPT]):
        assert cache.get((i,), lambda loop=loop: loop) is loop
    assert cache.get((0,), Loop) is loops[0]  # used again, so kept
    cache.get(("new",), lambda: loops[-1])
    assert [i for i, loop in enumerate(loops) if loop.closed] == [1]


# ---- on a GPU alone ----


@pytest.mark.usefixtures("on_gpu")
def test_replayed_steps_have_the_bits_of_launched_ones():
    layer = Layer("lstm", Variant(), 16, 48, torch.bfloat16)
    x, state = torch.randn(150, 5, 16).bfloat16(), layer.state(5, torch.bfloat16)
    seeds = seeds_like(layer, 150, 5, torch.bfloat16)
    launched, captured, replayed = (layer(x, state, seeds) for _ in range(3))
    for a, b, c in zip(launched, captured, replayed, strict=True):
        assert same(a, b)
        assert same(b, c)


@pytest.mark.usefixtures("on_gpu")
def test_in_a_graph_of_the_caller_and_on_a_stream_of_his():
    import layernorm

    gru = layernorm.LayerNormGRU(16, 32)
    x = torch.randn(20, 4, 16)
    with torch.no_grad():
        expected, _ = gru(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found, _ = gru(x)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(found, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found, _ = gru(x)
        x.copy_(x.flip(0))
        graph.replay()
        assert torch.equal(found, gru(x)[0])


@pytest.mark.usefixtures("on_gpu")
def test_several_threads_share_graphs():
    import layernorm

    lstm = layernorm.LayerNormLSTM(8, 16)
    inputs = [torch.randn(30, 3, 8) for _ in range(4)]
    with torch.no_grad():
        expected = [lstm(x)[0] for x in inputs]
        found = [None] * len(inputs)

        def call(i):
            with torch.no_grad(), backends.use("triton"):
                for _ in range(10):
                    found[i] = lstm(inputs[i])[0]

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert same(found, expected)


@pytest.mark.usefixtures("on_gpu")
def test_autocast_is_in_the_lower_precision():
    import layernorm

    lstm = layernorm.LayerNormLSTM(8, 16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output, _ = lstm(torch.randn(5, 2, 8))
    assert output.dtype == torch.bfloat16


@pytest.mark.sanitized
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("cell", list(GATES))
def test_the_persistent_kernel_agrees(cell):
    for hidden in (128, 512):
        layer = Layer(cell, Variant(), 16, hidden, torch.bfloat16)
        x, state = torch.randn(40, 19, 16).bfloat16(), layer.state(19, torch.bfloat16)
        seeds, resets = seeds_like(layer, 40, 19, torch.bfloat16), torch.rand(40, 19) < 0.05
        device = x.device
        with backends.use("persistent"):
            choice = backends.tier(cell, Variant(), hidden, torch.bfloat16, device)
            if choice.kernel != "persistent":
                pytest.skip(choice.reason)
            found = layer(x, state, seeds, resets=resets)
        expected = layer(x, state, seeds, resets=resets)
        # The state is rounded to bfloat16 at each step, and a difference of a unit is passed on: a few units.
        for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            error = (a.float() - b.float()).abs().max()
            assert error <= 16 * torch.finfo(torch.bfloat16).eps * (1 + b.float().abs().max())
