"""Arguments that the recurrent operators refuse."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from layernorm import Variant
from layernorm.spec import layer_spec
from tests.recurrent.cases import F, H, backward_arguments, detached, same
from tests.recurrent.cases import operator_arguments as arguments

pytestmark = pytest.mark.usefixtures("native", "one_thread")


def codes(cell, variant="paper"):
    """Return how the operators know a spec."""
    return list(layer_spec(cell, variant).codes)


def changed_weight(index, shape, dtype=torch.float32):
    def change(given):
        given["weights"][index] = torch.zeros(shape, dtype=dtype)

    return change


BAD = {
    "input of one dimension": ({"input": torch.zeros(3)}, "input must be a strided tensor of 3 dimensions"),
    "an integer input": ({"input": torch.zeros(3, 2, F, dtype=torch.int64)}, "of float32, float64, bfloat16"),
    "an input of another width": ({"input": torch.zeros(3, 2, F + 1)}, "weight_ih must be of shape"),
    "a state of another batch": ({"h": torch.zeros(3, H)}, r"h must be of shape \[2, 4\], got \[3, 4\]"),
    "a state of another dtype": (
        {"h": torch.zeros(2, H).double()},
        "h must be a strided tensor of the input",
    ),
    "a cell of another width": ({"c": torch.zeros(2, H + 1)}, r"c must be of shape \[2, 4\], got \[2, 5\]"),
    "no cell": ({"c": None}, "an LSTM's state has a cell"),
    "too few weights": ({"weights": [torch.zeros(16, F)]}, "weights must be a list of 11, got 1"),
    "no weights": ({"weights": []}, "weights must be a list of 11, got 0"),
    "too many weights": ({"weights": [torch.zeros(16, F)] * 12}, "weights must be a list of 11, got 12"),
    "no matrices": ({"weights": [None] * 11}, "weight_ih and weight_hh must be matrices"),
    "a weight of another height": (changed_weight(0, (15, F)), "weight_ih must be of shape"),
    "a recurrent weight of another height": (changed_weight(1, (15, H)), "must be matrices of 4 times"),
    "an empty recurrent weight": (changed_weight(1, (0, 0)), "must be matrices of 4 times"),
    "a recurrent weight of another width": (changed_weight(1, (16, H + 1)), "hidden_size=4 columns.*got 5"),
    "a projection of another height": (changed_weight(2, (3, H)), "weight_hr must be of shape"),
    "a weight that is a vector": (changed_weight(0, (16,)), "must be matrices of 4 times"),
    "a weight of another dtype": (changed_weight(0, (16, F), torch.float64), "weight_ih must be a strided"),
    "a gain of another width": (changed_weight(5, (15,)), "gain_ih must be of shape"),
    "a bias that it does not have": (changed_weight(8, (4,)), "gain or bias that this variant does not have"),
    "resets of numbers": ({"resets": torch.zeros(3, 2)}, "resets must be bool"),
    "resets of another shape": ({"resets": torch.zeros(2, 3, dtype=torch.bool)}, "resets must be bool, of"),
    "batch_sizes with a padded input": ({"batch_sizes": [2, 2, 2]}, "a strided tensor of 2 dimensions"),
    "a gated cell's weights for another": ({"spec": codes("gru"), "c": None}, "layernorm: "),
    "no step": (
        {"input": torch.zeros(0, 2, F), "resets": None},
        "sequence length to be larger than 0 in RNN",
    ),
}
BAD_PACKED = {
    "batch_sizes that grow": ([1, 2, 2], "must be positive and not increasing"),
    "batch_sizes with a zero": ([3, 2, 0], "must be positive and not increasing"),
    "negative batch_sizes": ([3, 3, -1], "must be positive and not increasing"),
    "batch_sizes of more rows": ([2, 2, 2], "must sum to the input's rows 5"),
    "batch_sizes of fewer rows": ([2, 2], "must sum to the input's rows 5"),
    "no batch_sizes": ([], "layernorm: "),
}


def refused(given, message):
    for operator in (torch.ops.layernorm.recurrent, torch.ops.layernorm.recurrent_forward):
        with pytest.raises(RuntimeError, match=message):
            operator(**detached(given))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.layernorm.recurrent(**given)


@pytest.mark.parametrize(("change", "message"), [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_bad_arguments_are_refused(change, message):
    given = arguments()
    if callable(change):
        change(given)
    else:
        given |= change
    refused(given, message)


@pytest.mark.parametrize(("sizes", "message"), [pytest.param(*v, id=k) for k, v in BAD_PACKED.items()])
def test_bad_batch_sizes_are_refused(sizes, message):
    refused(arguments(packed=True, batch_sizes=sizes), message)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "name", ["output", "saved_x", "saved_h", "saved_c", "saved_stats", "grad_output", "grad_h", "grad_c"]
)
def test_tensors_that_forward_did_not_return_are_refused(name, recompute):
    given = detached(arguments(recompute=recompute))
    right = backward_arguments(given, torch.ops.layernorm.recurrent_forward(**given))
    torch.ops.layernorm.recurrent_backward(**right)
    there = right[name]
    for wrong in (there.double(), torch.zeros(7), torch.zeros(1, 1)):
        if there.numel() == 0 and wrong.numel() == 0:
            continue
        with pytest.raises(RuntimeError, match="layernorm: "):
            torch.ops.layernorm.recurrent_backward(**right | {name: wrong})
    # As hooks on saved tensors may give it back.
    strided = there.new_zeros(*there.shape, 2)[..., 0].copy_(there)
    wanted = tree_leaves(torch.ops.layernorm.recurrent_backward(**right))
    assert same(tree_leaves(torch.ops.layernorm.recurrent_backward(**right | {name: strided})), wanted)


def test_tensors_that_another_call_kept_are_refused():
    given = detached(arguments())
    kept = {}
    for name, options in {
        "longer": {"input": torch.randn(4, 2, F), "resets": None},
        "recomputing": {"recompute": True},
        "another norm": {"spec": codes("lstm", Variant(scope="gate"))},
    }.items():
        kept[name] = torch.ops.layernorm.recurrent_forward(**given | options)
    right = backward_arguments(given, torch.ops.layernorm.recurrent_forward(**given))
    for name, (output, _, _, x, h, c, stats) in kept.items():
        wrong = {"output": output, "saved_x": x, "saved_h": h, "saved_c": c, "saved_stats": stats}
        if name == "recomputing":  # needs nothing else: the same gradients
            found = torch.ops.layernorm.recurrent_backward(**right | wrong)
            assert torch.equal(found[0], torch.ops.layernorm.recurrent_backward(**right)[0])
            wrong["saved_stats"] = right["saved_stats"]
        with pytest.raises(RuntimeError, match=r"layernorm: \w+ must be of shape"):
            torch.ops.layernorm.recurrent_backward(**right | wrong)
