"""Calls of every operator by its name: none crashes, and results are laid out as the fake kernels say."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from layernorm import Variant
from layernorm.spec import layer_spec
from tests.recurrent.cases import GATES_CELLS, backward_arguments, detached, operator_arguments, weights_of

pytestmark = pytest.mark.usefixtures("native", "one_thread")

RECURRENT = {
    "lstm": Variant(),
    "gru": Variant(),
    "rnn": Variant(),
    "gru-summed": Variant(kind="rms", inputs="summed", scope="gate"),
    "lstm-none": Variant(kind="none"),
}
# Each gives a tensor of the same shape in another layout.
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "offset": lambda t: torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
}


def norm_calls(rows=(4, 2), width=3, dtype=torch.float32, backward=True):
    """Yield the norm operators with their arguments by position."""
    x, other = torch.randn(*rows, width).to(dtype), torch.randn(*rows, width).to(dtype)
    gain, bias, shape = torch.ones(width).to(dtype), torch.zeros(width).to(dtype), [width]
    yield "layer_norm", (x, shape, gain, bias, 1e-5)
    yield "rms_norm", (x, shape, gain, 1e-5)
    yield "add_layer_norm", (x, other, shape, gain, bias, 1e-5)
    yield "add_rms_norm", (x, other, shape, gain, 1e-5)
    for residual in (None, other):
        forward = (x, residual, shape, gain, bias, 1e-5, True)
        yield "norm_forward", forward
        stats = torch.ops.layernorm.norm_forward(*forward)[2]
        for wanted in ([True] * 3, [False, True, False]):
            yield "norm_backward", (other, residual, x, stats, shape, gain, bias, True, wanted)


def recurrent_calls(name, **options):
    """Yield a recurrent operator and its derivative with their arguments by position."""
    given = detached(operator_arguments(name.partition("-")[0], RECURRENT[name], **options))
    yield "recurrent", tuple(given.values())
    yield "recurrent_forward", tuple(given.values())
    kept = torch.ops.layernorm.recurrent_forward(**given)
    yield "recurrent_backward", tuple(backward_arguments(given, kept).values())


def gates_calls(dtype=torch.float32):
    """Yield the gates' operators and their derivatives with their arguments by position."""
    for cell in GATES_CELLS:
        spec = layer_spec(cell, Variant())
        sizes = (spec.gates * 5, spec.gates * 5, 5)
        input_gates, hidden_gates, state = (torch.randn(3, size).to(dtype) for size in sizes)
        parameters = spec.listed_for_gates(weights_of(cell, spec.variant, 1, 5, 0, dtype, needs_grad=False))
        forward = (input_gates, hidden_gates, state, *parameters, list(spec.codes), spec.eps)
        yield f"{cell}_gates", forward
        wanted = [True] * 3 + [p is not None for p in parameters]
        grads = [state.clone() for _ in range(2 if cell == "lstm" else 1)]
        yield f"{cell}_gates_backward", (grads, *forward, wanted)


def every_call():
    """Yield a call of every operator but the composites, which are plain PyTorch."""
    yield from norm_calls()
    for name in RECURRENT:
        yield from recurrent_calls(name)
    yield from gates_calls()


# ---- wrong arguments ----


def replaced(arguments, place, value):
    """Return the arguments with a value in place of one of them, or of one in a list."""
    at, inside = place
    new = list(arguments)
    new[at] = value if inside is None else [*new[at][:inside], value, *new[at][inside + 1 :]]
    return tuple(new)


def places(arguments):
    """Yield the places of tensors."""
    for at, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            yield at, None
        elif isinstance(argument, list):
            yield from ((at, i) for i, one in enumerate(argument) if isinstance(one, Tensor))


def wrong_values(tensor):
    """Yield wrong values for a tensor's place."""
    yield None
    yield tensor[:0]
    yield tensor.new_zeros(())
    yield tensor.new_zeros(7, 1)
    yield tensor.to("meta")
    yield tensor.to(torch.int64)
    yield tensor.to(torch.complex64)
    yield tensor.double()
    yield tensor.to_sparse()


def try_all():
    """Call every operator with every tensor replaced by wrong ones; anything but an exception ends it."""
    torch.set_num_threads(1)
    tried = 0
    for name, arguments in every_call():
        operator = getattr(torch.ops.layernorm, name)
        for place in places(arguments):
            at, inside = place
            given = arguments[at] if inside is None else arguments[at][inside]
            for value in wrong_values(given):
                tried += 1
                try:
                    operator(*replaced(arguments, place, value))
                except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError):
                    continue
                except AttributeError:  # a fake kernel's, for a tensor on the meta device
                    continue
    assert tried > 1000


def test_no_argument_crashes_an_operator():
    process = multiprocessing.get_context("spawn").Process(target=try_all)
    process.start()
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}; a signal where it is negative"


def test_a_tensor_that_is_needed_is_named():
    for name, arguments in every_call():
        schema = getattr(torch.ops.layernorm, name).default._schema
        for at, argument in enumerate(schema.arguments):
            if str(argument.type) != "Tensor" or arguments[at] is None:
                continue
            with pytest.raises(TypeError, match=rf"layernorm: {argument.name} must be a Tensor, got None"):
                getattr(torch.ops.layernorm, name)(*replaced(arguments, (at, None), None))


# ---- what fake kernels promise ----


def described(results):
    return [(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in tree_leaves(results)]


def assert_fake_is_real(name, arguments):
    operator = getattr(torch.ops.layernorm, name)
    real = described(operator(*arguments))
    with FakeTensorMode() as mode:
        given = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t, arguments)
        fake = described(operator(*given))
    assert fake == real, name


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_are_laid_out_as_the_fake_kernels_say(layout, dtype):
    calls = [*norm_calls(dtype=dtype), *norm_calls(rows=(2, 0, 3), dtype=dtype), *gates_calls(dtype)]
    for name in RECURRENT:
        for options in ({}, {"packed": True}, {"recompute": True}, {"features": 0}, {"features": 1}):
            calls += recurrent_calls(name, dtype=dtype, **options)
    calls += recurrent_calls("lstm", proj=2, dtype=dtype)

    def lay_out(t):
        return LAYOUTS[layout](t) if isinstance(t, Tensor) and t.dim() > 1 and t.numel() else t

    for name, arguments in calls:
        assert_fake_is_real(name, tree_map(lay_out, arguments))


def test_mixed_types_are_laid_out_as_the_fake_kernels_say():
    x, gain = torch.randn(4, 3, dtype=torch.bfloat16), torch.ones(3)
    for weight, bias in ((gain, None), (gain, gain.bfloat16()), (gain.bfloat16(), gain), (None, gain)):
        assert_fake_is_real("norm_forward", (x, None, [3], weight, bias, 1e-5, True))
        stats = torch.ops.layernorm.norm_forward(x, None, [3], weight, bias, 1e-5, True)[2]
        wanted = [True, weight is not None, bias is not None]
        assert_fake_is_real("norm_backward", (x, x, x, stats, [3], weight, bias, True, wanted))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_triton_lays_out_as_the_fake_kernels_say(layout):
    calls = list(norm_calls())
    if layout == "transposed":
        calls += [*recurrent_calls("lstm"), *recurrent_calls("gru-summed", recompute=True)]
    for name, arguments in calls:
        assert_fake_is_real(
            name,
            tree_map(lambda a: LAYOUTS[layout](a) if isinstance(a, Tensor) and a.dim() > 1 else a, arguments),
        )
