"""The recurrent operators on GPUs, for any size and variant: what runs, in which order.

The functions have the signatures of the operators ``layernorm::recurrent…`` that they compute. W_ih x of all
steps is one product, normalized where it is by itself. Then come the steps, in order: the product W_hh h,
and a kernel for all the rest (``row_kernels``); or, of a small layer, one kernel for all of them
(``looped_kernels``). Backward goes through chunks of steps from the end of the loop; after a chunk's steps
come the products and sums over all of its rows.

Every product of a row and every norm is summed in an order that the sizes of the layer decide, so a row
has the same bits in any batch and however its sequence is cut. Gradients of parameters are sums over rows in
an order that the shapes decide.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from layernorm.gpu import settings, tiers
from layernorm.gpu.launching import compiled_by, launch, precision, triton_type
from layernorm.gpu.persistent import launches as persistent
from layernorm.gpu.recurrent import (
    backward_kernels,
    forward_kernels,
    looped_kernels,
    product_kernels,
    replay,
)
from layernorm.gpu.recurrent import table_kernels as tables
from layernorm.gpu.recurrent.gradients import Chunk, Gradients, normalize_rows
from layernorm.gpu.recurrent.layer import Layer, Saved
from layernorm.gpu.recurrent.products import product

#: About the memory for the gradients of a chunk of steps in backward: as much as keeps what is launched for a
#: chunk small compared with its steps.
CHUNK_BYTES: Final = 2**28
#: Of a chunk: what a grid's second dimension can be.
MOST_STEPS: Final = 2**16 - 1


def recurrent(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the operator ``layernorm::recurrent`` without a derivative."""
    layer = Layer.of(*arguments[:-1])
    output, hn, cn, _ = _forward(layer, keep=False)
    return output, hn, _or_empty(cn, layer)


def recurrent_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the operator ``layernorm::recurrent_forward``: also what backward needs."""
    layer, recompute = Layer.of(*arguments[:-1]), arguments[-1]
    output, hn, cn, saved = _forward(layer, keep=not recompute)
    stats = layer.h0.new_empty(0, dtype=torch.float32) if saved.stats is None else saved.stats
    x = None if recompute else saved.x
    kept = [_or_empty(tensor, layer) for tensor in (cn, x, saved.h, saved.c)]
    return output, hn, *kept, stats


def recurrent_backward(*arguments: Any) -> tuple[Tensor | list[Tensor], ...]:
    """Compute the operator ``layernorm::recurrent_backward``.

    Raises:
        RuntimeError: a tensor has another shape, dtype or device than the layer's.
    """
    *of_layer, grad_output, grad_h, grad_c, output, x, h, c, stats, wanted = arguments
    layer = Layer.of(*of_layer)
    # Hooks on saved tensors may give them back in another layout.
    output, saved = output.contiguous(), Saved(*(t.contiguous() for t in (x, h, c, stats)))
    layer.check_saved(output, saved)
    gradients = Gradients(layer, grad_output, grad_h, grad_c, wanted)
    if layer.rows > 0:
        recompute, kernel = saved.x.numel() == 0, _kernel(layer, backward=True)
        key = (*_compiled_for(layer, saved, kernel), recompute, tuple(wanted), grad_output is None)
        with compiled_by(("backward", *key), layer.input):
            cell_stats = kernel == "persistent"
            chunk = Chunk.of(layer, _rows_of_chunk(layer), recompute=recompute, cell_stats=cell_stats)
            _backward(layer, output, saved, gradients, chunk, kernel)
    return gradients.results()


def _rows_of_chunk(layer: Layer) -> int:
    """Return the rows of as many steps as backward takes at a time."""
    row_bytes = (2 * layer.gate_width + 3 * layer.hidden_size + layer.output_size) * layer.dtype.itemsize
    most = max(1, CHUNK_BYTES // (row_bytes * layer.batch))
    return min(layer.steps, most, MOST_STEPS) * layer.batch


def _or_empty(tensor: Tensor | None, layer: Layer) -> Tensor:
    """Return the tensor, or one without elements: operators return no None."""
    return layer.input.new_empty(0) if tensor is None else tensor


def _forward(layer: Layer, *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None, Saved]:
    """Return output, final state, and what is kept for backward, or a part of it."""
    output = layer.input.new_empty((*layer.input.shape[:-1], layer.output_size))
    h, c = layer.first_state()
    saved = layer.new_saved(layer.rows, with_c=True, keep=keep)
    if layer.rows == 0:
        return output, h, c, saved
    kernel = _kernel(layer, backward=False)
    with compiled_by(("forward", *_compiled_for(layer, saved, kernel)), layer.input):
        _run_forward(layer, saved, output, h, c, kernel)
    return output, h, c, saved


def _compiled_for(layer: Layer, saved: Saved, kernel: str) -> tuple[Any, ...]:
    # Where kernels of a step follow others, the first one has a second form from the second step on.
    several = layer.steps > 1 and tiers.is_dependent(layer.input.device)
    return (kernel, layer.key, replay.present(layer.tensors(saved)), precision(), several)


def _run_forward(
    layer: Layer, saved: Saved, output: Tensor, h: Tensor, c: Tensor | None, kernel: str
) -> None:
    """Write output, the final state in place of the initial one, and what is kept."""
    product(layer.input_rows, layer.weight_ih, saved.x, bias=layer.vectors["bias_ih"])
    normalize_rows(layer, saved)
    if kernel == "persistent":
        tensors = _persistent_tensors(layer, saved) | {"h0": layer.h0, "output": output, "hn": h, "cn": c}
        persistent.forward(layer.spec, tensors, steps=layer.steps, reverse=layer.reverse)
    else:
        tensors = layer.tensors(saved) | {"output": output, "h": h, "c": c}
        if kernel == "triton":
            tensors["wh"] = h.new_empty((layer.batch, layer.gate_width), dtype=torch.float32)
        if layer.is_projected:
            tensors["hidden"] = h.new_empty((layer.batch, layer.hidden_size))
        with replay.loop(layer, "forward", tensors, {"steps": layer.steps}) as loop:
            if kernel == "looped":
                _launch_looped(layer, looped_kernels.looped_forward, loop.table, loop.bits, layer.steps)
            else:
                loop.run(layer.steps, partial(_step_forward, layer))


def _kernel(layer: Layer, *, backward: bool) -> str:
    """Return which kernel takes a direction of a layer through its steps."""
    choice = tiers.tier(
        layer.spec,
        layer.hidden_size,
        layer.dtype,
        layer.input.device,
        projected=layer.is_projected,
        backward=backward,
    )
    return choice.kernel


def _persistent_tensors(layer: Layer, saved: Saved) -> dict[str, Tensor | None]:
    """Return what both directions of the persistent kernel read of a layer, by its names."""
    return {
        **layer.vectors,
        "x": saved.x,
        "c0": layer.c0,
        "weight_hh": layer.weight_hh,
        "resets": layer.resets,
        "batch_sizes": layer.batch_sizes,
        "step_offsets": layer.offsets,
        "saved_h": saved.h,
        "saved_c": saved.c,
        "stats": saved.stats,
    }


def _persistent_backward(
    layer: Layer, saved: Saved, gradients: Gradients, chunk: Chunk, place: persistent.ChunkPlace
) -> None:
    read = saved if chunk.recomputed is None else chunk.recomputed
    spec = layer.spec
    tensors = _persistent_tensors(layer, read) | {
        "saved_h": read.h if spec.products == "separate" else None,
        "saved_c": saved.c if spec.cell == "lstm" else None,
        "grad_output": gradients.output,
        "h_before": chunk.h_before,
        "cell_stats": chunk.cell_stats,
        "grad_gates": chunk.grad_gates,
        "grad_wh": chunk.grad_wh,
        "grad_own": chunk.grad_own,
        "grad_cell": chunk.grad_cell,
        "normalized_cell": chunk.cell,
        "grad_h": gradients.h,
        "grad_c": gradients.c,
    }
    persistent.backward(spec, tensors, steps=layer.steps, reverse=layer.reverse, chunk=place)


def _backward(
    layer: Layer, output: Tensor, saved: Saved, gradients: Gradients, chunk: Chunk, kernel: str
) -> None:
    """Go through chunks of steps from the end of the loop."""
    read = saved if chunk.recomputed is None else chunk.recomputed
    tensors = layer.tensors(read) | gradients.tensors() | chunk.tensors()
    tensors |= {"output": output, "saved_c": saved.c, "h0": layer.h0, "c0": layer.c0}
    most = chunk.h_before.size(0) // layer.batch
    for done in range(0, layer.steps, most):
        count = min(most, layer.steps - done)
        begin, rows = layer.chunk(done, count)
        first = 0 if chunk.recomputed is None else begin
        numbers = {"steps": layer.steps, "done": done, "base": begin, "kept": first}
        with replay.loop(layer, "backward", tensors, numbers) as loop:
            run = partial(_launch, layer, table=loop.table, bits=loop.bits, steps=count)
            run(backward_kernels.gather_before)
            kept = saved.rows(begin, rows)
            if chunk.recomputed is not None:
                kept = _recomputed_products(layer, chunk, begin, rows)
                run(forward_kernels.recompute_gates)
            if kernel == "persistent":
                if chunk.cell_stats is not None:
                    run(backward_kernels.cell_statistics)
                place = persistent.ChunkPlace(done, count, begin, first)
                _persistent_backward(layer, saved, gradients, chunk, place)
            elif kernel == "looped":
                _launch_looped(layer, looped_kernels.looped_backward, loop.table, loop.bits, count)
            else:
                loop.run(count, partial(_step_backward, layer))
        gradients.close(chunk, kept, begin, rows)


def _recomputed_products(layer: Layer, chunk: Chunk, begin: int, rows: int) -> Saved:
    """Compute again W_ih x, normalized where it is by itself, and W_hh h of a chunk's rows."""
    assert chunk.recomputed is not None  # noqa: S101 - it is asked for
    kept = chunk.recomputed.rows(0, rows)
    input = layer.input_rows[begin : begin + rows]
    product(input, layer.weight_ih, kept.x, bias=layer.vectors["bias_ih"])
    normalize_rows(layer, kept)
    before = chunk.rows("h_before", rows)
    product(before, layer.weight_hh, chunk.rows("wh", rows), bias=layer.vectors["bias_hh"], of_steps=True)
    return kept


def _step_forward(layer: Layer, table: Tensor, step: int, bits: int) -> None:
    product = partial(_step_product, layer, table, step, bits, from_last=layer.reverse)
    run = partial(_launch, layer, table=table, bits=bits, step=step)
    product("h", "weight_hh", "wh", follows=step > 0)
    run(forward_kernels.cell_forward)
    if layer.is_projected:
        product("hidden", "weight_hr", "h")
        run(forward_kernels.projected_forward)


def _step_backward(layer: Layer, table: Tensor, step: int, bits: int) -> None:
    product = partial(_step_product, layer, table, step, bits, from_last=not layer.reverse, transposed=False)
    run = partial(_launch, layer, table=table, bits=bits, step=step)
    if layer.is_projected:
        run(backward_kernels.projected_backward, follows=step > 0)
        product("grad_state", "weight_hr", "grad_hidden")
    run(backward_kernels.cell_backward, follows=step > 0 or layer.is_projected)
    product("grad_wh", "weight_hh", "grad_h")


def _dependence(layer: Layer, *, follows: bool) -> dict[str, Any]:
    """Return whether a kernel of a step waits for the one before by itself, and begins before that ends.

    It may begin so where it ``follows`` another of them. The first one waits for all that is written before a
    loop, as any kernel does, and so does what comes after the loop.
    """
    if not tiers.is_dependent(layer.input.device):
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": follows}


@functools.cache
def _parameters(kernel: Any) -> frozenset[str]:
    return frozenset(kernel.arg_names)


def _launch(
    layer: Layer,
    kernel: Any,
    table: Tensor,
    bits: int,
    step: int = 0,
    *,
    steps: int = 1,
    follows: bool = True,
) -> None:
    """Launch a kernel of ``row_kernels`` for all rows of one step, or of several."""
    names = _parameters(kernel)
    options = {name: value for name, value in layer.options.items() if name in names}
    if "DEPENDENT" in names:
        options |= _dependence(layer, follows=follows)
    block = settings.block_for(layer.hidden_size if "H" in names else layer.output_size)
    launch(
        kernel,
        (layer.batch, steps),
        table,
        table,
        step,
        layer.batch,
        **options,
        PRESENT=bits,
        BLOCK=block,
        num_warps=settings.row_warps(block),
    )


def _launch_looped(layer: Layer, kernel: Any, table: Tensor, bits: int, steps: int) -> None:
    """Launch a kernel of ``looped_kernels`` for all rows of these steps."""
    block = settings.loop_block(layer.hidden_size)
    options = layer.options | {"PRECISION": precision()}
    names = _parameters(kernel)
    launch(
        kernel,
        (-(-layer.batch // settings.LOOP_ROWS),),
        table,
        table,
        steps,
        layer.batch,
        **{name: value for name, value in options.items() if name in names},
        PRESENT=bits,
        ROWS=settings.LOOP_ROWS,
        BLOCK=block,
        num_warps=settings.LOOP_WARPS,
        num_stages=1,  # what a step reads is loaded ahead as it is
    )


def _step_product(
    layer: Layer,
    table: Tensor,
    step: int,
    bits: int,
    a: str,
    weight: str,
    out: str,
    *,
    from_last: bool,
    transposed: bool = True,
    follows: bool = True,
) -> None:
    """Launch the product of a state, or of rows of a chunk, with a matrix or its transpose, to a state."""
    matrix = getattr(layer, weight)
    columns, depth = matrix.shape if transposed else matrix.shape[::-1]
    tile = settings.product_tile(columns, layer.dtype)
    slot = tables.SLOTS.index
    has_bias = out == "wh" and bits >> slot("bias_hh") & 1
    launch(
        product_kernels.step_product,
        (-(-layer.batch // tile.rows), -(-columns // tile.columns)),
        table,
        table,
        step,
        layer.batch,
        A=slot(a),
        B=slot(weight),
        BIAS=slot("bias_hh") if has_bias else -1,
        OUT=slot(out),
        OUT_TYPE=triton_type(layer.dtype if out == "h" else torch.float32),
        SEQUENCE=a in ("grad_state", "grad_wh"),
        ADD=out == "grad_h" and layer.spec.cell == "gru",
        COLUMNS=columns,
        DEPTH=depth,
        B_COLUMN=depth if transposed else 1,
        B_DEPTH=1 if transposed else columns,
        TYPE=triton_type(layer.dtype),
        FROM_LAST=from_last,
        PACKED=layer.is_packed,
        PRECISION=precision(),
        **_dependence(layer, follows=follows),
        **tile.options(),
    )
