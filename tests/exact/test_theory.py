"""Closed forms and enumeration against hand-worked numbers, brute force and the paper's lemma."""

import itertools
import math

import numpy as np
import pytest

from llm_unlearn.exact.sequences import select_sequences
from llm_unlearn.exact.theory import (
    MAX_ENUMERATED_SLICES,
    depth_probabilities,
    expected_deletions,
    expected_depth,
    harmonic,
    hit_count_probabilities,
    lemma2_retention,
    retention_probability,
    sisa_expected_deletions,
)


@pytest.mark.parametrize(
    ("num_slices", "by_budget"),
    [
        (4, {1: 45.7, 2: 58.6, 4: 71.95, 24: 71.95}),
        (6, {1: 68.5, 2: 87.9, 3: 99.5, 4: 107.9, 5: 114.5, 6: 119.8}),
    ],
)
def test_expected_deletions_of_five_shards(num_slices: int, by_budget: dict) -> None:
    for num_sequences, expected in by_budget.items():
        assert expected_deletions(5, num_slices, num_sequences) == pytest.approx(expected, abs=0.06)


def test_expected_deletions_elsewhere() -> None:
    assert sisa_expected_deletions(5, 4) == expected_deletions(5, 4, 1)
    assert expected_deletions(1, 1, 1) == 1
    assert expected_deletions(1, 10, 10) == pytest.approx(29.29, abs=0.005)
    assert expected_deletions(5, 64, 64) == pytest.approx(2031.1, abs=0.05)
    # The asymptotic form continues the sum.
    assert harmonic(1_000_001) - harmonic(1_000_000) == pytest.approx(1 / 1_000_001, rel=1e-3)


@pytest.mark.parametrize(
    ("num_sequences", "depths"),
    [(1, (1.5, 0.88, 0.56, 0.19)), (4, (3.0, 2.0, 1.5, 0.68)), (24, (3.0, 2.25, 1.69, 0.71))],
)
def test_expected_depth_of_one_shard(num_sequences: int, depths: tuple) -> None:
    sequences = select_sequences(4, num_sequences)
    for num_requests, expected in zip((1, 2, 3, 6), depths, strict=True):
        assert expected_depth(sequences, num_requests) == pytest.approx(expected, abs=0.006)
    assert expected_depth(sequences, 0) == 4


def best_depth(sequences, requests) -> int:
    return max(
        next((i for i, s in enumerate(sequence) if s in requests), len(sequence))
        for sequence in sequences
    )


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("num_sequences", [1, 2, 3, 5])
def test_enumeration_equals_brute_force_over_requests(num_sequences: int, num_shards: int) -> None:
    sequences = select_sequences(3, num_sequences)
    for num_requests in range(5):
        counts = np.zeros(4)
        # Slices 3.. belong to other shards and hit nothing here.
        for requests in itertools.product(range(3 * num_shards), repeat=num_requests):
            counts[best_depth(sequences, requests)] += 1
        exact = depth_probabilities(sequences, num_requests, num_shards)
        np.testing.assert_allclose(exact, counts / counts.sum(), atol=1e-12)


def test_hit_counts_equal_surjection_numbers() -> None:
    num_slices, num_requests = 6, 9
    for hit, probability in enumerate(hit_count_probabilities(num_slices, num_requests)):
        onto = sum(
            (-1) ** i * math.comb(hit, i) * (hit - i) ** num_requests for i in range(hit + 1)
        )
        expected = math.comb(num_slices, hit) * onto / num_slices**num_requests
        assert probability == pytest.approx(expected, abs=1e-12)


def test_one_sequence_is_where_lemma_2_holds() -> None:
    for depth in range(5):
        for num_requests in range(6):
            exact = retention_probability([(0, 1, 2, 3)], depth, num_requests)
            assert exact == pytest.approx(lemma2_retention(4, 1, depth, num_requests))


@pytest.mark.parametrize(
    ("num_sequences", "depth", "num_requests", "lemma", "exact"),
    [(24, 3, 2, 0.788, 0.25), (4, 1, 6, 0.543, 0.619)],
)
def test_lemma_2_is_wrong_for_several_sequences(
    num_sequences: int, depth: int, num_requests: int, lemma: float, exact: float
) -> None:
    sequences = select_sequences(4, num_sequences)
    assert lemma2_retention(4, num_sequences, depth, num_requests) == pytest.approx(lemma, abs=5e-4)
    retained = retention_probability(sequences, depth, num_requests)
    assert retained == pytest.approx(exact, abs=5e-4)


def test_lemma_2_is_wrong_for_independent_random_sequences_too() -> None:
    # All 4 sequences drawn with replacement: E over hit sets of 1-(1-C(L-|D|,k)/C(L,k))^B.
    hits = hit_count_probabilities(4, 6)
    exact = sum(p * (1 - (1 - math.comb(4 - d, 1) / 4) ** 4) for d, p in enumerate(hits))
    assert exact == pytest.approx(0.447, abs=5e-4)
    drawn = itertools.product(itertools.permutations(range(4)), repeat=2)
    two = np.mean([retention_probability(list(pair), 1, 6) for pair in drawn])
    assert two == pytest.approx(
        sum(p * (1 - (1 - math.comb(4 - d, 1) / 4) ** 2) for d, p in enumerate(hits))
    )


def test_the_largest_enumeration_is_a_distribution() -> None:
    sequences = select_sequences(MAX_ENUMERATED_SLICES, MAX_ENUMERATED_SLICES)
    probabilities = depth_probabilities(sequences, 7, num_shards=3)
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities.min() >= 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_deletions(0, 4, 1), "num_shards is 0, expected at least 1"),
        (lambda: expected_deletions(1, 0, 1), "num_slices is 0, expected at least 1"),
        (lambda: expected_deletions(1, 4, -1), "num_sequences is -1, expected at least 1"),
        (lambda: expected_depth([(0, 1)], -1), "num_requests is -1, expected at least 0"),
        (lambda: expected_depth([(0, 1)], 1, 0), "num_shards is 0, expected at least 1"),
        (lambda: expected_depth([(0, 2)], 1), "expected a permutation of 0..1"),
        (lambda: expected_depth([range(13)], 1), "13 slices, expected at most 12"),
        (lambda: retention_probability([(0, 1)], 3, 1), "depth is 3, expected 0 to 2"),
        (lambda: lemma2_retention(4, 4, -1, 1), "depth is -1, expected 0 to 4"),
        (lambda: lemma2_retention(4, 0, 1, 1), "num_sequences is 0, expected at least 1"),
        (lambda: lemma2_retention(4, 4, 1, -1), "num_requests is -1, expected at least 0"),
    ],
)
def test_bad_inputs(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
