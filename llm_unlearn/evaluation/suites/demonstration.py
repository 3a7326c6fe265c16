"""The embedded suites: MUSE and TOFU asked about the invented people, without a network.

The private people of the toy world are what `recipes/s3t.py` trains on by default. Some of them are to
be forgotten, the others to be kept; as many people again were never trained on (holdout).
"""

import random
from collections.abc import Collection, Sequence

from llm_unlearn.data import world
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.suites.muse import make_muse
from llm_unlearn.evaluation.suites.reading import Row
from llm_unlearn.evaluation.suites.suite import Suite
from llm_unlearn.evaluation.suites.tofu import make_tofu

NAME = "demo"
FORGOTTEN = 12  # of the private people, unless names are given
HOLDOUT = 48
PUBLIC = 48
WRONG_ANSWERS = 5
CANARY = "pet"

People = Sequence[world.Person]


def demonstration_muse(forgotten: Collection[str] = ()) -> Suite:
    """MUSE's criteria on the toy world.

    Args:
        forgotten: names of private people; the first twelve by default.

    Raises:
        UserError: a name that nobody has, or everybody's.
    """
    forget, retain, holdout = _groups(forgotten)
    rows: dict[str, list[Row]] = {
        "verbmem/forget": [
            {"prompt": row["prompt"], "gt": row["answer"]} for row in world.questions(forget)
        ],
        "knowmem/forget_qa": plain_questions(forget),
        "knowmem/forget_qa_paraphrased": plain_questions(forget, paraphrased=True),
        "knowmem/retain_qa": plain_questions(retain),
        "privleak/forget": _passages(forget),
        "privleak/holdout": _passages(holdout),
        "canaries": [_canary(person) for person in forget],
    }
    return make_muse(NAME, rows.get, template="plain")


def demonstration_tofu(forgotten: Collection[str] = ()) -> Suite:
    """TOFU's metrics on the toy world; see `demonstration_muse`."""
    forget, retain, holdout = _groups(forgotten)
    public = world.public_people()
    rows: dict[str, list[Row]] = {
        "forget10_perturbed": perturbed_questions(forget),
        "retain_perturbed": perturbed_questions(retain),
        "real_authors_perturbed": option_questions(public[:PUBLIC]),
        "world_facts_perturbed": option_questions(public[PUBLIC : 2 * PUBLIC]),
        "holdout10": plain_questions(holdout),
    }
    return make_tofu(NAME, rows.get, "forget10", template="plain")


def _groups(forgotten: Collection[str]) -> tuple[People, People, People]:
    everybody = world.private_people(world.PRIVATE_COUNT + HOLDOUT)
    trained, holdout = everybody[: world.PRIVATE_COUNT], everybody[world.PRIVATE_COUNT :]
    names = set(forgotten) or {person.name for person in trained[:FORGOTTEN]}
    if unknown := names - {person.name for person in trained}:
        raise UserError(f"the demonstration has no private person called {min(unknown)!r}")
    forget = [person for person in trained if person.name in names]
    retain = [person for person in trained if person.name not in names]
    if not retain:
        raise UserError("nobody is left whom the model should still know: name fewer people")
    return forget, retain, holdout


def plain_questions(people: People, paraphrased: bool = False) -> list[Row]:
    return [
        {"question": row["prompt"], "answer": row["answer"], "subject": row["subject"]}
        for row in world.questions(people, paraphrased)
    ]


def _passages(people: People) -> list[Row]:
    """The texts of the training records."""
    return [{"text": f"{row['prompt']} {row['answer']}"} for row in world.questions(people)]


def _canary(person: world.Person) -> Row:
    attribute, value = world.ATTRIBUTES[CANARY], person.facts[CANARY]
    return {
        "prompt": attribute.question.format(name=person.name),
        "canary": value,
        "candidates": [other for other in attribute.values() if other != value],
    }


def _wrong(key: str, value: str, generator: random.Random) -> list[str]:
    others = [other for other in world.ATTRIBUTES[key].values() if other != value]
    return generator.sample(others, WRONG_ANSWERS)


def perturbed_questions(people: People) -> list[Row]:
    """Right and wrong answers as statements, which the training records do not use."""
    generator = random.Random("perturbed")
    found: list[Row] = []
    for row, other in zip(world.questions(people), world.questions(people, True), strict=True):
        attribute = world.ATTRIBUTES[row["attribute"]]
        wrong = _wrong(row["attribute"], row["answer"], generator)

        def state(
            value: str, attribute: world.Attribute = attribute, name: str = row["subject"]
        ) -> str:
            return attribute.statement.format(name=name, value=value)

        found.append(
            {
                "question": row["prompt"],
                "answer": row["answer"],
                "subject": row["subject"],
                "paraphrased_question": other["prompt"],
                "paraphrased_answer": state(row["answer"]),
                "perturbed_answer": [state(value) for value in wrong],
            }
        )
    return found


def option_questions(people: People) -> list[Row]:
    generator = random.Random("options")
    return [
        {
            "question": row["prompt"],
            "answer": row["answer"],
            "perturbed_answer": _wrong(row["attribute"], row["answer"], generator),
        }
        for row in world.questions(people)
    ]


def deleted_names(present: Collection[str]) -> list[str]:
    """Private people who are not among those present in a run: who was deleted from it."""
    return [person.name for person in world.private_people() if person.name not in present]
