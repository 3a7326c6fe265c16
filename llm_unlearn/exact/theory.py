"""Closed forms and exact enumeration for the deletion capacity of S3T.

Source: arXiv 2406.16257, section 4 and appendix A. Requests are uniform over all slices of all
shards, with replacement, and the fatal request counts. Capacity has two faces: how many requests
until nothing is left (`expected_deletions`), and how much is left meanwhile (`expected_depth`).
The second is what a user notices, and it is where sequences beyond one per slice still help.

The enumeration visits all 2^L sets of slices that requests can have hit, so it is limited to
``MAX_ENUMERATED_SLICES`` slices; `simulation` has no such limit.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from llm_unlearn.exact.sequences import check_at_least_one, check_sequences

MAX_ENUMERATED_SLICES = 12
"""Most slices per shard for exact enumeration: 4096 sets of hit slices."""

_EULER_GAMMA = 0.5772156649015329


def harmonic(count: int) -> float:
    """The harmonic number ``H_count = 1 + 1/2 + ... + 1/count``; 0 for ``count = 0``."""
    if count > 1_000_000:
        # The series beyond 1/(12 n^2) is below double precision here.
        return math.log(count) + _EULER_GAMMA + 1 / (2 * count) - 1 / (12 * count**2)
    return math.fsum(1.0 / i for i in range(1, count + 1))


def expected_deletions(num_shards: int, num_slices: int, num_sequences: int) -> float:
    """Expected requests until no shard has a model left: ``m L H_{m min(B, L)}``.

    Lemma 1 of arXiv 2406.16257 (coupon collector): everything is lost once every slice that is
    first in some sequence has been hit, in every shard. The B sequences are taken to have
    ``min(B, L)`` different first slices, as `cyclic` and `bms` have.

    Raises:
        ValueError: a number below 1.
    """
    check_at_least_one(num_shards=num_shards, num_slices=num_slices, num_sequences=num_sequences)
    num_coupons = num_shards * min(num_sequences, num_slices)
    return num_shards * num_slices * harmonic(num_coupons)


def sisa_expected_deletions(num_shards: int, num_slices: int) -> float:
    """Expected requests until SISA has lost every shard: ``m L H_m`` (S3T with one sequence)."""
    return expected_deletions(num_shards, num_slices, num_sequences=1)


def hit_count_probabilities(num_slices: int, num_requests: int, num_shards: int = 1) -> np.ndarray:
    """Probability that ``num_requests`` requests hit 0, 1, ..., L different slices of one shard.

    Shape (L+1,). This is the occupancy distribution, ``S(r, j) L! / (L-j)! / L^r`` for one shard,
    computed as a Markov chain because the alternating sums of the surjection numbers cancel. With
    several shards a request hits the observed shard with probability ``1/num_shards``.

    Raises:
        ValueError: a number out of range.
    """
    check_at_least_one(num_slices=num_slices, num_shards=num_shards)
    _check_requests(num_requests)
    hit = np.arange(num_slices + 1)
    new_slice = (num_slices - hit) / (num_slices * num_shards)
    transition = np.diag(1.0 - new_slice) + np.diag(new_slice[:-1], k=1)
    return np.linalg.matrix_power(transition, num_requests)[0]


def depth_probabilities(
    sequences: Sequence[Sequence[int]], num_requests: int, num_shards: int = 1
) -> np.ndarray:
    """Probability that the best sequence of a shard has exactly 0, 1, ..., L surviving stages.

    Shape (L+1,). Exact: all sequences face the same requests.

    Args:
        sequences: B permutations of ``range(L)``.
        num_requests: requests in total, uniform over the slices of all ``num_shards`` shards.
        num_shards: 1 means that every request goes to this shard.

    Raises:
        ValueError: sequences that are no permutations, more than ``MAX_ENUMERATED_SLICES`` slices,
            or a number out of range.
    """
    num_slices = check_sequences(sequences)
    if num_slices > MAX_ENUMERATED_SLICES:
        raise ValueError(
            f"sequences have {num_slices} slices, expected at most {MAX_ENUMERATED_SLICES}: exact "
            "enumeration visits 2^L sets; use simulation.simulate_depth"
        )
    hits = hit_count_probabilities(num_slices, num_requests, num_shards)
    return hits @ _depth_given_hits(tuple(tuple(sequence) for sequence in sequences))


def retention_probability(
    sequences: Sequence[Sequence[int]], depth: int, num_requests: int, num_shards: int = 1
) -> float:
    """Probability that at least ``depth`` stages of a shard's best sequence survive; exact.

    This is the quantity that lemma 2 of arXiv 2406.16257 is about. Arguments and errors as in
    `depth_probabilities`; ``depth`` is 0..L.
    """
    num_slices = check_sequences(sequences)
    _check_depth(depth, num_slices)
    return float(depth_probabilities(sequences, num_requests, num_shards)[depth:].sum())


def expected_depth(
    sequences: Sequence[Sequence[int]], num_requests: int, num_shards: int = 1
) -> float:
    """Expected number of surviving stages of a shard's best sequence, 0..L; exact.

    Arguments and errors as in `depth_probabilities`.
    """
    probabilities = depth_probabilities(sequences, num_requests, num_shards)
    return float(probabilities @ np.arange(len(probabilities)))


def lemma2_retention(num_slices: int, num_sequences: int, depth: int, num_requests: int) -> float:
    """Lemma 2 of arXiv 2406.16257 as printed: ``1 - (1 - (1 - k/L)^r)^min(B, L!/(L-k)!)``.

    Incorrect, and kept only to show by how much: it treats the sequences as independent although
    all of them face the same requests. With L = 4, all 24 sequences, k = 3 and r = 2 it gives
    0.788; three slices survive only if both requests hit the same one, which has probability 0.25.
    Use `retention_probability`.

    Raises:
        ValueError: a number out of range.
    """
    check_at_least_one(num_slices=num_slices, num_sequences=num_sequences)
    _check_depth(depth, num_slices)
    _check_requests(num_requests)
    num_prefixes = min(num_sequences, math.perm(num_slices, depth))
    return 1.0 - (1.0 - (1.0 - depth / num_slices) ** num_requests) ** num_prefixes


@lru_cache(maxsize=64)
def _depth_given_hits(sequences: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Distribution of the best surviving depth given the number of hit slices.

    Shape (L+1, L+1): row = number of different slices hit, column = depth. Given their number, all
    sets of hit slices are equally likely, so a row is a share of the sets of that size.
    """
    num_slices = len(sequences[0])
    hit_sets = np.arange(2**num_slices)
    num_hit = ((hit_sets[:, None] >> np.arange(num_slices)) & 1).sum(axis=1)
    best_depth = np.zeros(len(hit_sets), dtype=int)
    for sequence in sequences:
        alive = np.ones(len(hit_sets), dtype=bool)
        depth = np.zeros(len(hit_sets), dtype=int)
        for stage_slice in sequence:
            alive &= (hit_sets >> stage_slice) & 1 == 0
            depth += alive
        np.maximum(best_depth, depth, out=best_depth)
    table = np.zeros((num_slices + 1, num_slices + 1))
    np.add.at(table, (num_hit, best_depth), 1.0)
    table /= table.sum(axis=1, keepdims=True)
    table.setflags(write=False)  # the cache hands out this very array
    return table


def _check_depth(depth: int, num_slices: int) -> None:
    if not 0 <= depth <= num_slices:
        raise ValueError(f"depth is {depth}, expected 0 to {num_slices}")


def _check_requests(num_requests: int) -> None:
    if num_requests < 0:
        raise ValueError(f"num_requests is {num_requests}, expected at least 0")
