"""Which policies there are, which combinations mean nothing, and when an execution is due."""

import subprocess
import sys
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_unlearn.errors import UserError
from llm_unlearn.serving.policy import (
    DEFAULT_POLICY,
    POLICIES,
    Policy,
    Target,
    Timing,
    is_due,
    make_policy,
)

HOUR = 3600.0


def test_there_are_seven_policies_and_two_baselines() -> None:
    assert list(POLICIES) == [
        "immediate-execute",
        "uncertified-execute",
        "threshold-execute",
        "threshold-defer",
        "threshold-clean",
        "threshold-abstain",
        "deadline-clean",
        "oblivious",
        "serve-anyway",
    ]
    assert [name for name, policy in POLICIES.items() if policy.is_unsafe] == ["serve-anyway"]
    assert [name for name, policy in POLICIES.items() if not policy.certifies] == [
        "oblivious",
        "serve-anyway",
    ]
    for name, policy in POLICIES.items():
        assert policy.name == name and policy.description
        if policy.certifies:
            assert name == f"{policy.timing}-{policy.handling}"


def test_the_default() -> None:
    policy = make_policy()
    assert policy.name == DEFAULT_POLICY == "threshold-clean"
    assert policy.target == "deactivated" and policy.deadline_seconds == 24 * HOUR
    assert policy.for_shards(20).threshold == 5
    assert policy.for_shards(3).threshold == 1  # never none


def test_a_policy_by_name_and_by_its_parts_is_the_same() -> None:
    assert make_policy(timing="deadline", handling="clean") == make_policy("deadline-clean")
    assert make_policy(timing="deadline") == make_policy("deadline-clean")
    other = make_policy(timing="uncertified", handling="abstain", deadline_hours=2)
    assert (other.name, other.deadline_seconds) == ("uncertified-abstain", 2 * HOUR)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "eraser"}, "expected one of immediate-execute"),
        ({"name": "threshold-clean", "timing": "deadline"}, "leave out --timing"),
        ({"timing": "later"}, "--timing is 'later'"),
        ({"handling": "serve"}, "--handling is 'serve'"),  # no baseline by accident
        ({"handling": "wait"}, "--handling is 'wait'"),
        ({"timing": "deadline", "handling": "execute"}, "choose --timing uncertified"),
        ({"timing": "immediate", "handling": "defer"}, "choose --handling execute"),
        ({"timing": "uncertified", "handling": "defer"}, "choose --handling execute"),
        ({"target": "rebuilt"}, "--target is 'rebuilt'"),
        ({"name": "immediate-execute", "threshold": 3}, "--threshold has no effect"),
        ({"threshold": 0}, "expected at least 1"),
        ({"deadline_hours": 0}, "more than 0"),
        ({"deadline_hours": float("nan")}, "more than 0"),
        ({"deadline_hours": 1e300}, "at most"),
        ({"deadline_hours": float("inf")}, "more than 0"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        make_policy(**options)
    assert "\n" not in str(caught.value)


def test_a_threshold_of_more_shards_than_there_are_is_refused() -> None:
    policy = make_policy(threshold=6)
    assert policy.for_shards(6).threshold == 6
    with pytest.raises(UserError, match="more than the 5 shards"):
        policy.for_shards(5)


def due(policy: Policy, shards: int, requests: int, age: float, uncertified: bool = False) -> bool:
    return is_due(policy, shards, requests, age, uncertified) is not None


def test_immediate_is_due_with_the_first_request() -> None:
    policy = make_policy("immediate-execute").for_shards(8)
    assert due(policy, 1, 1, 0.0)
    assert not due(policy, 0, 0, 0.0, uncertified=True)


def test_thresholds_count_shards_and_requests() -> None:
    policy = make_policy(threshold=3).for_shards(8)
    assert not due(policy, 2, 2, 0.0)
    assert due(policy, 3, 1, 0.0)  # one subject in three shards
    assert due(policy, 1, 3, 0.0)  # three in one
    assert is_due(policy, 3, 1, 0.0, False) == "3 shards are affected"


def test_an_uncertified_query_starts_an_execution_only_where_the_policy_says_so() -> None:
    starts = {
        name
        for name, policy in POLICIES.items()
        if not due(policy.for_shards(8), 1, 1, 0.0) and due(policy.for_shards(8), 1, 1, 0.0, True)
    }
    assert starts == {"uncertified-execute", "threshold-execute"}


@pytest.mark.parametrize("name", POLICIES)
def test_the_deadline_bounds_every_timing(name: str) -> None:
    policy = make_policy(name, deadline_hours=10).for_shards(8)
    assert due(policy, 1, 1, 9.0 * HOUR)  # an hour is left for the execution
    assert POLICIES[name].timing == "immediate" or not due(policy, 1, 1, 8.99 * HOUR)


def test_the_head_start_is_long_enough_for_two_executions() -> None:
    policy = make_policy(deadline_hours=10).for_shards(8, seconds_per_shard=60)
    assert policy.latest_start_seconds == 10 * HOUR - 2 * 8 * 60
    hasty = make_policy(deadline_hours=0.1).for_shards(8, seconds_per_shard=60)
    assert hasty.latest_start_seconds == 0.0


def test_without_a_threshold_nobody_guesses() -> None:
    with pytest.raises(ValueError, match="for_shards"):
        is_due(make_policy(), 3, 3, 0.0, False)


@given(
    name=st.sampled_from(list(POLICIES)),
    shards=st.integers(0, 9),
    requests=st.integers(1, 9),
    age=st.floats(0, 30 * HOUR),
    uncertified=st.booleans(),
)
def test_what_is_due_stays_due_when_more_is_pending(
    name: str, shards: int, requests: int, age: float, uncertified: bool
) -> None:
    policy = make_policy(name).for_shards(9)
    if due(policy, shards, requests, age, uncertified):
        assert due(policy, shards + 1, requests, age, uncertified)
        assert due(policy, shards, requests + 1, age, uncertified)
        assert due(policy, shards, requests, age + 60, uncertified)
        assert due(policy, shards, requests, age, True)


def test_every_combination_is_a_policy_or_an_explanation() -> None:
    made = refused = 0
    handlings = ("execute", "defer", "clean", "abstain")
    for timing, handling, target in product(get_args(Timing), handlings, get_args(Target)):
        try:
            policy = make_policy(timing=timing, handling=handling, target=target)
        except UserError:
            refused += 1
            continue
        made += 1
        assert replace(policy, target="deactivated") == make_policy(
            timing=timing, handling=handling
        )
    assert (made, refused) == (26, 6)


def test_a_policy_needs_no_torch() -> None:
    code = "import sys, llm_unlearn.serving.policy; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
