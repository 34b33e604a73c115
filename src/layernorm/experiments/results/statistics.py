"""Compute means over seeds with their intervals, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from scipy import stats

#: The share of intervals that hold what they estimate.
CONFIDENCE: Final = 0.95


class Interval(NamedTuple):
    """A mean and the ends of its interval, which are NaN where one value tells nothing of its spread."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with its 95 % interval: ± t·s/√n, s with n - 1.

    Examples:
        >>> from layernorm.experiments.results.statistics import interval
        >>> [round(end, 3) for end in interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    spread = float(stats.sem(values)) * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(mean, mean - spread, mean + spread)


def geometric_interval(values: Sequence[float]) -> Interval:
    """Return the geometric mean of ratios, and its interval."""
    logs = interval(np.log(values).tolist())
    return Interval(*(math.exp(value) for value in logs))


__all__ = ["CONFIDENCE", "Interval", "geometric_interval", "interval"]
