"""Requests that are left from a half-lost trie: the simulation against every possible future."""

import itertools
from functools import cache

import pytest

from llm_unlearn.exact.outlook import Outlook, Standing, by_slice, by_subject
from llm_unlearn.exact.plan import Estimate, make_plan
from llm_unlearn.exact.sequences import select_sequences
from llm_unlearn.exact.simulation import simulate_deletions

STATES = {
    "whole": [Standing(((0, 1), (1, 0)), 2, (2, 3))],
    "one order left": [Standing(((2,), (1, 0), ()), 3, (1, 2, 2))],
    "uneven": [Standing(((0, 1, 2), (2, 0, 1)), 3, (1, 1, 4))],
    "an empty slice": [Standing(((0, 2), (2, 0)), 2, (3, 0, 2))],
    "two shards": [
        Standing(((0, 1), (1,)), 2, (2, 1)),
        Standing(((), (1, 0)), 2, (1, 2)),
    ],
    "one shard is dead": [
        Standing(((), ()), 2, (2, 1)),
        Standing(((0, 1), (1, 0)), 2, (1, 2)),
    ],
    "a shard each": [Standing(((0,),), 1, (1,)) for _ in range(5)],
    "half is gone": [Standing(((0,), ()), 3, (2, 1, 2))],
    "nothing is left": [Standing(((), ()), 2, (2, 2))],
}


def slices_of(shards: list[Standing]) -> list[tuple[int, int]]:
    """Every subject as the slice that it lives in."""
    return [
        (number, part)
        for number, shard in enumerate(shards)
        for part, held in enumerate(shard.subjects)
        for _ in range(held)
    ]


def depth(shards: list[Standing], hit: frozenset[tuple[int, int]]) -> int:
    """Blocks that are left, all shards together, in the best order of each."""

    def left(number: int, prefix: tuple[int, ...]) -> int:
        alive = itertools.takewhile(lambda part: (number, part) not in hit, prefix)
        return sum(1 for _ in alive)

    return sum(
        max(left(number, prefix) for prefix in shard.prefixes)
        for number, shard in enumerate(shards)
    )


def is_over(shards: list[Standing], hit: frozenset[tuple[int, int]]) -> tuple[bool, bool]:
    """Is everything gone; is more than half of the full depth?"""
    left = depth(shards, hit)
    return left == 0, 2 * left < sum(shard.full_depth for shard in shards)


def enumerated_by_subject(shards: list[Standing]) -> tuple[float, float]:
    """Means over all orders in which the subjects can ask."""
    totals, orders = [0, 0], 0
    for order in itertools.permutations(slices_of(shards)):
        orders += 1
        for which in (0, 1):
            totals[which] += next(
                asked
                for asked in range(len(order) + 1)
                if is_over(shards, frozenset(order[:asked]))[which]
            )
    return totals[0] / orders, totals[1] / orders


def enumerated_by_slice(shards: list[Standing]) -> tuple[float, float]:
    """Expected hitting times of the chain of hit slices."""
    slices = sorted(set(slices_of(shards)))

    @cache
    def expected(hit: frozenset[tuple[int, int]], which: int) -> float:
        if is_over(shards, hit)[which]:
            return 0.0
        new = [one for one in slices if one not in hit]
        later = sum(expected(hit | {one}, which) for one in new)
        return (len(slices) + later) / len(new)

    return expected(frozenset(), 0), expected(frozenset(), 1)


def is_near(found: Estimate, exact: float) -> bool:
    return abs(found.mean - exact) <= 4.5 * found.standard_error + 1e-9


@pytest.mark.parametrize("name", STATES)
def test_every_order_of_the_subjects_on_average(name: str) -> None:
    shards = STATES[name]
    found, (all_gone, half_gone) = by_subject(shards, seed=1), enumerated_by_subject(shards)
    assert is_near(found.all_gone, all_gone), (found, all_gone)
    assert is_near(found.half_gone, half_gone), (found, half_gone)
    assert found.all_gone.standard_error < 0.05  # it could tell


@pytest.mark.parametrize("name", STATES)
def test_the_chain_of_hit_slices_on_average(name: str) -> None:
    shards = STATES[name]
    found, (all_gone, half_gone) = by_slice(shards, seed=1), enumerated_by_slice(shards)
    assert is_near(found.all_gone, all_gone), (found, all_gone)
    assert is_near(found.half_gone, half_gone), (found, half_gone)


@pytest.mark.parametrize(("shards", "slices", "orders"), [(1, 4, 2), (5, 4, 2), (3, 6, 4)])
def test_a_fresh_run_is_what_the_plan_said(shards: int, slices: int, orders: int) -> None:
    sequences = tuple(select_sequences(slices, orders))
    found = by_slice([Standing(sequences, slices, (7,) * slices)] * shards)
    plan = make_plan(shards, slices, orders)
    assert is_near(found.all_gone, plan.deletions_until_retraining)
    half = plan.deletions_until_half_depth
    error = (half.standard_error**2 + found.half_gone.standard_error**2) ** 0.5
    assert abs(found.half_gone.mean - half.mean) < 4.5 * error


def test_many_subjects_in_a_slice_come_near_to_drawing_slices() -> None:
    sequences = tuple(select_sequences(4, 2))
    many = [Standing(sequences, 4, (20_000,) * 4)] * 5
    found, expected = by_subject(many), by_slice(many)
    for name in ("all_gone", "half_gone"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        error = (ours.standard_error**2 + theirs.standard_error**2) ** 0.5
        assert abs(ours.mean - theirs.mean) < 4.5 * error + 0.01 * theirs.mean


def test_with_a_shard_each_there_is_no_luck_in_it() -> None:
    found = by_subject([Standing(((0,),), 1, (1,))] * 3000)
    assert found.all_gone == Estimate(3000.0, 0.0) and found.half_gone == Estimate(1501.0, 0.0)


def test_a_request_that_hits_several_shards() -> None:
    shards = [Standing(((0,),), 1, (4,))] * 8
    found = by_slice(shards, fan_out=3)
    simulated = simulate_deletions(8, [(0,)], 4000, seed=9, fan_out=3)
    for ours, theirs in (
        (found.all_gone, simulated.all_shards_dead),
        (found.half_gone, simulated.half_depth),
    ):
        error = (ours.standard_error**2 + theirs.var(ddof=1) / len(theirs)) ** 0.5
        assert abs(ours.mean - theirs.mean()) < 4.5 * error
    assert by_slice(shards[:2], fan_out=3).all_gone == Estimate(1.0, 0.0)  # no more than there are


def test_no_shard_at_all() -> None:
    assert by_subject([]).all_gone == by_slice([]).half_gone == Estimate(0.0, 0.0)


@pytest.mark.parametrize("model", [by_subject, by_slice])
def test_a_seed_gives_the_same_numbers(model) -> None:
    def ask(seed: int) -> Outlook:
        return model(STATES["two shards"], runs=200, seed=seed)

    assert ask(1) == ask(1) and ask(1) != ask(2) and ask(1).runs == 200
