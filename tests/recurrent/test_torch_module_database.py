"""PyTorch's own database of modules as a judge: ours get its samples and its wrong arguments."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import layernorm
from layernorm.variants import PRESETS

CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn", "LSTMCell": "lstm", "GRUCell": "gru", "RNNCell": "rnn"}
CASES = [
    pytest.param(info, variant, id=f"{info.module_cls.__name__}-{variant}")
    for info in module_db
    if info.module_cls.__name__ in CELLS
    for variant in PRESETS
    if CELLS[info.module_cls.__name__] in PRESETS[variant]
]
every_case = pytest.mark.parametrize(("info", "variant"), CASES)


def ours(info):
    return getattr(layernorm, f"LayerNorm{info.module_cls.__name__}")


def inputs(info, dtype=torch.float64, training=True):
    torch.manual_seed(0)
    options = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": training}
    for given in info.module_inputs_func(info, **options):
        yield given.constructor_input, given.forward_input


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return [value.data]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors(part)]
    return []


def test_the_database_has_all_six():
    assert {case.values[0].module_cls.__name__ for case in CASES} == {*CELLS}


@every_case
def test_samples_run_with_their_shapes(info, variant):
    # Built, moved, copied, pickled and run on every sample of the database, in both modes.
    for training in (True, False):
        for dtype in info.dtypes:
            for made, called in inputs(info, dtype, training):
                module = ours(info)(*made.args, **made.kwargs, dtype=dtype, variant=variant)
                theirs = info.module_cls(*made.args, **made.kwargs, dtype=dtype)
                if variant == "none":
                    module.load_state_dict(theirs.state_dict())
                    theirs.load_state_dict(module.state_dict())
                module.train(training)
                expected = tensors(theirs.train(training)(*called.args, **called.kwargs))
                # Dropout's numbers come from the same generator.
                torch.manual_seed(1)
                found = tensors(module(*called.args, **called.kwargs))
                assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]
                again = pickle.loads(pickle.dumps(copy.deepcopy(module)))
                torch.manual_seed(1)
                assert all(map(torch.equal, tensors(again(*called.args, **called.kwargs)), found))
                sum(t.sum() for t in found).backward()
                assert all(p.grad is not None for p in module.parameters())
                assert repr(module)


@pytest.mark.parametrize(
    "info", [case.values[0] for case in CASES if case.values[1] == "none"], ids=lambda i: i.name
)
def test_samples_have_the_values_of_torch(info):
    for made, called in inputs(info):
        module = ours(info)(*made.args, **made.kwargs, dtype=torch.float64, variant="none")
        theirs = info.module_cls(*made.args, **made.kwargs, dtype=torch.float64)
        module.load_state_dict(theirs.state_dict())
        results = []
        for one in (module.eval(), theirs.eval()):
            found = tensors(one(*called.args, **called.kwargs))
            leaves = [
                *one.parameters(),
                *(t for t in tensors([*called.args]) if t.requires_grad and t.is_leaf),
            ]
            loss = sum(t.square().sum() for t in found)
            results.append([*found, *torch.autograd.grad(loss, leaves, allow_unused=True)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@every_case
def test_wrong_arguments_get_the_errors_of_torch(info, variant):
    if info.module_error_inputs_func is None:
        pytest.skip("the database has none")
    options = {"device": "cpu", "dtype": torch.float32, "requires_grad": False, "training": False}
    for case in info.module_error_inputs_func(info, **options):
        made = case.module_error_input.constructor_input
        called = case.module_error_input.forward_input
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                ours(info)(*made.args, **made.kwargs, variant=variant)
            continue
        module = ours(info)(*made.args, **made.kwargs, variant=variant)
        with pytest.raises(case.error_type, match=case.error_regex):
            module(*called.args, **called.kwargs)


@every_case
def test_parameters_are_made_where_and_as_asked(info, variant):
    for made, _ in inputs(info):
        for options in ({"device": "meta"}, {"dtype": torch.bfloat16}):
            module = ours(info)(*made.args, **made.kwargs, **options, variant=variant)
            for parameter in module.parameters():
                assert parameter.is_meta == ("device" in options)
                assert parameter.dtype == options.get("dtype", torch.float32)
