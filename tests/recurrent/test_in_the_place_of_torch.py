"""Modules in code that was written for torch.nn: its classes, its attributes, its exporters."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import layernorm
from tests.recurrent.cases import CELLS, SEQUENCES, flat

TWINS = {"lstm": (nn.LSTM, nn.LSTMCell), "gru": (nn.GRU, nn.GRUCell), "rnn": (nn.RNN, nn.RNNCell)}
every_cell = pytest.mark.parametrize("cell", TWINS)


@every_cell
def test_each_class_is_one_of_the_class_it_replaces(cell):
    sequence, single = TWINS[cell]
    assert issubclass(SEQUENCES[cell], sequence)
    assert issubclass(CELLS[cell], single)

    def start(module):
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            for name, parameter in module.named_parameters():
                if name.startswith("weight_hh"):
                    nn.init.orthogonal_(parameter)

    for module in (SEQUENCES[cell](3, 4), CELLS[cell](3, 4)):
        module.apply(start)
        weight = dict(module.named_parameters()).get("weight_hh_l0", getattr(module, "weight_hh", None))
        gram = weight.T @ weight
        torch.testing.assert_close(gram, torch.eye(4), rtol=0, atol=1e-5)


@every_cell
def test_the_attributes_of_an_rnn_base(cell):
    options = {"num_layers": 2, "bidirectional": True}
    theirs, ours = TWINS[cell][0](3, 4, **options), SEQUENCES[cell](3, 4, variant="none", **options)
    assert (ours.mode, ours._all_weights) == (theirs.mode, theirs._all_weights)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert [p.shape for p in ours._flat_weights] == [p.shape for p in theirs._flat_weights]
    normalized = SEQUENCES[cell](3, 4, **options)
    assert all(p is q for p, q in zip(normalized._flat_weights, normalized.parameters(), strict=True))
    assert layernorm.LayerNormRNN(3, 4, nonlinearity="relu").mode == "RNN_RELU"
    # What is assigned later is what is listed.
    normalized.weight_hh_l0 = nn.Parameter(torch.zeros_like(normalized.weight_hh_l0))
    assert normalized._flat_weights[1] is normalized.weight_hh_l0
    normalized.flatten_parameters()
    for other in (copy.deepcopy(normalized), pickle.loads(pickle.dumps(normalized))):
        x = torch.randn(5, 2, 3)
        assert torch.equal(other(x)[0], normalized(x)[0])
        assert other.double()(x.double())[0].dtype == torch.float64


def test_a_mixin_over_rnn_base():
    class Mixin(nn.RNNBase):
        def forward(self, x, hx=None, lengths=None):
            return super().forward(x, hx=hx)

    class Flexible(Mixin, layernorm.LayerNormLSTM):
        pass

    module = Flexible(3, 4, variant="haste")
    x = torch.randn(5, 2, 3)
    assert torch.equal(module(x, lengths=[5, 5])[0], layernorm.LayerNormLSTM.forward(module, x)[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@every_cell
def test_weight_norm_takes_a_weight_and_gives_it_back(cell):
    module = SEQUENCES[cell](3, 4)
    count = len(list(module.parameters()))
    nn.utils.weight_norm(module, "weight_hh_l0")
    assert sum(isinstance(p, nn.Parameter) for p in module._flat_weights) == count - 1
    nn.utils.remove_weight_norm(module, "weight_hh_l0")
    assert sum(isinstance(p, nn.Parameter) for p in module._flat_weights) == count
    assert "weight_hh_l0" in module._parameters


@pytest.mark.parametrize("variant", ["paper", "none"])
@every_cell
def test_cells_of_no_feature(cell, variant):
    for sizes in ((10, 0), (0, 4), (0, 0)):
        module = CELLS[cell](*sizes, variant=variant)
        x = torch.randn(3, sizes[0], requires_grad=True)
        found = flat(module(x))
        assert [t.shape for t in found] == [(3, sizes[1])] * len(found)
        sum(t.sum() for t in found).backward()


@every_cell
def test_script_says_what_to_use(cell):
    for module in (SEQUENCES[cell](3, 4), nn.Sequential(CELLS[cell](3, 4))):
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace, or use torch\.export"):
            torch.jit.script(module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
@every_cell
def test_onnx_export_writes_operators_of_onnx(cell, dynamo):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    cases = (
        (SEQUENCES[cell](3, 4), torch.randn(5, 2, 3)),
        (SEQUENCES[cell](3, 4, variant="none"), torch.randn(5, 2, 3)),
        (CELLS[cell](3, 4), torch.randn(2, 3)),
    )
    for module, x in cases:
        file, quiet = io.BytesIO(), io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), warnings.catch_warnings():
            torch.onnx.export(module.eval(), (x,), file, dynamo=dynamo)
        model = onnx.load_from_string(file.getvalue())
        assert {node.domain for node in model.graph.node} <= {"", "pkg.onnxscript.torch_lib", "ai.onnx"}
        evaluator = reference.ReferenceEvaluator(model)
        found = evaluator.run(None, {model.graph.input[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found[0]), flat(module(x))[0], rtol=1e-4, atol=1e-5)
