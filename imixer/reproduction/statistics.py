"""Means over seeds with their uncertainty, and differences paired by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The mean of a sample.

    Args:
        mean: The mean.
        deviation: Sample standard deviation, with n - 1 in the denominator; NaN for one value.
        low: Lower end of the 95% interval of Student's t for the mean; NaN for one value.
        high: Upper end.
        count: Number of values.
    """

    mean: float
    deviation: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0. False for one value, which has no interval."""
        return self.low > 0 or self.high < 0


def estimate(values: Sequence[float], *, size: float | None = None) -> Estimate:
    """The mean of values that were drawn independently, as those of different seeds are.

    Args:
        values: The values.
        size: The largest of the numbers that they were computed from, whose rounding is no deviation; None for the
            values themselves.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("an estimate needs one value at least")
    sample = np.asarray(values, dtype=np.float64)
    mean, count = float(sample.mean()), len(sample)
    if count == 1:
        return Estimate(mean=mean, deviation=math.nan, low=math.nan, high=math.nan, count=1)
    deviation = float(sample.std(ddof=1))
    if deviation <= 4 * np.finfo(np.float64).eps * (np.abs(sample).max() if size is None else size):
        deviation = 0.0
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return Estimate(mean=mean, deviation=deviation, low=mean - half, high=mean + half, count=count)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """The mean of ``values - baseline`` over the seeds that both have; None if they share none.

    Args:
        values: A result for each seed.
        baseline: Another one.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    size = max(abs(result[seed]) for result in (values, baseline) for seed in seeds)
    return estimate([values[seed] - baseline[seed] for seed in seeds], size=size)
