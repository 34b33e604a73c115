"""``layernorm.convert``: recurrent modules replaced in place, and put back."""

from __future__ import annotations

import pytest
import torch

import layernorm


class Model(torch.nn.Module):
    """Three recurrent layers at different depths, one of them twice."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.LSTM(3, 5, 2, batch_first=True, dropout=0.5, bidirectional=True)
        self.inner = torch.nn.ModuleDict({"decoder": torch.nn.LSTM(10, 6, proj_size=4, batch_first=True)})
        self.cell = torch.nn.LSTMCell(4, 7)
        self.again = self.cell
        self.head = torch.nn.Linear(7, 2)

    def forward(self, x):
        x, _ = self.encoder(x)
        x, _ = self.inner["decoder"](x)
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        h, _ = self.again(x[:, -1], state)
        return self.head(h)


def test_a_model_is_converted_and_back():
    model = Model().eval()
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model.cell.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    x = torch.randn(2, 4, 3)
    before = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seen.clear()
    report = layernorm.convert(model)
    assert report.replaced == {
        "encoder": "LayerNormLSTM",
        "inner.decoder": "LayerNormLSTM",
        "cell": "LayerNormLSTMCell",
    }
    assert report.left == {}
    assert report.speedup is None
    # The same objects, the same parameters.
    assert all(module is dict(model.named_modules())[name] for name, module in modules.items())
    assert all(parameter is dict(model.named_parameters())[name] for name, parameter in parameters.items())
    assert not model.encoder.training
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert set(seen) == {"LayerNormLSTMCell"}
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    model.train()(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model.encoder.weight_ih_l0, state["encoder.weight_ih_l0"])
    assert layernorm.convert(model).replaced == {}
    after = model.eval()(x)
    back = layernorm.convert(model, "torch.nn")
    assert back.replaced == {"encoder": "LSTM", "inner.decoder": "LSTM", "cell": "LSTMCell"}
    assert type(model.encoder) is torch.nn.LSTM
    assert repr(model) == repr(Model())
    torch.testing.assert_close(model(x), after, rtol=1e-5, atol=1e-6)
    assert all(parameter is dict(model.named_parameters())[name] for name, parameter in parameters.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.GRU(3, 5, 2, bias=False),
        lambda: torch.nn.RNN(3, 5, nonlinearity="relu", bidirectional=True),
        lambda: torch.nn.GRUCell(3, 5),
        lambda: torch.nn.RNNCell(3, 5, bias=False, nonlinearity="relu"),
        lambda: torch.nn.LSTM(3, 5).double(),
    ],
)
def test_the_model_itself_may_be_recurrent(make):
    module = make()
    x = torch.randn(2, 3, dtype=next(module.parameters()).dtype)
    x = x if isinstance(module, torch.nn.RNNCellBase) else x.unsqueeze(0)
    before, text = module(x), repr(module)
    report = layernorm.convert(module)
    assert report.replaced == {"": type(module).__name__}
    assert str(report).startswith(
        f"1 recurrent module replaced\n  (the model itself): {type(module).__name__}\n"
    )
    torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-6)
    module = torch.nn.Sequential(module)
    layernorm.convert(module, to="torch.nn")
    assert repr(module[0]) == text
    torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-6)


class LayerNormGRUCell(torch.nn.Module):
    """A cell of sheeprl's form, and of one that is not."""

    def __init__(self, shift=1.0):
        super().__init__()
        self.linear = torch.nn.Linear(9, 15, bias=False)
        self.layer_norm = torch.nn.LayerNorm(15, eps=1e-3)
        self.shift = shift

    def forward(self, input, hx):
        reset, candidate, update = self.layer_norm(self.linear(torch.cat((hx, input), -1))).chunk(3, -1)
        update = torch.sigmoid(update - self.shift)
        return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * hx


class LayerNormLSTMCell(torch.nn.LSTMCell):
    """A cell of the form that many have from PyTorch's issue 11335."""

    def __init__(self):
        super().__init__(4, 5)
        self.ln_ih, self.ln_hh, self.ln_ho = (torch.nn.LayerNorm(size) for size in (20, 20, 5))

    def forward(self, x, state):
        h, c = state
        gates = self.ln_ih(x @ self.weight_ih.T + self.bias_ih) + self.ln_hh(
            h @ self.weight_hh.T + self.bias_hh
        )
        i, f, o, g = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(self.ln_ho(c)), c


def test_a_name_that_several_sources_have():
    model = torch.nn.Sequential(LayerNormLSTMCell())
    x, state = torch.randn(2, 4), (torch.randn(2, 5), torch.randn(2, 5))
    before = model[0](x, state)
    assert layernorm.convert(model).replaced == {"0": "LayerNormLSTMCell"}
    assert isinstance(model[0], layernorm.LayerNormLSTMCell)
    for ours, theirs in zip(model[0](x, state), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_cells_of_other_code_are_known_by_name_and_tried():
    model = torch.nn.ModuleDict({"right": LayerNormGRUCell(), "wrong": LayerNormGRUCell(shift=2.0)})
    x, h = torch.randn(2, 4), torch.randn(2, 5)
    before = model["right"](x, h)
    report = layernorm.convert(model)
    assert report.replaced == {"right": "LayerNormGRUCell"}
    assert isinstance(model["right"], layernorm.LayerNormGRUCell)
    assert "take its weights with layernorm.interop.load" in report.left["wrong"]
    torch.testing.assert_close(model["right"](x, h), before, rtol=1e-5, atol=1e-6)


def test_modules_that_may_compute_something_else_are_left():
    class Own(torch.nn.GRU):
        pass

    class LayerNormGRUCell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gates = torch.nn.Linear(3, 4)

    patched = torch.nn.LSTM(3, 5)
    patched.forward = lambda x: x
    parametrized = torch.nn.utils.parametrizations.weight_norm(torch.nn.LSTM(3, 5), "weight_hh_l0")
    given = {"own": Own(3, 5), "patched": patched, "parametrized": parametrized, "other": LayerNormGRUCell()}
    report = layernorm.convert(torch.nn.ModuleDict(given))
    assert report.replaced == {}
    assert "subclass of GRU" in report.left["own"]
    assert "own forward" in report.left["patched"]
    assert "parametrized" in report.left["parametrized"]
    assert "is that of none of icefall, sheeprl, innereye" in report.left["other"]
    normalized = torch.nn.Sequential(layernorm.LayerNormLSTM(3, 5))
    assert "torch.nn has no LayerNormLSTM of variant" in layernorm.convert(normalized, "torch.nn").left["0"]


def test_a_speed_up_is_measured_on_request():
    model = torch.nn.Sequential(torch.nn.GRUCell(16, 16))
    report = layernorm.convert(model, example=(torch.randn(1, 16),))
    assert report.speedup > 0
    assert str(report).endswith(f"{report.speedup:.2f} times as fast on the example")


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        layernorm.convert("model")
    with pytest.raises(ValueError, match=r"to must be 'layernorm' or 'torch\.nn', got 'onnx'"):
        layernorm.convert(torch.nn.LSTM(3, 5), to="onnx")
