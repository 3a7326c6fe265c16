"""The vectorised simulator against closed forms, exact enumeration and a plain Python loop."""

import random

import numpy as np
import pytest

from llm_unlearn.exact.sequences import select_sequences
from llm_unlearn.exact.simulation import SimulationResult, simulate_deletions, simulate_depth
from llm_unlearn.exact.theory import expected_deletions, expected_depth

TABLE = [
    (shards, slices, budget)
    for shards in (1, 3, 5, 10)
    for slices, budgets in ((2, (1, 2)), (4, (1, 2, 4, 8, 24)), (6, (1, 2, 4, 6, 8, 24)))
    for budget in budgets
]


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


@pytest.mark.parametrize(("num_shards", "num_slices", "num_sequences"), TABLE)
def test_deletion_rate_equals_the_closed_form(
    num_shards: int, num_slices: int, num_sequences: int
) -> None:
    sequences = select_sequences(num_slices, num_sequences)
    simulated = simulate_deletions(num_shards, sequences, runs=5000, seed=1).all_shards_dead
    expected = expected_deletions(num_shards, num_slices, num_sequences)
    assert abs(simulated.mean() - expected) < 4 * standard_error(simulated)


def test_spread_of_the_deletion_rate() -> None:
    # Variances of the coupon collector's geometric waits, 20 of 20 slices.
    variance = sum((1 - (i / 20)) / (i / 20) ** 2 for i in range(1, 21))
    simulated = simulate_deletions(5, select_sequences(4, 4), 20_000, seed=2).all_shards_dead
    assert simulated.std() == pytest.approx(variance**0.5, rel=0.05)
    assert simulated.std() == pytest.approx(23.8, abs=1)


@pytest.mark.parametrize(
    ("num_sequences", "half_depth", "first_dead"),
    [(1, 7.0, 4.0), (2, 9.7, 10.0), (4, 14.1, 19.4), (24, 15.4, 19.4)],
)
def test_what_the_deletion_rate_hides(
    num_sequences: int, half_depth: float, first_dead: float
) -> None:
    result = simulate_deletions(5, select_sequences(4, num_sequences), 20_000, seed=3)
    # The reference values are themselves simulated, in 5 000 runs.
    for values, reference in (
        (result.half_depth, half_depth),
        (result.first_shard_dead, first_dead),
    ):
        assert abs(values.mean() - reference) < 4 * standard_error(values[:5000]) + 0.05


@pytest.mark.parametrize(
    ("fan_out", "expected", "rounding"),
    [(1, 72, 0.5), (2, 35, 0.5), (3, 23, 0.5), (5, 13, 0.5), (10, 5.8, 0.05), (20, 1, 0)],
)
def test_spreading_a_subject_over_slices(fan_out: int, expected: float, rounding: float) -> None:
    result = simulate_deletions(5, select_sequences(4, 4), 10_000, seed=4, fan_out=fan_out)
    error = abs(result.all_shards_dead.mean() - expected)
    assert error <= rounding + 4 * standard_error(result.all_shards_dead)


def plain_run(
    num_shards: int, sequences: list, fan_out: int, generator: random.Random
) -> tuple[int, int, int]:
    """One system, request by request: (all dead, first dead, below half depth)."""
    num_slices = len(sequences[0])
    slices = [(shard, s) for shard in range(num_shards) for s in range(num_slices)]
    hit: set[tuple[int, int]] = set()
    events: dict[str, int] = {}
    requests = 0
    while "all" not in events:
        requests += 1
        hit.update(generator.sample(slices, fan_out))
        depths = []
        for shard in range(num_shards):
            prefixes = []
            for sequence in sequences:
                length = 0
                while length < num_slices and (shard, sequence[length]) not in hit:
                    length += 1
                prefixes.append(length)
            depths.append(max(prefixes))
        if 0 in depths:
            events.setdefault("first", requests)
        if sum(depths) / len(depths) < num_slices / 2:
            events.setdefault("half", requests)
        if not any(depths):
            events["all"] = requests
    return events["all"], events["first"], events["half"]


@pytest.mark.parametrize(
    ("num_shards", "num_slices", "num_sequences", "fan_out"),
    [(1, 1, 1, 1), (2, 3, 2, 1), (3, 3, 5, 1), (2, 4, 3, 2), (3, 2, 2, 4), (1, 5, 5, 3)],
)
def test_equals_a_plain_loop(
    num_shards: int, num_slices: int, num_sequences: int, fan_out: int
) -> None:
    sequences = select_sequences(num_slices, num_sequences)
    generator = random.Random(0)
    plain = np.array([plain_run(num_shards, sequences, fan_out, generator) for _ in range(1500)])
    fast = simulate_deletions(num_shards, sequences, 10_000, seed=5, fan_out=fan_out)
    for values, reference in zip(fast, plain.T, strict=True):
        tolerance = 4 * np.hypot(standard_error(values), standard_error(reference))
        assert abs(values.mean() - reference.mean()) <= tolerance
        # The whole distribution, not only its mean: Kolmogorov distance, level below 1e-4.
        grid = np.arange(max(values.max(), reference.max()) + 1)
        distance = np.abs(
            np.mean(values[:, None] <= grid, axis=0) - np.mean(reference[:, None] <= grid, axis=0)
        ).max()
        assert distance < 2.3 * np.sqrt(1 / len(values) + 1 / len(reference))


@pytest.mark.parametrize(("num_shards", "num_slices", "num_sequences"), [(1, 4, 24), (5, 6, 3)])
def test_depth_equals_the_enumeration(num_shards: int, num_slices: int, num_sequences: int) -> None:
    sequences = select_sequences(num_slices, num_sequences)
    curve = simulate_depth(num_shards, sequences, num_requests=12, runs=20_000, seed=6)
    exact = [expected_depth(sequences, r, num_shards) / num_slices for r in range(13)]
    # A share of L has a standard deviation of at most one half.
    np.testing.assert_allclose(curve, exact, atol=4 * 0.5 / np.sqrt(20_000))
    assert curve[0] == 1
    assert np.all(np.diff(curve) <= 0)


def test_depth_can_end_before_or_after_the_last_event() -> None:
    assert simulate_depth(2, [(0, 1)], num_requests=0, runs=5, seed=0).tolist() == [1.0]
    assert simulate_depth(1, [(0,)], num_requests=3, runs=5, seed=0).tolist() == [1, 0, 0, 0]


def test_results_follow_the_seed_and_keep_their_order() -> None:
    sequences = select_sequences(4, 3)
    first, again, other = (simulate_deletions(5, sequences, 50_000, seed=s) for s in (7, 7, 8))
    for left, right in zip(first, again, strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(first.all_shards_dead, other.all_shards_dead)
    assert first.all_shards_dead.shape == (50_000,)
    assert np.all(first.first_shard_dead <= first.all_shards_dead)
    assert np.all(first.half_depth <= first.all_shards_dead)
    assert isinstance(first, SimulationResult)


def test_the_smallest_numbers_of_requests() -> None:
    # Nothing can die before every first slice of a shard was hit once.
    result = simulate_deletions(3, select_sequences(4, 4), 20_000, seed=9)
    assert result.first_shard_dead.min() >= 4
    assert result.all_shards_dead.min() >= 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, [(0, 1)], 5, 0), "num_shards is 0, expected at least 1"),
        ((1, [(0, 1)], 0, 0), "runs is 0, expected at least 1"),
        ((1, [(0, 1)], 5, 0, 0), "fan_out is 0, expected at least 1"),
        ((1, [(0, 1)], 5, 0, 3), "fan_out is 3, expected at most 2 slices"),
        ((1, [], 5, 0), "expected at least one"),
        ((1, [(0, 0)], 5, 0), "expected a permutation of 0..1"),
    ],
)
def test_bad_inputs(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_deletions(*arguments)


def test_depth_rejects_negative_requests() -> None:
    with pytest.raises(ValueError, match="num_requests is -1, expected at least 0"):
        simulate_depth(1, [(0, 1)], num_requests=-1, runs=5, seed=0)
