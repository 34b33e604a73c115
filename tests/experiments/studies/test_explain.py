"""The study that explains: its numbers, its picture, and what it measures."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from layernorm.baselines import BatchNormLSTM
from layernorm.cli import main
from layernorm.experiments.report import drawing, norms
from layernorm.experiments.studies.explain import batches, lengths, study

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "batch_sizes": (8, 128),
    "learning_rates": (1e-3, 1e-2),
    "seeds": 2,
    "epochs": 1,
    "times": (1, 1.5, 2),
    "reader_epochs": 1,
}


def test_the_steps_are_those_of_pytorchs_norms():
    a = torch.tensor(norms.MATRIX, dtype=torch.float64)
    gain, bias = torch.full((4,), norms.GAIN).double(), torch.full((4,), norms.BIAS).double()
    layer = torch.nn.functional.layer_norm(a, (4,), gain, bias, 0.0)
    batch = torch.nn.functional.batch_norm(a, None, None, gain, bias, True, eps=1e-15)
    for over, expected in (("layer", layer), ("batch", batch)):
        found = norms.steps(over)
        torch.testing.assert_close(found[-1].numbers, expected, rtol=0, atol=1e-12)
        assert [step.name for step in found] == ["mean", "variance", "normalize", "gain and bias"]
    # The numbers are such that a reader can follow them.
    assert norms.steps("batch")[0].numbers.tolist() == [[1.0, 2.0, 4.0, 5.0]]
    assert norms.steps("layer")[0].numbers.flatten().tolist() == [3.0, 5.0, 1.0]


def test_the_cube_is_drawn():
    png = drawing.png(norms.axes_picture(), dpi=40)
    assert png.startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("explain")
    said: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    study.run(out, said.append, **SIZES)
    torch.set_num_threads(threads)
    assert len(said) == len(batches.NORMS) * 2 * 2 * 2 + 2 * len(batches.MOMENTA) * 2 + 3 * 2
    return out


def test_what_is_measured_is_shown(folder):
    section = study.read(folder)
    assert [card.verdict != "not run" for card in section.cards] == [True] * 4
    by_batch, by_case, table, _ = section.tables
    assert by_batch.rows[1][2] == "the same for all: 1  2  4  5"
    assert [row[0] for row in by_case.rows] == ["a", "mean", "variance", "normalize", "gain and bias"]
    assert table.columns == ["norm", "8", "128"]
    training = pd.read_csv(folder / "training.csv")
    layer = training[(training.norm == "layer") & (training.batch_size == 8)]
    rate = layer.groupby("learning_rate").validation_error.mean().idxmin()
    shown = dict(zip([row[0] for row in table.rows], table.rows, strict=True))["layer"][1]
    assert shown.startswith(f"{layer[layer.learning_rate == rate].test_error.mean():.2f} ± ")
    sizes, momentum, _, _ = section.charts
    assert [line.name for line in sizes.rows[0][0].lines] == list(batches.NORMS)
    assert len(momentum.rows[0]) == 2
    assert momentum.rows[0][0].lines[0].x == sorted(batches.MOMENTA)
    assert not list(folder.glob("*.checkpoint"))


def test_a_run_goes_on_where_it_was_stopped(folder):
    before = (folder / "training.csv").read_bytes()
    said: list[str] = []
    study.run(folder, said.append, **SIZES)
    assert said == []
    (folder / "statistics.csv").write_text("half")
    study.run(folder, said.append, **SIZES | {"seeds": 1, "batch_sizes": (128,)})
    assert "is measured again" in said[0]
    assert (folder / "training.csv").read_bytes() == before


def test_one_case_has_no_batch_norm():
    cases = list(batches._cases((1, 2), (0.1,), (0,)))
    assert {norm for norm, size, _, _ in cases if size == 1} == {"none", "layer", "rms"}


def test_every_length_is_whole_passes(tmp_path):
    images = torch.arange(64.0).view(1, 8, 8)
    assert torch.equal(lengths.passes(images, 24), torch.cat([images] * 3, 1))
    with pytest.raises(ValueError, match=r"times: expected multiples of 0\.5.*got 1\.2"):
        lengths.measure(tmp_path, print, (1, 1.2), 1, 1)


def test_shared_statistics_are_those_of_all_steps_together():
    # One batch, with the momentum 1: the running statistics are its own, the variance unbiased.
    lstm = BatchNormLSTM(3, 2, max_length=5, momentum=1.0, dtype=torch.float64)
    input = torch.randn(5, 400, 3, dtype=torch.float64) + torch.arange(5).view(5, 1, 1)  # a mean for each
    lstm(input)
    lengths.share_statistics(lstm)
    product = (input @ lstm.weight_ih_l0.t()).flatten(0, 1)
    mean, var = lstm.running_mean_ih_l0, lstm.running_var_ih_l0
    torch.testing.assert_close(mean, product.mean(0).expand_as(mean))
    # Within a step the variance is 400/399 of the biased one, so the whole differs by at most that.
    torch.testing.assert_close(var, product.var(0, unbiased=False).expand_as(var), rtol=1 / 399, atol=0)


def test_the_lengths_are_shown(folder):
    table, (steps, chart) = lengths.read(folder).tables[0], lengths.read(folder).charts
    assert table.columns == ["statistics", "16 steps", "24 steps", "32 steps"]
    assert [row[0] for row in table.rows] == ["none", "batch, each step's own", "batch, shared", "layer"]
    assert [line.name for line in chart.rows[0][0].lines] == ["none", "batch", "batch, shared", "layer"]
    mean, variance = steps.rows[0]
    for panel, last in ((mean, 0.0), (variance, 1.0)):
        assert [line.x for line in panel.lines] == [[float(step) for step in range(1, 17)]] * 3
        assert [line.y[-1] for line in panel.lines] == [last] * 3
    # Before the first step h is 0, so its product has no variance.
    assert variance.lines[1].y[0] < 1e-2 < variance.lines[1].y[1]


def test_the_cards_follow_the_errors():
    def found(batch, shared, layer):
        """Errors at 16 and 32 steps, of three seeds that differ a little."""
        ways = [("none", "error", (9, 9)), ("batch", "error", batch), ("batch", "shared", shared)]
        return pd.DataFrame(
            {"norm": norm, "seed": seed, "what": what, "place": place, "value": value + 0.1 * seed * value}
            for norm, what, values in [*ways, ("layer", "error", layer)]
            for place, value in zip((16, 32), values, strict=True)
            for seed in range(3)
        )

    def verdicts(**errors):
        return [card.verdict for card in lengths.cards(found(**errors))]

    assert verdicts(batch=(3, 9), shared=(6, 7), layer=(4, 4)) == ["agrees", "agrees"]
    assert verdicts(batch=(3, 9), shared=(2, 7), layer=(4, 5)) == ["differs", "partly"]
    assert verdicts(batch=(6, 3), shared=(6, 6), layer=(4, 4.5)) == ["cannot tell", "differs"]
    _, longer = lengths.cards(found(batch=(3, 9), shared=(6, 7), layer=(4, 4)))
    assert "grows by 6.60 points" in longer.figure
    one = found(batch=(3, 9), shared=(6, 7), layer=(4, 4)).query("seed == 0")
    assert [card.verdict for card in lengths.cards(one)] == ["cannot tell", "cannot tell"]


def test_it_is_a_command(capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    assert "--preset" in capsys.readouterr().out
