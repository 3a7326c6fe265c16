"""Over-unlearning: what a deletion takes beyond what was asked for.

Two questions. Do retained rows that look like the forgotten ones lose more than rows far from
them (`collateral`)? And can somebody use the right to deletion as a weapon, by asking for the
deletion of their own rows blended with what others rely on (`over_unlearning_request`)?

Source: Hu et al., A Duty to Forget, a Right to be Assured? Exposing Vulnerabilities in Machine
Unlearning Services (NDSS 2024, arXiv 2309.08230), on image classifiers; that a requested row's text
is followed by a retained row's is our counterpart for text, and `collateral` is ours.

Control: for `collateral`, the retrained model (or the one from before): retained rows near the
forgotten ones may be harder for every model, so only the difference of differences counts. For the
request, the same method given the honest rows.
"""

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm_unlearn.evaluation.statistics import (
    DRAWS_AT_ONCE,
    RESAMPLES,
    Interval,
    mean_interval,
    paired_difference,
)

Floats = NDArray[np.float64]
Row = Mapping[str, str]
BUCKETS = 4096


class Neighbourhood(NamedTuple):
    """Indices of the retained rows nearest to and farthest from the forgotten ones."""

    near: list[int]
    far: list[int]


class Pair(NamedTuple):
    """Scores of the same rows: the unlearned model's, and its reference's."""

    unlearned: ArrayLike
    reference: ArrayLike


class Collateral(NamedTuple):
    """Collateral damage: change of the near rows, of the far rows, and their difference.

    `difference` below 0 = the neighbours of the forgotten rows lost more than the rest.
    """

    near: Interval
    far: Interval
    difference: Interval


@dataclass(frozen=True)
class OverUnlearning:
    """Utility on retained rows after an honest and after a malicious request.

    `difference` is malicious less honest over the same rows: below 0 = the request did harm.
    """

    honest: Interval
    malicious: Interval
    difference: Interval


def nearness(texts: Sequence[str], forgotten: Sequence[str]) -> Floats:
    """Cosine of each text with the forgotten text most like it, in [0, 1]; 1 = the same trigrams.

    Texts are counts of the character trigrams of their lower-cased words, hashed with CRC-32 into
    4096 buckets: no vocabulary and no corpus statistics, so the same everywhere.

    Raises:
        ValueError: nothing forgotten.
    """
    if not forgotten:
        raise ValueError("expected at least one forgotten text")
    if not texts:
        return np.empty(0)
    cosines = _hashed_trigrams(texts) @ _hashed_trigrams(forgotten).T
    return np.clip(cosines.max(axis=1), 0.0, 1.0)


def neighbourhood(
    texts: Sequence[str], forgotten: Sequence[str], share: float = 0.25
) -> Neighbourhood:
    """The nearest and the farthest `share` of the retained texts, at least one each; ties in order.

    Raises:
        ValueError: a share outside (0, 0.5], or fewer than two texts.
    """
    if not 0 < share <= 0.5 or len(texts) < 2:
        raise ValueError(f"expected two texts and a share in (0, 0.5]: {len(texts)}, {share}")
    order = np.argsort(-nearness(texts, forgotten), kind="stable").tolist()
    count = max(1, int(len(texts) * share))
    return Neighbourhood(sorted(order[:count]), sorted(order[-count:]))


def collateral(near: Pair, far: Pair, confidence: float = 0.95, seed: int = 0) -> Collateral:
    """Difference in differences: mean change of near rows less mean change of far rows.

    Formula: `mean(unlearned - reference | near) - mean(unlearned - reference | far)`; bootstrap over
    near and far rows, each drawn for itself. Range: twice that of the scores. NaN rows are left
    out and counted.

    Raises:
        ValueError: scores of a pair that are not of the same rows.
    """
    near_change, far_change = _changes(near), _changes(far)
    return Collateral(
        near=paired_difference(near.unlearned, near.reference, confidence, seed=seed),
        far=paired_difference(far.unlearned, far.reference, confidence, seed=seed),
        difference=_difference_of_means(near_change, far_change, confidence, seed),
    )


def over_unlearning_request(
    forget_rows: Sequence[Row],
    retain_rows: Sequence[Row],
    share: float = 0.5,
    seed: int = 0,
    keys: tuple[str, str] = ("prompt", "answer"),
) -> list[dict[str, str]]:
    """A malicious request: some of the forget rows go on with the text of a retained row.

    To the service it looks like the requester's own data; the answer to be unlearned holds, after
    the true answer, a retained prompt with its answer.

    Args:
        share: of the forget rows that are blended, in [0, 1]; at 0 the request is the honest one.
        keys: columns of prompt and answer.

    Raises:
        ValueError: a share outside [0, 1], or nothing to blend with.
    """
    count = round(len(forget_rows) * share)
    if not 0 <= share <= 1 or (count and not retain_rows):
        raise ValueError(f"expected a share in [0, 1] and retained rows: {share}")
    generator = random.Random(seed)
    blended = set(generator.sample(range(len(forget_rows)), count))
    borrowed = iter(_drawn(retain_rows, count, generator))
    prompt, answer = keys
    request = []
    for index, row in enumerate(forget_rows):
        copy = dict(row)
        if index in blended:
            other = next(borrowed)
            parts = [row[answer].rstrip(), other[prompt].strip(), other[answer].strip()]
            copy[answer] = " ".join(parts)
        request.append(copy)
    return request


def over_unlearning(
    unlearn: Callable[[Sequence[Row]], Any],
    measure: Callable[[Any], ArrayLike],
    honest: Sequence[Row],
    malicious: Sequence[Row],
) -> OverUnlearning:
    """Answer both requests with the same method and compare what is left for everybody else.

    Args:
        unlearn: the method: rows to its unlearned model, starting from the same model each time.
        measure: utility of a model, one score per retained row, higher = better; measured before
            the next model is made, so that a method may reuse one model.
    """
    utilities = [
        np.asarray(measure(unlearn(request)), dtype=np.float64) for request in (honest, malicious)
    ]
    return OverUnlearning(
        honest=mean_interval(utilities[0]),
        malicious=mean_interval(utilities[1]),
        difference=paired_difference(utilities[1], utilities[0]),
    )


def _hashed_trigrams(texts: Sequence[str]) -> Floats:
    counts = np.zeros((len(texts), BUCKETS))
    for row, text in enumerate(texts):
        padded = f" {' '.join(text.lower().split())} "
        for start in range(len(padded) - 2):
            counts[row, zlib.crc32(padded[start : start + 3].encode()) % BUCKETS] += 1
    lengths = np.linalg.norm(counts, axis=1, keepdims=True)
    return counts / np.where(lengths > 0, lengths, 1)


def _drawn(rows: Sequence[Row], count: int, generator: random.Random) -> list[Row]:
    """Each row once before one repeats."""
    drawn: list[Row] = []
    while len(drawn) < count:
        drawn += generator.sample(list(rows), min(len(rows), count - len(drawn)))
    return drawn


def _changes(pair: Pair) -> Floats:
    first, second = (np.asarray(scores, dtype=np.float64) for scores in pair)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"expected one score per row of both: {first.shape}, {second.shape}")
    return first - second


def _difference_of_means(first: Floats, second: Floats, confidence: float, seed: int) -> Interval:
    scored = [values[~np.isnan(values)] for values in (first, second)]
    count = sum(len(values) for values in scored)
    left_out = len(first) + len(second) - count
    if min(len(values) for values in scored) == 0:
        return Interval(float("nan"), float("nan"), float("nan"), count, left_out)
    mean = float(scored[0].mean() - scored[1].mean())
    if min(len(values) for values in scored) < 2:
        return Interval(mean, float("nan"), float("nan"), count, left_out)
    generator = np.random.default_rng(seed)
    draws = _resampled_means(scored[0], generator) - _resampled_means(scored[1], generator)
    lower, upper = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(lower), float(upper), count, left_out)


def _resampled_means(values: Floats, generator: np.random.Generator) -> Floats:
    step = max(1, DRAWS_AT_ONCE // len(values))
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    return np.concatenate(
        [
            values[generator.integers(len(values), size=(size, len(values)))].mean(axis=1)
            for size in sizes
        ]
    )
