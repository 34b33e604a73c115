"""Products with weights read where they lie, packed piece by piece, or packed whole: the same bits of all."""

from __future__ import annotations

import itertools

import pytest
import torch

from layernorm import Variant, backends
from tests.recurrent.cases import DTYPES, Layer, assert_rows_are_alone, largest, same
from tests.settings import CAPABILITIES, instruction_set, thread_count

pytestmark = pytest.mark.usefixtures("native", "one_thread")

# Depths on both sides of a block of sums, which is of 512 elements (256 of float64, and 1,024 where
# bfloat16 is multiplied in pairs), and no whole groups; widths that are whole panels and not.
DEEP = [
    ("lstm", Variant(), 67, 64, 0),
    ("gru", Variant(), 515, 23, 0),
    ("gru", Variant(inputs="summed", scope="all"), 1043, 64, 0),
    ("rnn", Variant(), 30, 519, 0),
    ("rnn", Variant(inputs="summed"), 128, 1030, 0),
    ("lstm", Variant(kind="none"), 270, 261, 259),
]
without_projection = pytest.mark.parametrize(
    ("cell", "variant", "features", "hidden"), [given[:4] for given in DEEP if given[4] == 0]
)
every_deep_layer = pytest.mark.parametrize(("cell", "variant", "features", "hidden", "proj"), DEEP)


@pytest.mark.parametrize("capability", CAPABILITIES)
@every_deep_layer
def test_steps_and_short_sequences_have_the_bits_of_long_ones(
    cell, variant, features, hidden, proj, capability
):
    # A row or two are read in place, more by pieces, and from 2, 4 or 8 steps on all is packed.
    with instruction_set(capability), torch.no_grad():
        for dtype, rows in zip(DTYPES, (1, 2, 3, 13), strict=True):
            layer = Layer(cell, variant, features, hidden, dtype, proj)
            for count in (rows, 1):
                x, state, _ = layer.drawn(9, count)
                whole, *_ = layer.forward(x, state)
                for steps in (1, 2, 3, 4, 7):
                    assert same(layer.forward(x[:steps], state)[:1], [whole[:steps]])
                between, found = state, []
                for step in x.split(1):
                    output, *between = layer.forward(step, between)
                    found.append(output)
                assert same([torch.cat(found)], [whole])


@pytest.mark.parametrize("steps", [1, 3])
@every_deep_layer
def test_a_row_has_its_bits_in_any_batch_and_thread(cell, variant, features, hidden, proj, steps):
    for dtype in DTYPES:
        layer = Layer(cell, variant, features, hidden, dtype, proj)
        given = layer.drawn(steps, 13)
        whole = layer(*given)
        for part in ([5], [0, 12], [2, 3, 4, 7]):
            assert_rows_are_alone(layer, *given, whole, part)
        with thread_count(2):
            assert all(same(a, b) for a, b in zip(whole, layer(*given), strict=True))


@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (1, 2), (1, 9), (3, 4), (9, 1)])
@without_projection
@pytest.mark.usefixtures("poisoned")
def test_float64(cell, variant, features, hidden, steps, rows):
    for capability, dtype in itertools.product(CAPABILITIES, (torch.float64, torch.float32)):
        torch.manual_seed(0)
        layer = Layer(cell, variant, features, hidden, dtype)
        x, state, seeds = layer.drawn(steps, rows)
        with instruction_set(capability):
            found = layer(x, state, seeds)
        with backends.use("reference"):
            wide = layer.in_float64()
            exact = wide(x.double(), [s.double() for s in state], [s.double() for s in seeds])
        # Sums of n numbers, each rounded, are off by √n roundings if these are random, and by 30 times as
        # much with the norms, the steps and what goes through both.
        tolerance = 30 * torch.finfo(dtype).eps * max(features, 4 * hidden, rows) ** 0.5
        for a, b in zip(itertools.chain(*found), itertools.chain(*exact), strict=True):
            assert largest(a.double() - b) <= tolerance * max(largest(b), 1e-3)
