"""Membership inference: was an example trained on? Scores, their AUC, and PrivLeak.

A score is computed from the log-probabilities of one example's tokens under the model, and every
score here points the same way: higher = more likely a member (a training example). So an AUC of 1
says that members give themselves away, 0.5 that they look like fresh text, 0 that they look
*less* familiar than fresh text. muse_bench and open-unlearning negate the scores; see `privleak`.
Any other number serves once it is oriented so: the norm of the gradient of an example's loss is
smaller for members (open-unlearning's mia_gradnorm), so its score is the norm times -1.
What cannot be scored is NaN, left out of an AUC and counted; log-probabilities above 0 or not in
one list are a ValueError.
"""

import math
import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata

Floats = NDArray[np.float64]
LOWEST_SHARE = 0.4  # of the tokens: MUSE's and open-unlearning's; Shi et al. report 0.2
SMALLEST_DEVIATION = 1e-3  # where the model is certain of a token, as open-unlearning
ROUNDING = 1e-4  # how far above 0 the log-probability of a certain token may be rounded


class Scores(NamedTuple):
    """One score per example: those that were trained on (or to be forgotten), and fresh ones."""

    members: ArrayLike
    non_members: ArrayLike


class AUC(NamedTuple):
    """Area under the ROC curve with its interval, and the examples behind it."""

    value: float
    lower: float
    upper: float
    n_members: int
    n_non_members: int
    n_unscorable: int


class TruePositiveRate(NamedTuple):
    """Share of members found, of non-members then taken for members, and examples behind it."""

    value: float
    false_positive_rate: float
    n_members: int
    n_non_members: int
    n_unscorable: int


class PrivLeak(NamedTuple):
    """PrivLeak in percent, and the AUCs (members positive) that it comes from."""

    value: float
    auc: float
    retrain_auc: float
    n_unscorable: int


def loss_score(log_probabilities: ArrayLike) -> float:
    """Mean log-probability of one example's tokens, the negative of its loss.

    Source: Yeom et al., arXiv 1709.01604. Range: (-inf, 0]. Higher = likelier a member. No tokens,
    or a NaN among them: NaN.
    """
    return _mean_of_lowest(_tokens(log_probabilities), share=1.0)


def zlib_score(log_probabilities: ArrayLike, text: str) -> float:
    """Mean log-probability over the number of bytes that zlib makes of the text.

    Source: Carlini et al., arXiv 2012.07805, section 5.2, as muse_bench and open-unlearning take
    it (mean loss, bytes). Range: (-inf, 0]. Higher = likelier a member: likely for the model, yet
    hard to compress. No tokens, or a NaN among them: NaN.
    """
    return loss_score(log_probabilities) / len(zlib.compress(text.encode("utf-8")))


def min_k_score(
    log_probabilities: ArrayLike, share: float = LOWEST_SHARE, at_least_one: bool = True
) -> float:
    """Min-K%: mean log-probability of the least likely `share` of the tokens, at least one.

    Formula: mean of the `max(1, int(share * N))` lowest; without `at_least_one`, as muse_bench, of
    the `int(share * N)` lowest, and NaN where that is none. Source: Shi et al., arXiv 2310.16789,
    equation 1. Range: (-inf, 0]. Higher = likelier a member. No tokens, or a NaN: NaN.

    Raises:
        ValueError: a share outside (0, 1].
    """
    return _mean_of_lowest(_tokens(log_probabilities), share, at_least_one)


def min_k_plus_plus_score(
    log_probabilities: ArrayLike,
    means: ArrayLike,
    deviations: ArrayLike,
    share: float = LOWEST_SHARE,
) -> float:
    """Min-K%++: Min-K% of log-probabilities standardised by the model's own next-token spread.

    Formula: mean of the lowest `share` of `(log p(x_t) - mu_t) / max(sigma_t, 1e-3)`, where
    `means` mu_t and `deviations` sigma_t are mean and standard deviation of `log p(v)` for v drawn
    from the model's distribution at t. Source: Zhang et al., arXiv 2404.02936. Range: unbounded.
    Higher = likelier a member. No tokens, or a NaN in any of the three: NaN.

    Raises:
        ValueError: a share outside (0, 1], other lengths, or negative deviations.
    """
    tokens, mu = _tokens(log_probabilities), _tokens(means)
    sigma = np.asarray(deviations, dtype=np.float64)
    if not tokens.shape == mu.shape == sigma.shape or (sigma < 0).any():
        got = f"{len(tokens)}, {mu.shape}, {sigma.shape}"
        raise ValueError(f"expected a mean and a deviation >= 0 for each token, got {got}")
    return _mean_of_lowest((tokens - mu) / np.maximum(sigma, SMALLEST_DEVIATION), share)


def reference_score(log_probabilities: ArrayLike, reference: ArrayLike) -> float:
    """Mean log-probability under the model less that under a model that never saw the example.

    Source: Carlini et al., arXiv 2012.07805, section 5.2 (comparison with another model), as a
    difference of mean losses; the two may have different tokens. Range: unbounded. Higher =
    likelier a member; 0 = as familiar as to the reference. No tokens, or a NaN: NaN.
    """
    return loss_score(log_probabilities) - loss_score(reference)


def auc(members: ArrayLike, non_members: ArrayLike, confidence: float = 0.95) -> AUC:
    """Chance that a member scores above a non-member, ties counting half.

    Formula: Mann-Whitney U over the number of pairs, with DeLong's interval (Biometrics 44, 1988;
    normal, deterministic) clipped to [0, 1]. At complete separation, where its variance is 0, the
    other bound is Clopper and Pearson's for min(members, non-members) disjoint pairs that agree.
    Range: [0, 1]. Higher = members are easier to tell. NaN scores are left out and counted; the
    value is NaN if a group has none left, the bounds also with one example in a group or all tied.

    Raises:
        ValueError: scores that are not one list per group, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence in (0, 1), got {confidence}")
    positive, negative, left_out = _split(members, non_members)
    n, m = len(positive), len(negative)
    if not n or not m:
        return AUC(math.nan, math.nan, math.nan, n, m, left_out)
    ranks = rankdata(np.concatenate([positive, negative]))
    value = float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
    lower = upper = math.nan
    if value in (0.0, 1.0):
        reach = 1 - ((1 - confidence) / 2) ** (1 / min(n, m))
        lower, upper = max(0.0, value - reach), min(1.0, value + reach)
    elif n > 1 and m > 1:
        below = (ranks[:n] - rankdata(positive)) / m
        above = 1 - (ranks[n:] - rankdata(negative)) / n
        variance = below.var(ddof=1) / n + above.var(ddof=1) / m
        reach = float(norm.ppf((1 + confidence) / 2)) * math.sqrt(variance)
        lower, upper = max(0.0, value - reach), min(1.0, value + reach)
    if lower == upper:
        lower = upper = math.nan
    return AUC(value, lower, upper, n, m, left_out)


def true_positive_rate(
    members: ArrayLike, non_members: ArrayLike, false_positive_rate: float = 0.01
) -> TruePositiveRate:
    """Share of members found when at most `false_positive_rate` of the non-members are taken.

    Formula: the share of members above the lowest threshold that few enough non-members exceed
    (no interpolation: with fewer than 1 / rate non-members, the share above all of them).
    Source: Carlini et al., arXiv 2112.03570. Range: [0, 1]. Higher = more members are surely found;
    near the rate itself = chance. NaN scores are left out and counted; NaN if a group has none.

    Raises:
        ValueError: scores that are not one list per group, or a rate outside [0, 1].
    """
    if not 0 <= false_positive_rate <= 1:
        raise ValueError(f"expected a rate in [0, 1], got {false_positive_rate}")
    positive, negative, left_out = _split(members, non_members)
    n, m = len(positive), len(negative)
    if not n or not m:
        return TruePositiveRate(math.nan, math.nan, n, m, left_out)
    allowed = math.floor(false_positive_rate * m + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if allowed == m:
        return TruePositiveRate(1.0, 1.0, n, m, left_out)
    threshold = np.sort(negative)[m - 1 - allowed]
    found, wrong = float((positive > threshold).mean()), float((negative > threshold).mean())
    return TruePositiveRate(found, wrong, n, m, left_out)


def privleak(
    unlearned: Scores | AUC | float, retrain: Scores | AUC | float | None, epsilon: float = 0.0
) -> PrivLeak:
    """How far the unlearned model's AUC on forgotten against holdout text is from retraining's.

    Formula: `100 * (A - A_retrain) / (A_retrain + epsilon)` with `A = 1 - AUC`, in percent. Source:
    MUSE (arXiv 2407.06460), criterion C3, with the sign of its tables and of open-unlearning's.
    Range: [-100, 100 * (1 / A_retrain - 1)]. 0 = like retraining; below = forgotten text still
    gives itself away (under-unlearned; -100 = fully memorised), above = it stands out as less
    familiar than fresh text (over-unlearned). A model that knows nothing is near 0 too: read it
    with utility. Unscorable examples are counted; NaN without a scorable one, or dividing by 0.

    AUCs are given and returned with members positive. muse_bench logs A: convert what it prints,
    and its constants.

    Args:
        unlearned: scores of the forget set (members) and the holdout set, or their AUC.
        retrain: the same under a model retrained without the forget set. There is no default:
            an AUC of 0.5 is not what retraining gives (muse_bench: 0.52 on News, 0.46 on Books).
        epsilon: added to the denominator (open-unlearning: 1e-10).

    Raises:
        ValueError: no retrain reference, or an AUC outside [0, 1].
    """
    if retrain is None:
        raise ValueError("PrivLeak needs scores or AUC of a model retrained without the forget set")
    (now, lost), (then, lost_then) = _area(unlearned), _area(retrain)
    scale = 1 - then + epsilon
    return PrivLeak(100 * (then - now) / scale if scale else math.nan, now, then, lost + lost_then)


def _area(given: Scores | AUC | float) -> tuple[float, int]:
    if isinstance(given, Scores):
        given = auc(*given)
    if isinstance(given, AUC):
        return given.value, given.n_unscorable
    if not 0 <= given <= 1:
        raise ValueError(f"expected an AUC in [0, 1], got {given}")
    return float(given), 0


def _tokens(values: ArrayLike) -> Floats:
    tokens = np.asarray(values, dtype=np.float64)
    if tokens.ndim != 1 or (tokens > ROUNDING).any():
        highest = tokens.max(initial=-np.inf)
        raise ValueError(f"expected log-probabilities <= 0, got {tokens.shape}, highest {highest}")
    return tokens


def _mean_of_lowest(tokens: Floats, share: float, at_least_one: bool = True) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"expected a share in (0, 1], got {share}")
    count = max(int(at_least_one), int(share * len(tokens)))
    if not len(tokens) or not count or np.isnan(tokens).any():  # sorted last, NaN is overlooked
        return math.nan
    return float(np.sort(tokens)[:count].mean())


def _split(members: ArrayLike, non_members: ArrayLike) -> tuple[Floats, Floats, int]:
    """The scores of both groups without NaN, and how many were NaN."""
    groups = [np.asarray(group, dtype=np.float64) for group in (members, non_members)]
    if any(group.ndim != 1 for group in groups):
        raise ValueError(f"expected one score per example, got {[g.shape for g in groups]}")
    positive, negative = (group[~np.isnan(group)] for group in groups)
    return positive, negative, sum(map(len, groups)) - len(positive) - len(negative)
