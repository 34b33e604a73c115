"""Bit-identical results that recurrent layers promise: in streams, packed sequences, batches and threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_packed_sequence

from tests.recurrent.cases import CELLS, as_hx, flat
from tests.settings import thread_count

from .draws import HALVES, Draw, check, run_case, same_bits
from .judging import second_order
from .layers import Case, Result, arguments, case_of, enlarged, result

STATES = ("h", "c")


def run(seed: int) -> float:
    """Draw a case and check some of its promises."""
    draw, case = case_of(seed, "promises")
    if draw.chance(0.05):
        widened(draw, case)
    return run_case((draw, case), judged)


def judged(draw: Draw, case: Case) -> float:
    """Check three promises, each with its own module."""
    chosen = draw.sample(PROMISES, 3)
    draw.note(promises=[promise.__name__ for promise in chosen])
    for promise in chosen:
        promise(draw, case, enlarged(case, case.module).to(case.dtype))
    return 0.0


def widened(draw: Draw, case: Case) -> None:
    """Give the case enough columns for threads to share them."""
    module, options = case.module, {"variant": case.variant, "dtype": torch.float64}
    if case.relu:
        options["nonlinearity"] = "relu"
    case.module = type(module)(module.input_size, draw.randint(180, 400), **options)
    case.tensors = {"input": case.tensors["input"][:, :5]}
    case.resets = None if case.resets is None else case.resets[:, :5]
    case.lengths = None
    draw.note(widened=case.module.hidden_size)


def padded(case: Case, **changes: Any) -> Case:
    """Return the case changed and without a packed sequence."""
    return Case(**vars(case) | {"lengths": None} | changes)


def outputs_of(case: Case, module: torch.nn.Module) -> list[Tensor]:
    """Return outputs and states."""
    return result(case, module, case.tensors, None, "native").outputs


def with_gradients(draw: Draw, case: Case, module: torch.nn.Module) -> Result:
    """Return outputs, states and every gradient."""
    seeds = [draw.normal(*t.shape) for t in outputs_of(case, module)]
    return result(case, module, case.tensors, seeds, "native")


def all_alike(a: Result, b: Result, what: str) -> None:
    """Fail unless two results are bit-identical."""
    check(same_bits(a.outputs, b.outputs), f"{what}: outputs of other bits")
    for name in a.grads:
        check(same_bits([a.grads[name]], [b.grads[name]]), f"{what}: gradient of {name} of other bits")


# ---- the promises ----


def check_rows(case: Case, a: Result, b: Result, rows_of_a: Tensor, rows_of_b: Tensor, what: str) -> None:
    """Fail unless some rows of two results, including gradients of input and state, are bit-identical."""
    axis = 0 if case.module.batch_first else 1
    axes = [axis, *[1] * (len(a.outputs) - 1), *[1] * len(case.tensors)]
    names = [f"output {i}" for i in range(len(a.outputs))] + [f"d {name}" for name in case.tensors]
    pairs = list(zip(a.outputs, b.outputs, strict=True))
    pairs += [(a.grads[name], b.grads[name]) for name in case.tensors if name in a.grads]
    for name, at, (x, y) in zip(names, axes, pairs, strict=False):
        check(
            same_bits([x.index_select(at, rows_of_a)], [y.index_select(at, rows_of_b)]),
            f"{what}: {name} of other bits",
        )


def rows_alone(draw: Draw, case: Case, module: torch.nn.Module) -> None:
    whole = padded(case, wanted="all")
    rows = whole.tensors["input"].size(1)
    chosen = torch.tensor(sorted(draw.sample(range(rows), draw.randint(1, rows))))
    tensors = {name: t[:, chosen] for name, t in whole.tensors.items()}
    some = padded(whole, tensors=tensors, resets=None if whole.resets is None else whole.resets[:, chosen])
    seeds = [draw.normal(*t.shape) for t in outputs_of(whole, module)]
    found = result(whole, module, whole.tensors, seeds, "native")
    axis = 0 if module.batch_first else 1
    few = [s.index_select(axis if i == 0 else 1, chosen) for i, s in enumerate(seeds)]
    alone = result(some, module, tensors, few, "native")
    check_rows(whole, found, alone, chosen, torch.arange(len(chosen)), f"rows {chosen.tolist()} alone")


def poisoned_row(draw: Draw, case: Case, module: torch.nn.Module) -> None:
    whole = padded(case, wanted="input")
    rows = whole.tensors["input"].size(1)
    row, bad = draw.randrange(rows), draw.choice((float("nan"), float("inf"), -float("inf")))
    tensors = {name: t.clone() for name, t in whole.tensors.items()}
    tensors[draw.choice(tuple(tensors))][-1, row, 0] = bad
    others = torch.tensor([i for i in range(rows) if i != row], dtype=torch.long)
    seeds = [draw.normal(*t.shape) for t in outputs_of(whole, module)]
    clean, found = (result(whole, module, t, seeds, "native") for t in (whole.tensors, tensors))
    check_rows(whole, clean, found, others, others, f"{bad} in row {row} reaches another")


def threads(draw: Draw, case: Case, module: torch.nn.Module) -> None:
    seeds = [draw.normal(*t.shape) for t in outputs_of(case, module)]
    results = []
    for count in (1, 2, 3):
        with thread_count(count):
            results.append(result(case, module, case.tensors, seeds, "native"))
    for other in results[1:]:
        all_alike(results[0], other, "more threads")


def recomputed(draw: Draw, case: Case, module: torch.nn.Module) -> None:
    seeds = [draw.normal(*t.shape) for t in outputs_of(case, module)]
    one = result(case, module, case.tensors, seeds, "native")
    module.recompute = not module.recompute
    other = result(case, module, case.tensors, seeds, "native")
    if case.dtype in HALVES:  # what is kept is rounded, what is computed again is not
        one.grads.clear()
    all_alike(one, other, "recompute")


def packed(draw: Draw, case: Case, module: torch.nn.Module) -> None:
    x = case.tensors["input"]
    steps, rows = x.shape[:2]
    lengths = torch.tensor([steps, *(draw.randint(1, steps) for _ in range(rows - 1))])
    data, state, resets = arguments(padded(case, lengths=lengths), case.tensors)
    output, final = module(data, state, resets=resets)
    output = pad_packed_sequence(output)[0].detach()
    states = [s.detach() for s in flat(final)]
    for row, length in enumerate(lengths.tolist()):
        place = slice(row, row + 1)
        alone_tensors = {name: t[:, place] for name, t in case.tensors.items()}
        alone_tensors["input"] = x[:length, place]
        alone_resets = None if case.resets is None else case.resets[:length, place]
        alone, *last = outputs_of(padded(case, tensors=alone_tensors, resets=alone_resets), module)
        check(same_bits([s[:, place] for s in states], last), f"packed row {row} alone: other states")
        expected = alone.transpose(0, 1) if module.batch_first else alone
        check(same_bits([output[:length, place]], [expected]), f"packed row {row} alone: other outputs")


def streamed(draw: Draw, case: Case, module: torch.nn.Module) -> None:
    if module.bidirectional:
        return
    whole = padded(case)
    x = whole.tensors["input"]
    output, *states = outputs_of(whole, module)
    state = as_hx([whole.tensors[name] for name in STATES if name in whole.tensors])
    stream = module.stream(x.size(1), state)
    for t in range(x.size(0)):
        if whole.resets is not None:
            stream.reset(whole.resets[t])
        x_t, expected = draw.laid(x[t]), output.select(1 if module.batch_first else 0, t)
        flattened = x.size(1) == 1 and draw.chance(0.5)
        if flattened:
            x_t, expected = x_t[0], expected[0]
        out = None
        if draw.chance(0.5):
            out = draw.laid(torch.full_like(expected, float("nan")))
        found = stream.step(x_t, out)
        check(out is None or found is out, "step() returns another tensor than out")
        check(same_bits([found], [expected.contiguous()]), f"stream at step {t}: other bits")
    check(same_bits(flat(stream.state), states), "the stream's last state has other bits")


def strided_out(draw: Draw, case: Case, module: torch.nn.Module) -> None:
    """Check that an ``out`` receives the result, in its own memory or the input's, or is refused."""
    if module.bidirectional:
        return
    x = case.tensors["input"][0].contiguous()
    rows, size = x.size(0), module.proj_size or module.hidden_size
    expected = module.stream(rows).step(x)
    strides = [draw.choice((0, 1, 2, 3, rows, size, size + 1, size - 1, 2 * size)) for _ in range(2)]
    reach = (rows - 1) * strides[0] + (size - 1) * strides[1] + 1
    memory = torch.zeros(x.numel() + reach, dtype=case.dtype)
    memory[: x.numel()] = x.flatten()
    x_t = memory[: x.numel()].view(x.shape)
    offset = draw.choice((x.numel(), draw.randint(0, x.numel())))
    out = memory.as_strided((rows, size), strides, offset)
    places = [i * strides[0] + k * strides[1] for i in range(rows) for k in range(size)]
    meets = len(set(places)) < len(places)
    draw.note(out=(strides, offset))
    before = memory.clone()
    try:
        module.stream(rows).step(x_t, out)
    except RuntimeError as error:
        check(meets, f"out is refused though its elements are apart: {error}")
        check(same_bits([memory], [before]), "a refused out was written to")
    else:
        check(not meets, f"out of strides {strides} and shape {[rows, size]} overwrites itself")
        check(same_bits([out], [expected]), "another result in out")


def split(draw: Draw, case: Case, module: torch.nn.Module) -> None:
    whole = padded(case)
    steps = whole.tensors["input"].size(0)
    if module.bidirectional or module.num_layers > 1 or steps < 2:
        return
    at = draw.randint(1, steps - 1)

    def part(tensors: dict[str, Tensor], begin: int, end: int) -> list[Tensor]:
        resets = None if whole.resets is None else whole.resets[begin:end]
        return outputs_of(padded(whole, tensors=tensors, resets=resets), module)

    first = part(whole.tensors | {"input": whole.tensors["input"][:at]}, 0, at)
    between = dict(zip(STATES, first[1:], strict=False))
    second = part({"input": whole.tensors["input"][at:], **between}, at, steps)
    both = torch.cat([first[0], second[0]], 1 if module.batch_first else 0)
    check(same_bits([both, *second[1:]], outputs_of(whole, module)), f"split at step {at}: other bits")


def as_cell(draw: Draw, case: Case, module: torch.nn.Module) -> None:
    if module.bidirectional or module.num_layers > 1 or module.proj_size:
        return
    options: dict[str, Any] = {"nonlinearity": module.nonlinearity} if case.cell == "rnn" else {}
    cell = CELLS[case.cell](
        module.input_size, module.hidden_size, module.bias, dtype=case.dtype, variant=case.variant, **options
    )
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in module.state_dict().items()})
    x = case.tensors["input"][:1]
    resets = None if case.resets is None else case.resets[:1]
    one = padded(case, tensors=case.tensors | {"input": x}, resets=resets)
    _, *expected = outputs_of(one, module)
    state = as_hx([case.tensors[name][0] for name in STATES if name in case.tensors])
    found = cell(x[0], state, resets=None if resets is None else resets[0])
    check(same_bits([f.detach() for f in flat(found)], [s[0] for s in expected]), "the cell has other bits")


def without_gradients(draw: Draw, case: Case, module: torch.nn.Module) -> None:
    expected = with_gradients(draw, case, module).outputs
    x, state, resets = arguments(case, case.tensors)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            check(same_bits(flat(module(x, state, resets=resets)), expected), f"{mode.__name__}: other bits")
    twin = copy.deepcopy(module)
    check(
        same_bits([t.detach() for t in flat(twin(x, state, resets=resets))], expected),
        "a copy has other bits",
    )


def differentiable_again(draw: Draw, case: Case, module: torch.nn.Module) -> None:
    """Check that the second derivative is the reference's, up to rounding."""
    if module.variant.kind != "none" and module.variant.eps < 1e-5:
        return
    twin = copy.deepcopy(case.module)
    twin.reset_parameters()
    x = case.tensors["input"][:3, :3]
    ordinary = padded(case, resets=None if case.resets is None else case.resets[:3, :3])
    names = [name for name, _ in twin.named_parameters()]

    def call(tensors: Mapping[str, Tensor]) -> list[Tensor]:
        data, _, resets = arguments(ordinary, {"input": tensors["input"]})
        parameters = {name: tensors[name] for name in names}
        return flat(torch.func.functional_call(twin, parameters, (data,), {"resets": resets}))

    second_order(draw, call, {"input": draw.normal(*x.shape), **dict(twin.named_parameters())})


PROMISES: tuple[Callable[[Draw, Case, torch.nn.Module], None], ...] = (
    rows_alone,
    poisoned_row,
    threads,
    recomputed,
    packed,
    streamed,
    streamed,
    strided_out,
    split,
    as_cell,
    without_gradients,
    differentiable_again,
)
