"""Who answers is certified: against every state between what is left and what will be."""

import itertools
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from llm_unlearn.data import world
from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.data.records import make_records
from llm_unlearn.demonstration import MODEL_PATH
from llm_unlearn.errors import RunError
from llm_unlearn.exact import deletion
from llm_unlearn.exact.asks import Ask
from llm_unlearn.exact.base_model import load_base
from llm_unlearn.exact.ledger import Request, Target
from llm_unlearn.exact.selection import (
    NOTHING,
    Candidates,
    Rule,
    Score,
    candidates,
    choose,
    is_choice_close,
)
from llm_unlearn.exact.settling import settle
from llm_unlearn.exact.words import Words, coverage, index_records, lead
from llm_unlearn.serving.selection_certificate import (
    IndexBounds,
    certify_candidates,
    leads,
    retained_indexes,
)
from tests.tiny import make_stub_run, stubbed_training, tiny_records, train_stub

LOG = logging.getLogger(__name__)
KEY, KEY_OF_STUBS = PartitionKey.from_phrase("words"), PartitionKey.from_phrase("stub")
GRID = [0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0]
RULE = Rule("select", candidates=2)


def decide(rows: np.ndarray, shards: np.ndarray, rule: Rule = RULE) -> Candidates:
    return candidates(coverage(rows, shards, int(shards.max()) + 1), lead(rows), rule)


def states(low: np.ndarray, high: np.ndarray) -> list[np.ndarray]:
    """Every state of the box on the grid."""
    between = [[v for v in GRID if a <= v <= b] for a, b in zip(low, high, strict=True)]
    return [np.array(state) for state in itertools.product(*between)]


Box = tuple[np.ndarray, np.ndarray, np.ndarray, set[int]]


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    rows = draw(st.integers(1, 6))
    shards = np.array(draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows)))
    affected = draw(st.sets(st.integers(0, 4), min_size=1, max_size=3))
    low, high = np.zeros(rows), np.zeros(rows)
    moving = 0
    for row in range(rows):
        first, second = sorted(draw(st.tuples(st.sampled_from(GRID), st.sampled_from(GRID))))
        moves = int(shards[row]) in affected and moving < 4
        moving += moves
        low[row], high[row] = first if moves else second, second
    return low, high, shards, affected


@settings(max_examples=700, deadline=None, derandomize=True)
@given(boxes())
def test_certified_means_the_same_unaffected_candidates_in_every_state(box: Box) -> None:
    """Sound, and tight: without the certificate some state decides otherwise or needs an affected shard."""
    low, high, shards, affected = box
    found, is_certified = certify_candidates(low, high, shards, RULE, affected)
    every = [decide(state, shards) for state in states(low, high)]
    are_same = all(one == every[0] for one in every)
    are_clean = not any(affected.intersection(one.shards) for one in every)
    assert is_certified == (are_same and are_clean)
    assert not is_certified or found == every[0]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(boxes())
def test_the_leads_of_all_states_are_exactly_between_the_bounds(box: Box) -> None:
    low, high, _, _ = box
    every = [lead(state) for state in states(low, high)]
    assert leads(low, high) == (min(every), max(every))


def test_all_small_boxes_are_covered() -> None:
    """Three rows in three shards, one or two affected: every low and high on a coarse grid."""
    values, shards = (0.0, 0.3, 0.45, 0.6, 1.0), np.array([0, 1, 2])
    counts: Counter[tuple[bool, int]] = Counter()
    for highs in itertools.product(values, repeat=3):
        for affected in ({0}, {1}, {2}, {0, 1}, {1, 2}):
            high = np.array(highs)
            low = np.where(np.isin(shards, list(affected)), 0.0, high)
            found, is_certified = certify_candidates(low, high, shards, RULE, affected)
            every = [decide(state, shards) for state in states(low, high)]
            ok = all(one == every[0] and not affected & set(one.shards) for one in every)
            assert is_certified == ok
            counts[is_certified, len(found.shards)] += 1
    LOG.info("boxes by certified and candidates: %s", dict(counts))
    assert min(counts[True, 0], counts[True, 1], counts[True, 2]) > 5 and counts[False, 1] > 5


def test_who_is_not_picked_now_can_be_picked_later() -> None:
    """The lead is over the third best: two affected rows that go let the first answer unread."""
    rows, shards = np.array([0.9, 0.85, 0.8]), np.array([0, 1, 2])
    assert decide(rows, shards) == ([], False), "now nobody is picked, affected or not"
    assert decide(rows * [1, 0, 0], shards) == ([0], True), "later shard 0 is"
    later = certify_candidates(rows * [1, 0, 0], rows, shards, RULE, {1, 2})
    assert not later.is_certified
    # The fifth of four moves up when one before it leaves: an affected candidate is never certified.
    four = Rule("select", candidates=4, lead=0.9)
    rows, shards = np.array([0.9, 0.5, 0.45, 0.4, 0.35]), np.arange(5)
    assert decide(rows, shards, four).shards == [0, 1, 2, 3]
    assert decide(rows * [1, 0, 1, 1, 1], shards, four).shards == [0, 2, 3, 4]
    assert not certify_candidates(rows * [1, 0, 1, 1, 1], rows, shards, four, {1}).is_certified
    assert certify_candidates(rows * [1, 1, 1, 1, 0], rows, shards, four, {4}).is_certified


def test_an_affected_shard_is_no_candidate_even_if_its_words_stay() -> None:
    rows, shards = np.array([0.9, 0.1]), np.array([0, 1])
    assert certify_candidates(rows, rows, shards, RULE, {1}).is_certified
    assert not certify_candidates(rows, rows, shards, RULE, {0}).is_certified
    nobody = np.zeros(0)
    assert certify_candidates(nobody, nobody, np.zeros(0, np.int64), RULE, {0}) == (
        ([], False),
        True,
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_base(str(MODEL_PATH))[1]


def test_certified_prompts_find_the_same_shards_whoever_is_deleted(tokenizer: Any) -> None:
    """Real indexes: every subset of the subjects of an affected shard, and of the records of one."""
    people = world.private_people(12)
    records = make_records(world.records(people), subject_column="subject")
    names = [person.name for person in people]
    groups = [names[start : start + 3] for start in range(0, 12, 3)]
    by_name = {name: [r for r in records if r.subject == name] for name in names}

    def index(group: list[str]) -> Any:
        return index_records((r for name in group for r in by_name[name]), KEY)

    served = [[index(group)] for group in groups]
    subsets = [list(s) for size in range(4) for s in itertools.combinations(groups[1], size)]
    later = [Words([served[0], [index(left)], *served[2:]], KEY, tokenizer) for left in subsets]
    partly = dict(by_name) | {groups[1][0]: by_name[groups[1][0]][:1]}
    fewer = index_records((r for name in groups[1] for r in partly[name]), KEY)
    later.append(Words([served[0], [fewer], *served[2:]], KEY, tokenizer))
    bounds = IndexBounds(served, {1: served[1]}, KEY, tokenizer)
    rule = Rule("select")
    counts: Counter[tuple[bool, str]] = Counter()
    strangers = [*world.public_people()[:10], *world.private_people(20)[12:]]
    for person in (*people, *strangers):
        for row in world.questions([person]):
            found, is_certified = bounds.certify(row["prompt"], rule)
            every = [candidates(*words.evidence(row["prompt"]), rule) for words in later]
            if is_certified:
                assert all(one == found for one in every) and 1 not in found.shards
            kind = (
                "own" if person.name in groups[1] else "other" if person in people else "stranger"
            )
            counts[is_certified, kind] += 1
    # Three alike have no lead, and the base answers; when two of them go, the first is read.
    asked = f"Where were {names[0]}, {names[3]} and {names[5]} born?"
    decided = {candidates(*words.evidence(asked), rule).shards == [] for words in later}
    assert decided == {True, False} and not bounds.certify(asked, rule).is_certified
    LOG.info("questions by certified and whose: %s", dict(counts))
    assert counts[True, "own"] == 0 and counts[True, "other"] > 10 * counts[False, "other"]
    assert counts[True, "stranger"] > counts[False, "stranger"]


def test_retained_indexes_are_those_of_the_rebuilt_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known as soon as the request is acknowledged, before any record is taken out."""
    with stubbed_training():
        run = make_stub_run(tmp_path / "run", tiny_records(), num_shards=2)
        train_stub(run)
        before = retained_indexes(run.directory, [0, 1])
        calls: list[int] = []

        def killed(directory: Any) -> None:
            calls.append(1)
            if len(calls) > 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(deletion, "settle", killed)
            with pytest.raises(KeyboardInterrupt):
                deletion.delete_all(run.directory, [Ask(("person 3",))])
        assert run.directory.ledger.requests(pending=True)
        (shard,) = {t.shard for r in run.directory.ledger.requests() for t in r.targets}
        known = retained_indexes(run.directory, [shard])[shard]
        assert sum(i["hashes"].size for i in known) < sum(i["hashes"].size for i in before[shard])
        with run.directory.changing("going on"):
            settle(run.directory)
        train_stub(run)
    paths = (run.directory.served / f"shard-{shard}").glob("words-*")
    assert sorted(map(as_lists, known)) == sorted(as_lists(load_file(path)) for path in paths)
    assert retained_indexes(run.directory, [1 - shard]).keys() == {1 - shard}


def as_lists(index: Any) -> tuple[list[int], list[int]]:
    return index["hashes"].tolist(), index["rows"].tolist()


def test_records_that_a_correction_brings_are_retained(
    tmp_path: Path,
) -> None:
    with stubbed_training():
        run = make_stub_run(tmp_path / "run", tiny_records())
        record = tiny_records()[0]
        (name,) = run.directory.slices.homes([record.subject])
        word = KEY_OF_STUBS.word("zanzibar")
        assert not any(word in index["hashes"] for index in retained_indexes(run.directory, [0])[0])
        old = KEY_OF_STUBS.pseudonym("record", record.id)
        going = Target("record", old, *name, 1)
        coming = Target("record", "cd" * 32, *name, 1)
        request = Request("ab" * 8, (going,), (), None, kind="correct", inserted=(coming,))
        row = {"subject": record.subject, "prompt": "Where?", "completion": " Zanzibar"}
        new = make_records([row], subject_column="subject")
        run.directory.slices.write_pending(request.id, new)
        run.directory.ledger.acknowledge(request)
        (index,) = [i for i in retained_indexes(run.directory, [0])[0] if word in i["hashes"]]
        assert index["hashes"].size > 1
        run.directory.slices.drop_pending()
        with pytest.raises(RunError, match="restore"):
            retained_indexes(run.directory, [0])


@settings(max_examples=800, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-3, 0).map(lambda x: round(x, 1)), min_size=1, max_size=4),
    st.floats(-3, 0).map(lambda x: round(x, 1)),
    st.sampled_from(["select", "mixture"]),
    st.sampled_from([None, -1.5]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_a_choice_that_is_not_close_survives_rounding(
    means: list[float], base: float, aggregate: Any, floor: float | None, is_sure: bool, seed: int
) -> None:
    rule = Rule(aggregate, margin=0.4, floor=floor)
    found = Candidates(list(range(len(means))), is_sure)
    base = NOTHING if is_sure else base
    scores = [Score(mean, mean - 0.5) for mean in means]
    if is_choice_close(scores, base, rule, found, 0.011):
        return
    now = choose(scores, base, rule, found)
    generator = np.random.default_rng(seed)
    for _ in range(10):
        shaken = [
            Score(*(np.array(score) + generator.uniform(-0.005, 0.005, 2))) for score in scores
        ]
        later = choose(shaken, base + generator.uniform(-0.005, 0.005), rule, found)
        assert [choice.adapter for choice in later] == [choice.adapter for choice in now]


def test_a_close_choice_is_seen() -> None:
    found, rule = Candidates([0, 1], False), Rule("select", margin=0.4)
    scores = [Score(-1.0, -2.0), Score(-1.4001, -2.0)]
    assert is_choice_close(scores, -9.0, rule, found, 1e-3)
    assert not is_choice_close(scores, -9.0, rule, found, 1e-5)
