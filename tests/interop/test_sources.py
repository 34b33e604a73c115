"""Every source against its formula in NumPy: loaded, differentiated, written back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import layernorm
from layernorm import interop
from tests.interop.formulas import FORMULAS, F, H

T, N = 6, 3
CASES = sorted(FORMULAS)


def draw(rng, shapes):
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def arguments(rng, cell, output):
    return [
        rng.standard_normal((T, N, F)),
        *(rng.standard_normal((N, s)) for s in (output, H)[: 1 + (cell == "lstm")]),
    ]


def expected(formula, weights, xs, *state):
    outputs = []
    for x in xs:
        state = formula.step(weights, x, *state)
        outputs.append(state[0])
    return np.stack(outputs), state


def computed(module, xs, *state):
    """Run a sequence module, or a cell step by step."""
    if isinstance(module, torch.nn.RNNCellBase):
        state = module.as_state(tuple(state))
        outputs = []
        for x in xs:
            state = module(x, state)
            outputs.append(module.as_tuple(state)[0])
        return torch.stack(outputs), module.as_tuple(state)
    output, state = module(xs, module.as_state(tuple(s.unsqueeze(0) for s in state)))
    return output, tuple(s.squeeze(0) for s in module.as_tuple(state))


def test_every_source_has_a_formula_and_is_on_the_pages():
    assert {(name, cell) for name, cells in interop.SOURCES.items() for cell in cells} == FORMULAS.keys()
    for page in ("which.md", "interop.md"):
        text = (Path(__file__).parents[2] / "docs" / page).read_text("utf-8")
        assert [name for name in interop.SOURCES if f"`{name}`" not in text] == []


@pytest.mark.parametrize(("source", "cell"), CASES)
@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 1e-12), (np.float32, 1e-6)])
def test_a_source_is_loaded(source, cell, dtype, atol):
    formula = FORMULAS[source, cell]
    rng = np.random.default_rng(7)
    # Small enough that a step does not amplify what rounding does to the one before.
    weights = {name: (0.3 * w).astype(dtype) for name, w in draw(rng, formula.shapes).items()}
    module = interop.load(weights, source, cell=cell, **formula.options)
    assert module.spec.cell == cell
    assert next(module.parameters()).dtype == torch.from_numpy(np.zeros((), dtype)).dtype
    xs, *state = arguments(rng, cell, formula.output)
    exact = {name: w.astype(np.float64) for name, w in weights.items()}
    output, final = expected(
        formula, exact, xs.astype(dtype).astype(np.float64), *(s.astype(dtype) for s in state)
    )
    with torch.no_grad():
        actual, end = computed(module, *(torch.from_numpy(a.astype(dtype)) for a in (xs, *state)))
    np.testing.assert_allclose(actual.numpy(), output, rtol=0, atol=atol)
    for ours, theirs in zip(end, final, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(("source", "cell"), CASES)
def test_a_source_has_its_gradients(source, cell):
    formula = FORMULAS[source, cell]
    rng = np.random.default_rng(8)
    weights, along = ({name: 0.3 * w for name, w in draw(rng, formula.shapes).items()} for _ in range(2))
    inputs, inputs_along = (arguments(rng, cell, formula.output) for _ in range(2))
    # The derivative along a direction in weights, input and state, exact to rounding by a complex step.
    h = 1e-30j
    output, _ = expected(
        formula,
        {name: w + h * along[name] for name, w in weights.items()},
        *(a + h * d for a, d in zip(inputs, inputs_along, strict=True)),
    )
    by_formula = output.imag.sum() / h.imag

    def load(scale):
        moved = {name: w + scale * along[name] for name, w in weights.items()}
        return interop.load(moved, source, cell=cell, **formula.options)

    module = load(0)
    given = [torch.from_numpy(a).requires_grad_() for a in inputs]
    computed(module, *given)[0].sum().backward()
    # How this package's parameters move with the source's: exactly, for they depend on them linearly.
    moved = dict(load(1).named_parameters())
    with torch.no_grad():
        found = sum((p.grad * (moved[name] - p)).sum() for name, p in module.named_parameters())
        found += sum((a.grad * torch.from_numpy(d)).sum() for a, d in zip(given, inputs_along, strict=True))
    np.testing.assert_allclose(found.item(), by_formula, rtol=1e-11)


@pytest.mark.parametrize(("source", "cell"), CASES)
def test_a_source_is_written_back(source, cell):
    formula = FORMULAS[source, cell]
    rng = np.random.default_rng(9)
    module = interop.load(draw(rng, formula.shapes), source, cell=cell, **formula.options)
    constants = {name: value for name, value in formula.options.items() if name != "cell_clip"}
    exported = interop.export(module, source, **constants)
    assert {name: tuple(t.shape) for name, t in exported.items()} == dict(formula.shapes)
    xs, *state = arguments(rng, cell, formula.output)
    output, _ = expected(formula, {name: t.numpy() for name, t in exported.items()}, xs, *state)
    with torch.no_grad():
        actual, _ = computed(module, *map(torch.from_numpy, (xs, *state)))
    np.testing.assert_allclose(actual.numpy(), output, rtol=0, atol=1e-9)
    again = interop.load(exported, source, cell=cell, **formula.options)
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, module.get_parameter(name), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("source", "cell"), CASES)
def test_the_description_lists_every_tensor(source, cell):
    text = interop.describe(source)
    for key in interop.SOURCES[source][cell].keys:
        assert f"  {key} (" in text


def test_fresh_modules_are_written_and_loaded():
    for source, cells in interop.SOURCES.items():
        for cell, found in cells.items():
            if found.is_unbiased:  # whose eps is another than the module's
                continue
            cls = getattr(layernorm, f"LayerNorm{cell.upper()}")
            module = cls(F, H, variant=found.variant)
            again = interop.load(interop.export(module, source), source, cell=cell, sequence=True)
            x = torch.randn(T, N, F)
            torch.testing.assert_close(again(x)[0], module(x)[0], rtol=1e-5, atol=1e-6)
