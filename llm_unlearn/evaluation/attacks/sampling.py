"""leak@k: what the best of k sampled answers gives away, where the greedy answer is clean.

What it shows: unlearned models that never name a forgotten fact greedily still give it to somebody
who asks again and again at temperature 1.

Formula, per prompt, from n >= k samples with scores sorted s_(1) <= ... <= s_(n):

    leak@k = sum_{i=k}^{n} C(i-1, k-1) / C(n, k) * s_(i)

It is the mean of the maximum over all subsets of k of the n samples, hence an unbiased estimate of
the expected maximum of k answers (with scores of 0 and 1 it is pass@k of Chen et al. 2021). Range:
that of the scores; higher = leaks more; it never falls with k.

Source: Reisizadeh et al., Leak@k: Unlearning Does Not Make LLMs Forget Under Probabilistic Decoding
(arXiv 2511.04934).

Control: k tries also help a model that never knew, so leak@k counts against the retrained model's
leak@k over the same prompts (`compare_leakage`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from llm_unlearn.evaluation.statistics import Interval, mean_interval, paired_difference

Floats = NDArray[np.float64]


def leak_at_k(scores: ArrayLike, k: int) -> Floats:
    """Expected maximum of k of the n sampled scores of each prompt.

    Args:
        scores: (prompts, n). A prompt with a NaN among its scores is NaN.

    Returns:
        One number per prompt.

    Raises:
        ValueError: scores that are not a table, or k outside 1 to n.
    """
    table_PN = np.asarray(scores, dtype=np.float64)
    if table_PN.ndim != 2:
        raise ValueError(f"expected scores by prompt and sample, got shape {table_PN.shape}")
    samples = table_PN.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, expected 1 to {samples} (samples per prompt)")
    # Binomials of a few hundred samples overflow a float; their logarithms do not.
    ranks = np.arange(k, samples + 1)
    weights = np.exp(_log_binomial(ranks - 1, k - 1) - _log_binomial(samples, k))
    weights /= weights.sum()  # they sum to 1 by the hockey-stick identity, up to rounding
    unscorable = np.isnan(table_PN).any(axis=1)
    found = np.sort(table_PN, axis=1)[:, k - 1 :] @ weights
    return np.where(unscorable, np.nan, found)


def leakage(scores: ArrayLike, ks: Sequence[int] | None = None) -> dict[int, Interval]:
    """Mean leak@k over prompts for several k (1, 2, 4, ... by default), with bootstrap intervals."""
    table_PN = np.asarray(scores, dtype=np.float64)
    wanted = ks if ks is not None else powers_of_two(table_PN.shape[-1])
    return {k: mean_interval(leak_at_k(table_PN, k)) for k in wanted}


def compare_leakage(
    scores: ArrayLike, retrained: ArrayLike, ks: Sequence[int] | None = None
) -> dict[int, Interval]:
    """leak@k less the retrained model's, over the same prompts: paired bootstrap by k.

    Above 0 = leaks more than a model that never saw the data.
    """
    first, second = (np.asarray(table, dtype=np.float64) for table in (scores, retrained))
    wanted = ks if ks is not None else powers_of_two(min(first.shape[-1], second.shape[-1]))
    return {k: paired_difference(leak_at_k(first, k), leak_at_k(second, k)) for k in wanted}


def powers_of_two(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `largest`."""
    return tuple(2**power for power in range(largest.bit_length()))


def sampled_scores(
    scorer: Any,
    prompts: Sequence[Sequence[int]],
    references: Sequence[str],
    score: Callable[[str, str], float],
    samples: int = 16,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> Floats:
    """Sample answers to every prompt and score each against its reference.

    Args:
        scorer: has `generate` and `tokenizer`, as `llm_unlearn.evaluation.scorer.Scorer`.
        prompts: token ids.
        score: of an answer and its reference, in [0, 1], higher = gives more away.

    Returns:
        (prompts, samples); NaN for a prompt that is too long for the model.

    Raises:
        ValueError: not one reference per prompt, or no randomness to sample with.
    """
    if len(prompts) != len(references):
        raise ValueError(f"expected one reference per prompt: {len(prompts)}, {len(references)}")
    if samples < 1 or not temperature > 0:
        raise ValueError(
            f"expected at least one sample at a temperature above 0: {samples}, {temperature}"
        )
    answers = scorer.generate(
        prompts, max_new_tokens, samples=samples, temperature=temperature, seed=seed
    )
    table_PN = np.full((len(prompts), samples), np.nan)
    for row, (said, reference) in enumerate(zip(answers, references, strict=True)):
        for column, ids in enumerate(said):
            text = scorer.tokenizer.decode(ids, skip_special_tokens=True)
            table_PN[row, column] = score(text.strip(), reference)
    return table_PN


def _log_binomial(n: ArrayLike, k: ArrayLike) -> Floats:
    n, k = np.asarray(n, dtype=np.float64), np.asarray(k, dtype=np.float64)
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
