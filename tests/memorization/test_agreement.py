"""Rank correlations and controls."""

import numpy as np
import pytest
from scipy import stats

from llm_unlearn.memorization.agreement import partial_spearman, spearman
from llm_unlearn.memorization.controls import gain, within_length


def correlated(n: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    first = generator.normal(size=n).round(1)  # with ties
    return first, first + generator.normal(size=n)


def test_spearman_is_scipys_and_its_interval_holds_it() -> None:
    first, second = correlated()
    found = spearman(first, second)
    assert found.rho == pytest.approx(stats.spearmanr(first, second).statistic)
    assert found.lower < found.rho < found.upper and found.n == 200
    fisher = np.tanh(np.arctanh(found.rho) + np.array([-1.96, 1.96]) / np.sqrt(197) * 1.03)
    assert (found.lower, found.upper) == pytest.approx(fisher, abs=0.04)
    assert spearman(first, second) == found  # seeded


def test_records_without_a_score_are_left_out_and_flat_is_no_number() -> None:
    first, second = correlated(50)
    holes = np.where(np.arange(50) % 5 == 0, np.nan, first)
    keep = ~np.isnan(holes)
    found = spearman(holes, second)
    assert found.n == 40 and found.rho == pytest.approx(
        stats.spearmanr(first[keep], second[keep]).statistic
    )
    assert np.isnan(spearman(np.ones(50), second).rho)
    assert np.isnan(spearman([1.0, 2.0], [1.0, 2.0]).rho)


def test_length_alone_is_controlled_away() -> None:
    generator = np.random.default_rng(1)
    length = generator.integers(3, 200, size=500)
    first, second = (length + generator.normal(scale=5, size=500) for _ in range(2))
    assert spearman(first, second, resamples=1).rho > 0.95
    assert abs(partial_spearman(first, second, [length])) < 0.15
    own = generator.normal(size=500)  # what length does not explain stays
    assert partial_spearman(length + 99 * own, length + 99 * own, [length]) == pytest.approx(1.0)


def test_ranks_within_length() -> None:
    lengths = np.repeat([5, 50], 10)
    scores = np.concatenate([np.arange(10), 100 + np.arange(10)]).astype(float)
    ranks = within_length(scores, lengths, buckets=2)
    assert ranks[:10] == pytest.approx(ranks[10:])
    assert ranks[:10] == pytest.approx((np.arange(10) + 0.5) / 10)
    assert within_length([1.0, np.nan, 2.0], [3, 3, 3]) == pytest.approx(
        [0.25, np.nan, 0.75], nan_ok=True
    )
    assert np.isnan(within_length([np.nan], [3])).all()


def test_what_the_base_model_knew_is_no_gain() -> None:
    assert gain([0.9, 0.9], [0.89, 0.1]) == pytest.approx([0.01, 0.8])
