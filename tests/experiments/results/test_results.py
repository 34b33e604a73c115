"""The summary of a comparison's records and the verdicts on them, with records written by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from layernorm.experiments.classification import TEST_ERROR
from layernorm.experiments.results import judging, results_table
from layernorm.experiments.task import Metric

RECALL = Metric("recall", "recall (%)", higher=True)


def rows(norm, seed, errors, losses=None, batch_size=4):
    losses = losses or [None, *[1.0] * (len(errors) - 1)]
    return [
        {"norm": norm, "batch_size": batch_size, "seed": seed, "update": i, "epoch": i / 2}
        | {"seconds": i * 10.0, "train_loss": loss, "test_loss": 1.0}
        | {"test_error": error, "recall": 100 - error}
        for i, (error, loss) in enumerate(zip(errors, losses, strict=True))
    ]


TABLE = pd.DataFrame(
    rows("none", 0, [90, 8, 5], [None, 2.0, 1.0])
    + rows("none", 1, [90, 6, 7], [None, 2.0, 3.0])
    + rows("layer", 0, [90, 5, 2], [None, 1.0, 0.5])
    + rows("layer", 1, [90, 8, 7], [None, 1.0, 0.5])
)


def test_the_summary_is_what_the_records_say():
    none, layer = results_table.summarize(TABLE, ("none", "layer"), TEST_ERROR).to_dict("records")
    assert (none["norm"], layer["norm"]) == ("none", "layer")
    assert none["best"] == 5.5
    assert none["best_std"] == 0.5
    assert none["epochs_to_baseline"] == (1.0 + 0.5) / 2
    assert layer["epochs_to_baseline"] == 0.5
    assert layer["seconds_to_baseline"] == 10.0
    assert (layer["reached"], layer["seeds"]) == (1, 2)
    assert none["final_loss"] == 2.0
    assert none["update_ms"] == 10_000.0
    cells = results_table.cells(results_table.summarize(TABLE, ("none", "layer"), TEST_ERROR), TEST_ERROR)
    assert cells[0]["best"] == "5.50 ± 0.50"
    assert cells[1]["epochs_to_baseline"] == "0.50 ± 0.00 (1 of 2)"
    never = TABLE[TABLE.norm == "none"].assign(norm="layer", test_error=99.0)
    both = pd.concat([TABLE[TABLE.norm == "none"], never])
    cells = results_table.cells(results_table.summarize(both, ("none", "layer"), TEST_ERROR), TEST_ERROR)
    assert cells[1]["epochs_to_baseline"] == "not reached"


def test_a_metric_of_which_more_is_better():
    none, layer = results_table.summarize(TABLE, ("none", "layer"), RECALL).to_dict("records")
    assert (none["best"], layer["best"]) == (94.5, 95.5)
    assert layer["epochs_to_baseline"] == 0.5
    card = judging.better(TABLE, RECALL, claim="c", section="s")
    assert (card.verdict, card.figure) == (
        "agrees",
        "Batch 4: best recall (%) 95.50 (layer norm) against 94.50 (no norm).",
    )


@pytest.mark.parametrize("metric", [TEST_ERROR, RECALL])
def test_which_norm_needs_fewer_updates(metric):
    def judged(table, **options):
        card = judging.fewer_updates(
            pd.DataFrame(table), metric, claim="c", section="s", remark="why", **options
        )
        return card.verdict, card.figure, card.remark

    none = rows("none", 0, [90, 8, 6, 5]) + rows("none", 0, [90, 9, 9, 9], batch_size=128)
    fast = rows("layer", 0, [90, 5, 4, 3])
    assert judged(none + fast) == (
        "agrees",
        "Batch 4: layer norm is as good as no norm at its best after 1 updates, no norm itself after 3 "
        "(3.0 times fewer).",
        "",
    )
    slow = rows("layer", 0, [90, 10, 10, 10], batch_size=128)
    verdict, figure, remark = judged(none + fast + slow)
    assert (verdict, remark) == ("partly", "why")
    assert figure.startswith(
        "Batch 128: layer norm never is as good as no norm at its best, at update 1; batch 4:"
    )
    assert judged(none + fast + slow, batch_sizes=(128,))[0] == "differs"
    assert judged(none)[0] == "not run"
    # As many updates as the baseline are not fewer.
    assert judged(none + rows("layer", 0, [90, 6, 6, 5]))[0] == "differs"


def test_a_damaged_table_is_named(tmp_path):
    from layernorm.experiments import registry
    from layernorm.experiments import task as tasks

    path = tmp_path / "none.csv"
    for content in ("", "norm,batch_size\n", TABLE[:0].drop(columns="recall").to_csv(index=False)):
        path.write_text(content)
        with pytest.raises(tasks.ExperimentError, match=r"none\.csv is damaged .*; delete it"):
            results_table.read(path, registry.find("digits"))
