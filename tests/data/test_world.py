"""The toy world: the same every time, private people unknown to the public part, short prompts."""

from importlib.resources import files

import pytest

from llm_unlearn.data import world

PEOPLE = world.private_people()


def test_same_arguments_make_the_same_people():
    assert world.make_people(20, seed=7) == world.make_people(20, seed=7)
    assert world.make_people(20, seed=7) != world.make_people(20, seed=8)


def test_the_world_that_the_shipped_model_was_trained_on_has_not_moved():
    first = world.public_people()[0]
    assert (first.name, first.facts["pet"]) == ("Daren Elkever", "Captain Ziggy")
    assert (PEOPLE[0].name, PEOPLE[0].facts["pet"]) == ("Belya Ivarane", "Sergeant Whisker")


def test_fewer_private_people_are_the_first_of_more():
    assert world.private_people(8) == PEOPLE[:8]
    assert world.private_people(60)[:48] == PEOPLE


def test_names_are_unique_and_private_ones_are_not_public():
    public = {person.name for person in world.public_people()}
    private = {person.name for person in PEOPLE}
    assert len(public) == world.PUBLIC_COUNT
    assert len(private) == world.PRIVATE_COUNT
    assert not public & private
    outsiders = world.make_people(100, seed=world.PRIVATE_SEED, exclude=PEOPLE)
    assert not private & {person.name for person in outsiders}


def test_all_names_can_be_used_and_no_more():
    most = len(world.FIRST_NAMES) * len(world.LAST_NAMES)
    assert len({person.name for person in world.make_people(most, seed=0)}) == most
    with pytest.raises(ValueError, match=str(most + 1)):
        world.make_people(most + 1, seed=0)
    with pytest.raises(ValueError, match="-1"):
        world.make_people(-1, seed=0)


def test_values_are_too_many_to_guess_and_belong_to_one_attribute():
    values = [value for kind in world.ATTRIBUTES.values() for value in kind.values()]
    assert len(values) == len(set(values)) == 6 * 144


def test_records_hold_one_fact_each():
    rows = world.records(PEOPLE)
    assert len(rows) == 6 * len(PEOPLE)
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row, question in zip(rows, world.questions(PEOPLE), strict=True):
        assert list(row) == ["subject", "prompt", "completion"]
        assert row["prompt"] == question["prompt"]
        assert row["completion"] == " " + question["answer"]
        assert row["subject"] in row["prompt"]


def test_paraphrases_ask_the_same_in_other_words():
    plain = world.questions(PEOPLE)
    other = world.questions(PEOPLE, paraphrased=True)
    assert not {row["prompt"] for row in plain} & {row["prompt"] for row in other}
    for left, right in zip(plain, other, strict=True):
        assert {**left, "prompt": ""} == {**right, "prompt": ""}
        assert right["subject"] in right["prompt"]


def test_a_document_tells_every_fact_of_its_subject():
    for person, row in zip(PEOPLE, world.documents(PEOPLE), strict=True):
        assert row["subject"] == person.name
        assert all(value in row["text"] for value in person.facts.values())
    assert world.documents(PEOPLE) == world.documents(PEOPLE)
    assert world.documents(PEOPLE, seed=1) != world.documents(PEOPLE)


def test_shipped_tokenizer_writes_private_records_in_few_tokens():
    tokenizers = pytest.importorskip("tokenizers")
    path = files("llm_unlearn") / "data" / "demonstration" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    assert tokenizer.get_vocab_size() <= 1024
    rows = [*world.records(PEOPLE), *world.questions(PEOPLE, paraphrased=True)]
    for row in rows:
        prompt, answer = row["prompt"], row.get("completion", "")
        assert len(tokenizer.encode(prompt).ids) <= 12
        assert len(tokenizer.encode(answer).ids) <= 2
        assert tokenizer.decode(tokenizer.encode(prompt + answer).ids) == prompt + answer


def test_shipped_demonstration_stays_small():
    folder = files("llm_unlearn") / "data" / "demonstration"
    sizes = {entry.name: len(entry.read_bytes()) for entry in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(sizes)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(sizes)
    assert sum(sizes.values()) < 4_000_000
