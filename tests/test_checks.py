"""Arguments of the wrong kind: every function and module says which, and what was expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import layernorm
from layernorm import functional as LF
from layernorm.variants import parameter_shapes, resolve

X, H, GATES = torch.randn(4, 2, 3), torch.zeros(2, 5), torch.randn(2, 20)
ROWS = torch.randn(2, 3)


def weights(cell):
    shapes = parameter_shapes(cell, resolve("paper", cell), 3, 5)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


VECTORS = {name: tensor for name, tensor in weights("lstm").items() if not name.startswith("weight")}
NO_TENSORS = (
    None,
    3,
    2.5,
    "a",
    [1, 2],
    (H,),
    {},
    object(),
    np.zeros((2, 5)),
    torch.Tensor,
    pack_sequence([H]),
)
NO_FLAGS = (None, 1, "True", torch.tensor(True))
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
NO_VARIANTS = (None, 3, ["paper"], {}, object())

#: A call, the name by which its messages call the argument, and what the argument cannot be.
SEQUENCES = {
    f"{cell}: {name}": (call, name, bad)
    for cell, state in (("lstm", (H, H)), ("gru", H), ("rnn", H))
    for function, w in [(getattr(LF, cell), weights(cell))]
    for call, name, bad in (
        (lambda b, f=function, s=state, w=w: f(b, s, w), "input", NO_TENSORS),
        (
            lambda b, f=function, w=w: f(X, b, w),
            "state",
            (*NO_TENSORS, (H, H, H), H) if cell == "lstm" else (*NO_TENSORS, (H, H)),
        ),
        (lambda b, f=function, s=state: f(X, s, b), "weights", (None, 3, "a", [H], H, object())),
        *(
            (
                lambda b, f=function, s=state, w=w, n=n: f(X, s, w | {n: b}),
                rf"weights\['{n}'\]",
                NO_TENSORS,
            )
            for n in ("weight_ih", "weight_hh", "bias")
        ),
        (lambda b, f=function, s=state, w=w: f(X, s, w, variant=b), "variant", NO_VARIANTS),
        (lambda b, f=function, s=state, w=w: f(X, s, w, reverse=b), "reverse", NO_FLAGS),
        (lambda b, f=function, s=state, w=w: f(X, s, w, recompute=b), "recompute", NO_FLAGS),
        (
            lambda b, f=function, s=state, w=w: f(X.flatten(0, 1), s, w, batch_sizes=b),
            "batch_sizes",
            NO_SIZES,
        ),
        (lambda b, f=function, s=state, w=w: f(X, s, w, resets=b), "resets", NO_TENSORS[1:]),
    )
}
OTHERS = {
    "lstm: h": (lambda b: LF.lstm(X, (b, H), weights("lstm")), r"state\[0\]", NO_TENSORS),
    "lstm: c": (lambda b: LF.lstm(X, [H, b], weights("lstm")), r"state\[1\]", NO_TENSORS),
    "rnn: nonlinearity": (
        lambda b: LF.rnn(X, H, weights("rnn"), nonlinearity=b),
        "nonlinearity",
        (None, 3, ["tanh"], torch.tanh),
    ),
    "lstm_gates: input_gates": (lambda b: LF.lstm_gates(b, GATES, H, VECTORS), "input_gates", NO_TENSORS),
    "lstm_gates: hidden_gates": (lambda b: LF.lstm_gates(GATES, b, H, VECTORS), "hidden_gates", NO_TENSORS),
    "lstm_gates: c": (lambda b: LF.lstm_gates(GATES, GATES, b, VECTORS), "c", NO_TENSORS),
    "lstm_gates: weights": (lambda b: LF.lstm_gates(GATES, GATES, H, b), "weights", (None, 3, [H], H)),
    "lstm_gates: gain_ih": (
        lambda b: LF.lstm_gates(GATES, GATES, H, VECTORS | {"gain_ih": b}),
        r"weights\['gain_ih'\]",
        NO_TENSORS,
    ),
    "lstm_gates: variant": (
        lambda b: LF.lstm_gates(GATES, GATES, H, VECTORS, variant=b),
        "variant",
        NO_VARIANTS,
    ),
    "LSTM: input": (lambda b: layernorm.LayerNormLSTM(3, 5)(b), "input", NO_TENSORS[:-1]),
    "LSTM: hx": (lambda b: layernorm.LayerNormLSTM(3, 5)(X, b), "hx", (*NO_TENSORS[1:], (H, 3), (H, H, H))),
    "GRU: hx": (lambda b: layernorm.LayerNormGRU(3, 5)(X, b), "hx", NO_TENSORS[1:]),
    "GRU: hx of packed": (
        lambda b: layernorm.LayerNormGRU(3, 5)(pack_sequence([X[:, 0]]), b),
        "hx",
        NO_TENSORS[1:],
    ),
    "GRU: resets": (lambda b: layernorm.LayerNormGRU(3, 5)(X, resets=b), "resets", NO_TENSORS[1:]),
    "LSTMCell: input": (lambda b: layernorm.LayerNormLSTMCell(3, 5)(b), "input", NO_TENSORS),
    "LSTMCell: hx": (lambda b: layernorm.LayerNormLSTMCell(3, 5)(ROWS, b), "hx", (*NO_TENSORS[1:], (H, 3))),
    "GRUCell: hx": (lambda b: layernorm.LayerNormGRUCell(3, 5)(ROWS, b), "hx", NO_TENSORS[1:]),
    "GRUCell: resets": (
        lambda b: layernorm.LayerNormGRUCell(3, 5)(ROWS, resets=b),
        "resets",
        NO_TENSORS[1:],
    ),
    "RNN: nonlinearity": (
        lambda b: layernorm.LayerNormRNN(3, 5, nonlinearity=b),
        "nonlinearity",
        (None, 3, ["tanh"]),
    ),
}
SHAPES = (None, 3, 2.5, "3", (3.0,), ("3",), (None,), ((3,),), [True], {3}, np.array([3]), torch.tensor([3]))
EPS = ("a", 1j, [1e-5], torch.ones(1), object())
for _name in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"):
    _function = getattr(LF, _name)
    _rows = (ROWS,) if not _name.startswith("add") else (ROWS, ROWS)
    OTHERS |= {
        f"{_name}: input": (lambda b, f=_function, r=_rows: f(b, *r[1:], (3,)), "input", NO_TENSORS),
        f"{_name}: shape": (lambda b, f=_function, r=_rows: f(*r, b), "normalized_shape", SHAPES),
        f"{_name}: weight": (lambda b, f=_function, r=_rows: f(*r, (3,), b), "weight", NO_TENSORS[1:]),
        f"{_name}: eps": (lambda b, f=_function, r=_rows: f(*r, (3,), eps=b), "eps", EPS),
    }
    if _name.startswith("add"):
        OTHERS[f"{_name}: residual"] = (
            lambda b, f=_function: f(ROWS, b, (3,)),
            "residual",
            NO_TENSORS,
        )
    if _name.endswith("layer_norm"):
        OTHERS[f"{_name}: bias"] = (
            lambda b, f=_function, r=_rows: f(*r, (3,), None, b),
            "bias",
            NO_TENSORS[1:],
        )
CASES = SEQUENCES | OTHERS


@pytest.mark.parametrize("case", CASES)
def test_a_value_of_the_wrong_type_is_a_type_error_that_names_it(case):
    call, name, values = CASES[case]
    for value in values:
        with pytest.raises(TypeError, match=rf"(^|\W){name}\W.*(must|should) be"):
            call(value)


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


def test_gates_of_other_kinds_are_refused_in_words():
    for change, message in (
        ({"gain_ih": torch.ones(20, device="meta")}, "c is on cpu and gain_ih on meta"),
        ({"bias": torch.ones(20).long()}, "bias must be of a floating-point dtype, got torch.int64"),
    ):
        with pytest.raises(RuntimeError, match=f"lstm_gates: .*{message}"):
            LF.lstm_gates(GATES, GATES, H, VECTORS | change)


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
