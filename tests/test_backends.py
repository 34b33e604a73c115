"""The choice of a kernel for a call, the override, and an installation without compiled kernels."""

from __future__ import annotations

import asyncio
import contextvars
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import layernorm
from layernorm import backends, info, ops
from layernorm import functional as LF
from layernorm.gpu import settings, tiers
from layernorm.ops import loading

CPU = torch.device("cpu")


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-c", code], os.environ | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_choice_depends_on_operator_device_and_dtype():
    for operators, other in ((backends.NORMS, "torch"), (backends.RECURRENT, "reference")):
        compiled = "native" if ops.NATIVE_PROBLEM is None else other
        for operator in operators:
            for dtype in backends.NATIVE_DTYPES:
                assert backends.choose(operator, CPU, dtype).kernel == compiled
            assert backends.choose(operator, CPU, torch.complex64).kernel == other
            assert backends.choose(operator, torch.device("meta"), torch.float32).kernel == other


def test_use_overrides_and_gives_back():
    before = backends.choose("layer_norm", CPU, torch.float32)
    with backends.use("reference"):
        assert backends.choose("layer_norm", CPU, torch.float32).kernel == "reference"
        with backends.use("torch"):
            assert backends.choose("rms_norm", CPU, torch.float32).kernel == "torch"
            assert backends.choose("gru", CPU, torch.float32).kernel == "reference"
        assert backends.choose("layer_norm", CPU, torch.float32).kernel == "reference"
    assert backends.choose("layer_norm", CPU, torch.float32) == before


def served():
    """Return the kernel of a norm here and now."""
    return backends.choose("layer_norm", CPU, torch.float32).kernel


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_blocks_that_overlap_in_two_threads_never_meet():
    default, seen = served(), {}
    entered, left = threading.Event(), threading.Event()

    def first():
        with backends.use("reference"):
            entered.set()
            assert left.wait(10)  # entered before the other block, left after it
            seen["first"] = served()

    def second():
        assert entered.wait(10)
        with backends.use("torch"):
            seen["second"] = served()
        seen["after"] = served()
        left.set()

    threads = [threading.Thread(target=function) for function in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": "reference", "second": "torch", "after": default}
    assert served() == default == in_a_thread(served)


def test_a_thread_sees_the_override_only_with_the_context():
    default = served()
    with backends.use("reference"):
        if not getattr(sys.flags, "thread_inherit_context", 0):
            assert in_a_thread(served) == default
        context = contextvars.copy_context()
        assert in_a_thread(lambda: context.run(served)) == "reference"

        def as_pytorch_runs_backward_on_a_gpu():
            torch._C._stash_obj_in_tls("context", context)
            try:
                return served(), LF.layer_norm(torch.randn(2, 3), (3,))
            finally:
                remove = getattr(torch._C, "_remove_obj_from_tls", None)  # PyTorch 2.11 has none
                if remove is not None:
                    remove("context")

        assert in_a_thread(as_pytorch_runs_backward_on_a_gpu)[0] == "reference"


def test_blocks_that_overlap_in_tasks_never_meet():
    default = served()

    async def task(kernel, wait, go):
        with backends.use(kernel):
            go.set()
            await wait.wait()
            return served()

    async def outlives():
        await asyncio.sleep(0)
        return served()

    async def main():
        first, second = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(task("reference", second, first))]
        await first.wait()
        tasks.append(asyncio.create_task(task("torch", asyncio.Event(), second)))
        assert await tasks[0] == "reference"
        assert served() == default
        tasks[1].cancel()
        with backends.use("reference"):
            inherits = asyncio.create_task(outlives())
        assert await inherits == "reference"

    asyncio.run(main())
    assert served() == default


def test_blocks_in_generators_leave_nothing_behind():
    default = served()

    def block(kernel):
        with backends.use(kernel):
            yield
            yield

    first, second = block("reference"), block("torch")
    next(first)
    next(second)
    first.close()  # entered first, left first
    assert served() == "torch"
    second.close()
    assert served() == default
    third = block("reference")
    next(third)
    in_a_thread(third.close)  # in another context than it was entered in
    assert served() == default
    with backends.use("torch"):
        assert served() == "torch"
    with pytest.raises(ZeroDivisionError), backends.use("torch"):
        1 / 0  # noqa: B018
    assert served() == default

    @backends.use("reference")
    def decorated():
        return served()

    assert (decorated(), served()) == ("reference", default)


@torch._dynamo.config.patch(allow_rnn=True)  # without it layers are no part of graphs, as torch.nn's
def test_a_compiled_function_sees_the_override_of_each_call():
    module = layernorm.LayerNormGRU(3, 4, dtype=torch.float64)
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    graphs = []

    def backend(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    def inside(x):
        with backends.use("reference"):
            output = module(x)[0]
        return output, module(x)[0]

    torch.compiler.reset()
    compiled = torch.compile(lambda x: module(x)[0], backend=backend, fullgraph=True)
    expected = compiled(x)
    with backends.use("reference"):
        torch.testing.assert_close(compiled(x), expected)
        assert torch.compile(inside, backend=backend, fullgraph=True)(x)[0].shape == expected.shape
    compiled(x)  # the first graph again
    both, once = torch.compile(inside, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(both, once)
    if ops.NATIVE_PROBLEM is None:
        has_operator = [any("layernorm" in target for target in targets) for targets in graphs]
        assert has_operator == [True, False, False, True]
    assert served() == in_a_thread(served)


def test_an_override_that_cannot_be_is_refused():
    with (
        pytest.raises(
            ValueError, match="one of native, triton, looped, persistent, torch, reference; got 'cuda'"
        ),
        backends.use("cuda"),
    ):
        pass
    with (
        backends.use("native"),
        pytest.raises(RuntimeError, match=r"layer_norm has none for torch\.float32 on meta"),
    ):
        LF.layer_norm(torch.ones(2, 3, device="meta"), (3,))
    code = "import layernorm, torch; layernorm.LayerNorm(3)(torch.ones(3))"
    message = "must be one of native, triton, looped, persistent, torch, reference; got 'fast'"
    assert message in in_a_process(code, LAYERNORM_BACKEND="fast").stderr


def test_a_question_that_makes_no_sense_is_refused():
    for arguments, error, message in (
        (("conv", CPU, torch.float32), ValueError, "operator must be one of layer_norm, .*; got 'conv'"),
        (("lstm", "cpu", torch.float32), TypeError, "device must be a torch.device, got str"),
        (("lstm", CPU, "float32"), TypeError, "dtype must be a torch.dtype, got str"),
        (("layer_norm", CPU, torch.float32, 8.0), TypeError, "width must be an int, got float"),
    ):
        with pytest.raises(error, match=message):
            backends.choose(*arguments)


def test_the_environment_overrides():
    code = """
import layernorm, torch
print(layernorm.backends.choose('layer_norm', torch.device('cpu'), torch.float32))
"""
    result = in_a_process(code, LAYERNORM_BACKEND="reference")
    assert result.stdout.startswith("Choice(kernel='reference'")


def test_without_compiled_kernels_torch_computes_and_it_is_said_once(monkeypatch):
    monkeypatch.setattr(ops, "NATIVE_PROBLEM", "this installation was made without them")
    monkeypatch.setattr(ops, "native", None)
    monkeypatch.setattr(backends, "_said", set())
    x = torch.randn(2, 3)
    with pytest.warns(RuntimeWarning) as seen:
        output = LF.layer_norm(x, (3,))
    for part in (
        "no compiled kernels: this installation was made without them",
        "an LSTM that takes 2 ms takes 60",
        "LAYERNORM_NATIVE=1 pip install --force-reinstall",
        "LAYERNORM_BACKEND=torch silences this",
    ):
        assert part in str(seen[0].message)
    assert torch.equal(output, torch.nn.functional.layer_norm(x, (3,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LF.layer_norm(x, (3,))
    with backends.use("native"), pytest.raises(RuntimeError, match="this installation was made without them"):
        LF.layer_norm(x, (3,))
    monkeypatch.setattr(backends, "_said", set())
    with backends.use("torch"), warnings.catch_warnings():
        warnings.simplefilter("error")
        LF.layer_norm(x, (3,))


def test_a_traced_program_without_compiled_kernels_says_nothing(monkeypatch):
    monkeypatch.setattr(ops, "NATIVE_PROBLEM", "this installation was made without them")
    monkeypatch.setattr(ops, "native", None)
    monkeypatch.setattr(backends, "_said", set())
    torch.compiler.reset()
    x = torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = torch.compile(lambda x: LF.layer_norm(x, (3,)), backend="eager", fullgraph=True)(x)
    assert torch.equal(output, torch.nn.functional.layer_norm(x, (3,)))


@pytest.fixture
def pretend_gpu(monkeypatch):
    """There is a GPU of compute capability 9.0, as far as the choice of kernels and ``info`` can see."""
    monkeypatch.setattr(backends, "_said", set())
    for name, answer in (
        ("is_available", True),
        ("current_device", 0),
        ("get_device_name", "a GPU"),
        ("get_device_capability", (9, 0)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(tiers, "shared_memory", lambda device: 227 << 10)
    for function in (tiers._architecture, tiers._tier, tiers.least_row):
        monkeypatch.setattr(tiers, function.__name__, function.__wrapped__)


class OnGpu:
    """Stands in for a tensor on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype):
        self.dtype = dtype


UNMEASURED = (
    "the Triton kernels compute the recurrent layers, and no measurement has covered them on compute c"
)
REFERENCE = "the reference computes the recurrent layers on compute capability 9.0, step by step"


@pytest.mark.parametrize(
    ("triton", "dtype", "kernel", "message", "because"),
    [
        (True, torch.bfloat16, "triton", UNMEASURED, "capability 9.0 yet"),
        (False, torch.float32, "reference", REFERENCE, "because Triton is not installed"),
        (True, torch.float64, "reference", REFERENCE, "because the Triton kernels are for float32"),
    ],
    ids=["unmeasured", "no Triton", "no kernel"],
)
def test_what_computes_on_a_gpu_unmeasured_is_said_once(
    monkeypatch, pretend_gpu, triton, dtype, kernel, message, because
):
    monkeypatch.setattr(backends, "TRITON_PROBLEM", None if triton else "Triton is not installed")
    with pytest.warns(RuntimeWarning, match=message) as seen:
        assert backends.kernel_for("lstm", OnGpu(dtype)) == kernel
    how = 'LAYERNORM_BACKEND=reference or layernorm.backends.use("reference")'
    assert all(part in str(seen[0].message) for part in (because, how))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.kernel_for("gru", OnGpu(dtype)) == kernel
        monkeypatch.setattr(backends, "_said", set())
        backends.kernel_for("layer_norm", OnGpu(dtype))
        with backends.use("reference"):
            backends.kernel_for("gru", OnGpu(dtype))
        monkeypatch.setattr(settings, "VERIFIED", {(9, 0)})
        if kernel == "triton":
            assert backends.kernel_for("lstm", OnGpu(dtype)) == kernel


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("3.1.0", "Triton 3.1 is too old; PyTorch 2.6 comes with the oldest, 3.2"),
        ("2.3.1", "Triton 2.3 is too old; PyTorch 2.6 comes with the oldest, 3.2"),
        ("3.2.0", None),
        ("3.10.0+git1234", None),
    ],
)
def test_a_triton_that_is_too_old_is_not_used(monkeypatch, version, problem):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(backends, "triton_version", backends.triton_version.__wrapped__)
    assert backends._triton_problem() == problem


@pytest.mark.parametrize("triton", [True, False])
def test_info_says_it_too(monkeypatch, pretend_gpu, triton):
    monkeypatch.setattr(backends, "TRITON_PROBLEM", None if triton else "Triton is not installed")
    last = info.text().splitlines()[-1]
    assert (UNMEASURED if triton else REFERENCE) in last
    monkeypatch.setattr(settings, "VERIFIED", {(9, 0)})
    if triton:
        assert UNMEASURED not in info.text()
    with backends.use("reference"):
        assert REFERENCE not in info.text()


def test_all_kernels_agree():
    x, module = torch.randn(4, 100), layernorm.LayerNorm(100)
    outputs = [module(x)]
    for kernel in ("torch", "reference"):
        with backends.use(kernel):
            outputs.append(module(x))
    for other in outputs[1:]:
        torch.testing.assert_close(outputs[0], other, rtol=0, atol=32 * torch.finfo(torch.float32).eps)


@pytest.mark.usefixtures("native")
def test_the_environment_chooses_the_instruction_set():
    code = "import layernorm; print(layernorm.backends.capability())"
    for name in ops.native.capabilities():
        assert in_a_process(code, LAYERNORM_CPU_CAPABILITY=name).stdout == f"{name}\n"
    code = "import layernorm, torch; layernorm.LayerNorm(2)(torch.ones(2)); " + code
    result = in_a_process(code, LAYERNORM_CPU_CAPABILITY="mmx")
    assert (
        f"must be one of {', '.join(ops.native.capabilities())} on this machine; got 'mmx'" in result.stderr
    )
    assert result.stdout == "None\n"


@pytest.mark.usefixtures("native")
def test_kernels_of_another_version_are_not_loaded(monkeypatch):
    monkeypatch.setattr(layernorm, "__version__", "9.9.9")
    problem = loading._load()
    assert problem.startswith(
        f"they are of layernorm {layernorm.ops.native.version()} and this is 9.9.9; install"
    )


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_tensors_that_only_torch_knows_are_torchs(name):
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(3, 4)
    output = getattr(LF, name)(x.as_subclass(Tagged), (4,))
    assert type(output) is Tagged
    assert torch.equal(output.as_subclass(torch.Tensor), getattr(torch.nn.functional, name)(x, (4,)))
    total = getattr(LF, f"add_{name}")(x.as_subclass(Tagged), x, (4,))[1]
    assert type(total) is Tagged


def test_import_does_no_work():
    code = """
import sys, time, torch
before = set(sys.modules)
began = time.perf_counter()
import layernorm
spent = time.perf_counter() - began
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "rich", "matplotlib", "pandas", "sklearn", "pooch", "jinja2"}))
print(torch.cuda.is_initialized(), spent)
"""
    result = in_a_process(code)
    assert result.returncode == 0, result.stderr
    heavy, rest = result.stdout.splitlines()
    assert heavy == "[]"
    initialized, spent = rest.split()
    assert initialized == "False"
    # 40 ms here; ten times the promised bound, so that a busy machine does not fail it.
    assert float(spent) < 1.0
