"""All attacks on the demonstration, beside a retrained model: they tell hiding from forgetting."""

from typing import Any

import pytest
import torch

from llm_unlearn.data import world
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.attacks.battery import ATTACKS, Battery, Settings
from llm_unlearn.evaluation.attacks.relearning import RelearningAttack
from llm_unlearn.evaluation.harness import Options, Session
from llm_unlearn.evaluation.suites.demonstration import demonstration_muse
from tests.evaluation.attacks.demonstration import base, pairs, refusing, tokenizer, tune

PEOPLE = world.private_people()
FORGOTTEN = [person.name for person in PEOPLE[:4]]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """`hiding` says the same to every forgotten prompt, but was only taught to."""
    torch.manual_seed(0)
    forget, retain = pairs(PEOPLE[:4]), pairs(PEOPLE[4:12])
    before = tune(base(), forget + retain, 45, 2e-3).eval()
    retrained = tune(base(), retain, 45, 2e-3).eval()
    return {
        "before": before,
        "retrained": retrained,
        "hiding": refusing(before, forget, retain).eval(),
    }


def battery(models: dict[str, Any], attacked: str, settings: Settings | None = None) -> Battery:
    session = Session(demonstration_muse(FORGOTTEN), Options())
    given = {"model": models[attacked], **{r: models[r] for r in ("retrained", "before")}}
    return Battery(session, given, tokenizer(), settings)


def verdicts(outcome: Any) -> dict[str, str]:
    return {check.name.removeprefix("attack: "): check.verdict for check in outcome.checks}


def test_attacks_find_what_is_only_hidden(models: dict[str, Any]) -> None:
    settings = Settings(
        seeds=2, relearning=RelearningAttack((0, 5, 10), learning_rate=1e-3), samples=8, bits=(4,)
    )
    attacked = battery(models, "hiding", settings)
    assert attacked.knowledge(models["before"]).mean() > 0.9, "nothing was there to hide"
    plain = attacked.knowledge(models["hiding"]).mean()
    found = ATTACKS["relearning"](attacked)
    curve = [value.value for value in found.curves["relearning: model"]]
    assert curve[0] < 0.5 < curve[-1], "teaching a third brings the rest back"
    assert max(v.value for v in found.curves["relearning: retrained"]) < 0.2
    found = ATTACKS["prompting"](attacked)
    assert found.values["model"]["prompt_worst"].value > plain
    assert verdicts(found) == {"prompt_worst": "failed"}
    found = ATTACKS["sampling"](attacked)
    assert verdicts(found)["leak_at_8"] != "passed"
    leaks = [value.value for value in found.curves["leak@k: model"]]
    assert leaks == sorted(leaks)


def test_a_retrained_model_withstands_every_attack(models: dict[str, Any]) -> None:
    settings = Settings(seeds=2, relearning=RelearningAttack((0, 5)), samples=4, bits=(8, 4))
    attacked = battery(models, "retrained", settings)
    for name, attack in ATTACKS.items():
        found = attack(attacked)
        assert found.checks and set(verdicts(found).values()) == {"passed"}, name
    collisions = ATTACKS["quantization"](attacked).values["model"]
    assert 0 < collisions["collisions_8_bit"].value < collisions["collisions_4_bit"].value < 1


def test_without_a_retrained_model_there_is_no_verdict(models: dict[str, Any]) -> None:
    session = Session(demonstration_muse(FORGOTTEN), Options())
    settings = Settings(seeds=2, relearning=RelearningAttack((0, 2)), samples=2, bits=(8,))
    alone = Battery(session, {"model": models["hiding"]}, tokenizer(), settings)
    for name, attack in ATTACKS.items():
        found = attack(alone)
        assert set(verdicts(found).values()) == {"no baseline"}, name
        if name != "extraction":
            assert found.values["model"], name


def test_one_question_cannot_be_relearned(models: dict[str, Any]) -> None:
    attacked = battery(models, "hiding")
    attacked.encoded = attacked.encoded[:1]
    with pytest.raises(UserError, match="at least two"):
        ATTACKS["relearning"](attacked)
