"""Which orders of a shard's slices to train: the training sequences of S3T.

A sequence is a permutation of the slices ``0..L-1`` of one shard. A request that hits a slice
deactivates, in every sequence, the stages from that slice's position on, so a good set of ``B``
sequences puts every slice late in some of them. Source: "Towards Scalable Exact Machine Unlearning
Using Parameter-Efficient Fine-Tuning" (arXiv 2406.16257), section 3.3 and appendix B.

Nothing here reads records: the choice depends on the numbers of slices and sequences, a seed and,
for two methods, a prior. A prior estimated from deletable records would tie every node to them;
it has to come from public knowledge.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

REQUESTS_AHEAD = 100
"""Number of requests t that the BMS score looks ahead; the value of the paper's experiments."""

_SMALLEST_MASS = 1e-12
"""Prior mass below this counts as zero; sums of a prior are no more exact than that."""

_TIE_BREAK = 1e-9
"""Weight of the log score beside the relative score in one matching."""


def select_sequences(
    num_slices: int,
    num_sequences: int,
    method: str = "cyclic",
    prior: Sequence[float] | None = None,
    seed: int = 0,
) -> list[tuple[int, ...]]:
    """Choose exactly ``num_sequences`` distinct permutations of ``range(num_slices)``.

    Args:
        num_slices: L, slices of one shard.
        num_sequences: B, the budget, from 1 to L!.
        method: ``cyclic`` (no prior, the default), ``bms`` or ``conditional`` (known prior) or
            ``random``. ``cyclic`` with a larger budget begins with the list of a smaller one, so
            that a budget can be raised without discarding work.
        prior: probability, per slice, that the next request hits it; sums to 1.
        seed: used by ``conditional`` and ``random`` only.

    Raises:
        ValueError: a number, method or prior outside what is said above.
    """
    _check_budget(num_slices, num_sequences)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    checked_prior = _check_prior(num_slices, method, prior)
    return METHODS[method](checked_prior, num_sequences, seed)


def diversity(sequences: Sequence[Sequence[int]]) -> float:
    """Average, over ordered pairs of different sequences, of the positions in which they differ.

    Between 0 and L; L means that no slice has the same position twice (the "average edit distance"
    of arXiv 2406.16257, figure 8). A single sequence has no pair and gives 0.

    Raises:
        ValueError: a sequence is not a permutation.
    """
    num_slices = check_sequences(sequences)
    num_pairs = len(sequences) * (len(sequences) - 1)
    if num_pairs == 0:
        return 0.0
    agreeing = sum(
        count * (count - 1)
        for position in range(num_slices)
        for count in Counter(sequence[position] for sequence in sequences).values()
    )
    return num_slices - agreeing / num_pairs


def check_sequences(sequences: Sequence[Sequence[int]]) -> int:
    """Return L if every sequence is a permutation of ``range(L)``.

    Raises:
        ValueError: no sequence, or one that is not such a permutation.
    """
    if len(sequences) == 0 or len(sequences[0]) == 0:
        raise ValueError(f"sequences is {sequences!r}, expected at least one that is not empty")
    num_slices = len(sequences[0])
    for sequence in sequences:
        if sorted(sequence) != list(range(num_slices)):
            raise ValueError(
                f"sequence is {tuple(sequence)}, expected a permutation of 0..{num_slices - 1}"
            )
    return num_slices


def bms_log_score(
    sequence: Sequence[int], prior: Sequence[float], num_requests: int = REQUESTS_AHEAD
) -> float:
    """Log of the BMS score ``sum_i i * (1 - sum_{j<=i} p_j)^t`` (arXiv 2406.16257, appendix B.2).

    In logs, because for t = 100 the terms underflow for quite ordinary priors. ``-inf`` means that
    no stage survives.
    """
    return float(np.logaddexp.reduce(_log_score_terms(sequence, prior, num_requests)))


def check_at_least_one(**numbers: int | None) -> None:
    """Raise ValueError, with its name, for a number below 1; None means not given."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")


def _check_budget(num_slices: int, num_sequences: int) -> None:
    check_at_least_one(num_slices=num_slices, num_sequences=num_sequences)
    # L! of a large L has thousands of digits, and no budget comes near it.
    if num_slices <= 20 and num_sequences > math.factorial(num_slices):
        raise ValueError(
            f"num_sequences is {num_sequences}, expected at most {math.factorial(num_slices)}: "
            f"{num_slices} slices have no more orders"
        )


def _check_prior(num_slices: int, method: str, prior: Sequence[float] | None) -> np.ndarray:
    """Return the prior as a float array of shape (L,), uniform for methods that take none."""
    uniform = np.full(num_slices, 1.0 / num_slices)
    if method not in _METHODS_WITH_PRIOR:
        if prior is not None:
            raise ValueError(f"prior is {prior!r}, expected None: method {method!r} takes no prior")
        return uniform
    if prior is None:
        raise ValueError(f"prior is None, expected {num_slices} probabilities for {method!r}")
    values = np.asarray(prior, dtype=float)
    if values.shape != (num_slices,):
        raise ValueError(f"prior has shape {values.shape}, expected ({num_slices},)")
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError(f"prior is {values.tolist()}, expected finite values that are >= 0")
    if abs(values.sum() - 1.0) > 1e-6:
        raise ValueError(f"prior sums to {values.sum():.6g}, expected 1")
    return values / values.sum()


def _cyclic(prior: np.ndarray, num_sequences: int, seed: int) -> list[tuple[int, ...]]:
    return list(islice(_rotations(len(prior)), num_sequences))


def _rotations(num_slices: int) -> Iterator[tuple[int, ...]]:
    """Yield all L! orders, most diverse first (arXiv 2406.16257, algorithm 1 and appendix B.1).

    First the right-rotations of ``0..L-1``, then rotations of what follows a shared prefix of
    length 1, then 2, and so on. Every rotation is dealt to all sequences before the next one, and
    neighbours in the deal begin with different slices, so that every budget is balanced.
    """
    sequences = [tuple(range(num_slices))]
    yield sequences[0]
    for prefix in range(num_slices - 1):
        current = sorted(sequences)
        stride = max(1, len(current) // num_slices)
        dealt = [sequence for start in range(stride) for sequence in current[start::stride]]
        for turn in range(1, num_slices - prefix):
            for sequence in dealt:
                head, tail = sequence[:prefix], sequence[prefix:]
                rotated = head + tail[-turn:] + tail[:-turn]
                sequences.append(rotated)
                yield rotated


def _bms(prior: np.ndarray, num_sequences: int, seed: int) -> list[tuple[int, ...]]:
    """Bipartite matching selection (arXiv 2406.16257, algorithm 2); best-scored sequences first.

    Beyond L sequences the paper, and this, falls to conditional sampling.
    """
    if num_sequences > len(prior):
        return _conditional(prior, num_sequences, seed)

    def rank(sequence: tuple[int, ...]) -> tuple[float, ...]:
        # The first terms can swamp the sum in double precision; the single terms settle what
        # remains, and the sequence itself makes true ties reproducible.
        terms = _log_score_terms(sequence, prior.tolist(), REQUESTS_AHEAD)
        return (-float(np.logaddexp.reduce(terms)), *(-terms), *sequence)

    return sorted(_latin_square(prior), key=rank)[:num_sequences]


def _log_score_terms(
    sequence: Sequence[int], prior: Sequence[float], num_requests: int
) -> np.ndarray:
    """Logs of the terms ``i * (1 - sum_{j<=i} p_j)^t``, shape (L,).

    The paper calls their sum the expected number of functioning slices. That number, E[K], has no
    factor i: with the factor the sum equals E[K(K+1)/2], K being the surviving prefix length.
    """
    # fsum is correctly rounded, so slices of equal probability give exactly equal scores.
    surviving = [math.fsum(prior[s] for s in sequence[i:]) for i in range(1, len(sequence) + 1)]
    positions = np.arange(1, len(sequence) + 1)
    with np.errstate(divide="ignore"):  # log 0 = -inf is the right answer: nothing survives
        return np.log(positions) + num_requests * np.log(surviving)


def _latin_square(prior: np.ndarray) -> list[tuple[int, ...]]:
    """Extend L sequences, one per first slice, by a maximum-weight matching per position.

    Every slice has every position exactly once, so a perfect matching always exists (lemma 3).
    """
    from scipy.optimize import linear_sum_assignment

    # Worked out on slices sorted by risk, so that renaming the slices changes nothing else.
    by_risk = np.argsort(prior, kind="stable")
    num_slices = len(prior)
    sequences = [[first] for first in range(num_slices)]
    unused = ~np.eye(num_slices, dtype=bool)
    for _ in range(num_slices - 1):
        weights = _matching_weights(prior[by_risk], unused)
        rows, chosen = linear_sum_assignment(weights, maximize=True)
        unused[rows, chosen] = False
        for sequence, next_slice in zip(sequences, chosen.tolist(), strict=True):
            sequence.append(next_slice)
    return [tuple(by_risk[sequence].tolist()) for sequence in sequences]


def _matching_weights(prior: np.ndarray, unused: np.ndarray) -> np.ndarray:
    """Weights of extending sequence i by slice s, shape (L, L); ``-inf`` where s is used already.

    The paper weighs an extension with the score of the whole extended sequence. All that differs
    among the extensions of one sequence is the new term, so only that term is compared: added to
    the earlier ones it would vanish in double precision and leave the choice to the solver. The
    terms themselves span hundreds of orders of magnitude, hence the small log part, which orders
    those that are negligible beside the largest.

    Args:
        prior: shape (L,), rising, so that sequence i is better than i+1.
        unused: shape (L, L), whether sequence i may still be extended by slice s.
    """
    mass = np.round((unused @ prior)[:, None] - prior[None, :], 12)
    log_term = REQUESTS_AHEAD * np.log(np.maximum(mass, _SMALLEST_MASS))
    highest, lowest = log_term[unused].max(), log_term[unused].min()
    # Sequences with the same slices so far tie in pairs. The better one, which a small budget
    # keeps, gets the better slice.
    preference = 1.0 + 1e-3 * np.linspace(1.0, 0.0, len(prior))[:, None]
    relative_log = preference * (log_term - lowest) / max(highest - lowest, 1.0)
    relative_score = np.exp(np.minimum(log_term - highest, 0.0))
    return np.where(unused, relative_score + _TIE_BREAK * relative_log, -np.inf)


def _conditional(prior: np.ndarray, num_sequences: int, seed: int) -> list[tuple[int, ...]]:
    """Conditional sampling: slices drawn one by one with weight ``1 - p`` (appendix B.2)."""
    return _sample_distinct(1.0 - prior, num_sequences, seed)


def _random(prior: np.ndarray, num_sequences: int, seed: int) -> list[tuple[int, ...]]:
    return _sample_distinct(np.ones(len(prior)), num_sequences, seed)


def _sample_distinct(weights: np.ndarray, num_sequences: int, seed: int) -> list[tuple[int, ...]]:
    """Draw distinct permutations slice by slice, without ever rejecting one.

    Rejecting duplicates, as the paper does, need not end: with p = 1 for a slice only (L-1)!
    orders have a positive probability. Here the chance of a slice is multiplied by the chance that
    the order below it is still unseen, which gives the same distribution; orders of probability
    zero come last.
    """
    generator = np.random.default_rng(seed)
    num_seen: Counter[tuple[int, ...]] = Counter()  # orders drawn, by prefix
    share_seen: dict[tuple[int, ...], float] = {}  # their probability, given the prefix
    sequences: list[tuple[int, ...]] = []
    for _ in range(num_sequences):
        prefix: tuple[int, ...] = ()
        chances: list[float] = []
        while len(prefix) < len(weights):
            choices = [s for s in range(len(weights)) if s not in prefix]
            orders_below = math.factorial(len(choices) - 1)
            weight = weights[choices] if weights[choices].any() else np.ones(len(choices))
            chance = weight / weight.sum()
            # Counted, because a sum of probabilities is not exactly 1 when nothing is left.
            is_open = np.array([num_seen[(*prefix, s)] < orders_below for s in choices])
            unseen = np.array([1.0 - share_seen.get((*prefix, s), 0.0) for s in choices])
            likely = chance * is_open * np.maximum(unseen, 0.0)
            # Without the second, a budget beyond the orders of positive probability would fail.
            share = likely if likely.sum() > 0 else is_open.astype(float)
            drawn = int(generator.choice(len(choices), p=share / share.sum()))
            prefix = (*prefix, choices[drawn])
            chances.append(float(chance[drawn]))
        for length in range(1, len(prefix) + 1):
            num_seen[prefix[:length]] += 1
            probability = math.prod(chances[length:])
            share_seen[prefix[:length]] = share_seen.get(prefix[:length], 0.0) + probability
        sequences.append(prefix)
    return sequences


_METHODS_WITH_PRIOR = ("bms", "conditional")

METHODS: dict[str, Callable[[np.ndarray, int, int], list[tuple[int, ...]]]] = {
    "cyclic": _cyclic,
    "bms": _bms,
    "conditional": _conditional,
    "random": _random,
}
"""All methods: (prior of shape (L,), number of sequences, seed) to sequences."""
