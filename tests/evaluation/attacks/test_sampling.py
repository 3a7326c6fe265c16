"""leak@k against its definition, and on a model that knows beside one that does not."""

from itertools import combinations

import numpy as np
import pytest

from llm_unlearn.evaluation.attacks.sampling import (
    compare_leakage,
    leak_at_k,
    leakage,
    powers_of_two,
    sampled_scores,
)
from llm_unlearn.evaluation.scorer import Scorer, tokenize_open
from tests.evaluation.attacks.demonstration import FORGET, PUBLIC, base, pairs, tokenizer
from tests.tiny import make_tiny_model


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_leak_at_k_is_the_mean_maximum_over_all_subsets(k: int) -> None:
    scores = np.random.default_rng(0).random((4, 6)).round(1)  # with ties
    expected = [np.mean([max(subset) for subset in combinations(row, k)]) for row in scores]
    np.testing.assert_allclose(leak_at_k(scores, k), expected, atol=1e-12)


def test_leak_at_k_of_zeros_and_ones_is_pass_at_k() -> None:
    right, samples, k = 3, 200, 50
    scores = np.zeros((1, samples))
    scores[0, :right] = 1
    # 1 - C(n - c, k) / C(n, k), as a product that does not overflow
    missed = np.prod([(samples - k - i) / (samples - i) for i in range(right)])
    np.testing.assert_allclose(leak_at_k(scores, k), 1 - missed, rtol=1e-10)


def test_leak_at_k_estimates_the_expected_maximum_without_bias() -> None:
    generator = np.random.default_rng(1)
    estimates = leak_at_k(generator.random((20000, 8)), 4)
    assert abs(estimates.mean() - 4 / 5) < 0.005  # of four uniform numbers
    naive = generator.random((20000, 8)).max(axis=1).mean()
    assert naive > 0.88  # what the maximum of all samples would have said


def test_leak_at_k_never_falls_with_k() -> None:
    scores = np.random.default_rng(2).random((5, 64))
    curve = np.array([leak_at_k(scores, k) for k in range(1, 65)])
    assert (np.diff(curve, axis=0) >= -1e-12).all()
    np.testing.assert_allclose(curve[0], scores.mean(axis=1))
    np.testing.assert_allclose(curve[-1], scores.max(axis=1))


def test_unscorable_prompts_are_counted_and_bad_k_is_refused() -> None:
    scores = np.array([[0.0, 1.0], [np.nan, np.nan]])
    interval = leakage(scores)[2]
    assert (interval.mean, interval.n, interval.n_unscorable) == (1.0, 1, 1)
    for k in (0, 3):
        with pytest.raises(ValueError, match="expected 1 to 2"):
            leak_at_k(scores, k)
    assert powers_of_two(20) == (1, 2, 4, 8, 16)


def test_the_model_that_knows_leaks_more_than_the_one_that_does_not() -> None:
    model = base()
    scorer = Scorer(model, tokenizer())
    tables = []
    for rows in (pairs(PUBLIC[:4]), FORGET[:24]):  # known, and never seen
        prompts = [tokenize_open(tokenizer(), prompt) for prompt, _ in rows]
        tables.append(
            sampled_scores(
                scorer,
                prompts,
                [said for _, said in rows],
                lambda said, true: float(said == true),
                samples=8,
                max_new_tokens=8,
            )
        )
    known, unknown = (leakage(table) for table in tables)
    assert known[1].mean > 0.95
    assert unknown[8].mean < 0.1
    difference = compare_leakage(*tables)[8]
    assert difference.lower > 0.8


def test_samples_are_seeded_and_too_long_prompts_are_not_scored() -> None:
    scorer = Scorer(make_tiny_model(), tokenizer())

    def table(seed: int) -> np.ndarray:
        prompts = [[5, 6, 7], [9] * 600]
        return sampled_scores(
            scorer,
            prompts,
            ["", ""],
            lambda said, _: float(len(said)),
            samples=4,
            max_new_tokens=4,
            seed=seed,
        )

    first = table(1)
    np.testing.assert_array_equal(first, table(1))
    assert (first[0] != table(2)[0]).any()
    assert np.isnan(first[1]).all() and not np.isnan(first[0]).any()
    with pytest.raises(ValueError, match="temperature above 0"):
        sampled_scores(scorer, [[1]], [""], lambda *_: 0.0, temperature=0.0)
