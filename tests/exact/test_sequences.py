"""Training sequences: always B distinct permutations, diverse, and ordered by a known prior."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.exact.sequences import bms_log_score, diversity, select_sequences

ALL_BUDGETS = [(n, b) for n in range(1, 6) for b in range(1, math.factorial(n) + 1)]


def assert_distinct_permutations(sequences, num_slices, num_sequences) -> None:
    assert len(sequences) == len(set(sequences)) == num_sequences
    assert all(sorted(sequence) == list(range(num_slices)) for sequence in sequences)


def test_cyclic_worked_example() -> None:
    assert select_sequences(4, 4) == [(0, 1, 2, 3), (3, 0, 1, 2), (2, 3, 0, 1), (1, 2, 3, 0)]


@pytest.mark.parametrize("method", ["cyclic", "random"])
def test_every_budget_gives_that_many_distinct_permutations(method: str) -> None:
    for num_slices, num_sequences in ALL_BUDGETS:
        sequences = select_sequences(num_slices, num_sequences, method)
        assert_distinct_permutations(sequences, num_slices, num_sequences)


@pytest.mark.parametrize("method", ["bms", "conditional"])
def test_every_budget_with_a_prior(method: str) -> None:
    for num_slices in range(1, 5):
        prior = np.arange(1, num_slices + 1) / np.arange(1, num_slices + 1).sum()
        for num_sequences in range(1, math.factorial(num_slices) + 1):
            sequences = select_sequences(num_slices, num_sequences, method, prior.tolist())
            assert_distinct_permutations(sequences, num_slices, num_sequences)


def test_cyclic_budgets_are_nested() -> None:
    for num_slices in range(1, 6):
        everything = select_sequences(num_slices, math.factorial(num_slices))
        for num_sequences in (1, 2, num_slices, 2 * num_slices, 3 * num_slices + 1):
            budget = min(num_sequences, len(everything))
            assert select_sequences(num_slices, budget) == everything[:budget]


@pytest.mark.parametrize("num_sequences", [5, 8, 11, 30, 60, 100])
def test_cyclic_first_slices_are_balanced_beyond_one_sequence_per_slice(num_sequences: int) -> None:
    first = [sequence[0] for sequence in select_sequences(5, num_sequences)]
    counts = [first.count(s) for s in range(5)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("num_slices", "budgets"), [(3, range(2, 7)), (4, range(2, 5))], ids=["L=3", "L=4"]
)
def test_cyclic_is_maximally_diverse(num_slices: int, budgets: range) -> None:
    orders = list(itertools.permutations(range(num_slices)))
    for budget in budgets:
        # Relabelling slices changes no distance, so the first order may be fixed.
        rest = itertools.combinations(orders[1:], budget - 1)
        best = max(diversity([orders[0], *others]) for others in rest)
        assert diversity(select_sequences(num_slices, budget)) == pytest.approx(best)


def test_diversity_by_hand() -> None:
    assert diversity([(0, 1, 2)]) == 0
    assert diversity([(0, 1, 2), (0, 2, 1)]) == 2
    assert diversity([(0, 1, 2), (0, 2, 1), (1, 2, 0)]) == pytest.approx((2 + 3 + 2) / 3)
    assert diversity(select_sequences(6, 6)) == 6
    # The end of the paper's figure 8, left.
    assert diversity(select_sequences(6, 120)) == pytest.approx(5.042, abs=5e-4)


def test_bms_is_a_latin_square_that_puts_risky_slices_late() -> None:
    square = select_sequences(4, 4, "bms", [0.4, 0.3, 0.2, 0.1])
    assert all(sorted(column) == [0, 1, 2, 3] for column in zip(*square, strict=True))
    assert square[0] == (3, 2, 1, 0)


@pytest.mark.parametrize("num_slices", [2, 3, 5, 8, 20])
def test_bms_latin_square_for_random_priors(num_slices: int) -> None:
    prior = np.random.default_rng(num_slices).dirichlet(np.ones(num_slices)).tolist()
    square = select_sequences(num_slices, num_slices, "bms", prior)
    assert diversity(square) == num_slices
    scores = [bms_log_score(sequence, prior) for sequence in square]
    assert scores == sorted(scores, reverse=True)
    assert square[: num_slices // 2 + 1] == select_sequences(
        num_slices, num_slices // 2 + 1, "bms", prior
    )


def test_bms_orders_later_positions_although_their_scores_underflow() -> None:
    # All terms but the first are below double precision beside it; a tie would be broken by the
    # slices' numbers, and reversing the prior would then not reverse the sequences.
    prior = [0.4, 0.3, 0.2, 0.1]
    forward = select_sequences(4, 4, "bms", prior)
    backward = select_sequences(4, 4, "bms", prior[::-1])
    assert forward != backward
    assert [tuple(3 - s for s in sequence) for sequence in backward] == forward


def test_bms_beats_sorted_rotation_as_in_figure_15() -> None:
    generator = np.random.default_rng(0)
    matched, rotated = [], []
    for _ in range(10):
        prior = generator.dirichlet(np.ones(5))
        order = np.argsort(prior)
        rotations = [tuple(order[list(sequence)]) for sequence in select_sequences(5, 5)]
        sequences = select_sequences(5, 5, "bms", prior.tolist())
        matched.append(sum(math.exp(bms_log_score(s, prior.tolist())) for s in sequences))
        rotated.append(sum(math.exp(bms_log_score(s, prior.tolist())) for s in rotations))
    assert np.all(np.array(matched) >= np.array(rotated))
    assert np.mean(matched) > 1.2 * np.mean(rotated)


def test_bms_score_is_not_the_expected_number_of_functioning_slices() -> None:
    sequence, prior, num_requests = (0, 1, 2), [0.2, 0.3, 0.5], 3
    expected_length = expected_triangle = 0.0
    for requests in itertools.product(range(3), repeat=num_requests):
        probability = math.prod(prior[s] for s in requests)
        length = next((i for i, s in enumerate(sequence) if s in requests), 3)
        expected_length += probability * length
        expected_triangle += probability * length * (length + 1) / 2
    score = math.exp(bms_log_score(sequence, prior, num_requests))
    assert score == pytest.approx(expected_triangle)
    assert score > expected_length


def test_conditional_ends_with_a_certain_slice_and_a_full_budget() -> None:
    sequences = select_sequences(4, 24, "conditional", [1.0, 0.0, 0.0, 0.0])
    assert_distinct_permutations(sequences, 4, 24)
    assert all(sequence[-1] == 0 for sequence in sequences[:6])


def test_conditional_puts_risky_slices_late() -> None:
    prior = [0.9, 0.05, 0.05]
    first = [select_sequences(3, 1, "conditional", prior, seed=s)[0][0] for s in range(300)]
    # Probability 0.1 / 2 each; four standard deviations above.
    assert first.count(0) < 300 * 0.05 + 4 * math.sqrt(300 * 0.05 * 0.95)


def test_random_is_uniform_and_follows_its_seed() -> None:
    drawn = [select_sequences(3, 1, "random", seed=s)[0] for s in range(600)]
    assert all(abs(drawn.count(order) - 100) < 40 for order in set(drawn))
    assert len(set(drawn)) == 6
    assert select_sequences(6, 9, "random", seed=1) == select_sequences(6, 9, "random", seed=1)
    assert select_sequences(6, 9, "random", seed=1) != select_sequences(6, 9, "random", seed=2)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda p: sum(p) > 0.01))
def test_any_prior_is_served(weights: list[float]) -> None:
    prior = (np.array(weights) / sum(weights)).tolist()
    for method in ("bms", "conditional"):
        for budget in (1, len(prior), len(prior) + 1):
            count = min(budget, math.factorial(len(prior)))
            sequences = select_sequences(len(prior), count, method, prior)
            assert_distinct_permutations(sequences, len(prior), count)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "num_slices is 0, expected at least 1"),
        ((4, 0), "num_sequences is 0, expected at least 1"),
        ((3, 7), "num_sequences is 7, expected at most 6"),
        ((3, 2, "sorted"), "method is 'sorted', expected one of cyclic, bms"),
        ((3, 2, "bms"), "prior is None, expected 3 probabilities"),
        ((3, 2, "conditional"), "prior is None, expected 3 probabilities"),
        ((3, 2, "cyclic", [0.2, 0.3, 0.5]), "method 'cyclic' takes no prior"),
        ((3, 2, "bms", [0.5, 0.5]), r"prior has shape \(2,\), expected \(3,\)"),
        ((3, 2, "bms", [-0.5, 0.5, 1.0]), "expected finite values that are >= 0"),
        ((3, 2, "bms", [math.nan, 0.5, 0.5]), "expected finite values that are >= 0"),
        ((3, 2, "bms", [0.5, 0.5, 0.5]), "prior sums to 1.5, expected 1"),
    ],
)
def test_bad_inputs(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_sequences(*arguments)


@pytest.mark.parametrize("sequences", [[], [()], [(0, 0)], [(1, 2)], [(0, 1), (0, 1, 2)]])
def test_diversity_rejects_what_is_no_permutation(sequences: list) -> None:
    with pytest.raises(ValueError, match="expected"):
        diversity(sequences)
