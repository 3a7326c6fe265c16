"""Intervals over rows and seeds: against the normal limit, their coverage, pairing, NaN and bad input."""

import math
from typing import Any

import numpy as np
import pytest

from llm_unlearn.evaluation.statistics import across_seeds, mean_interval, paired_difference

NAN = math.nan
ROWS = np.random.default_rng(1).normal(2.0, 3.0, 400)


def test_the_interval_meets_the_normal_one_on_many_rows() -> None:
    interval = mean_interval(ROWS)
    reach = 1.96 * ROWS.std(ddof=1) / 20
    assert interval.mean == pytest.approx(ROWS.mean())
    assert interval.lower == pytest.approx(ROWS.mean() - reach, abs=reach / 10)
    assert interval.upper == pytest.approx(ROWS.mean() + reach, abs=reach / 10)
    assert (interval.n, interval.n_unscorable) == (400, 0)


def test_two_rows_worked_out_by_hand() -> None:
    """Of the four equally likely draws of (0, 1), one has mean 0, two 0.5 and one 1."""
    interval = mean_interval([0.0, 1.0])
    assert interval == (0.5, 0.0, 1.0, 2, 0)
    assert mean_interval([0.0, 1.0], confidence=0.4)[1:3] == (0.5, 0.5)


def test_nineteen_of_twenty_intervals_hold_the_mean() -> None:
    generator = np.random.default_rng(0)
    held = [
        interval.lower <= 0.5 <= interval.upper
        for interval in (mean_interval(generator.random(50), resamples=999) for _ in range(400))
    ]
    assert 0.91 < np.mean(held) < 0.98


def test_the_seed_decides_and_nothing_else() -> None:
    np.random.seed(7)  # the global generator must play no part
    first = mean_interval(ROWS, seed=3)
    np.random.random(5)
    assert mean_interval(ROWS, seed=3) == first != mean_interval(ROWS, seed=4)


def test_shift_scale_and_confidence() -> None:
    base, moved = mean_interval(ROWS), mean_interval(5 + 2 * ROWS)
    assert np.allclose(moved[:3], 5 + 2 * np.array(base[:3]))
    wide = mean_interval(ROWS, confidence=0.99)
    assert wide.lower < base.lower < base.mean < base.upper < wide.upper
    assert mean_interval([0.3] * 9)[:3] == pytest.approx((0.3, 0.3, 0.3))


def test_pairing_removes_what_rows_share() -> None:
    """Rows differ far more than the models do; only the paired interval sees the difference."""
    better = ROWS + 0.1 + np.random.default_rng(2).normal(0, 0.05, 400)
    paired = paired_difference(better, ROWS)
    assert 0 < paired.lower < 0.1 < paired.upper < 0.12
    alone = mean_interval(ROWS)
    assert paired.upper - paired.lower < (alone.upper - alone.lower) / 20
    back = paired_difference(ROWS, better)
    assert (back.mean, back.lower) == pytest.approx((-paired.mean, -paired.upper), abs=1e-3)


def test_rows_without_a_score_are_left_out_of_both_and_counted() -> None:
    interval = paired_difference([1.0, NAN, 3.0, 9.0, NAN], [0.0, 5.0, 1.0, NAN, NAN])
    assert interval == (*paired_difference([1.0, 3.0], [0.0, 1.0])[:3], 2, 3)
    assert interval.mean == 1.5
    assert mean_interval([NAN, 1.0, 2.0]) == (*mean_interval([1.0, 2.0])[:3], 2, 1)


@pytest.mark.parametrize(("rows", "mean", "n"), [([], NAN, 0), ([NAN] * 3, NAN, 0), ([4], 4.0, 1)])
def test_too_few_rows_give_no_interval(rows: list[float], mean: float, n: int) -> None:
    interval = mean_interval(rows)
    assert interval.mean == pytest.approx(mean, nan_ok=True)
    assert math.isnan(interval.lower) and math.isnan(interval.upper)
    assert (interval.n, interval.n_unscorable) == (n, len(rows) - n)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1.0, math.inf], {}, "1 infinite"),
        ([[1.0, 2.0]], {}, r"shape \(1, 2\)"),
        ([1.0, 2.0], {"confidence": 1.0}, "confidence in"),
        ([1.0, 2.0], {"confidence": 95}, "confidence in"),
        ([1.0, 2.0], {"resamples": 0}, "at least one resample"),
    ],
)
def test_bad_input(values: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_interval(values, **options)
    with pytest.raises(ValueError, match=message):
        paired_difference(values, [0.0] * len(values), **options)


def test_models_on_different_rows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same rows, got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_three_seeds_worked_out_by_hand() -> None:
    """Mean 2, deviation 1, t(0.975, 2) = 4.3027: 2 +- 4.3027 / sqrt(3)."""
    interval = across_seeds([1.0, 2.0, 3.0])
    assert interval == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841, 3, 0), abs=1e-4)
    assert across_seeds([1.0, NAN, 2.0, 3.0]) == (*interval[:4], 1)
    narrow = across_seeds([1.0, 2.0, 3.0], confidence=0.5)
    assert interval.lower < narrow.lower < 2 < narrow.upper < interval.upper


def test_intervals_of_few_seeds_hold_the_mean_where_the_bootstrap_does_not() -> None:
    draws = np.random.default_rng(0).normal(0.7, 0.1, (400, 3))
    student = [across_seeds(seeds) for seeds in draws]
    rows = [mean_interval(seeds, resamples=299) for seeds in draws]
    held, bootstrap = (
        np.mean([interval.lower <= 0.7 <= interval.upper for interval in intervals])
        for intervals in (student, rows)
    )
    assert 0.92 < held < 0.98 and bootstrap < 0.85


@pytest.mark.parametrize(("seeds", "mean", "n"), [([], NAN, 0), ([NAN], NAN, 0), ([0.4], 0.4, 1)])
def test_one_seed_has_no_interval(seeds: list[float], mean: float, n: int) -> None:
    interval = across_seeds(seeds)
    assert interval.mean == pytest.approx(mean, nan_ok=True)
    assert math.isnan(interval.lower) and math.isnan(interval.upper)
    assert (interval.n, interval.n_unscorable) == (n, len(seeds) - n)


def test_seeds_that_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="1 infinite"):
        across_seeds([1.0, math.inf])
    with pytest.raises(ValueError, match="confidence in"):
        across_seeds([1.0, 2.0], confidence=95)
