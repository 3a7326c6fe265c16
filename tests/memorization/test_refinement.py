"""Refinement: the partition, the order, the retain pool, and what is refused."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.errors import UserError
from llm_unlearn.memorization.refinement import refine, retain_pool, share_steps, shuffled
from tests.tiny import tiny_records


@settings(max_examples=60, deadline=None)
@given(st.integers(6, 60), st.integers(2, 3), st.integers(0, 1000))
def test_subsets_are_disjoint_cover_all_and_rise(count: int, parts: int, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=count)
    subsets = refine(scores, parts)
    assert sorted(np.concatenate(subsets).tolist()) == list(range(count))
    assert max(map(len, subsets)) - min(map(len, subsets)) <= 1
    for lower, higher in pairwise(subsets):
        assert scores[lower].max() <= scores[higher].min()
    control = shuffled([len(part) for part in subsets], seed)
    assert sorted(np.concatenate(control).tolist()) == list(range(count))
    assert list(map(len, control)) == list(map(len, subsets))


SPREAD = np.linspace(0, 1, 30)
REFUSED = {
    "the same": (np.ones(30), "all records have the same score"),
    "flat": (0.99 + SPREAD / 1000, "the scores are flat"),
    "tied at a cut": (np.repeat([0.0, 0.5, 1.0], [4, 16, 10]), "16 of 30 records have the score"),
    "a hole": (np.where(SPREAD > 0.9, np.nan, SPREAD), "3 of 30 records have no score"),
    "infinite": (np.where(SPREAD > 0.99, np.inf, SPREAD), "1 of 30 records have no score"),
    "few": (np.array([0.1, 0.5, 0.9]), "3 records are too few for 3 subsets of 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_scores_that_tell_nothing_are_refused_with_the_reason(case: str) -> None:
    scores, reason = REFUSED[case]
    with pytest.raises(UserError, match=reason):
        refine(scores)


def test_ties_within_a_subset_do_no_harm() -> None:
    subsets = refine(np.repeat([0.0, 0.5, 1.0], 10))
    assert [part.tolist() for part in subsets] == [
        list(range(10)), list(range(10, 20)), list(range(20, 30))
    ]  # fmt: skip


def test_the_retain_pool_of_every_step() -> None:
    records = tiny_records()
    forget, retain = records[:6], records[6:]
    subsets = [np.array([0, 3]), np.array([1, 4]), np.array([2, 5])]
    for stage in range(3):  # where a deletion is due, nothing of it is trained on again
        assert retain_pool(retain, forget, subsets, stage, pending_in_retain=False) == retain
    paper = [retain_pool(retain, forget, subsets, stage, True) for stage in range(3)]
    assert paper[0] == [*retain, *(forget[n] for n in (1, 4, 2, 5))]
    assert paper[1] == [*retain, forget[2], forget[5]]
    assert paper[2] == retain


def test_a_text_that_is_being_unlearned_is_not_kept_under_another_id() -> None:
    records = tiny_records()
    forget = [records[0], records[1], replace(records[0], id="copy")]
    subsets = [np.array([0]), np.array([1, 2])]
    assert retain_pool([], forget, subsets, 0, True) == [records[1]]


def test_every_control_gets_exactly_the_same_steps() -> None:
    assert share_steps(60, [24, 24, 24], [True] * 3) == [20, 20, 20]
    assert share_steps(61, [24, 24, 24], [False, True, True]) == [0, 31, 30]
    assert share_steps(10, [5, 3], [True, True]) == [6, 4]
    for total in range(3, 40):
        assert sum(share_steps(total, [7, 6, 6], [True] * 3)) == total
    with pytest.raises(UserError, match="no subset has a method"):
        share_steps(10, [5, 5], [False, False])
    with pytest.raises(UserError, match="2 steps are too few for 3 subsets"):
        share_steps(2, [5, 5, 5], [True] * 3)
