"""Membership scores, AUC, true positives and PrivLeak: by hand, in the limit, and as published."""

import itertools
import math
import zlib
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from llm_unlearn.evaluation.membership import (
    Scores,
    auc,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    privleak,
    reference_score,
    true_positive_rate,
    zlib_score,
)

NAN = math.nan
TOKENS = [-1.0, -4.0, -0.5, -2.5, -2.0]


def test_scores_worked_out_by_hand() -> None:
    assert loss_score(TOKENS) == -2.0
    assert zlib_score(TOKENS, "hello") == -2.0 / len(zlib.compress(b"hello"))
    assert min_k_score(TOKENS) == (-4.0 - 2.5) / 2
    assert min_k_score(TOKENS, share=0.6) == (-4.0 - 2.5 - 2.0) / 3
    assert reference_score(TOKENS, [-3.0, -6.0]) == 2.5
    means, deviations = [-1.5, -2.0, -0.5, -2.0, -1.0], [0.5, 1.0, 0.0, 0.25, 2.0]
    # standardised: 1, -2, 0, -2, -0.5
    assert min_k_plus_plus_score(TOKENS, means, deviations) == -2.0
    assert min_k_plus_plus_score(TOKENS, means, deviations, share=1.0) == pytest.approx(-0.7)


def test_standardising_with_moments_of_a_real_distribution() -> None:
    """p = (1/2, 1/4, 1/4): mu = -1.5 ln 2, sigma = 0.5 ln 2, so the tokens are at +1 and -1."""
    log_two = math.log(2)
    score = min_k_plus_plus_score(
        [-log_two, -2 * log_two], [-1.5 * log_two] * 2, [0.5 * log_two] * 2, share=0.5
    )
    assert score == pytest.approx(-1.0)


def test_limits_of_min_k() -> None:
    assert min_k_score(TOKENS, share=1.0) == loss_score(TOKENS)
    assert min_k_score(TOKENS, share=1e-9) == min(TOKENS)
    assert min_k_score([-3.0]) == min_k_score([-3.0, -1.0]) == -3.0
    assert min_k_score(TOKENS) == min_k_score(TOKENS[::-1])
    assert math.isnan(min_k_score([-3.0, -1.0], at_least_one=False))  # int(0.4 * 2) is 0
    assert min_k_score([-3.0, -1.0, -2.0], at_least_one=False) == -3.0
    unit = min_k_plus_plus_score(TOKENS, [0.0] * 5, [1.0] * 5)
    assert unit == min_k_score(TOKENS)


def test_a_certain_model_gives_large_but_finite_scores() -> None:
    assert min_k_plus_plus_score([-1.0], [0.0], [0.0]) == pytest.approx(-1000.0)
    assert min_k_plus_plus_score([0.0], [0.0], [0.0]) == 0.0


@pytest.mark.parametrize("tokens", [[], [NAN], [-1.0, NAN, -2.0]])
def test_an_example_that_cannot_be_scored_is_nan(tokens: list[float]) -> None:
    ones = [1.0] * len(tokens)
    scores = [loss_score(tokens), zlib_score(tokens, "text"), min_k_score(tokens)]
    scores += [min_k_plus_plus_score(tokens, [-1.0] * len(tokens), ones)]
    scores += [reference_score(tokens, [-1.0]), reference_score([-1.0], tokens)]
    assert all(math.isnan(score) for score in scores)
    assert math.isnan(min_k_plus_plus_score([-1.0, -2.0], [-1.0, -1.0], [1.0, NAN], share=0.5))


def brute_force(members: Any, non_members: Any) -> float:
    return float(np.mean([(a > b) + (a == b) / 2 for a in members for b in non_members]))


@pytest.mark.parametrize(
    ("members", "non_members", "value"),
    [
        ([3.0, 4.0], [1.0, 2.0], 1.0),
        ([1.0, 2.0], [3.0, 4.0], 0.0),
        ([1.0, 3.0], [2.0, 4.0], 0.25),
        ([1.0, 2.0], [2.0, 0.0], 0.625),
        ([1.0, 1.0], [1.0, 1.0, 1.0], 0.5),
        ([math.inf, 0.0], [-math.inf, 1.0], 0.75),
    ],
)
def test_areas_worked_out_by_hand(members: Any, non_members: Any, value: float) -> None:
    assert auc(members, non_members).value == value == brute_force(members, non_members)
    assert auc(non_members, members).value == 1 - value


def draw(seed: int, n: int, m: int, shift: float) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    return np.round(generator.normal(shift, 1, n), 1), np.round(generator.normal(0, 1, m), 1)


def test_area_is_mann_whitney_with_ties_and_follows_order_alone() -> None:
    members, non_members = draw(0, 70, 45, 0.5)
    result = auc(members, non_members)
    assert result.value == mannwhitneyu(members, non_members).statistic / (70 * 45)
    assert auc(np.exp(members[::-1]), np.exp(non_members)) == pytest.approx(result)
    assert (result.n_members, result.n_non_members, result.n_unscorable) == (70, 45, 0)


def test_interval_is_delong() -> None:
    """Against the definition: variances of the share of the other group that each one beats."""
    members, non_members = draw(3, 40, 60, 0.4)
    wins = (members[:, None] > non_members) + (members[:, None] == non_members) / 2
    variance = wins.mean(1).var(ddof=1) / 40 + wins.mean(0).var(ddof=1) / 60
    result = auc(members, non_members)
    assert result.upper - result.value == pytest.approx(1.959964 * variance**0.5, rel=1e-6)
    assert result.value - result.lower == pytest.approx(1.959964 * variance**0.5, rel=1e-6)
    narrow = auc(members, non_members, confidence=0.5)
    assert result.lower < narrow.lower < result.value < narrow.upper < result.upper


def test_interval_covers_the_true_area() -> None:
    """Members N(1, 1), others N(0, 1): the area is Phi(1 / sqrt 2) = 0.7602."""
    held = 0
    for seed in range(400):
        generator = np.random.default_rng(seed)
        result = auc(generator.normal(1, 1, 60), generator.normal(0, 1, 60))
        held += result.lower <= 0.7602 <= result.upper
    assert 0.91 < held / 400 < 0.98


def test_complete_separation_is_not_certainty() -> None:
    """Five pairs that agree: the chance is at least 0.025 ** (1 / 5) = 0.478."""
    assert auc([2.0] * 5, [1.0] * 9) == pytest.approx((1.0, 0.025**0.2, 1.0, 5, 9, 0))
    assert auc([1.0] * 5, [2.0] * 9) == pytest.approx((0.0, 0.0, 1 - 0.025**0.2, 5, 9, 0))


def test_areas_without_scores_or_spread() -> None:
    assert auc([1.0, NAN, 3.0], [2.0, NAN, NAN, 4.0])[::3] == (0.25, 2)
    assert auc([1.0, NAN, 3.0], [2.0, NAN, NAN, 4.0])[3:] == (2, 2, 3)
    for members, non_members in ([], [1.0]), ([NAN], [1.0]), ([1.0], []):
        assert all(math.isnan(number) for number in auc(members, non_members)[:3])
    for members, non_members in ([1.0], [0.0, 2.0]), ([1.0] * 4, [1.0] * 4):
        result = auc(members, non_members)
        assert result.value == 0.5 and math.isnan(result.lower) and math.isnan(result.upper)


@pytest.mark.parametrize(
    ("rate", "found", "wrong"),
    [(0.0, 0.5, 0.0), (0.19, 0.5, 0.0), (0.2, 0.5, 0.2), (0.4, 0.75, 0.4), (1.0, 1.0, 1.0)],
)
def test_true_positives_worked_out_by_hand(rate: float, found: float, wrong: float) -> None:
    """Above the highest other (5) are two of four members; above 4 the same; above 3 also 3.5."""
    result = true_positive_rate([0.5, 3.5, 5.5, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0], rate)
    assert result == (found, wrong, 4, 5, 0)


def test_true_positives_with_ties_rounding_and_nan() -> None:
    assert true_positive_rate([1.0, 2.0], [1.0, 1.0], 0.5) == (0.5, 0.0, 2, 2, 0)
    others = list(range(100))
    assert true_positive_rate([70.5], others, 0.29) == (1.0, 0.29, 1, 100, 0)
    assert true_positive_rate([NAN, 2.0], [1.0, NAN]) == (1.0, 0.0, 1, 1, 2)
    assert math.isnan(true_positive_rate([NAN], [1.0]).value)
    members, non_members = draw(1, 200, 200, 0.7)
    rates = [true_positive_rate(members, non_members, rate) for rate in np.linspace(0, 1, 50)]
    assert all(a.value <= b.value for a, b in itertools.pairwise(rates))


@pytest.mark.parametrize(
    ("model", "retrain", "published"),
    [
        (0.2313, 0.5393, -57.11),
        (0.4061, 0.5393, -24.70),
        (0.4083, 0.5393, -24.29),
        (0.3349, 0.5393, -37.90),
        (0.4224, 0.5393, -21.68),
        (0.4028, 0.5393, -25.31),
        (0.3389, 0.5393, -37.16),
        (0.4374, 0.5393, -18.89),
        (0.0009, 0.4772, -99.81),
        (1.0, 0.4772, 109.56),
        (0.0, 0.4772, -100.0),
        (0.0, 0.5393, -100.0),
        (1.0, 0.5393, 85.43),
    ],
)
def test_privleak_as_published(model: float, retrain: float, published: float) -> None:
    """muse_bench's AUCs at Min-40%, which are 1 - AUC, for Books and News; both bounds of each."""
    for epsilon in (0.0, 1e-10):
        leak = privleak(1 - model, 1 - retrain, epsilon)
        assert leak.value == pytest.approx(published, abs=0.005)


def test_privleak_has_one_direction() -> None:
    assert privleak(0.52, 0.52).value == 0
    assert privleak(1.0, 0.5) == (-100, 1.0, 0.5, 0)
    assert privleak(0.0, 0.5) == (100, 0.0, 0.5, 0)
    assert privleak(0.6, 0.4).value == pytest.approx(-100 / 3)
    values = [privleak(area, 0.52).value for area in np.linspace(0, 1, 11)]
    assert values == sorted(values, reverse=True)


def test_privleak_where_retraining_is_found_out_too() -> None:
    """An AUC of 1 after retraining leaves nothing to divide by, but for an epsilon."""
    assert math.isnan(privleak(0.5, 1.0).value)
    assert privleak(0.5, 1.0, epsilon=1e-10).value == pytest.approx(5e11)
    assert privleak(0.5, 0.0).value == -50


def test_privleak_from_scores_is_that_from_their_areas() -> None:
    unlearned, retrain = Scores(*draw(5, 50, 50, 1.0)), Scores(*draw(6, 50, 50, 0.0))
    leak = privleak(unlearned, retrain)
    assert leak == privleak(auc(*unlearned), auc(*retrain))
    assert leak == privleak(auc(*unlearned).value, auc(*retrain).value)
    assert leak.value < 0 < leak.retrain_auc < leak.auc
    unscorable = privleak(Scores([NAN, 1.0], [0.0, 2.0]), Scores([NAN], [1.0]))
    assert math.isnan(unscorable.value) and math.isnan(unscorable.retrain_auc)
    assert (unscorable.auc, unscorable.n_unscorable) == (0.5, 2)


def test_no_privleak_without_retraining() -> None:
    with pytest.raises(ValueError, match="retrained without the forget set"):
        privleak(0.7, None)
    with pytest.raises(TypeError):
        privleak(0.7)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_score([1.0, 2.0]), "log-probabilities <= 0"),
        (lambda: loss_score([[-1.0]]), r"got \(1, 1\)"),
        (lambda: min_k_score(TOKENS, share=40), r"share in \(0, 1\], got 40"),
        (lambda: min_k_score(TOKENS, share=0.0), "got 0.0"),
        (lambda: min_k_plus_plus_score(TOKENS, [-1.0], [1.0]), r"each token, got 5, \(1,\)"),
        (lambda: min_k_plus_plus_score([-1.0], [-1.0], [-1.0]), "deviation >= 0"),
        (lambda: auc([[1.0]], [1.0]), "one score per example"),
        (lambda: auc([1.0], [1.0], confidence=95), "confidence in"),
        (lambda: true_positive_rate([1.0], [1.0], 5), "rate in"),
        (lambda: privleak(1.2, 0.5), r"AUC in \[0, 1\], got 1.2"),
        (lambda: privleak(0.5, NAN), "got nan"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
