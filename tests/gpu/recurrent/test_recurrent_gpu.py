"""The Triton kernels of recurrent layers: the promises of the compiled ones, interpreted and on a GPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch

from layernorm import Variant, backends
from layernorm.gpu import settings, tiers
from layernorm.parametrizations import block_diagonal
from layernorm.spec import layer_spec
from layernorm.variants import GATES
from tests.recurrent.cases import (
    ALL_FUNCTIONS,
    CELL_FUNCTIONS,
    FUNCTIONS,
    Layer,
    backward_arguments,
    detached,
    every_function,
    largest,
    of_functions,
    operator_arguments,
    same,
    seeds_like,
)
from tests.recurrent.drawn_networks import CHOICES, LARGE, Case, alike, drawn_cases, network, of_cases

pytest.importorskip("triton", reason="Triton is not installed: pip install 'layernorm[triton]'")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter takes milliseconds for a row of a step.
SMALL = CHOICES | {"hidden": (1, 3, 7, 33), "features": (1, 5, 33), "steps": (1, 3), "rows": (1, 3)}
some_functions = of_functions(FUNCTIONS[::2])


@pytest.fixture(params=["interpreted", "on_gpu"])
def place(request) -> str:
    """Name where the Triton kernels run: every tensor that is made lies there."""
    request.getfixturevalue(request.param)
    return request.param


@pytest.fixture(params=["interpreted", "gpu"])
def kernel(request) -> str:
    """Return the kernel's name by which the cases of ``test_recurrent_kernels`` know what computes them."""
    request.getfixturevalue(request.param)
    return "native" if request.param == "interpreted" else "triton"


@pytest.fixture(params=["triton", "looped"])
def loop(request, monkeypatch) -> str:
    """Name what takes layers through their steps: launches for each, or one for all where it can be."""
    monkeypatch.setattr(tiers, "asked_for", lambda: request.param)
    if os.environ["TRITON_INTERPRET"] == "1":  # whose products are exact
        monkeypatch.setattr(tiers, "precision", lambda: "tf32")
    return request.param


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Backward's chunks hold a few steps or one, so that a short sequence has several."""
    from layernorm.gpu.recurrent import operators as recurrent

    monkeypatch.setattr(recurrent, "CHUNK_BYTES", 4000)


def meta_layer(cell, steps, rows, hidden, proj=0):
    """Return a layer's arguments for the operators, without values."""

    def meta(*shape):
        return torch.empty(shape, device="meta")

    spec = layer_spec(cell, "paper")
    shapes = spec.parameter_shapes(2, hidden, proj_size=proj)
    weights = spec.listed({name: meta(*shape) for name, shape in shapes.items()})
    c = meta(rows, hidden) if cell == "lstm" else None
    state = (meta(rows, proj or hidden), c)
    return (meta(steps, rows, 2), *state, weights, *[None] * 4, spec.codes, spec.eps, False)


def both_directions(layer):
    """Call the operators forward and backward."""
    from layernorm.gpu.recurrent import operators

    output, hn, cn, *kept = operators.recurrent_forward(*layer, False)
    grad_c = None if layer[2] is None else cn
    operators.recurrent_backward(*layer, output, hn, grad_c, output, *kept, [True] * 16)


@of_cases(drawn_cases(1, 5000, SMALL, ALL_FUNCTIONS))
@pytest.mark.usefixtures("poisoned", "small_chunks")
def test_values_and_gradients(case, kernel, loop):
    if kernel == "native" and case.seed % (6 if loop == "triton" else 3):
        pytest.skip("the interpreter is slow, and takes a part of the cases")
    alike(case, DTYPES[case.seed % 5 % 3], draws=1, kernel=kernel)


# Every function of a cell apart from its gates, and relus where a candidate meets its reset in every way.
@of_cases(
    [
        Case(cell, variant, 5900 + i, hidden=7, features=3, steps=3, relu=i % 2 == 1, recompute=i % 3 == 1)
        for i, (cell, variant) in enumerate(CELL_FUNCTIONS)
    ]
    + [
        Case("gru", variant, 5950 + i, hidden=7, features=3, steps=3, relu=True, recompute=i == 1)
        for i, variant in enumerate(
            (Variant(), Variant(inputs="summed"), Variant(inputs="summed", scope="all"), Variant(kind="none"))
        )
    ]
    + [Case("lstm", Variant(), 5960, hidden=7, features=3, steps=3, relu=True)]
)
@pytest.mark.usefixtures("poisoned", "small_chunks")
def test_other_cells(case, kernel, loop):
    alike(case, torch.float32, draws=1, kernel=kernel)


@of_cases([case for case in LARGE if case.hidden > 100][::2][:2])
@pytest.mark.usefixtures("poisoned")
def test_sums_longer_than_a_block(case, kernel):
    alike(case, torch.float32, draws=1, kernel=kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("proj", [0, 3])
def test_alone_and_in_any_batch(dtype, proj, place, loop, monkeypatch):
    if proj and loop == "looped":
        pytest.skip("no kernel loops over a projected layer's steps")
    rows, every = 131, 7  # 64 share a tile of a step's product, 128 one of all steps'
    if place == "interpreted":
        rows, every = 19, 13
        for tile in ("product_tile", "sequence_tile"):
            monkeypatch.setattr(settings, tile, lambda *_: settings.ProductTile(16, 32, 32, 4, 3))
    for cell, variant in FUNCTIONS[:1] if proj else FUNCTIONS[DTYPES.index(dtype) :: every]:
        layer = Layer(cell, variant, 5, 7, dtype, proj)
        x, state = torch.randn(2, rows, 5).to(dtype), layer.state(rows, dtype)
        seeds = seeds_like(layer, 2, rows, dtype)
        outputs, grads, _ = layer(x, state, seeds)
        for some in ([0], [rows - 1], [1, 13, rows - 2]):
            rest = layer(x[:, some], [s[some] for s in state], [s[..., some, :] for s in seeds])
            assert same(rest[0], [t[..., some, :] for t in outputs])
            assert same(rest[1], [t[..., some, :] for t in grads])


@pytest.mark.skipif(not hasattr(torch.backends.cudnn.rnn, "fp32_precision"), reason="before PyTorch 2.9")
def test_float32_products_are_tf32_where_those_of_torch_are(place, monkeypatch):
    layer = Layer("lstm", Variant(), 17, 33)
    x, state = torch.randn(3, 5, 17), layer.state(5)

    def error(precision):
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
        found = layer.forward(x, state)
        return max(largest(a - e) for a, e in zip(found, exact, strict=True))

    with torch.no_grad():
        with backends.use("reference"):
            exact = layer.in_float64().forward(x.double(), [s.double() for s in state])
        # Both factors are rounded to 11 bits: 2⁻¹⁰ of a term at most. Norms bring a sum of them to order 1,
        # gains of up to 2 and the cell's norm pass it on, over three steps: eight times is room enough. In
        # float32 it would be 2⁻²³.
        assert 2**-15 < error("tf32") < 8 * 2**-10
        assert error("ieee") < 2**-15


@every_function
def test_for_any_split_of_the_sequence_at_its_state(cell, variant, place, loop):
    layer = Layer(cell, variant, 5, 33, torch.bfloat16)
    x, state = torch.randn(4, 2, 5).bfloat16(), layer.state(2, torch.bfloat16)
    whole = layer.forward(x, state)
    with torch.no_grad():
        first, *between = layer.forward(x[:1], state)
        second, *final = layer.forward(x[1:], between)
    assert same([torch.cat([first, second]), *final], whole)


@pytest.mark.sanitized
@some_functions
@pytest.mark.usefixtures("small_chunks")
def test_with_what_forward_kept_and_recomputed(cell, variant, place, loop):
    layer = Layer(cell, variant, 9, 33)
    x, state, seeds = torch.randn(5, 3, 9), layer.state(3), seeds_like(layer, 5, 3)
    resets = torch.rand(5, 3) < 0.2
    kept, recomputed = (layer(x, state, seeds, resets=resets, recompute=r) for r in (False, True))
    for a, b in zip(kept, recomputed, strict=True):
        if loop == "triton":
            assert same(a, b)
        # A product of 33 terms is summed in another order than in the loop, to some units of 6e-8; norms
        # bring it to order 1, and five steps pass it on.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.sanitized
@pytest.mark.parametrize("reverse", [False, True])
@some_functions
@pytest.mark.usefixtures("small_chunks")
def test_packed_as_each_row_alone(cell, variant, reverse, place, loop):
    if place == "interpreted" and reverse != (cell == "lstm"):
        pytest.skip("the interpreter is slow, and takes one direction of each cell")
    layer = Layer(cell, variant, 6, 9, torch.bfloat16)
    lengths = [5, 5, 3, 1]
    sizes = [sum(length > t for length in lengths) for t in range(5)]
    kept = torch.tensor([[t < length for length in lengths] for t in range(5)])
    x, state = torch.randn(5, 4, 6).bfloat16(), layer.state(4, torch.bfloat16)
    resets, seeds = torch.rand(5, 4) < 0.3, seeds_like(layer, 5, 4, torch.bfloat16)
    outputs, grads, _ = layer(
        x[kept],
        state,
        [seeds[0][kept], *seeds[1:]],
        batch_sizes=sizes,
        resets=resets[kept],
        reverse=reverse,
    )
    padded, grad_x = torch.zeros(5, 4, outputs[0].size(-1)).bfloat16(), torch.zeros(5, 4, 6).bfloat16()
    padded[kept], grad_x[kept] = outputs[0], grads[0]
    for row, length in enumerate(lengths):
        here = slice(row, row + 1)
        alone = layer(
            x[:length, here],
            [s[here] for s in state],
            [seeds[0][:length, here], *(s[here] for s in seeds[1:])],
            resets=resets[:length, here],
            reverse=reverse,
        )
        assert same(alone[0], [padded[:length, here], *(t[here] for t in outputs[1:])])
        assert same(alone[1], [grad_x[:length, here], *(t[here] for t in grads[1:])])


@some_functions
def test_a_bad_row_harms_no_other_and_a_reset_forgets_it(cell, variant, place, loop):
    layer = Layer(cell, variant, 6, 9)
    x, state, seeds = torch.randn(4, 3, 6), layer.state(3), seeds_like(layer, 4, 3)
    resets = torch.zeros(4, 3, dtype=torch.bool)
    resets[2, 1] = True
    good = layer(x, state, seeds, resets=resets)
    x[1, 1, 2] = float("nan")
    bad = layer(x, state, seeds, resets=resets)
    assert torch.isnan(bad[0][0][1, 1]).any()
    for rows in ([0], [2]):
        assert same([t[..., rows, :] for t in good[0]], [t[..., rows, :] for t in bad[0]])
        assert same([t[..., rows, :] for t in good[1]], [t[..., rows, :] for t in bad[1]])
    assert torch.equal(good[0][0][2:], bad[0][0][2:])
    assert torch.equal(good[1][0][2:], bad[1][0][2:])


@pytest.mark.parametrize("size", [1e20, 1e30, 1e-20, 1e-30])
@pytest.mark.parametrize(("cell", "variant"), [(c, v) for c, v in FUNCTIONS if v.normalizes_gates])
def test_numbers_whose_squares_float32_cannot_hold(cell, variant, size, place, loop):
    # A norm without eps does not see the size of what it normalizes; here it is the size of x and of W_hh h.
    variant = Variant(kind=variant.kind, inputs=variant.inputs, scope=variant.scope, cell=variant.cell, eps=0)
    layer = Layer(cell, variant, 6, 9)
    x, state = torch.randn(1, 3, 6), layer.state(3)
    with torch.no_grad():
        expected = layer.forward(x, state)
        layer.weights["weight_ih"] *= size
        layer.weights["weight_hh"] *= size
        found = layer.forward(x, state)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_operators_pass_opcheck(place):
    for (cell, variant), packed in zip((FUNCTIONS[0], FUNCTIONS[7]), (True, False), strict=True):
        given = operator_arguments(cell, variant, packed=packed)
        torch.library.opcheck(torch.ops.layernorm.recurrent.default, (), given)
        inputs = detached(given)
        forward = torch.ops.layernorm.recurrent_forward.default
        torch.library.opcheck(forward, (), inputs)
        backward = backward_arguments(inputs, forward(**inputs))
        torch.library.opcheck(torch.ops.layernorm.recurrent_backward.default, (), backward)


def test_a_block_diagonal_matrix_is_a_whole_one_to_the_kernels(kernel):
    module, leaves = network(Case("gru", Variant(), 5970, hidden=6), torch.float32)
    results = []
    for name in (kernel, "reference"):
        gru = block_diagonal(copy.deepcopy(module), blocks=2)
        device = "cuda" if name == "triton" else "cpu"
        with backends.use(name):
            output, _ = gru.to(device)(leaves["x"].to(device))
            output.square().sum().backward()
        blocks = gru.parametrizations.weight_hh_l0.original
        results.append([output.detach().cpu(), blocks.grad.cpu()])
    assert results[0][1].shape == (3, 2, 3, 3)
    for found, expected in zip(*results, strict=True):
        # Sums of at most 18 products of order 1, over four steps.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_other_cells_compile():
    code = """
import torch
from layernorm import Variant
from layernorm.spec import layer_spec
from tools.resources import compiled, launches_of_layer, usage
clipped = Variant(kind="rms", inputs="plain", cell="carried", cell_clip=0.4)
for architecture, size, *cell in (
    (80, 64, "lstm", clipped, "relu"),
    (90, 64, "gru", "icefall", "relu"),
    (100, 128, "lstm", Variant(cell_eps=0.3, cell_clip=2)),
):
    launches = launches_of_layer(layer_spec(*cell), size, torch.bfloat16)
    for name in ("cell_forward", "cell_backward", "looped_forward", "looped_backward"):
        kernel = compiled(next(each for each in launches if each.kernel.__name__ == name), architecture)
        print(name, cell[0], size, kernel.metadata.shared, usage(kernel.asm["cubin"])[1])
"""
    command, environment = [sys.executable, "-c", code], os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) == 3 * 4
    for name, cell, *numbers in map(str.split, found):
        width, shared, stack = map(int, numbers)
        assert stack <= 16
        if name.startswith("looped"):  # a device is chosen by what they may take
            assert shared <= settings.loop_bytes(GATES[cell], width, torch.bfloat16)


@pytest.mark.parametrize("proj", [0, 3])
def test_which_kernels_of_a_step_begin_before_the_one_before_ends(proj, monkeypatch):
    from layernorm.gpu.launching import recording

    monkeypatch.setattr(tiers, "is_dependent", lambda device: True)
    layer = meta_layer("lstm", 4, 5, 6, proj)
    with backends.use("triton"), recording() as launches:
        both_directions(layer)
    of_steps = [at for at, launch in enumerate(launches) if launch.options.get("DEPENDENT")]
    early = [at for at, launch in enumerate(launches) if launch.options.get("launch_pdl")]
    per_step = 2 * (2 if proj else 1)
    assert len(of_steps) == 2 * 4 * per_step
    # What a loop reads is written before it, and what follows reads what it wrote: its first kernel waits.
    assert early == [at for at in of_steps if at - 1 in of_steps]
    assert len(of_steps) - len(early) == 2
    names = {launch.kernel.__name__ for launch in launches if not launch.options.get("DEPENDENT")}
    assert names >= {"product", "normalize_rows", "write", "gather_before", "column_sums"}
    with backends.use("looped"), recording() as launches:
        both_directions(meta_layer("lstm", 4, 5, 6))
    assert not any("launch_pdl" in launch.options for launch in launches)


def test_kernels_of_a_step_wait_before_they_read_what_the_one_before_wrote():
    code = """
import triton
from layernorm import backends
from layernorm.gpu import tiers
from layernorm.gpu.launching import recording
from tests.gpu.recurrent.test_recurrent_gpu import both_directions, meta_layer
from tools.resources import compiled
tiers.is_dependent = lambda device: True
with backends.use("triton"), recording() as launches:
    both_directions(meta_layer("lstm", 2, 4, 64, 32))
kernels = {launch.kernel.__name__: launch for launch in launches if launch.options.get("launch_pdl")}
for name, launch in kernels.items():
    binary = compiled(launch, 90)
    before, _, after = binary.asm["ptx"].partition("griddepcontrol.wait")
    loads, stores = ([part.count(f"{what}.global") for part in (before, after)] for what in ("ld", "st"))
    print(name, *loads, *stores, binary.metadata.launch_pdl, "griddepcontrol.launch" in after)
"""
    command, environment = [sys.executable, "-c", code], os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {name: numbers for name, *numbers in map(str.split, done.stdout.splitlines())}
    assert found.keys() == {
        "step_product",
        "cell_forward",
        "cell_backward",
        "projected_forward",
        "projected_backward",
    }
    for reads_before, reads, writes_before, writes, early, lets_in in found.values():
        assert min(map(int, (reads_before, writes))) > 0
        assert int(reads) > 0
        assert (int(writes_before), early, lets_in) == (0, "True", "True")


def test_no_grid_is_larger_than_a_device_allows(monkeypatch):
    from layernorm.gpu.launching import recording
    from layernorm.gpu.recurrent import operators

    assert operators.MOST_STEPS == 2**16 - 1  # of the second dimension; the first goes to 2³¹
    monkeypatch.setattr(operators, "MOST_STEPS", 4)
    with recording() as launches:
        both_directions(meta_layer("gru", 11, 900, 3))
    assert {launch.kernel.__name__ for launch in launches} >= {"gather_before", "column_sums", "product"}
    assert max(launch.grid[1] for launch in launches if len(launch.grid) > 1) == 4


@pytest.mark.parametrize("cell", list(GATES))
def test_an_empty_batch(cell, place):
    layer = Layer(cell, Variant(), 3, 5)
    outputs, grads, weights = layer(torch.randn(4, 0, 3), layer.state(0), seeds_like(layer, 4, 0))
    assert outputs[0].shape == (4, 0, 5)
    assert all(g.numel() == 0 for g in grads)
    assert all(not g.any() for g in weights)


def test_a_stream_has_the_bits_of_the_sequence(place, monkeypatch):
    import layernorm

    if place == "interpreted":  # else the CPU's own kernel would serve the steps
        monkeypatch.setattr(backends, "recurrent_kernel_for", lambda *arguments: "triton")
    lstm = layernorm.LayerNormLSTM(6, 9, num_layers=2)
    stream = lstm.stream(batch_size=3)
    x = torch.randn(5, 3, 6)
    steps = [stream.step(x_t) for x_t in x]
    output, (h, _) = lstm(x)
    assert stream.kernel == "triton"
    assert torch.equal(torch.stack(steps), output)
    assert torch.equal(stream.state[0], h)
    stream.reset(torch.tensor([True, False, False]))
    assert not stream.state[0][:, 0].any()


def test_the_choice(monkeypatch):
    gpu = torch.device("cuda", 0)
    for cell in GATES:
        assert backends.choose(cell, gpu, torch.bfloat16).kernel == "triton"
    assert backends.choose("lstm", gpu, torch.float64).kernel == "reference"
    with backends.use("triton"):
        assert backends.choose("gru", gpu, torch.float32).kernel == "triton"
    with backends.use("torch"):
        assert backends.choose("gru", gpu, torch.float32).kernel == "reference"


def test_the_tiers_and_what_info_says_of_them(monkeypatch, pretend_architecture):
    from layernorm import info
    from layernorm.gpu.persistent import compiling as persistent_compile

    gpu, half = torch.device("cuda", 0), torch.bfloat16

    def tier(cell="lstm", variant=None, size=256, dtype=half, **options):
        tiers._tier.cache_clear()  # the settings change
        return backends.tier(cell, variant or Variant(), size, dtype, gpu, **options)

    pretend_architecture(9, 0)
    monkeypatch.setattr(persistent_compile, "problem", lambda architecture: None)
    monkeypatch.setattr(persistent_compile, "device_problem", lambda device, blocks: None)
    assert tier() == ("triton", "the persistent kernel has not been measured on compute capability 9.0 yet")
    monkeypatch.setitem(settings.PERSISTENT, (9, 0), {"lstm": (256, 128)})
    assert tier() == ("persistent", "measured as faster on compute capability 9.0")
    assert tier(size=128).kernel == "persistent"
    assert tier(size=512) == ("triton", "measured as faster on compute capability 9.0")
    assert tier(backward=True) == ("triton", "measured as faster on compute capability 9.0")
    assert tier(size=128, backward=True).kernel == "persistent"
    assert tier("gru").kernel == "triton"
    with backends.use("persistent"):
        assert tier("gru", size=512) == ("persistent", "the override asks for it")
        for reason, options in {
            "not a multiple of 16": {"size": 100},
            "do not fit": {"size": 2048},
            "dtype float32": {"dtype": torch.float32},
            "projected": {"projected": True},
            "no norm": {"variant": Variant(kind="none")},
        }.items():
            assert tier(**options).kernel != "persistent"
            assert reason in tier(**options).reason
        # Backward has less room: by gate there are more statistics.
        gate = {"variant": Variant(scope="gate"), "size": 768}
        assert tier(**gate).kernel == "persistent"
        assert "do not fit" in tier(**gate, backward=True).reason
        assert backends.choose("lstm", gpu, half).kernel == "persistent"
        assert backends.choose("layer_norm", gpu, half).kernel == "torch"
    with backends.use("triton"):
        assert tier(size=64) == ("triton", "the override asks for it")
    lines = info.tiers(gpu)
    for served in (
        ["lstm", "64", "to", "256", "bfloat16", "forward", "persistent"],
        ["gru", "64", "to", "128", "bfloat16", "backward", "looped"],
    ):
        assert any(line.split()[: len(served)] == served for line in lines)
    pretend_architecture(8, 0)
    assert tier() == ("triton", "compute capability 8.0 has no thread block clusters")


def test_which_layers_are_looped(monkeypatch, pretend_architecture):
    gpu, half = torch.device("cuda", 0), torch.bfloat16

    def tier(cell="lstm", variant=None, size=128, dtype=half, **options):
        tiers._tier.cache_clear()  # the settings change
        return backends.tier(cell, variant or Variant(), size, dtype, gpu, **options)

    pretend_architecture(9, 0)
    assert tier() == tier(backward=True) == ("looped", "one launch for all steps")
    assert tier("gru", Variant(kind="none"), 100).kernel == "looped"
    assert tier(dtype=torch.float32, size=64).kernel == "looped"  # as TF32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert tier(dtype=torch.float32, size=64).kernel == "triton"
    monkeypatch.setitem(settings.LOOPED, (9, 0), {"lstm": (128, 64)})
    assert [tier().kernel, tier(backward=True).kernel, tier("gru").kernel] == ["looped", "triton", "triton"]
    with backends.use("looped"):
        assert tier("gru") == ("looped", "the override asks for it")
        for reason, options in {
            "its weights do not fit on a multiprocessor": {"size": 129},
            "its weights do not fit": {"dtype": torch.float32},
            "h is projected": {"projected": True},
        }.items():
            assert tier(**options).kernel == "triton"
            assert reason in tier(**options).reason
        assert backends.choose("lstm", gpu, half).kernel == "looped"
        assert backends.choose("layer_norm", gpu, half).kernel == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tiers, "shared_memory", lambda device: 99 << 10)
    with backends.use("looped"):
        assert tier() == ("triton", "it takes 144 KiB of shared memory, and a program has 99")
        assert tier(size=64).kernel == "looped"
        monkeypatch.setattr(tiers, "triton_version", lambda: (3, 4))
        assert tier(size=64) == ("triton", "products of eight columns need Triton 3.5")
        pretend_architecture(7, 5)
        assert tier(size=64) == ("triton", "compute capability 7.5 has no tensor cores for every dtype")
