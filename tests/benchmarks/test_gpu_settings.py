"""The rules that turn the figures of a GPU into settings, on figures that are made up."""

from __future__ import annotations

import json
from functools import partial

import pytest

from benchmarks.gpu_norms.measure import BENCHMARK as NORMS
from benchmarks.gpu_recurrent.measure import BENCHMARK as RECURRENT
from tests.benchmarks.cases import write_table
from tools import gpu_settings
from tools.gpu_settings import LOOPED, PERSISTENT, dependent, faster, main, served, speaks, verdict

# In bfloat16: 192 KiB, and 8 MiB or more of rows of 768, 1024, 4096 and 8192, the third once more.
SHAPES = ((128, 768), (8192, 768), (8192, 1024), (1024, 4096), (16384, 4096), (8192, 8192))


def norm(ratios, operator="layer_norm", dtype="bfloat16", modes=("forward", "training"), peer="layernorm"):
    """Return rows with a ratio for each shape."""
    point = {"operator": operator, "dtype": dtype, "peer": peer}
    return [
        {**point, "rows": str(rows), "width": str(width), "mode": mode, "ratio_to_torch": str(ratio)}
        for (rows, width), ratio in zip(SHAPES, ratios, strict=True)
        for mode in modes
    ]


def test_norms_are_faster_from_a_width_on():
    name = ("layer_norm", "bfloat16")
    assert faster(norm([1.0] * 6)) == {name: 2 * 768}
    # Small inputs are bound by the launch and decide nothing.
    assert faster(norm([0.5, 1.0, 1.0, 1.0, 1.2, 1.0])) == {name: 2 * 768}
    assert faster(norm([1.5, 0.9, 1.0, 1.0, 1.2, 1.0])) == {name: 2 * 1024}
    # Fast, slow and fast again counts from the last time on; one slow size of a width is enough.
    assert faster(norm([1.5, 1.1, 0.9, 1.0, 1.2, 1.0])) == {name: 2 * 4096}
    assert faster(norm([1.5, 1.1, 1.0, 1.2, 0.9, 1.0])) == {name: 2 * 8192}
    assert faster(norm([1.5, 1.5, 1.5, 1.5, 1.5, 0.99])) == {}
    assert faster(norm([1.5, 1.5, 1.5, 1.5, 1.5, ""])) == {}  # failed
    assert faster(norm([1.5] * 6, modes=("forward",))) == {}
    assert faster(norm([1.5] * 6)[:2]) == {}  # nothing as large as 8 MiB
    assert faster(norm([1.5] * 6, peer="liger")) == {}
    assert faster([]) == {}


def test_norms_are_told_apart():
    rows = norm([0.5, 0.5, 1.0, 1.0, 1.0, 1.0], "add_rms_norm")
    rows += norm([0.5, 0.5, 0.5, 1.0, 1.0, 1.0], dtype="float32")
    found = faster(rows + norm([0.0] * 6))
    assert found == {("add_rms_norm", "bfloat16"): 2 * 1024, ("layer_norm", "float32"): 4 * 4096}


def layer(peer, hidden, inference, forward, backward, cell="lstm", dtype="bfloat16", batches=(16, 64)):
    """Return the rows of a layer; a time that is None was not measured."""
    point = {"cell": cell, "dtype": dtype, "hidden": str(hidden), "peer": peer}

    def text(time):
        return "" if time is None else str(time)

    training = None if backward is None else forward + backward
    return [
        {**point, "batch": str(batch), "mode": mode, "median_us": text(time), "forward_us": text(of_forward)}
        for batch in batches
        for mode, time, of_forward in (("inference", inference, None), ("training", training, forward))
    ]


persistent = partial(served, kernel=PERSISTENT)


def both(hidden, inference=0.5, forward=0.5, backward=0.5, **point):
    """Return rows in which Triton takes 100 µs for each part, and the persistent kernel so much of them."""
    times = [100.0 * part if part is not None else None for part in (inference, forward, backward)]
    return layer("layernorm", hidden, 100.0, 100.0, 100.0, **point) + layer(
        "layernorm-persistent", hidden, *times, **point
    )


def test_the_persistent_kernel_serves_up_to_a_size():
    rows = [*both(128), *both(256), *both(512, backward=1.0)]
    assert persistent(rows, spoke=False) == {"lstm": (512, 256)}
    assert persistent(rows, spoke=True) == {"lstm": (0, 0)}
    assert persistent(both(128, 0.95, 0.95, 0.95), spoke=False) == {"lstm": (128, 128)}
    assert persistent(both(128, 0.96), spoke=False) == {"lstm": (0, 128)}
    assert persistent(both(128, forward=0.96), spoke=False) == {"lstm": (0, 128)}
    # Larger sizes do not count after one that is slow, nor one batch alone, nor another dtype.
    assert persistent([*both(128), *both(256, 1.1, 1.1, 1.1), *both(512)], spoke=False) == {
        "lstm": (128, 128)
    }
    assert persistent(both(128, batches=(16,)), spoke=False) == {"lstm": (0, 0)}
    assert persistent([*both(128, dtype="float16"), *both(64)], spoke=False) == {"lstm": (64, 64)}
    assert persistent([*both(64), *both(128, None, None, None)], spoke=False) == {"lstm": (64, 64)}
    assert persistent(layer("layernorm", 64, 1.0, 1.0, 1.0), spoke=False) == {"lstm": (0, 0)}


def test_the_looped_kernel_serves_where_it_is_no_slower():
    def looped(hidden, time, **point):
        return layer("layernorm-looped", hidden, time, time, time, **point)

    rows = [*both(64), *both(128), *looped(64, 60.0), *looped(128, 100.0)]
    assert served(rows, LOOPED) == {"lstm": (128, 128)}
    assert served([*both(64), *both(128), *looped(64, 99.0), *looped(128, 101.0)], LOOPED) == {
        "lstm": (64, 64)
    }
    # The persistent kernel takes 50 µs, which is 0.83 of 60 and more than 0.95 of 52.
    assert persistent(rows, spoke=False) == {"lstm": (128, 128)}
    assert persistent([*both(64), *looped(64, 52.0)], spoke=False) == {"lstm": (0, 0)}
    assert persistent([*both(64), *looped(64, None)][:-1], spoke=False) == {"lstm": (64, 64)}


def test_dependent_launches_are_used_where_they_save_time_and_change_no_bit():
    def lines(time=0.97, is_same=True, ran=True, hidden=256):
        at = {"stage": "dependent:lstm:bfloat16", "hidden": hidden, "batch": 16}
        us = {"inference": 6.0 * time, "training": 12.0 * time}
        return [at | {"dependent": ran}, at | {"as_usual": [True, is_same]}, at | {"us_a_step": us}]

    assert dependent(contact() + lines())
    assert dependent(contact() + lines() + lines(0.5, hidden=512))
    assert not dependent(contact() + lines() + lines(0.98, hidden=512))
    assert not dependent(contact() + lines(is_same=False))
    assert not dependent(contact() + lines(ran=False))
    assert not dependent(contact() + lines()[:1] + lines()[2:])
    assert not dependent(contact() + lines()[:2])
    assert not dependent(contact() + lines(hidden=64))  # the usual time of which is not known
    assert not dependent(contact())


def test_cells_are_named_as_the_settings_do():
    rows = [*both(128, cell="gru"), *both(64, cell="rnn")]
    assert persistent(rows, spoke=False) == {"gru": (128, 128), "rnn_tanh": (64, 64)}


def contact(cudnn=3.0, triton=6.0, forward=3.0, training=6.0, off=1e-3, same=True, tier="persistent", **more):
    """Return lines of first contact; Triton's training takes 12 µs a step, and its error is 1e-3."""
    found = []
    for hidden in (256, 512):
        for batch in (16, 64):
            at = {"hidden": hidden, "batch": batch}
            for kernel, us, error in (
                ("triton", {"inference": triton, "training": 12.0}, 1e-3),
                ("persistent", {"inference": forward, "training": training}, off),
            ):
                line = {"stage": f"{kernel}:lstm:bfloat16", **at}
                found += [
                    line | {"tier": [tier, tier], "why": ["", ""]},
                    line | {"off": [error] * 3, "same_bits": [same, True]},
                    line | {"us_a_step": us},
                ]
            dtype = {"stage": "cudnn", "dtype": "bfloat16", "us_a_step": {"inference": cudnn}}
            found += [dtype | at, dtype | at | {"dtype": "float16", "us_a_step": {"inference": 1.0}}]
    for blocks in (8, 16):
        for protocol, ns in (("release", 700.0), ("async", more.get("ns", 400.0))):
            found.append({"stage": "exchange", "blocks": blocks, "stores": 4, "protocol": protocol, "ns": ns})
    return found


@pytest.mark.parametrize(
    ("figures", "cells", "backward", "exchange", "reason"),
    [
        ({"cudnn": 6.0}, (), False, False, "the Triton kernels take no longer than cuDNN in bfloat16"),
        (
            {},
            ("lstm", "gru"),
            True,
            True,
            "forward is 2.00 times as fast as Triton at least, training takes",
        ),
        ({"forward": 4.0, "training": 9.0}, ("lstm", "gru"), True, True, "1.50 times as fast"),
        ({"forward": 4.01}, (), False, False, "1.50 times as fast"),
        ({"training": 9.1}, ("lstm", "gru"), False, True, "training takes 0.76 of its time"),
        ({"ns": 501.0}, ("lstm", "gru"), True, False, ""),
        ({"ns": 500.0}, ("lstm", "gru"), True, True, ""),
        (
            {"off": 2.1e-3},
            (),
            False,
            False,
            "wrong, or not there, at (hidden, batch) [(256, 16), (256, 64), ",
        ),
        ({"off": None}, (), False, False, "wrong"),
        ({"same": False}, (), False, False, "wrong"),
        ({"tier": "triton"}, (), False, False, "wrong"),
    ],
)
def test_what_becomes_of_the_persistent_kernels(figures, cells, backward, exchange, reason):
    found = verdict(contact(**figures))
    assert found[:3] == (cells, backward, exchange)
    assert reason in found.reason


def test_a_wrong_gradient_is_of_backward_alone():
    lines = contact()
    for line in lines:
        if line["stage"].startswith("persistent") and "off" in line:
            line["off"] = [1e-3, 1e-3, 3e-3]
    assert verdict(lines)[:2] == (("lstm", "gru"), False)


def test_a_verdict_wants_figures():
    lines = [line for line in contact() if line["stage"] != "cudnn" or line["hidden"] == 256]
    text = "first contact has no times of cuDNN at hidden 512, batch 16, cuDNN at hidden 512, batch 64"
    with pytest.raises(ValueError, match=text):
        verdict(lines)
    with pytest.raises(ValueError, match="Triton at hidden 256"):
        verdict([line | {"rehearsal": True} for line in contact()])
    without = [line for line in contact() if not line["stage"].startswith("persistent")]
    assert verdict(without).cells == ()


def test_checkers_speak_or_do_not_end():
    figure = '{"stage": "persistent:lstm:bfloat16", "hidden": 256, "batch": 9, "off": [0.001]}\n========= '
    assert not speaks(f"{figure}ERROR SUMMARY: 0 errors\n")
    assert not speaks(f"{figure}RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
    assert speaks(f"{figure}ERROR SUMMARY: 12 errors\n")
    assert speaks(f"{figure}ERROR SUMMARY: 0 errors\n========= RACECHECK SUMMARY: 1 hazard displayed\n")
    assert speaks(f"{figure}COMPUTE-SANITIZER\n")
    assert speaks("========= ERROR SUMMARY: 0 errors\n")  # of nothing


def test_the_program_prints_what_is_pasted(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "has no gpu.csv, gpu_recurrent.csv or first_contact.jsonl" in capsys.readouterr().err
    common = {
        "gpu": "A GPU, 141 GiB",
        "capability": "9.0",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "driver": "580",
    }
    write_table(NORMS, tmp_path / "gpu.csv", norm([1.0] * 6), **common)
    write_table(RECURRENT, tmp_path / "gpu_recurrent.csv", both(256), **common)
    text = "\n".join(map(json.dumps, contact()))
    (tmp_path / "first_contact.jsonl").write_text(text)
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    namespace: dict[str, object] = {}
    exec(printed, namespace)
    assert namespace["FASTER"] == {(9, 0): {("layer_norm", "bfloat16"): 1536}}
    assert namespace["LOOPED"] == {(9, 0): {"lstm": (0, 0)}}
    assert "# DEPENDENT, the compute capability of the first contact: no\n" in printed
    assert namespace["PERSISTENT"] == {(9, 0): {"lstm": (256, 256)}}
    assert "    # gpu A GPU, 141 GiB; torch 2.11.0; triton 3.6.0; driver 580\n" in printed
    assert "# checkers that found fault: none, of 0\n" in printed
    assert "# Verdict(cells=('lstm', 'gru'), backward=True, exchange=True, reason='forward is 2.00" in printed
    logs = tmp_path / "sanitizers"
    logs.mkdir()
    (logs / "racecheck.txt").write_text("========= RACECHECK SUMMARY: 1 hazard displayed\n")
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "# checkers that found fault: racecheck.txt, of 1\n" in printed
    assert "{'lstm': (0, 0)}" in printed


def test_a_table_of_two_devices_is_refused(tmp_path, capsys):
    rows = [row | {"capability": capability} for row in norm([1.0] * 6) for capability in ("9.0", "10.0")]
    write_table(NORMS, tmp_path / "gpu.csv", rows)
    assert main([str(tmp_path)]) == 2
    text = "expected a table of one device; its compute capabilities are ['10.0', '9.0']"
    assert capsys.readouterr().err == f"{text}\n"


def test_the_sizes_that_are_compared_are_measured():
    """At every point from which settings follow there is a figure of the default grid."""
    points = list(RECURRENT.grid())
    sizes = {(point.hidden, point.batch) for point in points if point.dtype == "bfloat16"}
    assert {(hidden, batch) for hidden in gpu_settings.DECIDING for batch in gpu_settings.BATCHES} <= sizes
    bytes_of = {2 * point.rows * point.width for point in NORMS.grid() if point.dtype == "bfloat16"}
    assert {size >= gpu_settings.LEAST_BYTES for size in bytes_of} == {True, False}
