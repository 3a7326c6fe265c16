"""How well one score ranks records as another does: Spearman's correlation, with bootstrap intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from llm_unlearn.memorization.controls import residual_ranks
from llm_unlearn.memorization.orientation import Floats

RESAMPLES = 1999
RANKS_AT_ONCE = 500_000


class Agreement(NamedTuple):
    """Spearman's correlation over `n` records with the ends of its 95 % interval; NaN if flat."""

    rho: float
    lower: float
    upper: float
    n: int


def spearman(
    first: ArrayLike, second: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Agreement:
    """Rank correlation with a percentile bootstrap over records (Efron and Tibshirani, 1993, 13.3).

    Records that either score leaves NaN are left out. The interval knows nothing of other trainings.
    """
    left, right = _known(first, second)
    if len(left) < 3:
        return Agreement(np.nan, np.nan, np.nan, len(left))
    generator = np.random.default_rng(seed)
    step, found = max(1, RANKS_AT_ONCE // len(left)), []
    for start in range(0, resamples, step):
        chosen = generator.integers(len(left), size=(min(step, resamples - start), len(left)))
        found.append(_correlations(rankdata(left[chosen], axis=1), rankdata(right[chosen], axis=1)))
    rho = float(_correlations(rankdata(left)[None], rankdata(right)[None])[0])
    drawn = np.concatenate(found)
    drawn = drawn[~np.isnan(drawn)]
    lower, upper = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
    return Agreement(rho, float(lower), float(upper), len(left))


def partial_spearman(first: ArrayLike, second: ArrayLike, controls: Sequence[ArrayLike]) -> float:
    """Rank correlation of what the controls' ranks do not explain; NaN if nothing is left."""
    left, right, *others = _known(first, second, *controls)
    if len(left) < 3 + len(others):
        return float("nan")
    ours, theirs = residual_ranks(left, others), residual_ranks(right, others)
    return float(_correlations(ours[None], theirs[None])[0])


def _known(*columns: ArrayLike) -> list[Floats]:
    values = [np.asarray(one, np.float64) for one in columns]
    known = ~np.isnan(np.stack(values)).any(axis=0)
    return [one[known] for one in values]


def _correlations(left: Floats, right: Floats) -> Floats:
    """Pearson's correlation of each row; NaN where one is constant."""
    left = left - left.mean(axis=1, keepdims=True)
    right = right - right.mean(axis=1, keepdims=True)
    scale = np.sqrt((left * left).sum(axis=1) * (right * right).sum(axis=1))
    smallest = 1e-9 * left.shape[1] ** 3
    product = (left * right).sum(axis=1)
    return np.divide(product, scale, out=np.full(len(left), np.nan), where=scale > smallest)
