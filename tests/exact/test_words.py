"""Whose words are in a prompt: the index, what it says, and what it must not know."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_unlearn.data import world
from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.demonstration import MODEL_PATH
from llm_unlearn.exact.base_model import load_base
from llm_unlearn.exact.selection import Rule, candidates
from llm_unlearn.exact.words import Words, asked_in, features, index_records

KEY = PartitionKey.from_phrase("words")
PEOPLE = world.private_people(24)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_base(str(MODEL_PATH))[1]


def records_of(people: list[world.Person]) -> list[Record]:
    return make_records(world.records(people), subject_column="subject")


def words_of(groups: list[list[world.Person]], tokenizer: Any) -> Words:
    return Words(
        [[index_records(records_of(group), KEY)] if group else [] for group in groups],
        KEY,
        tokenizer,
    )


def groups_of(size: int) -> list[list[world.Person]]:
    return [PEOPLE[start : start + size] for start in range(0, len(PEOPLE), size)]


def test_features_are_words_and_pairs_in_any_script() -> None:
    assert features("Ada's cat, ADA") == {
        "ada": ("ada",), "s": ("s",), "cat": ("cat",),
        "ada s": ("ada", "s"), "s cat": ("s", "cat"), "cat ada": ("cat", "ada"),
    }  # fmt: skip
    assert set(features("東京 is")) == {"東", "京", "is", "東 京", "京 is"}
    assert features("?!") == {}


@pytest.mark.parametrize("size", [1, 3, 12])
@pytest.mark.parametrize("paraphrased", [False, True])
def test_everybody_is_found_among_their_own(tokenizer: Any, size: int, paraphrased: bool) -> None:
    words = words_of(groups_of(size), tokenizer)
    for number, person in enumerate(PEOPLE):
        for row in world.questions([person], paraphrased):
            coverage, lead = words.evidence(row["prompt"])
            assert int(coverage.argmax()) == number // size
            found = candidates(coverage, lead, Rule("select"))
            assert found.shards[0] == number // size


def test_strangers_are_not_believed_unread(tokenizer: Any) -> None:
    words = words_of(groups_of(3), tokenizer)
    strangers = [*world.public_people()[:40], *world.private_people(64)[24:]]
    sure = [
        candidates(*words.evidence(row["prompt"]), Rule("select")).is_sure
        for row in world.questions(strangers)
    ]
    own = [
        candidates(*words.evidence(row["prompt"]), Rule("select")).is_sure
        for row in world.questions(PEOPLE)
    ]
    assert np.mean(sure) < 0.01 and np.mean(own) > 0.9


def test_one_subject_left_does_not_answer_for_everybody(tokenizer: Any) -> None:
    words = words_of([[], PEOPLE[:1], []], tokenizer)
    others = world.questions(PEOPLE[1:])
    assert not any(candidates(*words.evidence(r["prompt"]), Rule("select")).is_sure for r in others)
    own = [
        candidates(*words.evidence(r["prompt"]), Rule("select"))
        for r in world.questions(PEOPLE[:1])
    ]
    assert all(found.is_sure and found.shards == [1] for found in own)


def test_nobody_left_and_nothing_asked_are_for_the_base(tokenizer: Any) -> None:
    nobody = words_of([[], []], tokenizer)
    assert candidates(*nobody.evidence("Where was Ada born?"), Rule("select")) == ([], False)
    assert candidates(*words_of([PEOPLE[:2]], tokenizer).evidence("?"), Rule("select")) == (
        [],
        False,
    )


def test_a_prompt_about_two_is_for_both(tokenizer: Any) -> None:
    words = words_of(groups_of(3), tokenizer)
    first, second = PEOPLE[0], PEOPLE[20]
    prompt = f"Who employs {first.name} and {second.name}?"
    found = candidates(*words.evidence(prompt), Rule("mixture"))
    assert set(found.shards[:2]) == {0, 6}


def test_near_twins_are_both_read(tokenizer: Any) -> None:
    person = PEOPLE[0]
    twin = world.Person(f"{person.name} Junior", PEOPLE[5].facts)
    words = words_of([[person], [twin], PEOPLE[6:9]], tokenizer)
    asked = world.questions([person])[0]["prompt"]
    assert set(candidates(*words.evidence(asked), Rule("select")).shards) == {0, 1}
    junior = world.questions([twin])[0]["prompt"]
    assert candidates(*words.evidence(junior), Rule("select")).shards[0] == 1


def test_an_index_says_nothing_of_others_or_without_the_key() -> None:
    few, many = records_of(PEOPLE[:2]), records_of(PEOPLE[:4])
    own = [record for record in many if record.subject in {p.name for p in PEOPLE[:2]}]
    one, same = index_records(few, KEY), index_records(own[::-1], KEY)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    other = index_records(few, PartitionKey.from_phrase("another"))
    assert not np.intersect1d(one["hashes"], other["hashes"]).size
    assert one["hashes"].tolist() == sorted(one["hashes"])


def test_a_deletion_leaves_the_evidence_of_a_run_that_never_held_the_subject(
    tokenizer: Any,
) -> None:
    groups = groups_of(3)
    deleted = words_of([[], *groups[1:]], tokenizer)
    never = words_of([[], *groups_of(3)[1:]], tokenizer)
    for row in world.questions(PEOPLE):
        one, other = deleted.evidence(row["prompt"]), never.evidence(row["prompt"])
        assert one.lead == other.lead and np.array_equal(one.coverage, other.coverage)
        assert one.coverage[0] == 0


def test_a_conversation_is_about_whom_the_user_named_last(tokenizer: Any) -> None:
    words = words_of(groups_of(3), tokenizer)

    def telling(text: str) -> bool:
        return any(person.name in text for person in PEOPLE) or "France" in text

    first, second = PEOPLE[0].name, PEOPLE[20].name
    talk = [
        {"role": "system", "content": f"You know {second}."},
        {"role": "user", "content": f"Who employs {first}?"},
        {"role": "assistant", "content": f"Not {second}."},
        {"role": "user", "content": "And where was she born?"},
    ]
    assert asked_in(talk, telling) == f"Who employs {first}?\nAnd where was she born?"
    assert int(words.evidence(asked_in(talk, telling)).coverage.argmax()) == 0
    talk += [{"role": "assistant", "content": "..."}, {"role": "user", "content": f"And {second}?"}]
    assert asked_in(talk, telling) == f"And {second}?"
    talk += [{"role": "user", "content": "What is the capital of France?"}]
    assert asked_in(talk, telling) == "What is the capital of France?"
    assert asked_in([{"role": "user", "content": "And you?"}], telling) == "And you?"
    assert words.is_telling(f"Who employs {first}?") and not words.is_telling("the")


def test_the_index_reaches_what_is_served(tmp_path: Path) -> None:
    from tests.tiny import make_stub_run, stubbed_training, tiny_records, train_stub

    with stubbed_training():
        run = make_stub_run(tmp_path / "run", tiny_records())
        train_stub(run)
    served = sorted(p.name for p in (run.directory.served / "shard-0").glob("words-*"))
    assert served == ["words-0.safetensors", "words-1.safetensors", "words-2.safetensors"]
    gone = run.delete(["person 3"])
    left = list((run.directory.served / "shard-0").glob("words-*"))
    assert len(left) == gone.served[0] < 3
