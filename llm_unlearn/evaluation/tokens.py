"""Memorisation of one row, from what the model predicts at each token of the true answer.

`hits` says for each token whether the most likely next token, given the true ones before it, was
that token; log-probabilities are those of the true tokens. A row without tokens, or with a NaN
among them, is NaN.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from llm_unlearn.evaluation.membership import loss_score


class Exposure(NamedTuple):
    """How early a canary comes among the candidates, and how many of those had a loss."""

    value: float
    rank: float
    n_candidates: int
    n_unscorable: int


def extraction_strength(hits: ArrayLike, floor: bool = False) -> float:
    """How little of a text a person must give for the model to write the rest, greedily.

    Formula: `1 - k / m` for m tokens, with k the smallest number of given tokens after which all
    others are hits (k = m: nothing is extracted). Since each token is then what greedy decoding
    would write, one teacher-forced pass is enough. Source: Carlini et al. (arXiv 2012.07805);
    as a metric of unlearning Wang et al. (arXiv 2406.09179), open-unlearning (arXiv 2506.12618).
    Range: [0, 1]. Higher = more is extracted. `floor` is open-unlearning's k, at most m - 1: then
    a text of which nothing is extracted scores 1 / m, the more the shorter it is.

    Raises:
        ValueError: hits that are not one list of true and false.
    """
    right = _hits(hits)
    if not len(right) or np.isnan(right).any():
        return math.nan
    misses = np.flatnonzero(right == 0)
    extracted = len(right) - 1 - int(misses[-1]) if len(misses) else len(right)
    return max(extracted, int(floor)) / len(right)


def exact_memorization(hits: ArrayLike) -> float:
    """Share of the tokens that are the model's first choice.

    Formula: mean of the hits. Source: Tirumala et al. (arXiv 2205.10770); the memorization
    accuracy of Jang et al. (arXiv 2210.01504). Range: [0, 1]. Higher = more is memorised; fluent
    text has hits without having been seen, so compare with a retrained model.

    Raises:
        ValueError: hits that are not one list of true and false.
    """
    right = _hits(hits)
    return float(right.mean()) if len(right) else math.nan


def answer_probability(log_probabilities: ArrayLike) -> float:
    """Length-normalised probability of an answer.

    Formula: `exp(mean_t log p_t)`, the geometric mean of its tokens' probabilities. Source: TOFU
    (arXiv 2401.06121), section 2.2. Range: [0, 1]. Higher = the answer is better known.

    Raises:
        ValueError: log-probabilities above 0 or not in one list.
    """
    return min(math.exp(loss_score(log_probabilities)), 1.0)


def exposure(canary_loss: float, candidate_losses: ArrayLike) -> Exposure:
    """How much surer the model is of a secret it was shown than of others it might have been.

    Formula: `log2 |R| - log2 rank`, where R holds the canary and the candidates, and the rank
    counts from 1 at the lowest loss; equal losses share their average rank. Source: Carlini et
    al., The Secret Sharer (arXiv 1802.08232). Range: [0, log2 |R|] bits. Higher =
    more memorised; a canary never trained on has a mean of 1.44 (log2 e) at many candidates. R is
    a sample of all possible secrets, so the value cannot exceed its size's logarithm. Candidates
    whose loss is NaN are left out and counted; NaN without any other, or if the canary's is NaN.

    Args:
        candidate_losses: of other secrets of the same form, none of them trained on, without the
            canary itself.

    Raises:
        ValueError: losses that are not one list.
    """
    losses = np.asarray(candidate_losses, dtype=np.float64)
    if losses.ndim != 1:
        raise ValueError(f"expected one loss per candidate, got {losses.shape}")
    others = losses[~np.isnan(losses)]
    left_out = len(losses) - len(others)
    if math.isnan(canary_loss) or not len(others):
        return Exposure(math.nan, math.nan, len(others), left_out)
    rank = float(rankdata([canary_loss, *others])[0])
    return Exposure(math.log2(len(others) + 1) - math.log2(rank), rank, len(others), left_out)


def _hits(values: ArrayLike) -> NDArray[np.float64]:
    hits = np.asarray(values, dtype=np.float64)
    if hits.ndim != 1 or not (np.isnan(hits) | (hits == 0) | (hits == 1)).all():
        raise ValueError(f"expected one list of true and false, got shape {hits.shape}")
    return hits
