"""The recurrent modules against torch.nn's, against each other, and under autograd."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import layernorm
from layernorm import functional as LF
from layernorm.variants import PRESETS
from tests.recurrent import cases
from tests.recurrent.cases import (
    ALL_FUNCTIONS,
    RESET_BEFORE,
    SEQUENCES,
    as_function,
    flat,
    made,
    of_functions,
    randomized,
    same,
    state_of,
    weights_of,
)

TWINS = {
    nn.LSTM: layernorm.LayerNormLSTM,
    nn.GRU: layernorm.LayerNormGRU,
    nn.RNN: layernorm.LayerNormRNN,
    nn.LSTMCell: layernorm.LayerNormLSTMCell,
    nn.GRUCell: layernorm.LayerNormGRUCell,
    nn.RNNCell: layernorm.LayerNormRNNCell,
}
every_cell = pytest.mark.parametrize("cell", SEQUENCES)
INFOS = {info.module_cls: info for info in module_db if info.module_cls in TWINS}
EPS32 = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("twin", TWINS, ids=lambda c: c.__name__)
def test_without_norm_it_agrees_with_torch_on_torchs_samples(twin, dtype, training):
    info = INFOS[twin]
    packed = {"with_packed_sequence": True} if twin in (nn.GRU, nn.RNN) else {}
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training, **packed
    )
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = twin(*args, **kwargs, dtype=dtype).train(training)
        ours = TWINS[twin](*args, **kwargs, dtype=dtype, variant="none").train(training)
        assert list(theirs.state_dict()) == list(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
        inputs, options = sample.forward_input.args, sample.forward_input.kwargs
        expected, actual = flat(theirs(*inputs, **options)), flat(ours(*inputs, **options))
        # Values stay under 20 (relu, inputs under 9, weights under 0.71); at most 2 layers of 5 steps,
        # each a sum of at most 15 products, round at most (15 + 8)·10 times.
        tol = 1e-12 if dtype == torch.float64 else 230 * 20 * EPS32
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=tol, atol=tol)
        seeds = [torch.randn_like(e) for e in expected if e.requires_grad]
        for result in (expected, actual):
            torch.autograd.backward([r for r in result if r.requires_grad], seeds)
        for t, p in zip(theirs.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(p.grad, t.grad, rtol=100 * tol, atol=100 * tol)


@pytest.mark.parametrize("variant", ["none", None], ids=["no norm", "paper"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("twin", TWINS, ids=lambda c: c.__name__)
def test_raises_for_torchs_error_inputs(twin, dtype, variant):
    info = INFOS[twin]
    options = {} if variant is None else {"variant": variant}
    samples = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=False
    )
    for sample in samples:
        constructor, forward = (
            sample.module_error_input.constructor_input,
            sample.module_error_input.forward_input,
        )
        kwargs = constructor.kwargs | options
        if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                TWINS[twin](*constructor.args, **kwargs)
        else:
            module = TWINS[twin](*constructor.args, **{"dtype": dtype} | kwargs)
            with pytest.raises(sample.error_type, match=sample.error_regex):
                module(*forward.args, **forward.kwargs)


@pytest.mark.parametrize("twin", TWINS, ids=lambda c: c.__name__)
def test_signature_and_initial_weights_are_torchs(twin):
    if twin in (nn.LSTMCell, nn.GRUCell, nn.RNNCell, nn.LSTM):
        parameters = inspect.signature(TWINS[twin].__init__).parameters.values()
        ours = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)  # which come after torch's
        names = [p.name for p in parameters if p.kind not in ours]
        wanted = {nn.LSTM: ["proj_size", "device", "dtype"], nn.RNNCell: ["nonlinearity", "device", "dtype"]}
        assert names[-3:] == wanted.get(twin, ["bias", "device", "dtype"])
    torch.manual_seed(3)
    theirs = twin(5, 7)
    torch.manual_seed(3)
    ours = TWINS[twin](5, 7, variant="none")
    for (name, a), (other, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    normalized = TWINS[twin](5, 7)
    for name, parameter in normalized.named_parameters():
        if name.startswith("gain"):
            assert (parameter == 1).all()
        elif name.startswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.abs().max() <= 7**-0.5
            assert parameter.std() > 0.1


def test_reset_parameters_knows_a_parametrized_weight():
    lstm = torch.nn.utils.parametrizations.weight_norm(layernorm.LayerNormLSTM(3, 4), "weight_hh_l0")
    lstm.reset_parameters()
    assert lstm.parametrizations.weight_hh_l0.original1.std() > 0.1
    assert (lstm.gain_hh_l0 == 1).all()
    assert lstm(torch.randn(5, 2, 3))[0].isfinite().all()


def test_parameter_names():
    lstm = layernorm.LayerNormLSTM(3, 4, 2, bidirectional=True, proj_size=2)
    names = [n for n, _ in lstm.named_parameters()]
    layer = ["weight_ih", "weight_hh", "weight_hr", "gain_ih", "gain_hh", "bias", "gain_cell", "bias_cell"]
    suffixes = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert names == [name + suffix for suffix in suffixes for name in layer]
    assert [len(w) for w in lstm.all_weights] == [8] * 4
    gru = layernorm.LayerNormGRU(3, 4, bias=False)
    assert [n for n, _ in gru.named_parameters()] == [
        "weight_ih_l0",
        "weight_hh_l0",
        "gain_ih_l0",
        "gain_hh_l0",
    ]
    icefall = layernorm.LayerNormLSTMCell(3, 4, variant="icefall")
    expected = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "gain", "bias", "gain_cell", "bias_cell"]
    assert [n for n, _ in icefall.named_parameters()] == expected


@of_functions([*ALL_FUNCTIONS, *RESET_BEFORE])
def test_derivatives_of_both_orders(cell, variant):
    weights = weights_of(cell, variant)
    x = torch.randn(2, 2, cases.F, dtype=torch.float64, requires_grad=True)
    # A large eps keeps curvature within what finite differences of two orders can resolve.
    function = as_function(cell, weights, variant=dataclasses.replace(variant, eps=0.5))
    leaves = (x, *state_of(cell, 2), *weights.values())
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("twin", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_agree_with_torch(twin, enforce_sorted):
    theirs = twin(3, 4, 2, bidirectional=True, dtype=torch.float64)
    ours = TWINS[twin](3, 4, 2, bidirectional=True, dtype=torch.float64, variant="none")
    ours.load_state_dict(theirs.state_dict())
    lengths = [5, 4, 4, 1] if enforce_sorted else [4, 5, 1, 4]
    packed = pack_padded_sequence(
        torch.randn(5, 4, 3, dtype=torch.float64), lengths, enforce_sorted=enforce_sorted
    )
    results = ours(packed), theirs(packed)
    for a, e in zip(*map(flat, results), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)
    for a, e in zip(*(output[1:] for output, _ in results), strict=True):  # batch sizes and indices
        assert a is e is None or torch.equal(a, e)


@every_cell
def test_layers_and_directions_are_single_ones_put_together(cell):
    rnn = made(cell, num_layers=2, bidirectional=True, dtype=torch.float64)
    data = x = torch.randn(5, 2, 3, dtype=torch.float64)
    finals = []
    for layer in range(2):
        outputs = []
        for suffix in ("", "_reverse"):
            single = SEQUENCES[cell](data.size(-1), 4, dtype=torch.float64)
            ending = f"_l{layer}{suffix}"
            state = {
                n.removesuffix(ending) + "_l0": p for n, p in rnn.state_dict().items() if n.endswith(ending)
            }
            single.load_state_dict(single.state_dict() | state)
            output, final = single(data.flip(0) if suffix else data)
            outputs.append(output.flip(0) if suffix else output)
            finals.append(flat(final)[0])
        data = torch.cat(outputs, -1)
    output, final = rnn(x)
    torch.testing.assert_close(output, data, rtol=0, atol=1e-12)
    torch.testing.assert_close(flat(final)[0], torch.cat(finals), rtol=0, atol=1e-12)


@every_cell
def test_dropout_is_between_layers_and_in_training_only(cell):
    module = SEQUENCES[cell]
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        module(3, 4, dropout=0.5)
    rnn = module(3, 4, 2, dropout=1.0)
    x = torch.randn(5, 2, 3)
    output, _ = rnn(x)
    # With everything dropped the second layer sees zeros, whatever the input.
    torch.testing.assert_close(output, rnn(x * 2 + 1)[0], rtol=0, atol=0)
    rnn.eval()
    assert not torch.equal(rnn(x)[0], rnn(x * 2 + 1)[0])


@pytest.mark.parametrize("module", TWINS.values(), ids=lambda c: c.__name__)
def test_copies_pickles_and_prints(module):
    rnn = randomized(module(3, 4, variant="rms"))
    x = torch.randn(2, 3) if "Cell" in module.__name__ else torch.randn(5, 2, 3)
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert same(flat(twin(x)), flat(rnn(x)))
    assert repr(rnn) == f"{module.__name__}(3, 4, variant='rms')"
    changed = {n: p + 1 for n, p in rnn.named_parameters()}
    swapped = torch.func.functional_call(rnn, changed, (x,))
    assert not torch.equal(flat(swapped)[0], flat(rnn(x))[0])


def test_repr_tells_what_differs_from_the_defaults():
    lstm = layernorm.LayerNormLSTM(
        3, 4, 2, bias=False, batch_first=True, dropout=0.5, bidirectional=True, proj_size=2
    )
    assert repr(lstm) == (
        "LayerNormLSTM(3, 4, proj_size=2, num_layers=2, bias=False, batch_first=True, dropout=0.5, "
        "bidirectional=True, variant='paper')"
    )
    assert "nonlinearity='relu'" in repr(layernorm.LayerNormRNN(3, 4, nonlinearity="relu"))
    for module in SEQUENCES.values():
        assert (
            repr(module(3, 4, recompute=True)) == f"{module.__name__}(3, 4, variant='paper', recompute=True)"
        )


@every_cell
def test_recompute_changes_no_result(cell):
    rnn = SEQUENCES[cell](3, 4, 2, recompute=True)
    x = torch.randn(5, 2, 3)
    results = []
    for rnn.recompute in (True, False):
        output, final = rnn(x)
        output.sum().backward()
        results.append([output, *flat(final), *(p.grad for p in rnn.parameters())])
        rnn.zero_grad()
    assert same(*results)
    rnn.recompute = 1  # the operator gets what the module holds
    with pytest.raises(TypeError, match="recompute should be of type bool, got: int"):
        rnn(x)


@every_cell
def test_an_empty_batch_is_taken_and_empty_time_refused_as_in_torch(cell):
    ours = SEQUENCES[cell](3, 4, 2, bidirectional=True)
    theirs = getattr(nn, cell.upper())(3, 4, 2, bidirectional=True)
    for module in (ours, theirs):
        x = torch.randn(5, 0, 3, requires_grad=True)
        output, final = module(x)
        output.sum().backward()
        assert output.shape == (5, 0, 8)
        assert {s.shape for s in flat(final)} == {(4, 0, 4)}
        assert x.grad.shape == x.shape
        assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
            module(torch.randn(0, 2, 3))


@pytest.mark.usefixtures("native")
@every_cell
def test_at_most_five_frames_lie_between_a_call_and_its_kernel(cell):
    module, x = SEQUENCES[cell](16, 16), torch.randn(1, 1, 16)
    module(x)  # once, so that whatever is cached is there
    entries = []

    def watch(frame, event, function):
        if event != "c_call" or function is not layernorm.ops.native.recurrent:
            return
        names = []
        while frame.f_code is not type(module).forward.__code__:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        entries.append(["forward", *reversed(names)])

    sys.setprofile(watch)
    try:
        module(x)
    finally:
        sys.setprofile(None)
    assert entries
    assert max(map(len, entries)) <= 5, entries


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_makes_a_module_that_trains(name):
    for cell in PRESETS[name]:
        rnn = SEQUENCES[cell](3, 4, 2, variant=name)
        output, _ = rnn(torch.randn(5, 2, 3))
        (output**2).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in rnn.parameters())


LSTM, GRU = layernorm.LayerNormLSTM, layernorm.LayerNormGRU
X, H = torch.zeros(5, 2, 3), torch.zeros(1, 2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LSTM(3, -4), ValueError, "hidden_size must be greater than zero, got -4"),
        (lambda: LSTM(3, 4, -1), ValueError, "num_layers must be greater than zero, got -1"),
        (lambda: LSTM(3, 4, proj_size=-1), ValueError, "proj_size should be a positive integer.*got -1"),
        (lambda: LSTM(3, 4, proj_size=4), ValueError, "proj_size has to be smaller than hidden_size"),
        (lambda: LSTM(3, 4, dropout=1.5), ValueError, r"dropout should be a number in range \[0, 1\].*1.5"),
        (lambda: LSTM(3, 4, recompute=1), TypeError, "recompute should be of type bool, got: int"),
        (lambda: layernorm.LayerNormRNN(3, 4, nonlinearity="sin"), ValueError, "Unknown nonlinearity 'sin'"),
        (lambda: layernorm.LayerNormGRUCell(3, -1), ValueError, "hidden_size must not be negative, got -1"),
        (
            lambda: layernorm.LayerNormGRUCell(3, 4.0),
            TypeError,
            "hidden_size should be of type int, got: float",
        ),
        (lambda: GRU(3, 4, proj_size=2), ValueError, "proj_size argument is only supported for LSTM"),
        (lambda: LSTM(3, 4)(torch.zeros(3)), ValueError, "LSTM: Expected input to be 2D or 3D, got 1D"),
        (lambda: LSTM(3, 4)([X]), TypeError, "input must be a Tensor or PackedSequence, got list"),
        (lambda: LSTM(3, 4)(X[..., :2]), RuntimeError, "Expected 3, got 2"),
        (lambda: LSTM(3, 4)(X, X), TypeError, r"hx must be a tuple \(h_0, c_0\) of two Tensors, got Tensor"),
        (lambda: LSTM(3, 4)(X, (X,)), TypeError, "two Tensors, got tuple of 1"),
        (lambda: GRU(3, 4)(X, (X,)), TypeError, "hx must be a Tensor h_0, got tuple"),
        (lambda: LSTM(3, 4)(X, (X[:1], H)), RuntimeError, r"Expected hidden\[0\] .*2, 4\), got \[1, 2, 3\]"),
        (lambda: LSTM(3, 4)(X, (H, H[:, :1])), RuntimeError, r"hidden\[1\] size .*2, 4\), got \[1, 1, 4\]"),
        (
            lambda: GRU(3, 4)(X, H[..., None]),
            RuntimeError,
            "batched 3-D .* hx should also be 3-D but got 4-D",
        ),
        (
            lambda: GRU(3, 4)(X, H.double()),
            RuntimeError,
            "hx must have the input's dtype .*32, got .*float64",
        ),
        (lambda: layernorm.LayerNormLSTMCell(3, 4)(X), ValueError, "Expected input to be 1D or 2D, got 3D"),
        (lambda: layernorm.LayerNormGRUCell(3, 4)(X[0], H[0, 0]), RuntimeError, "hidden0 .* as input, 2"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


WEIGHTS = weights_of("gru", dtype=torch.float32)


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        (WEIGHTS | {"gain": torch.zeros(12)}, {}, ValueError, "unknown: gain"),
        ({k: v for k, v in WEIGHTS.items() if k != "gain_ih"}, {}, ValueError, "missing: gain_ih"),
        (WEIGHTS | {"gain_ih": torch.zeros(3)}, {}, RuntimeError, r"gain_ih of shape \[12\], but got \[3\]"),
        (WEIGHTS, {"variant": "nope"}, ValueError, "unknown variant"),
        (WEIGHTS, {"recompute": None}, TypeError, "recompute should be of type bool, got: NoneType"),
        (WEIGHTS, {"batch_sizes": [2]}, RuntimeError, "input must have 2 dimensions, got 3"),
        ({}, {}, ValueError, "weights must hold the matrix weight_ih"),
    ],
)
def test_errors_of_the_sequence_functions(weights, options, error, message):
    with pytest.raises(error, match=message):
        LF.gru(X, torch.zeros(2, 4), weights, **options)


def test_errors_of_batch_sizes_and_state():
    with pytest.raises(ValueError, match=r"batch_sizes must be positive, not increasing.*got \[1, 2\]"):
        LF.gru(torch.zeros(3, 3), torch.zeros(2, 4), WEIGHTS, batch_sizes=[1, 2])
    with pytest.raises(RuntimeError, match=r"Expected h of the state to have size \[2, 4\], got \[3, 4\]"):
        LF.gru(X, torch.zeros(3, 4), WEIGHTS)
    with pytest.raises(ValueError, match="Unknown nonlinearity"):
        LF.rnn(X, torch.zeros(2, 4), weights_of("rnn", dtype=torch.float32), nonlinearity="sin")


# ---- the start ----
