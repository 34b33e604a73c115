"""The spec of a layer: its codes, the facts that follow from it, and codes of no spec."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import layernorm
from layernorm import Variant
from layernorm.spec import GATES_PARAMETERS, PARAMETERS, LayerSpec, layer_spec
from layernorm.variants import GATES, PRESETS, resolve
from tests.recurrent.cases import ALL_FUNCTIONS, CELLS, SEQUENCES, F, H, detached, operator_arguments

SPECS = list(
    dict.fromkeys(
        [
            *(LayerSpec(cell, variant) for cells in PRESETS.values() for cell, variant in cells.items()),
            *(LayerSpec(*function) for function in ALL_FUNCTIONS),
            *(LayerSpec(cell, Variant(eps=eps)) for cell in GATES for eps in (0.0, 1e-12, 0.1, 3.0)),
            *(LayerSpec(cell, variant, "relu") for cell, variant in ALL_FUNCTIONS),
        ]
    )
)
every_spec = pytest.mark.parametrize(
    "spec", SPECS, ids=[f"{spec.operation}-{i}" for i, spec in enumerate(SPECS)]
)


@every_spec
def test_codes_are_decoded_to_the_spec_that_they_encode(spec):
    decoded = LayerSpec.decode(spec.codes, spec.eps)
    assert decoded == spec
    assert hash(decoded) == hash(spec)
    for fact in dataclasses.fields(LayerSpec):
        assert getattr(decoded, fact.name) == getattr(spec, fact.name)


def test_specs_that_differ_have_other_codes_or_another_eps():
    assert len({(spec.codes, spec.eps) for spec in SPECS}) == len(SPECS)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("recompute", [False, True])
@every_spec
def test_forward_keeps_for_backward_what_the_spec_says(spec, recompute):
    given = detached(operator_arguments(spec.cell, spec.variant, recompute=recompute))
    given["spec"] = spec.codes
    rows, groups = 6, len(spec.groups)
    none, kept = (0,), not recompute
    expected = [
        (rows, spec.gates * H) if kept else none,
        (rows, spec.saved_h_gates * H) if kept and spec.saved_h_gates else none,
        (rows, H) if spec.cell == "lstm" else none,
        (rows, spec.statistics) if kept else none,
    ]
    assert spec.statistics in (groups, 2 * groups)
    real = torch.ops.layernorm.recurrent_forward(**given)
    with FakeTensorMode() as mode:
        lifted = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t, given)
        fake = torch.ops.layernorm.recurrent_forward(**lifted)
    assert [tuple(t.shape) for t in real[3:]] == expected
    assert [tuple(t.shape) for t in fake[3:]] == expected
    assert [t.dtype for t in fake] == [t.dtype for t in real]


@every_spec
def test_names_are_those_of_the_parameters(spec):
    proj = 2 if spec.cell == "lstm" else 0
    shapes = spec.parameter_shapes(F, H, proj_size=proj)
    assert len(spec.names) == len(PARAMETERS) == 11
    assert set(shapes) <= set(spec.names)
    assert shapes["weight_ih"] == (spec.gates * H, F)
    assert sum(spec.groups) in (0, spec.gates)
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    listed = spec.listed(weights)
    named = spec.named(listed)
    assert list(named) == [name for name in spec.names if name in shapes]
    assert all(named[name] is weights[name] for name in weights)
    for_gates = spec.listed_for_gates(weights)
    places = [PARAMETERS.index(parameter) for parameter in GATES_PARAMETERS]
    assert all(a is listed[place] for a, place in zip(for_gates, places, strict=True))
    assert spec.named(for_gates, GATES_PARAMETERS).items() <= named.items()
    assert [name for name in spec.gates_names if name] == [n for n in shapes if not n.startswith("weight")]


# ---- codes of no spec ----

RIGHT = list(layer_spec("lstm", "paper").codes)
WRONG_CODES = {
    "none": ([], "spec must have 8 codes.*got"),
    "one too few": (RIGHT[:-1], "spec must have 8 codes.*got"),
    "one too many": ([*RIGHT, 0], "spec must have 8 codes.*got"),
} | {
    f"{name} {code}": (
        [*RIGHT[:at], code, *RIGHT[at + 1 :]],
        rf"the code of {name} in spec must be in \[0, {count}\), got {code}",
    )
    for at, (name, count) in enumerate(
        {"cell": 6, "kind": 3, "inputs": 3, "scope": 3, "cell_norm": 3, "projection_bias": 2}.items()
    )
    for code in (-1, count, 1 << 40)
}
wrong_codes = pytest.mark.parametrize(
    ("codes", "message"), [pytest.param(*case, id=name) for name, case in WRONG_CODES.items()]
)


@wrong_codes
def test_python_names_the_code_that_is_unknown(codes, message):
    with pytest.raises(RuntimeError, match="layernorm: " + message):
        LayerSpec.decode(codes, 1e-5)


@pytest.mark.usefixtures("native")
@wrong_codes
def test_every_operator_names_the_code_that_is_unknown(codes, message):
    given = detached(operator_arguments(resets=False)) | {"spec": codes}
    operators = torch.ops.layernorm
    gates = [torch.zeros(2, 4 * H), torch.zeros(2, 4 * H), torch.zeros(2, H)]
    vectors = layer_spec("lstm", "paper").listed_for_gates(
        dict(zip(layer_spec("lstm", "paper").names, given["weights"], strict=True))
    )
    state = (torch.zeros(1, 2, H), torch.zeros(1, 2, H))
    calls = [
        lambda: operators.recurrent(**given),
        lambda: operators.recurrent_forward(**given),
        lambda: operators.lstm_gates(*gates, *vectors, codes, 1e-5),
        lambda: operators.gru_gates(*gates, *vectors, codes, 1e-5),
        lambda: layernorm.ops.native.Stream([given["weights"]], *state, tuple(codes), 1e-5),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=message):
            call()
    with FakeTensorMode() as mode:
        lifted = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t, given)
        for operator in (operators.recurrent, operators.recurrent_forward):
            with pytest.raises(RuntimeError, match=message):
                operator(**lifted)
        step = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in (*gates, *vectors)]
        with pytest.raises(RuntimeError, match=message):
            operators.lstm_gates(*step, codes, 1e-5)
        with pytest.raises(RuntimeError, match=message):
            operators.lstm_gates_backward(step[1:3], *step, codes, 1e-5, [True] * 11)


# ---- specs of presets and modules ----


def test_a_preset_and_its_variant_are_one_spec():
    for name, cells in PRESETS.items():
        for cell in cells:
            assert layer_spec(cell, name) == LayerSpec(cell, resolve(name, cell))
            assert layer_spec(cell, name) is layer_spec(cell, name)


@pytest.mark.parametrize("cell", GATES)
def test_a_module_keeps_its_spec(cell):
    for module in (SEQUENCES[cell](F, H), CELLS[cell](F, H)):
        assert module.spec == layer_spec(cell, "paper")
        assert module.variant is module.spec.variant
        with pytest.raises(AttributeError):
            module.variant = Variant(kind="rms")
        with pytest.raises(dataclasses.FrozenInstanceError):
            module.spec.cell = "lstm"
        if cell == "rnn":
            assert module.nonlinearity == "tanh"
            with pytest.raises(AttributeError):
                module.nonlinearity = "relu"
