"""The recurrent operators: schemas, fake kernels, CPU kernels, derivatives, and the call of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.compiler import is_compiling

from layernorm import recurrent_checks, reference
from layernorm.ops import flops
from layernorm.ops.composite import gradients_of, leaves_of, register_composite
from layernorm.ops.loading import native
from layernorm.ops.registration import (
    empty_for_none,
    register_derivative,
    register_on_cpu,
    register_on_gpus,
    register_vmap,
    require_tensors,
    run_beneath,
    wants_composite,
)
from layernorm.pytorch_internals import (
    below_autograd,
    count_dispatch_modes,
    is_in_forward_mode,
    recorder_of,
    saved_tensors_hooks,
)
from layernorm.spec import PARAMETERS, LayerSpec

# weights has PARAMETERS; spec and eps are a LayerSpec's. c, reset_c, and cn among the results, are an LSTM's;
# cn has no element elsewhere. batch_sizes are a packed sequence's.
_LAYER: Final = (
    "Tensor input, Tensor h, Tensor? c, Tensor?[] weights, Tensor? resets, Tensor? reset_h, Tensor? reset_c,"
    " int[]? batch_sizes, int[] spec, float eps, bool reverse"
)
_GRADS: Final = "Tensor? grad_output, Tensor? grad_h, Tensor? grad_c"
_SAVED: Final = "Tensor saved_x, Tensor saved_h, Tensor saved_c, Tensor saved_stats"
_OUTPUTS: Final = "Tensor output, Tensor hn, Tensor cn"
# wanted: of input, h, c, reset_h, reset_c and the weights. A gradient that is not wanted has no element.
_WANTED: Final = f"bool[{5 + len(PARAMETERS)}] wanted"
_FOUND: Final = (
    "(Tensor grad_input, Tensor grad_h, Tensor grad_c, Tensor grad_reset_h, Tensor grad_reset_c,"
    " Tensor[] grad_weights)"
)
# On GPUs they keep tables and CUDA graphs of their own, which Inductor's must not contain.
_TAGS: Final = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
for _name, _schema in {
    "recurrent": f"({_LAYER}, bool recompute) -> ({_OUTPUTS})",
    "recurrent_forward": f"({_LAYER}, bool recompute) -> ({_OUTPUTS}, {_SAVED})",
    "recurrent_backward": f"({_LAYER}, {_GRADS}, Tensor output, {_SAVED}, {_WANTED}) -> {_FOUND}",
    "recurrent_composite_backward": f"({_LAYER}, {_GRADS}, {_WANTED}) -> {_FOUND}",
}.items():
    torch.library.define(f"layernorm::{_name}", _schema, tags=_TAGS)
_RECURRENT: Final = torch.ops.layernorm.recurrent.default
_FORWARD: Final = torch.ops.layernorm.recurrent_forward.default
_BACKWARD: Final = torch.ops.layernorm.recurrent_backward.default


def recurrent_layer(
    spec: LayerSpec,
    input: Tensor,
    state: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
    reset_state: Sequence[Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute ``layernorm.reference.recurrent_layer`` by the operator.

    ``recompute`` keeps less for backward and computes it again.
    """
    if not is_compiling() and count_dispatch_modes() > 0:
        flops.register()
    options = (reverse, batch_sizes, resets, recompute, reset_state)
    if not is_compiling():
        found = recurrent_layer_natively(spec, input, state, weights, *options)
        if found is not NotImplemented:
            return found  # type: ignore[no-any-return]
    return _as_layer(_RECURRENT(*_arguments(spec, input, state, weights, *options)), len(state))


def recurrent_layer_natively(
    spec: LayerSpec, input: Tensor, state: Sequence[Tensor], weights: Mapping[str, Tensor], *options: Any
) -> Any:
    """Compute it by the compiled kernels, or return NotImplemented where they do not take these tensors."""
    if native is None:
        return NotImplemented
    found = native.recurrent(*_arguments(spec, input, state, weights, *options))
    return found if found is NotImplemented else _as_layer(found, len(state))


def _arguments(
    spec: LayerSpec,
    input: Tensor,
    state: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    reverse: bool,
    batch_sizes: Sequence[int] | None,
    resets: Tensor | None,
    recompute: bool,
    reset_state: Sequence[Tensor] | None,
) -> tuple[Any, ...]:
    """Return the arguments of the operator."""
    h, c = state[0], state[1] if len(state) > 1 else None
    sizes = None if batch_sizes is None else list(batch_sizes)
    starts = (None, None) if reset_state is None else (*reset_state, None)[:2]
    tensors = (input, h, c, spec.listed(weights), resets, *starts)
    return (*tensors, sizes, spec.codes, spec.eps, reverse, recompute)


def _as_layer(found: tuple[Tensor, ...], states: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output, and the final state of a cell that has so many tensors."""
    output, hn, cn = found
    return output, (hn, cn) if states > 1 else (hn,)


def _outputs(input: Tensor, h: Tensor, c: Tensor | None, spec: LayerSpec) -> tuple[Tensor, ...]:
    require_tensors(input=input, h=h)
    if h.dim() != 2 or input.dim() not in (2, 3):
        raise RuntimeError(
            "layernorm: h must have 2 dimensions, and input 3, or 2 if it is packed; got "
            f"{h.dim()} and {input.dim()}"
        )
    output = input.new_empty((*input.shape[:-1], h.size(-1)))
    cn = input.new_empty(c.shape) if c is not None and spec.cell == "lstm" else input.new_empty(0)
    return output, input.new_empty(h.shape), cn


@torch.library.register_fake("layernorm::recurrent")
def _recurrent_fake(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    batch_sizes: Sequence[int] | None,
    codes: Sequence[int],
    eps: float,
    *_: object,
) -> tuple[Tensor, ...]:
    return _outputs(input, h, c, LayerSpec.decode(codes, eps))


@torch.library.register_fake("layernorm::recurrent_forward")
def _recurrent_forward_fake(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    batch_sizes: Sequence[int] | None,
    codes: Sequence[int],
    eps: float,
    reverse: bool,
    recompute: bool,
) -> tuple[Tensor, ...]:
    spec = LayerSpec.decode(codes, eps)
    weight = weights[1] if len(weights) == len(PARAMETERS) else None
    if weight is None or weight.dim() != 2:
        raise RuntimeError(
            f"layernorm: weights must be a list of {len(PARAMETERS)}, with the matrix weight_hh"
        )
    hidden = weight.size(0) // spec.gates
    rows = math.prod(input.shape[:-1])
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    h_width = spec.saved_h_gates * hidden
    saved = (
        input.new_empty(0 if recompute else (rows, spec.gates * hidden)),
        input.new_empty(0 if recompute or not h_width else (rows, h_width)),
        input.new_empty((rows, hidden) if spec.cell == "lstm" else 0),
        input.new_empty(0 if recompute else (rows, spec.statistics), dtype=dtype),
    )
    return *_outputs(input, h, c, spec), *saved


@torch.library.register_fake("layernorm::recurrent_backward")
def _recurrent_backward_fake(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | list[Tensor], ...]:
    wanted: Sequence[bool] = rest[-1]
    require_tensors(input=input, h=h)

    def like(tensor: Tensor | None, is_wanted: bool) -> Tensor:
        return tensor.new_empty(tensor.shape) if tensor is not None and is_wanted else input.new_empty(0)

    states = [like(t, want) for t, want in zip((input, h, c, reset_h, reset_c), wanted[:5], strict=True)]
    return *states, [like(t, want) for t, want in zip(weights, wanted[5:], strict=True)]


def _composite_backward(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    batch_sizes: Sequence[int] | None,
    codes: Sequence[int],
    eps: float,
    reverse: bool,
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | list[Tensor], ...]:
    """Return the gradients by differentiating the reference, themselves differentiable."""
    spec = LayerSpec.decode(codes, eps)
    leaves = leaves_of([input, h, c, reset_h, reset_c, *weights])
    of_state = 2 if spec.cell == "lstm" else 1
    x, state, starts = leaves[0], leaves[1 : 1 + of_state], leaves[3 : 3 + of_state]
    parameters = spec.named(leaves[5:])
    recurrent_checks.layer_arguments(
        spec, x, tuple(state) if spec.cell == "lstm" else state[0], parameters, batch_sizes, resets
    )
    with torch.enable_grad():
        output, final = reference.recurrent_layer(
            spec, x, state, parameters, reverse, batch_sizes, resets, None if starts[0] is None else starts
        )
    pairs = [
        (out, grad)
        for out, grad in zip((output, *final), (grad_output, grad_h, grad_c), strict=False)
        if grad is not None
    ]
    outputs, grads = zip(*pairs, strict=True)
    found = gradients_of(outputs, leaves, grads, wanted)
    return *found[:5], found[5:]


class _Output:
    """The output as backward needs it: kept as autograd keeps tensors, but not lost if changed in place.

    ``nn.ReLU(inplace=True)`` may follow a layer. Backward computes again what was changed since.
    """

    def __init__(self, output: Tensor) -> None:
        held = self._witness = output.detach()  # which has the output's version, but not its node: no cycle
        self._version = None if held.is_inference() else held._version
        self._unpack = None
        if (hooks := saved_tensors_hooks()) is not None:
            pack, self._unpack = hooks
            self._packed = pack(output.detach())
            held.data = held.new_empty(0)  # the version alone is kept, not the memory

    def get(self) -> Tensor | None:
        """Return the output, or None where it has been changed in place."""
        if self._version is not None and self._witness._version != self._version:
            return None
        return self._witness if self._unpack is None else self._unpack(self._packed)


class LayerNormRecurrent(torch.autograd.Function):
    """A layer and direction whose derivative is recorded.

    ``found`` is what the operator ``recurrent_forward`` returns; ``options`` are batch_sizes, spec, eps and
    reverse.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        h: Tensor,
        c: Tensor | None,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
        resets: Tensor | None,
        options: tuple[Any, ...],
        found: Sequence[Tensor],
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keep what backward needs; return output, h and c."""
        output, hn, cn, *saved = found
        ctx.save_for_backward(input, h, c, reset_h, reset_c, resets, *saved, *weights)
        ctx.options, ctx.output = options, _Output(output)
        ctx.set_materialize_grads(False)
        if cn.dim() == 1:
            ctx.mark_non_differentiable(cn)  # it is an LSTM's alone
        return output, hn, cn

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of the tensors among the arguments."""
        needed = ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return (None,) * len(needed)
        input, h, c, reset_h, reset_c, resets, *kept = ctx.saved_tensors
        wanted = (*needed[:5], *needed[8:])
        layer = (input, h, c, kept[4:], resets, reset_h, reset_c, *ctx.options)
        grad_output, grad_h, grad_c = grads
        given: list[Any] = [*layer, grad_output, grad_h, None if c is None else grad_c]
        if wants_composite(*grads):
            found = _composite_backward(*[*given, wanted])
        else:
            output = ctx.output.get()
            if output is None:
                output = run_beneath(_FORWARD, "recurrent_forward", *layer, True)[0]
            found = run_beneath(_BACKWARD, "recurrent_backward", *given, output, *kept[:4], wanted)
        *of_tensors, of_weights = found
        grads = tuple(
            grad if want else None for grad, want in zip((*of_tensors, *of_weights), wanted, strict=True)
        )
        return (*grads[:5], None, None, None, *grads[5:])


def _record(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    *options: Any,
) -> Any:
    """Call the operator ``recurrent`` and record its derivative."""
    if len(weights) != len(PARAMETERS):
        raise RuntimeError(f"layernorm: weights must be a list of {len(PARAMETERS)}, got {len(weights)}")
    with below_autograd():
        found = _FORWARD(input, h, c, weights, resets, reset_h, reset_c, *options)
    return LayerNormRecurrent.apply(  # type: ignore[no-untyped-call]
        input, h, c, reset_h, reset_c, resets, options[:-1], found, *weights
    )


def _definition(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    batch_sizes: Sequence[int] | None,
    codes: Sequence[int],
    eps: float,
    reverse: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if is_in_forward_mode():
        raise NotImplementedError(
            "layernorm: the compiled recurrent kernels have no forward-mode derivative; use "
            'layernorm.backends.use("reference")'
        )
    spec = LayerSpec.decode(codes, eps)
    state = [h] if spec.cell != "lstm" or c is None else [h, c]
    starts = None if reset_h is None else [reset_h] if reset_c is None else [reset_h, reset_c]
    output, final = reference.recurrent_layer(
        spec, input, state, spec.named(weights), reverse, batch_sizes, resets, starts
    )
    return output, final[0], final[1] if len(final) > 1 else input.new_empty(0)


def _tensors_of(
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    resets: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    return (input, h, c, reset_h, reset_c, *weights)


def _on_cpu(entry: Any, *arguments: Any) -> Any:
    input, h, *_ = arguments
    require_tensors(input=input, h=h)
    return entry(*arguments)


def _backward_on_cpu(entry: Any, *arguments: Any) -> Any:
    input, h, *_, output, saved_x, saved_h, saved_c, saved_stats, _ = arguments
    saved = {"saved_x": saved_x, "saved_h": saved_h, "saved_c": saved_c, "saved_stats": saved_stats}
    require_tensors(input=input, h=h, output=output, **saved)
    *found, of_weights = entry(*arguments)
    return (*empty_for_none(input, found), empty_for_none(input, of_weights))


register_on_cpu("recurrent", "recurrent_forward", lambda entry, *layer: _on_cpu(entry, *layer[:-1], None))
register_on_cpu("recurrent_forward", "recurrent_forward", _on_cpu)
register_on_cpu("recurrent_backward", "recurrent_backward", _backward_on_cpu)
register_derivative("recurrent", _record, _definition, _tensors_of)
#: By name of an operator, the function that records its derivative.
RECORDERS: Final = {"recurrent": recorder_of(LayerNormRecurrent)}
register_composite("recurrent_composite_backward", _composite_backward)
for _name in ("recurrent", "recurrent_forward", "recurrent_backward"):
    register_on_gpus("recurrent", _name, traced=False)
    register_vmap(_name)
register_vmap("recurrent_composite_backward")
