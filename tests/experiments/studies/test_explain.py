"""The study that explains: its numbers, its picture, and what it measures."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from layernorm.cli import main
from layernorm.experiments.report import drawing
from layernorm.experiments.studies import explain

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"batch_sizes": (8, 128), "learning_rates": (1e-3, 1e-2), "seeds": 2, "epochs": 1}


def test_the_steps_are_those_of_pytorchs_norms():
    a = torch.tensor(explain.MATRIX, dtype=torch.float64)
    gain, bias = torch.full((4,), explain.GAIN).double(), torch.full((4,), explain.BIAS).double()
    layer = torch.nn.functional.layer_norm(a, (4,), gain, bias, 0.0)
    batch = torch.nn.functional.batch_norm(a, None, None, gain, bias, True, eps=1e-15)
    for over, expected in (("layer", layer), ("batch", batch)):
        found = explain.steps(over)
        torch.testing.assert_close(found[-1].numbers, expected, rtol=0, atol=1e-12)
        assert [step.name for step in found] == ["mean", "variance", "normalize", "gain and bias"]
    # The numbers are such that a reader can follow them.
    assert explain.steps("batch")[0].numbers.tolist() == [[1.0, 2.0, 4.0, 5.0]]
    assert explain.steps("layer")[0].numbers.flatten().tolist() == [3.0, 5.0, 1.0]


def test_the_cube_is_drawn():
    png = drawing.png(explain.axes_picture(), dpi=40)
    assert png.startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("explain")
    said: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    explain.run(out, said.append, **SIZES)
    torch.set_num_threads(threads)
    assert len(said) == len(explain.NORMS) * 2 * 2 * 2 + 2 * len(explain.MOMENTA) * 2
    return out


def test_what_is_measured_is_shown(folder):
    section = explain.read(folder)
    assert [card.verdict != "not run" for card in section.cards] == [True, True]
    by_batch, by_case, table = section.tables
    assert by_batch.rows[1][2] == "the same for all: 1  2  4  5"
    assert [row[0] for row in by_case.rows] == ["a", "mean", "variance", "normalize", "gain and bias"]
    assert table.columns == ["norm", "8", "128"]
    training = pd.read_csv(folder / "training.csv")
    layer = training[(training.norm == "layer") & (training.batch_size == 8)]
    rate = layer.groupby("learning_rate").validation_error.mean().idxmin()
    shown = dict(zip([row[0] for row in table.rows], table.rows, strict=True))["layer"][1]
    assert shown.startswith(f"{layer[layer.learning_rate == rate].test_error.mean():.2f} ± ")
    sizes, momentum = section.charts
    assert [line.name for line in sizes.rows[0][0].lines] == list(explain.NORMS)
    assert len(momentum.rows[0]) == 2
    assert momentum.rows[0][0].lines[0].x == sorted(explain.MOMENTA)
    assert not list(folder.glob("*.checkpoint"))


def test_a_run_goes_on_where_it_was_stopped(folder):
    before = (folder / "training.csv").read_bytes()
    said: list[str] = []
    explain.run(folder, said.append, **SIZES)
    assert said == []
    (folder / "statistics.csv").write_text("half")
    explain.run(folder, said.append, **SIZES | {"seeds": 1, "batch_sizes": (128,)})
    assert "is measured again" in said[0]
    assert (folder / "training.csv").read_bytes() == before


def test_one_case_has_no_batch_norm():
    cases = list(explain._cases((1, 2), (0.1,), (0,)))
    assert {norm for norm, size, _, _ in cases if size == 1} == {"none", "layer", "rms"}


def test_it_is_a_command(capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    assert "--preset" in capsys.readouterr().out
