"""Arguments of the wrong kind: every function and module says which, and what was expected."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import layernorm
from layernorm import functional as LF
from layernorm.variants import GATES
from tests.recurrent.cases import CELLS, GATES_CELLS, SEQUENCES, as_hx, weights_of

X, H, ROWS = torch.randn(4, 2, 3), torch.zeros(2, 5), torch.randn(2, 3)


def weights(cell):
    """Return parameters for X and H."""
    return weights_of(cell, "paper", 3, 5, dtype=torch.float32, needs_grad=False)


def gates(cell):
    """Return the arguments of a step after its products."""
    products = torch.randn(2, GATES[cell] * 5)
    vectors = {name: tensor for name, tensor in weights(cell).items() if not name.startswith("weight")}
    state = {"c" if cell == "lstm" else "h": H}
    return {"input_gates": products, "hidden_gates": products, **state, "weights": vectors}


NO_OPTIONS = (3, 2.5, "a", [1, 2], (H,), {}, object(), np.zeros((2, 5)), torch.Tensor)  # tensors, or None
NO_TENSORS = (None, *NO_OPTIONS, pack_sequence([H]))
NO_STATES = {"lstm": (H, (H, 3), (H, H, H)), "gru": ((H, H),), "rnn": ((H, H),)}
NO_SIZES = (
    3,
    2.5,
    "22",
    [2.0, 2.0],
    [None],
    {},
    object(),
    [True, True],
    torch.tensor(2),
    torch.tensor([2.0]),
)
NO_DIMS = (
    None,
    3,
    2.5,
    "3",
    (3.0,),
    ("3",),
    (None,),
    ((3,),),
    [True],
    {3},
    np.array([3]),
    torch.tensor([3]),
)
#: What an argument of a name cannot be.
WRONG = {
    **dict.fromkeys(("input", "residual", "input_gates", "hidden_gates", "c", "h"), NO_TENSORS),
    **dict.fromkeys(("weight", "bias", "resets"), NO_TENSORS[1:]),
    **dict.fromkeys(("reverse", "recompute"), (None, 1, "True", torch.tensor(True))),
    "weights": (None, 3, "a", [H], H, object()),
    "variant": (None, 3, ["paper"], {}, object()),
    "nonlinearity": (None, 3, ["tanh"], torch.tanh),
    "batch_sizes": NO_SIZES,
    "normalized_shape": NO_DIMS,
    "eps": ("a", 1j, [1e-5], torch.ones(1), object()),
}


def subjects():
    """Yield functions by name, with arguments that they take and what else some of these cannot be."""
    for cell in GATES_CELLS:
        yield f"{cell}_gates", getattr(LF, f"{cell}_gates"), gates(cell) | {"variant": "paper"}, {}
    for cell in SEQUENCES:
        hx = as_hx([H] * (2 if cell == "lstm" else 1))
        nonlinearity = {"nonlinearity": "tanh"} if cell == "rnn" else {}
        given = {"input": X, "state": hx, "weights": weights(cell), "variant": "paper", **nonlinearity}
        given |= {"reverse": False, "recompute": False, "resets": None}
        no_state = (*NO_TENSORS[1:], *NO_STATES[cell])
        yield cell, getattr(LF, cell), given, {"state": (None, *no_state)}
        packed = {"input": X.flatten(0, 1), "batch_sizes": [2] * 4}
        yield f"{cell} packed", getattr(LF, cell), given | packed, {"state": (None, *no_state)}
        module, single = SEQUENCES[cell](3, 5), CELLS[cell](3, 5)
        yield (
            f"{cell} module",
            module,
            {"input": X, "hx": None, "resets": None},
            {
                "input": NO_TENSORS[:-1],
                "hx": no_state,
            },
        )
        packed = {"input": pack_sequence([X[:, 0]]), "hx": None}
        yield f"{cell} module, packed", module, packed, {"input": NO_TENSORS[:-1], "hx": no_state}
        yield f"{cell} cell", single, {"input": ROWS, "hx": None, "resets": None}, {"hx": no_state}
        sizes = {"input_size": 3, "hidden_size": 5, "variant": "paper", **nonlinearity}
        yield f"{cell} module's constructor", SEQUENCES[cell], sizes, {}
        yield f"{cell} cell's constructor", CELLS[cell], sizes, {}
    for name in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"):
        given = {"input": ROWS, "normalized_shape": (3,), "weight": None, "eps": 1e-5}
        given |= {"residual": ROWS} if name.startswith("add") else {}
        yield name, getattr(LF, name), given | ({"bias": None} if name.endswith("layer_norm") else {}), {}


CASES = {
    f"{name}: {argument}": (function, given, argument, values)
    for name, function, given, others in subjects()
    for argument, values in (WRONG | others).items()
    if argument in given
}


@pytest.mark.parametrize("case", CASES)
def test_a_value_of_the_wrong_type_is_a_type_error_that_names_it(case):
    function, given, name, values = CASES[case]
    function(**given)  # which is right
    for value in values:
        with pytest.raises(TypeError, match=rf"(^|\W){name}\W.*(must|should) be"):
            function(**given | {name: value})


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "lstm_gates", "gru_gates"])
def test_a_weight_of_the_wrong_type_is_named(name):
    given = CASES[f"{name}: weights"][1]
    names = ("gain_ih",) if name.endswith("gates") else ("weight_ih", "weight_hh", "bias")
    for weight, value in itertools.product(names, NO_TENSORS):
        with pytest.raises(TypeError, match=rf"(^|\W)weights\['{weight}'\]\W.*(must|should) be"):
            getattr(LF, name)(**given | {"weights": given["weights"] | {weight: value}})


def test_a_part_of_a_state_of_the_wrong_type_is_named():
    for value in NO_TENSORS:
        for at, state in enumerate(((value, H), [H, value])):
            with pytest.raises(TypeError, match=rf"(^|\W)state\[{at}\]\W.*(must|should) be"):
                LF.lstm(X, state, weights("lstm"))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_batch_sizes_are_what_a_packed_sequence_has(cell):
    packed = pack_sequence([X[:, 0], X[:2, 1]])
    state = (H, H) if cell == "lstm" else H
    function, w = getattr(LF, cell), weights(cell)
    expected, _ = function(packed.data, state, w, batch_sizes=[2, 2, 1, 1])
    for sizes in (packed.batch_sizes, (2, 2, 1, 1), list(np.array([2, 2, 1, 1])), list(packed.batch_sizes)):
        assert torch.equal(function(packed.data, state, w, batch_sizes=sizes)[0], expected)
    for sizes in ([3, 4, -1], [6, 0], [1, 5], [6, 1], [[6]]):
        with pytest.raises((ValueError, TypeError), match=f"{cell}: batch_sizes must be"):
            function(packed.data, state, w, batch_sizes=sizes)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        function(packed.data[:0], state, w, batch_sizes=[])


def test_weights_of_other_mappings_and_names():
    given = torch.nn.ParameterDict(weights("gru"))
    assert torch.equal(LF.gru(X, H, given)[0], LF.gru(X, H, dict(given.items()))[0])
    with pytest.raises(ValueError, match=r"gru: weights of this variant are .*unknown: 3"):
        LF.gru(X, H, weights("gru") | {3: H})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"input": lambda t: t.long()}, "input must be of a floating-point dtype, got torch.int64"),
        ({"input": lambda t: t.cfloat()}, "input must be of a floating-point dtype, got torch.complex64"),
        ({"state": lambda t: t.bool()}, "h must be of a floating-point dtype, got torch.bool"),
        ({"weight_hh": lambda t: t.int()}, "weight_hh must be of a floating-point dtype, got torch.int32"),
        ({"gain_hh": lambda t: t.double()}, r"expected gain_hh of the input's dtype .*32, got .*float64"),
        ({"state": lambda t: t.half()}, r"expected h of the input's dtype .*32, got .*16; convert one"),
        ({"bias": lambda t: t.bfloat16()}, r"expected bias of the input's dtype .*32, got .*bfloat16"),
        ({"state": lambda t: t.to("meta")}, "same device, but input is on cpu and h on meta; move one"),
        ({"gain_ih": lambda t: t.to("meta")}, "same device, but input is on cpu and gain_ih on meta"),
        ({"input": lambda t: t.to("meta")}, "same device, but input is on meta and h on cpu"),
    ],
)
def test_tensors_of_other_kinds_are_refused_in_words(change, name):
    given = {"input": X, "state": H, **weights("gru")}
    for key, function in change.items():
        given[key] = function(given[key])
    x, h = given.pop("input"), given.pop("state")
    with pytest.raises(RuntimeError, match=f"gru: .*{name}"):
        LF.gru(x, h, given)


@pytest.mark.parametrize(("cell", "state"), [("lstm", "c"), ("gru", "h")])
def test_gates_of_other_kinds_are_refused_in_words(cell, state):
    given, width = gates(cell), GATES[cell] * 5
    for change, message in (
        ({"gain_ih": torch.ones(width, device="meta")}, f"{state} is on cpu and gain_ih on meta"),
        ({"bias": torch.ones(width).long()}, "bias must be of a floating-point dtype, got torch.int64"),
    ):
        with pytest.raises(RuntimeError, match=f"{cell}_gates: .*{message}"):
            getattr(LF, f"{cell}_gates")(**given | {"weights": given["weights"] | change})


def test_complex_sequences_where_torch_has_them():
    theirs = torch.nn.LSTM(3, 5, dtype=torch.complex128)
    ours = layernorm.LayerNormLSTM(3, 5, dtype=torch.complex128, variant="none")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, 3, dtype=torch.complex128)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("gain", [None, torch.complex64, torch.float32])
def test_complex_rows_are_torchs(gain, eps):
    x = torch.randn(3, 4, dtype=torch.complex64, requires_grad=True)
    weight = None if gain is None else torch.randn(4).to(gain)
    expected = torch.nn.functional.rms_norm(x, (4,), weight, eps)
    assert torch.equal(LF.rms_norm(x, (4,), weight, eps), expected)
    output, total = LF.add_rms_norm(x, x, (4,), weight, eps)
    assert torch.equal(total, x + x)
    assert torch.equal(output, torch.nn.functional.rms_norm(x + x, (4,), weight, eps))
    direction = torch.randn_like(expected)
    grads = [torch.autograd.grad(y, x, direction)[0] for y in (LF.rms_norm(x, (4,), weight, eps), expected)]
    assert torch.equal(*grads)


def test_complex_modules_are_torchs_and_layer_norm_of_them_is_refused():
    theirs = torch.nn.RMSNorm(4, dtype=torch.complex64)
    ours = layernorm.RMSNorm(4, dtype=torch.complex64)
    x = torch.randn(3, 4, dtype=torch.complex64)
    expected = theirs(x)
    assert torch.equal(ours(x), expected)
    layernorm.replace_norms(theirs)
    assert torch.equal(theirs(x), expected)
    for function in (LF.layer_norm, lambda x, shape: LF.add_layer_norm(x, x, shape)):
        with pytest.raises(RuntimeError, match=r"input must be of a floating-point dtype.*view_as_real"):
            function(x, (4,))
    with pytest.raises(RuntimeError, match=r"rms_norm: .*floating-point dtype, got torch.int64; convert it"):
        LF.rms_norm(torch.ones(3, 4).long(), (4,))
