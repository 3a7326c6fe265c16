"""Means with intervals: how far a score would move had other rows been drawn.

Percentile bootstrap over rows (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
sections 13.3 and 16.4), the interval of the MUSE paper's table 6, here always seeded. It speaks of
the rows alone: it knows nothing of other seeds of training, for which there is `across_seeds`, and
it is too narrow below some twenty rows. What cannot be scored is NaN: left out and counted.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

RESAMPLES = 9999  # the 2.5 % and 97.5 % points then fall on resamples
DRAWS_AT_ONCE = 1_000_000  # bounds the memory, whatever the number of rows


class Interval(NamedTuple):
    """A mean over `n` scored rows (or seeds), its interval, and how many were left out."""

    mean: float
    lower: float
    upper: float
    n: int
    n_unscorable: int


def mean_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of one score per row, with its percentile bootstrap interval.

    Formula: the `(1 - confidence) / 2` and `(1 + confidence) / 2` quantiles of the means of
    `resamples` draws of n rows with replacement. Range and direction are those of the score.
    NaN rows are left out and counted; without a scored row all three numbers are NaN, with one
    the bounds are.

    Raises:
        ValueError: values that are infinite or not one list, a confidence outside (0, 1), or
            no resamples.
    """
    rows = _one_per_row(values, "values")
    return _bootstrap(rows, confidence, resamples, seed)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of `first - second` over the same rows, with its paired bootstrap interval.

    Formula: `mean_interval` of the row-wise differences, so that what makes a row hard for both
    models cancels. Above 0 = the first scores higher; an interval that holds 0 tells no difference.
    A row that either model leaves NaN is left out of both and counted.

    Raises:
        ValueError: as for `mean_interval`, or lists of different lengths.
    """
    left, right = _one_per_row(first, "first"), _one_per_row(second, "second")
    if len(left) != len(right):
        raise ValueError(f"expected the same rows, got {len(left)} and {len(right)}")
    return _bootstrap(left - right, confidence, resamples, seed)


def across_seeds(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of one score per training seed, with Student's interval for so few numbers.

    Formula: `mean +- t * s / sqrt(n)`, with s the sample's standard deviation and t Student's
    quantile at n - 1 degrees of freedom. It holds for scores that vary normally between seeds, and
    can reach beyond the score's own range. Range and direction are those of the score. Seeds whose
    score is NaN are left out and counted; all three numbers are NaN without a seed, the bounds
    with one.

    Raises:
        ValueError: values that are infinite or not one list, or a confidence outside (0, 1).
    """
    given = _one_per_row(values, "values")
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence in (0, 1), got {confidence}")
    seeds = given[~np.isnan(given)]
    n, left_out = len(seeds), len(given) - len(seeds)
    mean = float(seeds.mean()) if n else float("nan")
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), n, left_out)
    reach = float(student_t.ppf((1 + confidence) / 2, n - 1) * seeds.std(ddof=1) / n**0.5)
    return Interval(mean, mean - reach, mean + reach, n, left_out)


def _one_per_row(values: ArrayLike, name: str) -> NDArray[np.float64]:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or np.isinf(rows).any():
        raise ValueError(
            f"expected one finite number (or NaN) per row as {name}, got shape {rows.shape}, "
            f"{int(np.isinf(rows).sum())} infinite"
        )
    return rows


def _bootstrap(
    values: NDArray[np.float64], confidence: float, resamples: int, seed: int
) -> Interval:
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"expected a confidence in (0, 1) and at least one resample: {confidence}, {resamples}"
        )
    rows = values[~np.isnan(values)]
    left_out = len(values) - len(rows)
    if len(rows) < 2:
        mean = float(rows[0]) if len(rows) else float("nan")
        return Interval(mean, float("nan"), float("nan"), len(rows), left_out)
    generator = np.random.default_rng(seed)
    step = max(1, DRAWS_AT_ONCE // len(rows))
    means = np.concatenate(
        [
            rows[
                generator.integers(len(rows), size=(min(step, resamples - start), len(rows)))
            ].mean(axis=1)
            for start in range(0, resamples, step)
        ]
    )
    lower, upper = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(rows.mean()), float(lower), float(upper), len(rows), left_out)
