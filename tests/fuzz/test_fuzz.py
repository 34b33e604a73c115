"""The short form of the fuzz, and tests that its judges are right and notice errors.

The long form is ``python -m tests.fuzz --minutes 10``; see ``CONTRIBUTING.md``.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from layernorm import Variant, reference
from layernorm import functional as LF
from layernorm.spec import layer_spec
from layernorm.variants import PRESETS
from tests.fuzz import arguments, draws, exact_norm, layers, naive, norm_cases, norms, parts
from tests.recurrent.cases import F, H, state_of, weights_of

# Enough for every kind of row, variant and setting; about 15 s on one core.
CASES = {"norms": 500, "large_norms": 4, "gates": 120, "layers": 100, "promises": 150}


@pytest.mark.parametrize("part", CASES)
@pytest.mark.usefixtures("native")
def test_short(part):
    failures = parts.failures_of(part, range(CASES[part]))
    assert not failures, "\n".join(failures)


@pytest.mark.usefixtures("native")
def test_wrong_arguments():
    failures = parts.failures_of("arguments", range(1200))
    assert not failures, "\n".join(failures)


# ---- the judges ----


def test_reference_is_the_formulas_as_they_are_written():
    variants = [
        Variant(kind=kind, inputs=inputs, scope=scope, cell=cell_norm, projection_bias=bias)
        for kind in ("layer", "rms", "none")
        for inputs in ("separate", "summed")
        for scope in ("matrix", "all", "gate")
        for cell_norm in ("output", "carried", "none")
        for bias in (False, True)
    ]
    functions = set(itertools.product(("lstm", "gru", "rnn"), variants))
    functions |= {pair for cells in PRESETS.values() for pair in cells.items()}
    for cell, variant in functions:
        proj = 2 if cell == "lstm" and variant.scope == "gate" else 0
        relu = cell == "rnn" and variant.projection_bias
        weights = weights_of(cell, variant, F, H, proj, needs_grad=False)
        x, state = torch.randn(3, 2, F, dtype=torch.float64), state_of(cell, 2, proj)
        state = [s.detach() for s in state]
        spec = layer_spec(cell, variant, "relu" if relu else "tanh")
        output, final = reference.recurrent_layer(spec, x, state, weights)
        arrays = {name: w.numpy() for name, w in weights.items()}
        for row in range(2):
            start = tuple(s[row].numpy() for s in state)
            found, last = naive.sequence(cell, x[:, row].numpy(), start, arrays, variant, relu)
            # Some thirty roundings in a step, of numbers of the order of 10, and norms that amplify by 1/√eps
            # where a row happens to be nearly constant.
            np.testing.assert_allclose(found, output[:, row].numpy(), rtol=1e-9, atol=1e-11)
            for a, b in zip(last, final, strict=True):
                np.testing.assert_allclose(a, b[row].numpy(), rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(not exact_norm.IS_WIDER, reason="long double is float64 here")
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_the_norms_judge_agrees_with_autograd(name):
    x, weight, grad = (
        torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((3, 5), (5,), (3, 5))
    )
    v, w = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    output = getattr(reference, name)(x, (5,), weight, eps=0.1)
    first = torch.autograd.grad(output, (x, weight), grad, create_graph=True)
    second = torch.autograd.grad(first, (x, weight, grad), (v, w))
    case = norm_cases.Case(name, (3, 5), 5, (5,), 0.1, x, None, weight, None, grad, None, "function")
    judge = norms.Judge.of(case)
    directions = {"input": exact_norm.wide(v), "weight": exact_norm.wide(w)}
    for found, exact in (
        (output, judge.output()),
        (first[0], judge.first("input")),
        (first[1], judge.first("weight")),
        *((s, judge.second(n, directions)) for n, s in zip(("input", "weight", "grad"), second, strict=True)),
    ):
        # Autograd's own roundings, some tens of units of numbers of the order of 10.
        assert np.abs(exact_norm.wide(found) - exact.value).max() < 1e-13
        assert (exact.bound < 1e-12).all()


def first_failure(part: str, count: int = 60) -> str | None:
    return next((f for seed in range(count) if (f := parts.failure_of(part, seed)) is not None), None)


@pytest.mark.usefixtures("native")
def test_a_wrong_gradient_of_a_norm_is_seen(monkeypatch):
    # A former bug for rows above 1e9: the gradient of RMS norm as if there were a mean.
    def broken(input, normalized_shape, weight=None, eps=None):
        output = LF.layer_norm(input, normalized_shape, weight, None, 1e-5)
        return output + (right(input, normalized_shape, weight, eps) - output).detach()

    right = LF.rms_norm
    monkeypatch.setattr(LF, "rms_norm", broken)
    found = first_failure("norms", 200)
    assert found is not None
    assert "gradient of input" in found
    assert "again: python -m tests.fuzz norms --case " in found


@pytest.mark.usefixtures("native")
def test_a_rounding_too_many_in_a_layer_is_seen(monkeypatch):
    right = layers.result

    def broken(case, module, tensors, seeds, kernel, draw=None):
        found = right(case, module, tensors, seeds, kernel, draw)
        if kernel == "native" and "weight_hh_l0" in found.grads:
            found.grads["weight_hh_l0"] *= 1 + 256 * draws.unit(case.dtype)
        return found

    monkeypatch.setattr(layers, "result", broken)
    found = first_failure("layers")
    assert found is not None
    assert "weight_hh_l0" in found


def test_a_call_that_kills_its_process_is_told(monkeypatch):
    monkeypatch.setattr(arguments, "CHILD", "import os; print('call 3 a call', flush=True); os.abort()")
    (failure,) = parts.failures_of("arguments", range(3, 4))
    assert "a call" in failure
    assert "the process ended with" in failure
