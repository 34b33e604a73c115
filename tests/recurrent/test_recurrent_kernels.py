"""The compiled recurrent kernels against the reference in float64: values, states and every gradient."""

from __future__ import annotations

import itertools
from dataclasses import fields

import pytest
import torch
from torch import nn

from layernorm.variants import PRESETS
from tests.recurrent.cases import CELL_FUNCTIONS, GATES_FUNCTIONS, HALVES, SEQUENCES, flat, largest
from tests.recurrent.drawn_networks import (
    CHOICES,
    LARGE,
    Case,
    alike,
    alike_in_float64,
    drawn_cases,
    of_cases,
)
from tests.settings import CAPABILITIES, instruction_set

pytestmark = pytest.mark.usefixtures("native", "one_thread")

CASES = drawn_cases(3, 1000)
COUNT = len(GATES_FUNCTIONS)
CELL_CASES = drawn_cases(2, 1500, functions=CELL_FUNCTIONS)
# Every public variant with its own eps.
PRESET_CASES = [
    Case(*function, 2000 + i)
    for i, function in enumerate(dict.fromkeys(pair for cells in PRESETS.values() for pair in cells.items()))
]


def test_every_pair_of_options_occurs():
    names = [field.name for field in fields(Case)][3:]
    for a, b in itertools.combinations(names, 2):
        cases = [c for c in CASES if ("proj" not in (a, b) or c.cell == "lstm")]  # which alone has one
        missing = set(itertools.product(CHOICES[a], CHOICES[b])) - {
            (getattr(c, a), getattr(c, b)) for c in cases
        }
        assert not missing, (a, b)


@of_cases(CASES[: 2 * COUNT] + CELL_CASES)
@pytest.mark.usefixtures("poisoned")
def test_float64(case):
    alike_in_float64(case)


@of_cases(PRESET_CASES)
def test_presets(case):
    alike_in_float64(case)
    alike(case, torch.float32)


@of_cases(CASES[COUNT:] + CELL_CASES)
@pytest.mark.usefixtures("poisoned")
def test_float32(case):
    alike(case, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@of_cases(CASES[2 * COUNT :] + CELL_CASES)
@pytest.mark.usefixtures("poisoned")
def test_half_precisions(case, dtype):
    alike(case, dtype)


def alike_in(case, dtype):
    """Check the compiled kernel in any precision."""
    if dtype == torch.float64:
        alike_in_float64(case)
    else:
        alike(case, dtype, draws=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@of_cases(LARGE)
@pytest.mark.usefixtures("poisoned")
def test_long_sums_and_sequences(case, dtype):
    alike_in(case, dtype)


@pytest.mark.skipif(len(CAPABILITIES) < 2, reason="one instruction set only")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_other_instruction_sets(dtype):
    for capability, case in itertools.product(CAPABILITIES[:-1], [*LARGE[::6], *CASES[::24]]):
        with instruction_set(capability):
            alike_in(case, dtype)


# ---- torch.nn's own ----


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "deep"])
@pytest.mark.parametrize("hidden", [1, 7, 33, 130])
@pytest.mark.parametrize("cell", ["lstm", "lstm projected", "gru", "rnn", "rnn relu"])
def test_without_norm_it_is_torchs(cell, hidden, options):
    cell, _, kind = cell.partition(" ")
    if kind == "projected" and hidden > 1:
        options = options | {"proj_size": (hidden + 1) // 2}
    elif kind == "relu":
        options = options | {"nonlinearity": "relu"}
    theirs = getattr(nn, cell.upper())(5, hidden, dtype=torch.float64, **options)
    ours = SEQUENCES[cell](5, hidden, dtype=torch.float64, variant="none", **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(9, 4, 5, dtype=torch.float64, requires_grad=True)
    expected, actual = flat(theirs(x)), flat(ours(x))
    seeds = [torch.randn_like(e) for e in expected]
    wanted = torch.autograd.grad(expected, [x, *theirs.parameters()], seeds)
    found = torch.autograd.grad(actual, [x, *ours.parameters()], seeds)
    for a, e in zip((*actual, *found), (*expected, *wanted), strict=True):
        # 9 steps of 2 layers, sums of √200 units in each: 14·18·1.1e-16 = 3e-14 of what is summed, backward
        # over 36 rows too.
        assert largest(a - e) <= 1e-12 * (1 + largest(e))
