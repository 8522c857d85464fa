"""Means, intervals and paired differences against values computed by hand."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from imixer.reproduction import estimate, paired_difference
from imixer.reproduction.tables import verdict

NUMBERS = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


def test_mean_deviation_and_interval_by_hand() -> None:
    # The deviations from 2.5 are -1.5, -0.5, 0.5, 1.5; their squares add up to 5, so the variance is 5/3. The 97.5%
    # quantile of Student's t with three degrees of freedom is 3.182446, from a printed table.
    found = estimate([1, 2, 3, 4])
    assert found.mean == 2.5
    assert found.deviation == pytest.approx(math.sqrt(5 / 3))
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert found.low == pytest.approx(2.5 - half, abs=1e-6)
    assert found.high == pytest.approx(2.5 + half, abs=1e-6)
    assert found.count == 4


def test_two_values_have_a_wide_interval() -> None:
    # With one degree of freedom the quantile is tan(0.475 pi) = 12.7062.
    found = estimate([1.0, 3.0])
    assert found.high - found.mean == pytest.approx(math.tan(0.475 * math.pi), abs=1e-9)
    assert not found.excludes_zero


def test_one_value_has_no_interval_and_supports_no_claim() -> None:
    found = estimate([7.0])
    assert (found.mean, found.count) == (7.0, 1)
    assert math.isnan(found.deviation)
    assert math.isnan(found.low)
    assert not found.excludes_zero
    assert verdict(found) == ""


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="one value at least"):
        estimate([])


def test_differences_are_paired_by_seed_and_need_both() -> None:
    # Seeds 0, 1 and 2 are common: the differences are 1, 2 and 3.
    found = paired_difference({0: 11, 1: 22, 2: 33, 5: 0}, {2: 30, 1: 20, 0: 10, 7: 100})
    assert found is not None
    assert (found.mean, found.deviation, found.count) == (2, 1, 3)
    half = 4.302653 / math.sqrt(3)
    assert found.low == pytest.approx(2 - half, abs=1e-6)
    assert not found.excludes_zero
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@given(st.lists(st.integers(0, 499), min_size=2, max_size=6))
def test_differences_that_are_equal_but_for_rounding_have_no_deviation(right: list[int]) -> None:
    """Accuracies of 500 images, in percent, of which each seed has one image more right."""
    before = {seed: 100 * number / 500 for seed, number in enumerate(right)}
    after = {seed: 100 * (number + 1) / 500 for seed, number in enumerate(right)}
    found = paired_difference(after, before)
    assert found is not None
    assert found.deviation == 0
    assert verdict(found) == ""


def test_pairing_sees_what_unpaired_means_do_not() -> None:
    baseline = {0: 40.0, 1: 50.0, 2: 60.0, 3: 70.0}
    better = {seed: value + 1 + 0.1 * seed for seed, value in baseline.items()}
    found = paired_difference(better, baseline)
    assert found is not None
    assert verdict(found) == "better"
    reversed_sign = paired_difference(baseline, better)
    assert reversed_sign is not None
    assert verdict(reversed_sign) == "worse"
    two = paired_difference({0: 2.0, 1: 2.1}, {0: 1.0, 1: 1.1 + 1e-3})
    assert two is not None
    assert two.excludes_zero
    assert verdict(two) == ""  # two seeds agree by chance too easily
    equal = paired_difference({0: 2.0, 1: 2.0, 2: 2.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert equal is not None
    assert verdict(equal) == ""
    assert estimate(list(better.values())).low < estimate(list(baseline.values())).mean


@given(NUMBERS, st.floats(-50, 50), st.floats(0.1, 10))
def test_shifting_and_scaling_move_the_interval_alike(values: list[float], shift: float, factor: float) -> None:
    plain, moved = estimate(values), estimate([factor * value + shift for value in values])
    for name in ("mean", "low", "high"):
        assert getattr(moved, name) == pytest.approx(factor * getattr(plain, name) + shift, abs=1e-6)
    assert moved.deviation == pytest.approx(factor * plain.deviation, abs=1e-6)
    assert plain.low <= plain.mean <= plain.high


@given(NUMBERS)
def test_a_difference_from_itself_is_none(values: list[float]) -> None:
    found = paired_difference(dict(enumerate(values)), dict(enumerate(values)))
    assert found is not None
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert not found.excludes_zero
