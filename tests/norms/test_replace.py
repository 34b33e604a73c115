"""Replacing the norms of a model in place."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import layernorm
from layernorm import backends, replace_norms

from .replaced import TWINS, ByMixin, Extended, is_replaced

BOTH = pytest.mark.parametrize("norm", TWINS, ids=lambda c: c.__name__)


def model_of_both():
    block = nn.ModuleDict({"norm": nn.LayerNorm(4), "out": nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))})
    return nn.Sequential(nn.LayerNorm(4, bias=False), block, nn.RMSNorm(4, elementwise_affine=False))


def test_replaces_every_norm_and_says_so():
    model = model_of_both()
    report = replace_norms(model)
    assert report.replaced == {
        "0": "LayerNorm",
        "1.norm": "LayerNorm",
        "1.out.1": "RMSNorm",
        "2": "RMSNorm",
    }
    assert report.left == {}
    for name, kind in report.replaced.items():
        assert type(model.get_submodule(name)) is getattr(layernorm, kind)
        assert is_replaced(model.get_submodule(name))
    assert str(report).splitlines() == [
        "4 norms replaced",
        "  0: LayerNorm",
        "  1.norm: LayerNorm",
        "  1.out.1: RMSNorm",
        "  2: RMSNorm",
        "0 norms left alone",
    ]


def test_a_second_call_replaces_nothing():
    model = nn.Sequential(model_of_both(), Extended(4), ByMixin(4))
    first = replace_norms(model)
    classes = [type(m) for m in model.modules()]
    second = replace_norms(model)
    assert second.replaced == {}
    assert second.left == first.left == {"2": "ByMixin has its own forward"}
    assert [type(m) for m in model.modules()] == classes


def test_changes_nothing_but_the_class():
    model = nn.Sequential(model_of_both(), Extended(4)).to(torch.bfloat16)
    model[0][0].eval()
    model[0][0].weight.requires_grad_(False)
    model[0][0].note = "mine"
    modules, state, shown = dict(model.named_modules()), model.state_dict(keep_vars=True), repr(model)
    attributes = {name: dict(vars(m)) for name, m in modules.items()}
    replace_norms(model)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is state[name] for name in state)
    # Every attribute is the same object: parameters, hooks, training, eps, and what users put there.
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert all(vars(module)[key] is value for key, value in attributes[name].items())
    assert repr(model) == shown


@BOTH
def test_the_model_itself_may_be_a_norm(norm):
    model = norm(4)
    report = replace_norms(model)
    assert type(model) is TWINS[norm]
    assert report.replaced == {"": norm.__name__}
    assert str(report) == f"1 norm replaced\n  (the model itself): {norm.__name__}\n0 norms left alone"


def test_shared_norms_and_tied_parameters_stay_so():
    shared, a, b = nn.LayerNorm(4), nn.RMSNorm(4), nn.RMSNorm(4)
    b.weight = a.weight
    model = nn.ModuleDict({"first": shared, "second": shared, "a": a, "b": b})
    assert list(replace_norms(model).replaced) == ["first", "a", "b"]
    assert model["first"] is model["second"] is shared
    assert model["a"].weight is model["b"].weight
    assert is_replaced(shared)


def test_norms_that_were_ours_are_not_mentioned():
    class Mine(layernorm.LayerNorm):
        def forward(self, input):
            return -super().forward(input)

    model = nn.Sequential(layernorm.LayerNorm(4), Mine(4), nn.GroupNorm(2, 4))
    assert replace_norms(model) == layernorm.Replacement({}, {})
    assert type(model[1]) is Mine


def test_on_the_meta_device():
    model = nn.LayerNorm(4, device="meta", dtype=torch.float16)
    replace_norms(model)
    assert model(torch.empty(2, 4, device="meta", dtype=torch.float16)).is_meta


def encoder(**kwargs):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **kwargs)
    model = nn.TransformerEncoder(layer, 2, norm=nn.RMSNorm(16), enable_nested_tensor=False)
    for parameter in model.parameters():  # gains and biases that show, and layers that differ
        nn.init.normal_(parameter, 0.5, 0.3) if parameter.dim() == 1 else nn.init.xavier_uniform_(parameter)
    return model


def test_transformer_trains_to_the_same_bits_on_the_same_kernel():
    model = encoder()
    other = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, other)]
    before = [p.detach().clone() for p in model.parameters()]
    report = replace_norms(other)
    assert len(report.replaced) == 5
    x = torch.randn(3, 7, 16)
    with backends.use("torch"):
        for _ in range(3):
            for m, optimizer in zip((model, other), optimizers, strict=True):
                optimizer.zero_grad()
                m(x).sin().sum().backward()
                optimizer.step()
    for name, p, q, old in zip(
        dict(model.named_parameters()), model.parameters(), other.parameters(), before, strict=True
    ):
        assert torch.equal(p, q), name
        assert not torch.equal(q, old), name


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_is_as_exact_as_before(norm_first):
    model = encoder(norm_first=norm_first)
    x = torch.randn(3, 7, 16)

    def results(m, x):
        x = x.clone().requires_grad_()
        output = m(x)
        output.sin().sum().backward()
        grads = [p.grad.double() for p in m.parameters()]
        m.zero_grad()
        return [output.detach().double(), x.grad.double(), *grads]

    exact = results(copy.deepcopy(model).double(), x.double())
    theirs = results(model, x)
    replace_norms(model)
    for ours, torchs, true in zip(results(model, x), theirs, exact, strict=True):
        # Both are roundings of the same numbers and differ in the order of the sums in the norms. One norm
        # rounds log2(16) + 8 times a value of at most √16, relative to the largest gradient or output;
        # what follows amplifies that as it does torch's own roundings, for which 4 times those leave room.
        slack = 12 * 4 * torch.finfo(torch.float32).eps * max(1.0, true.abs().max().item())
        assert (ours - true).abs().max() <= 4 * (torchs - true).abs().max() + slack


def test_transformers_fast_path():
    model = encoder().eval()
    x, padding = torch.randn(3, 7, 16), torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad(), backends.use("torch"):
        expected = model(x, src_key_padding_mask=padding)
        replace_norms(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_ragged_rows_of_a_padded_batch():
    # A hook on a norm takes a layer off PyTorch's fast path but leaves it the encoder's nested tensor.
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    model.layers[1].norm1.register_forward_hook(lambda *_: None)
    x, padding = torch.randn(3, 7, 16), torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        replace_norms(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), expected)


@BOTH
def test_hooks_are_still_called(norm):
    model, called = nn.Sequential(norm(4)), []
    handles = [
        model[0].register_forward_pre_hook(lambda *_: called.append("before")),
        model[0].register_forward_hook(lambda *_: called.append("after")),
        model[0].register_full_backward_hook(lambda *_: called.append("backward")),
        model[0].register_state_dict_pre_hook(lambda *_: called.append("state")),
    ]
    replace_norms(model)
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    model.state_dict()
    assert called == ["before", "after", "backward", "state"]
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 4))
    assert len(called) == 4


def test_an_instance_with_its_own_forward_is_left_alone():
    model = nn.LayerNorm(4)
    model.forward = torch.tanh
    assert replace_norms(model).left == {"": "this instance has its own forward"}
    assert type(model) is nn.LayerNorm


def test_parametrized_before_and_after():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4), Extended(4))
    parametrizations.weight_norm(model[0])
    before = type(model[0])
    report = replace_norms(model)
    assert type(model[0]) is before
    assert list(report.replaced) == ["1", "2"]
    assert report.left["0"].startswith("parametrized")
    for module in model[1:]:
        cls = type(module)
        parametrizations.weight_norm(module)
        assert is_replaced(module)
        assert is_replaced(copy.deepcopy(module))
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            pickle.dumps(module)
        assert replace_norms(module) == ({}, {})
        parametrize.remove_parametrizations(module, "weight")
        assert type(module) is cls
        assert is_replaced(module)
    # What was left alone can be parametrized no longer, and then be replaced.
    parametrize.remove_parametrizations(model[0], "weight")
    assert replace_norms(model).replaced == {"0": "LayerNorm"}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weights_computed_by_hooks():
    pruned, normed = nn.LayerNorm(4), nn.LayerNorm(4)
    prune.random_unstructured(pruned, "weight", amount=2)
    nn.utils.weight_norm(normed)
    model, x = nn.Sequential(pruned, normed), torch.randn(2, 4)
    with backends.use("torch"):
        expected = model(x)
        assert len(replace_norms(model).replaced) == 2
        assert torch.equal(model(x), expected)
        nn.utils.remove_weight_norm(normed)
        prune.remove(pruned, "weight")
        assert torch.equal(model(x), expected)
    assert all(map(is_replaced, model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="no quantized engine")
def test_prepared_for_quantization_is_left_alone():
    quantization = torch.ao.quantization
    model = nn.Sequential(
        quantization.QuantStub(),
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        quantization.DeQuantStub(),
        nn.LayerNorm(4),
    ).eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    model[4].qconfig = None
    quantization.prepare(model, inplace=True)
    report = replace_norms(model)
    assert list(report.replaced) == ["4"]
    assert report.left["2"].startswith("prepared for quantization")
    model(torch.randn(8, 4))
    quantization.convert(model, inplace=True)
    assert model(torch.randn(8, 4)).dtype == torch.float32
    assert replace_norms(model).left == {"2": "LayerNorm has its own forward"}


@pytest.mark.parametrize("compile", ["script", "trace"])
def test_torchscript_is_left_alone(compile):
    inner = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    args = (inner, torch.ones(2, 4)) if compile == "trace" else (inner,)
    model = nn.Sequential(getattr(torch.jit, compile)(*args), nn.LayerNorm(4))
    assert replace_norms(model) == ({"1": "LayerNorm"}, {"0.0": "compiled by TorchScript"})
    assert model(torch.ones(2, 4)).shape == (2, 4)


def test_traced_by_fx_before():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)))
    assert replace_norms(model).replaced == {"0": "LayerNorm"}
    assert model(torch.ones(2, 4)).shape == (2, 4)


def test_torch_compile_before_and_after():
    torch.compiler.reset()
    model, x = nn.Sequential(nn.LayerNorm(4), Extended(4), nn.RMSNorm(4)), torch.randn(3, 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with backends.use("torch"):
        expected = model(x)
        assert torch.equal(compiled(x), expected)
        assert list(replace_norms(compiled).replaced) == [f"_orig_mod.{i}" for i in range(3)]
        assert torch.equal(compiled(x), expected)
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
        program = torch.export.export(model, (x,)).module()
        assert torch.equal(program(x), expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ([nn.LayerNorm(4)], "model must be a torch.nn.Module, got list"),
        (None, "model must be a torch.nn.Module, got NoneType"),
        (nn.LayerNorm, "model must be a torch.nn.Module, got the class LayerNorm; make an instance"),
    ],
)
def test_what_is_no_module_is_refused(model, message):
    with pytest.raises(TypeError, match=f"replace_norms: {message}"):
        replace_norms(model)
