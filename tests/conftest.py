"""Fixtures of all tests."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import threading
import warnings
from collections.abc import Iterator

# Triton asks when it is imported. Without a GPU its kernels run in its interpreter here.
os.environ.setdefault("TRITON_INTERPRET", "1")
# So does cuBLAS, whose products are deterministic only so.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch

from layernorm import backends, ops
from tests.settings import poisoned_memory, thread_count

# The operators with Triton kernels, by their room in layernorm.gpu.
TRITON_OPERATORS = {
    "norm": (*ops.NORMS, "norm_forward", "norm_backward"),
    "recurrent": ("recurrent", "recurrent_forward", "recurrent_backward"),
}

# Who runs the tests in the background may have Ctrl-C ignored; the commands under test must not inherit that.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Several workers with several threads each would wait for one another; so would their subprocesses.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def native() -> None:
    """Skip where there are no compiled kernels."""
    if ops.NATIVE_PROBLEM is not None:
        pytest.skip(f"no compiled kernels: {ops.NATIVE_PROBLEM}")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:layernorm. the Triton kernels compute:RuntimeWarning")
    if ops.NATIVE_PROBLEM is not None:
        # Said once in a process, in whichever test comes first; test_backends.py tests it.
        config.addinivalue_line("filterwarnings", "ignore:layernorm. no compiled kernels:RuntimeWarning")


@pytest.fixture(autouse=True)
def _fixed_randomness() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill fresh tensors with NaN."""
    with poisoned_memory():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread."""
    with thread_count(1):
        yield


def round_to_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return the nearest bfloat16 of float32, both as bits: ties to even, NaN kept."""
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, bits >> 16 | 0x40, rounded).astype(np.uint16)


def round_to_tf32(a: np.ndarray) -> np.ndarray:
    """Return float32 with ten bits of its fraction, as TF32 has."""
    return ((a.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.fixture
def ieee() -> Iterator[None]:
    """Let GPUs multiply float32 as it is, which by default they do as TF32.

    By the older flag: one of the newer ones makes PyTorch refuse to tell the older, which benchmarks read.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def interpreted(ieee: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute the operators of CPU tensors by the Triton kernels, in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install 'layernorm[triton]'")
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("TRITON_INTERPRET is not 1")
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(data, source, target, rounding):
        # Triton's interpreter cuts bfloat16 off where its compiler rounds to the nearest.
        if (source, target) == (tl.float32, tl.bfloat16):
            return round_to_bfloat16(data.view(np.uint32))
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return convert(data, source, target, rounding)

    def dot(self, a, b, sums, precision, *rest):
        # It multiplies bits of bfloat16 as integers, and knows no TF32. And a library's product may sum in
        # an order that depends on the shape and on the machine; that of a GPU's instructions does not.
        wide = [self.create_fp_ext(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
        factors = [t.data.astype(sums.data.dtype) for t in wide]
        if a.dtype.scalar == tl.float32 and "TF32" in str(precision):
            factors = [round_to_tf32(f) for f in factors]
        product = np.einsum("ik,kj->ij", *factors)
        return interpreter.TensorHandle(product + sums.data, sums.dtype.scalar)

    def splat(self, shape, value):
        # It makes integers of booleans.
        data = np.full(shape.shape, value.data.item(), dtype=value.data.dtype)
        return interpreter.TensorHandle(data, value.dtype.scalar)

    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        # Triton 3.6 takes an array of one element for a number, which NumPy 2.4 refuses.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch_language, languages = interpreter._patch_lang, {}

    def patch_once(function):
        # It does so anew each time a function calls another, which takes half of the time.
        if function not in languages:
            modules = function.__globals__.values()
            languages[function] = [module for module in modules if module is tl or module is tl.core]
        if any(tl.core.is_builtin(module.load) for module in languages[function]):
            return patch_language(function)
        return interpreter._LangPatchScope()

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", splat)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    for module in (ops, ops.recurrent, ops.registration):  # whose calls would not be seen by the dispatcher
        monkeypatch.setattr(module, "native", None)
    monkeypatch.setattr(
        ops, "NATIVE_PROBLEM", None
    )  # the operators have kernels, if there is a module or not
    library = torch.library.Library("layernorm", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for room, names in TRITON_OPERATORS.items():
            for name in names:
                # PyTorch 2.11 refuses to replace a kernel that is in Python too.
                torch.library._impls.discard(f"layernorm/{name}/CPU")
                library.impl(name, ops.gpu_kernel(room, name), "CPU")
    with np.errstate(all="ignore"):  # as on a GPU
        yield
    library._destroy()


@pytest.fixture
def looped(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do as ``interpreted``, with blocks so small that rows of more than 512 elements are looped over."""
    from layernorm.gpu import settings

    def small(blocks: dict[int, settings.Tile]) -> dict[int, settings.Tile]:
        return {block: tile for block, tile in blocks.items() if block <= 512}

    default = settings.DEFAULT
    changed = dataclasses.replace(
        default,
        forward=small(default.forward),
        backward=small(default.backward),
        looped_forward=settings.Tile(1, 512, 4, whole=False),
        looped_sums=settings.Tile(1, 512, 4, whole=False),
        columns=settings.Tile(1, 256, 4, whole=False),
    )
    monkeypatch.setattr(settings, "DEFAULT", changed)


@pytest.fixture
def gpu(ieee: None) -> None:
    """Skip where no GPU can run the Triton kernels."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    if os.environ["TRITON_INTERPRET"] == "1":
        pytest.skip("Triton's kernels are interpreted: set TRITON_INTERPRET=0")


@pytest.fixture
def on_gpu(gpu: None) -> Iterator[None]:
    """Make tensors on a GPU, and compute by the Triton kernels."""
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    with backends.use("triton"):
        yield
    torch.set_default_device(before)
