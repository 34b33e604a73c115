"""Interleaved measuring, by a clock that only the subjects move."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest

from benchmarks.core import timing
from benchmarks.core.table import measures
from benchmarks.core.timing import Samples, interleaved, order


class Clock:
    """A clock that only the subjects move."""

    def __init__(self):
        self.now, self.called = 0.0, []

    def __call__(self):
        return self.now

    def subject(self, name, seconds):
        def call():
            self.called.append(name)
            self.now += seconds

        return call


def test_timing_samples_every_subject_once_in_each_round_in_changing_order():
    clock = Clock()
    lasting = {"a": 0.004, "b": 0.05, "c": 0.001}
    subjects = {name: clock.subject(name, seconds) for name, seconds in lasting.items()}
    samples = interleaved(subjects, 7, least=0.003, budget=1e9, clock=clock)
    # Enough calls for the least seconds, 1.2 times over where one is not enough.
    assert {name: found.calls for name, found in samples.items()} == {"a": 1, "b": 1, "c": 4}
    for name, seconds in lasting.items():
        assert samples[name].seconds == pytest.approx([seconds] * 7)
    # One call more before a sample of short calls, none before long ones.
    sampled = {"a": 2, "b": 1, "c": 5}
    expected = [n for index in range(7) for n in order("abc", index) for _ in range(sampled[n])]
    assert clock.called[-len(expected) :] == expected


def test_a_context_surrounds_each_sample_and_is_not_timed():
    clock = Clock()
    open_now, seen = [], []

    @contextmanager
    def context():
        clock.now += 5.0
        open_now.append(True)
        yield
        open_now.clear()
        clock.now += 5.0

    def call():
        clock.now += 0.004
        seen.append(("a", bool(open_now)))

    def other():
        clock.now += 0.004
        seen.append(("b", bool(open_now)))

    samples = interleaved({"a": call, "b": other}, 3, budget=1e9, contexts={"a": context}, clock=clock)
    assert samples["a"].seconds == pytest.approx([0.004] * 3)
    assert set(seen) == {("a", True), ("b", False)}


def test_every_subject_is_as_often_at_every_place_and_after_several_others():
    orders = [order("abcd", index) for index in range(8)]
    assert all(sorted(names) == list("abcd") for names in orders)
    for place in range(4):
        assert set(Counter(names[place] for names in orders).values()) == {2}
    before_b = {names[names.index("b") - 1] for names in orders if names.index("b")}
    assert before_b == {"a", "c"}


def test_timing_stops_at_its_budget_but_not_before_a_few_rounds():
    def rounds(budget):
        clock = Clock()
        samples = interleaved({"a": clock.subject("a", 1.0)}, 30, budget=budget, clock=clock)
        return len(samples["a"].seconds)

    assert rounds(1.0) == timing.LEAST_ROUNDS
    assert rounds(12.5) == 12  # 1 call to calibrate, then 12 until 13 seconds are over
    assert rounds(1e9) == 30


def test_a_subject_that_has_had_its_seconds_is_left_out_of_further_rounds():
    clock = Clock()
    subjects = {"slow": clock.subject("slow", 0.2), "fast": clock.subject("fast", 0.01)}
    samples = interleaved(subjects, 12, clock=clock, least_rounds=3, each=0.1)
    assert {name: len(found.seconds) for name, found in samples.items()} == {"slow": 3, "fast": 10}
    row = measures(samples["slow"], samples["fast"])  # of the rounds that both took part in
    assert (row["rounds"], row["ratio_to_torch"]) == (3, pytest.approx(0.05))


def test_a_pause_of_the_process_does_not_make_samples_short():
    clock = Clock()
    lasting = iter([1e-4, 5.0, 1e-4])  # the second call of the calibration is disturbed

    def call():
        clock.now += next(lasting, 1e-4)

    # A sample that is as long as the disturbed one is believed at once; one of 10 ms is not.
    assert interleaved({"a": call}, 1, clock=clock)["a"].calls == 1
    lasting = iter([1e-4, 0.01, 1e-4])
    assert interleaved({"a": call}, 1, clock=clock)["a"].calls >= 30


def test_the_ratio_is_the_median_of_the_ratios_of_each_round():
    base, other = Samples(3, (4e-6, 9e-6, 5e-6)), Samples(7, (2e-6, 1e-6, 5e-6))
    row = measures(other, base)
    assert (row["calls_per_sample"], row["rounds"]) == (7, 3)
    assert (row["q25_us"], row["median_us"], row["q75_us"]) == (1.5, 2.0, 3.5)
    # 2, 9 and 1; the medians alone would give 2.5.
    assert (row["ratio_q25"], row["ratio_to_torch"], row["ratio_q75"]) == (1.5, 2.0, 5.5)
