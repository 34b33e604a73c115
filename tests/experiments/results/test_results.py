"""The summary of a comparison's records and the verdicts on them, with records written by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from layernorm.experiments import registry
from layernorm.experiments.classification import TEST_ERROR, VALIDATION_ERROR
from layernorm.experiments.results import judging, results_table
from layernorm.experiments.results.statistics import geometric_interval, interval
from layernorm.experiments.task import ExperimentError, Metric

RECALL = Metric("recall", "recall (%)", higher=True)
DIGITS = registry.find("digits")
BY_RECALL = dataclasses.replace(DIGITS, metrics=(RECALL,))


def rows(norm, seed, errors, losses=None, batch_size=4, rate=1e-3, test=None, warmup=0):
    losses = losses or [None, *[1.0] * (len(errors) - 1)]
    return [
        {"norm": norm, "batch_size": batch_size, "learning_rate": rate, "warmup": warmup}
        | {"seed": seed, "update": i, "epoch": i / 2, "seconds": i * 10.0, "train_loss": loss}
        | {"validation_error": error, "validation_loss": 1.0}
        | {"test_error": error if test is None else test, "recall": 100 - error}
        for i, (error, loss) in enumerate(zip(errors, losses, strict=True))
    ]


TABLE = pd.DataFrame(
    rows("none", 0, [90, 8, 5], [None, 2.0, 1.0])
    + rows("none", 1, [90, 6, 7], [None, 2.0, 3.0])
    + rows("layer", 0, [90, 5, 2], [None, 1.0, 0.5])
    + rows("layer", 1, [90, 8, 7], [None, 1.0, 0.5])
)


def test_the_summary_is_what_the_records_say():
    summary = results_table.summarize(TABLE, ("none", "layer"), DIGITS)
    none, layer = summary.to_dict("records")
    assert (none["norm"], layer["norm"]) == ("none", "layer")
    assert (none["final"], layer["final"]) == (6.0, 4.5)
    assert none["final_std"] == pytest.approx(math.sqrt(2))  # of 5 and 7, with n - 1
    assert layer["difference"] == -1.5
    assert [layer["difference_low"], layer["difference_high"]] == pytest.approx(
        stats.t.interval(0.95, 1, -1.5, stats.sem([-3, 0]))
    )
    assert none["epochs_to_baseline"] == (1.0 + 0.5) / 2
    assert layer["epochs_to_baseline"] == 0.5
    assert layer["seconds_to_baseline"] == 10.0
    assert (layer["reached"], layer["seeds"], layer["learning_rate"]) == (1, 2, 1e-3)
    assert none["final_loss"] == 2.0
    assert none["update_ms"] == 10_000.0
    cells = results_table.cells(summary, DIGITS)
    assert (cells[0]["final"], cells[0]["difference"]) == ("6.00 ± 1.41", "–")
    assert cells[1]["difference"] == "-1.50 (-20.56 to +17.56)"
    assert cells[1]["epochs_to_baseline"] == "0.50 (1 of 2)"
    never = TABLE[TABLE.norm == "none"].assign(norm="layer", validation_error=99.0)
    both = pd.concat([TABLE[TABLE.norm == "none"], never])
    cells = results_table.cells(results_table.summarize(both, ("none", "layer"), DIGITS), DIGITS)
    assert cells[1]["epochs_to_baseline"] == "not reached"
    one = results_table.cells(
        results_table.summarize(TABLE[TABLE.seed == 0], ("none", "layer"), DIGITS), DIGITS
    )
    assert (one[1]["final"], one[1]["difference"]) == ("2.00", "-3.00")


def test_the_test_cases_are_read_at_the_end_and_never_where_they_are_best():
    table = pd.DataFrame(rows("none", 0, [90, 8, 9]) + rows("layer", 0, [90, 2, 7]))
    assert results_table.summarize(table, ("none", "layer"), DIGITS).final.tolist() == [9.0, 7.0]
    assert "9.00 (no norm)" in judging.better(table, TEST_ERROR, claim="c", section="s").figure


def test_the_learning_rate_is_chosen_by_the_validation_cases_alone():
    # With rate 0.1 the test error is least; the validation error says 0.01.
    table = pd.DataFrame(
        [row for seed in (0, 1) for row in rows("none", seed, [90, 30], rate=0.01, test=20)]
        + [row for seed in (0, 1) for row in rows("none", seed, [90, 40], rate=0.1, test=1)]
        + [row for seed in (0, 1) for row in rows("layer", seed, [90, 20], rate=0.1, test=9)]
        + [row for seed in (0, 1) for row in rows("layer", seed, [90, math.nan], rate=0.01, test=2)]
    )
    chosen = judging.at_best_rates(table, VALIDATION_ERROR)
    assert {(norm, rate) for norm, rate in zip(chosen.norm, chosen.learning_rate, strict=True)} == {
        ("none", 0.01),
        ("layer", 0.1),
    }
    none, layer = results_table.summarize(table, ("none", "layer"), DIGITS).to_dict("records")
    assert (none["final"], layer["final"]) == (20.0, 9.0)
    shown = results_table.rates_table(table, DIGITS)
    assert shown.columns == ["batch", "norm", "0.01", "0.1"]
    assert shown.rows == [["4", "none", "30.00 *", "40.00"], ["4", "layer", "inf", "20.00 *"]]
    assert "a rate beyond it may be better: none at batch size 4, layer at batch size 4" in shown.note
    assert results_table.rates_table(TABLE, DIGITS) is None


def test_a_warm_up_is_chosen_with_the_learning_rate():
    table = pd.DataFrame(
        rows("none", 0, [90, 30], rate=0.01)
        + rows("none", 0, [90, 40], rate=0.1)
        + rows("none", 0, [90, 35], rate=0.01, warmup=5)
        + rows("none", 0, [90, 20], rate=0.1, warmup=5)
    )
    chosen = judging.at_best_rates(table, VALIDATION_ERROR)
    assert set(chosen.learning_rate) == {0.1}
    assert set(chosen.warmup) == {5}
    shown = results_table.rates_table(table, DIGITS)
    assert (shown.caption, shown.columns) == (
        "Learning rates and warm-ups",
        ["batch", "norm", "warm-up", "0.01", "0.1"],
    )
    assert shown.rows == [["4", "none", "0", "30.00", "40.00"], ["4", "none", "5", "35.00", "20.00 *"]]
    cells = results_table.cells(results_table.summarize(table, ("none",), DIGITS), DIGITS)
    assert cells[0]["learning_rate"] == "0.1, warm-up 5"


def test_how_much_worse_a_norm_may_be_moves_the_boundary():
    table = pd.DataFrame(
        [row for seed, end in enumerate([5, 5, 5]) for row in rows("none", seed, [90, end, end])]
        + [row for seed, end in enumerate([6.0, 6.1, 6.2]) for row in rows("layer", seed, [90, end, end])]
    )

    def verdict(within):
        return judging.better(table, VALIDATION_ERROR, claim="c", section="s", within=within).verdict

    assert [verdict(within) for within in (0.0, 1.1, 2.0)] == ["differs", "cannot tell", "agrees"]
    better = table.assign(validation_error=table.validation_error - table["update"])
    worse = judging.better(better, VALIDATION_ERROR, claim="c", section="s")
    assert worse.verdict == "not converged"
    of_budget = judging.better(better, VALIDATION_ERROR, claim="c", section="s", is_of_budget=True)
    assert of_budget.verdict == "differs"
    recall = judging.better(table, RECALL, claim="c", section="s", within=2.0)
    assert recall.verdict == "agrees"


def test_a_rate_is_judged_by_the_seeds_that_all_rates_have():
    table = pd.DataFrame(
        rows("none", 0, [90, 10], rate=0.1)
        + rows("none", 0, [90, 11], rate=0.2)
        + rows("none", 1, [90, 1], rate=0.2)
    )
    assert judging.at_rates(table, VALIDATION_ERROR).validation_error.tolist() == [10, 11]
    assert judging.at_rates(table.assign(recall=100 - table.validation_error), RECALL).recall.tolist() == [
        90,
        89,
    ]


def test_a_metric_of_which_more_is_better():
    none, layer = results_table.summarize(TABLE, ("none", "layer"), BY_RECALL).to_dict("records")
    assert (none["final"], layer["final"]) == (94.0, 95.5)
    assert layer["epochs_to_baseline"] == 0.5


def of_seeds(norm, ends, before=1.0, batch_size=4):
    """Return runs of several seeds whose last error but one is less than the last by ``before``."""
    return [
        row
        for seed, end in enumerate(ends)
        for row in rows(norm, seed, [90, end - before, end], batch_size=batch_size)
    ]


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ([3.0, 3.1, 2.9, 3.2], "agrees"),
        ([7.0, 7.1, 6.9, 7.2], "differs"),
        ([3.0, 7.0, 4.9, 5.2], "cannot tell"),
        ([3.0], "cannot tell"),
    ],
)
@pytest.mark.parametrize("metric", [TEST_ERROR, RECALL])
def test_which_norm_is_better(ends, verdict, metric):
    none = [5.0, 5.1, 4.9, 5.0][: len(ends)]
    table = pd.DataFrame(of_seeds("none", none) + of_seeds("layer", ends))
    if metric is RECALL and len(ends) > 1:  # its best is where the error's is
        table["recall"] = 100 - table.validation_error
    card = judging.better(table, metric, claim="c", section="s", remark="why")
    assert card.verdict == verdict
    assert card.remark == ("" if verdict == "agrees" else "why")
    if len(ends) == 1:
        assert "from one seed" in card.figure


def test_differences_are_paired_by_seed():
    # The seeds differ by far more than the norms, and by the same for both.
    none, layer = [5.0, 15.0, 25.0, 35.0], [4.0, 14.1, 23.9, 34.0]
    card = judging.better(
        pd.DataFrame(of_seeds("none", none) + of_seeds("layer", layer)), TEST_ERROR, claim="c", section="s"
    )
    assert card.verdict == "agrees"
    low, high = stats.t.interval(0.95, 3, np.mean([-1, -0.9, -1.1, -1]), stats.sem([-1, -0.9, -1.1, -1]))
    assert f"a difference of -1.00, 95 % from {low:.2f} to {high:.2f}." in card.figure


def test_a_norm_that_still_improves_when_training_ends_has_not_lost_yet():
    none = of_seeds("none", [5.0, 5.1, 4.9], before=-1.0)  # best at the last evaluation
    layer = of_seeds("layer", [3.0, 3.1, 2.9])
    assert (
        judging.better(pd.DataFrame(none + layer), TEST_ERROR, claim="c", section="s").verdict
        == "not converged"
    )
    behind = of_seeds("none", [5.0, 5.1, 4.9]) + of_seeds("layer", [3.0, 3.1, 2.9], before=-1.0)
    assert judging.better(pd.DataFrame(behind), TEST_ERROR, claim="c", section="s").verdict == "agrees"


def test_small_batches_are_small_ones():
    table = pd.DataFrame(
        of_seeds("batch", [5.0, 5.2], batch_size=128) + of_seeds("layer", [3.0, 3.2], batch_size=128)
    )
    assert judging.small_batches(table) == ()
    assert [card.verdict for card in DIGITS.judge(table)] == ["not run", "not run"]
    table = pd.concat([table, table.assign(batch_size=4)])
    assert judging.small_batches(table) == (4,)


def judged(table, metric=VALIDATION_ERROR, **options):
    card = judging.fewer_updates(pd.DataFrame(table), metric, claim="c", section="s", remark="why", **options)
    return card.verdict, card.figure, card.remark


def curves(norm, place, end=5, count=12, seeds=4, batch_size=4):
    """Return runs that come to an error at an update, one later in every other seed, then a bit above."""
    found = []
    for seed in range(seeds):
        errors = [90.0, *[50.0] * count]
        errors[place + seed % 2 :] = [end] + [end + 1] * (len(errors) - place - seed % 2 - 1)
        found += rows(norm, seed, errors, batch_size=batch_size)
    return found


@pytest.mark.parametrize("metric", [VALIDATION_ERROR, RECALL])
def test_which_norm_needs_fewer_updates(metric):
    none = curves("none", 8)
    verdict, figure, remark = judged(none + curves("layer", 3), metric)
    assert (verdict, remark) == ("agrees", "")
    share = geometric_interval([3 / 8, 4 / 9] * 2)
    assert figure == (
        "Batch 4: layer norm is as good as no norm at its best after 4 updates, no norm itself after 8 "
        f"(a share of {share.mean:.2f}, 95 % from {share.low:.2f} to {share.high:.2f})."
    )
    assert judged(curves("none", 3) + curves("layer", 8), metric)[0] == "differs"
    assert judged(none + curves("layer", 8), metric)[0] == "cannot tell"  # as many are not fewer
    assert judged(none)[0] == "not run"
    assert judged(curves("none", 8, seeds=1) + curves("layer", 3, seeds=1))[0] == "cannot tell"


def test_a_claim_with_a_number_is_tested_on_that_number():
    table = curves("none", 10) + curves("layer", 8)
    assert judged(table)[0] == "agrees"
    verdict, figure, _ = judged(table, at_most=0.6)
    assert verdict == "differs"  # 80 % of the updates are not 60 %
    assert "the claim's is at most 0.6" in figure
    assert judged(curves("none", 10) + curves("layer", 3), at_most=0.6)[0] == "agrees"


def test_a_run_that_never_gets_there_is_no_yes():
    none = curves("none", 5)
    verdict, figure, remark = judged(none + curves("layer", 3, end=7))
    assert (verdict, remark) == ("differs", "why")
    assert figure.startswith(
        "Batch 4: layer norm never is as good as no norm at its best, at update 6, with 4 of 4"
    )
    late = [row for row in curves("layer", 1) if row["seed"] != 3] + rows("layer", 3, [90.0, *[6.0] * 12])
    assert judged(curves("none", 11) + late)[0] == "cannot tell"


def test_a_baseline_that_still_improves_has_no_best_yet():
    still = [row for seed in range(4) for row in rows("none", seed, [90, 30, 20, 10 + 0.1 * seed])]
    fast = [row for seed in range(4) for row in rows("layer", seed, [90, 5, 5, 5])]
    assert judged(still + fast)[0] == "not converged"


def test_verdicts_of_several_batch_sizes():
    good, bad = curves("none", 8) + curves("layer", 3), curves("none", 3) + curves("layer", 8)
    other = [row | {"batch_size": 128} for row in bad]
    verdict, figure, remark = judged(good + other)
    assert (verdict, remark) == ("partly", "why")
    assert figure.startswith("Batch 128:")
    assert judged(good + other, batch_sizes=(128,))[0] == "differs"


def test_the_best_norm_is_named_with_whether_that_is_chance():
    table = pd.DataFrame(
        of_seeds("none", [5.0, 5.1, 4.9])
        + of_seeds("layer", [3.0, 3.1, 2.9])
        + of_seeds("rms", [3.0, 3.2, 2.9])
    )
    (card,) = judging.ranking(table, metric=TEST_ERROR, curve=VALIDATION_ERROR)
    assert card.claim == "At batch size 4 layer norm is best of 3."
    assert (card.section, card.verdict) == ("RMS norm is second", "cannot tell")
    (card,) = judging.ranking(table[table.norm != "rms"], metric=TEST_ERROR, curve=VALIDATION_ERROR)
    assert card.verdict == "agrees"


def test_intervals_hold_the_mean_as_often_as_they_say():
    # 4,000 intervals of 5 normal numbers: 95 % within four standard deviations of a share, 0.0035.
    values = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    held = [low <= 3.0 <= high for _, low, high in map(interval, values.tolist())]
    assert abs(np.mean(held) - 0.95) < 4 * 0.0035
    assert all(map(math.isnan, interval([2.0])[1:]))
    assert geometric_interval([0.5, 2.0]).mean == pytest.approx(1.0)


def test_curves_are_also_drawn_over_time():
    chart = results_table.chart("time", TABLE, ("none", "layer"), [VALIDATION_ERROR], "seconds")
    panel = chart.rows[0][0]
    assert panel.x_label == "seconds of training"
    assert panel.lines[0].x == [0.0, 10.0, 20.0]
    assert "over the time of training" in chart.caption


def test_a_damaged_table_is_named(tmp_path):
    path = tmp_path / "none.csv"
    for content in ("", "norm,batch_size\n", TABLE[:0].drop(columns="recall").to_csv(index=False)):
        path.write_text(content)
        with pytest.raises(ExperimentError, match=r"none\.csv is damaged .*; delete it"):
            results_table.read(path, DIGITS)
