"""The three fakes are caught, and a model that was retrained is not accused."""

from typing import Any

import pytest
import torch

from llm_unlearn.data import world
from llm_unlearn.evaluation.harness import (
    BEFORE,
    RETRAINED,
    Candidate,
    Options,
    Session,
    run_session,
)
from llm_unlearn.evaluation.results import Results
from llm_unlearn.evaluation.self_test import add_decoys
from llm_unlearn.evaluation.suites.demonstration import demonstration_muse, demonstration_tofu
from tests.evaluation.attacks.demonstration import base, pairs, tokenizer, tune

PEOPLE = world.private_people()
FORGOTTEN = 6


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Trained on everybody, and twice (differently) on everybody but the forgotten."""
    torch.manual_seed(0)
    rows = {BEFORE: PEOPLE, RETRAINED: PEOPLE[FORGOTTEN:], "model": PEOPLE[FORGOTTEN:]}
    rates = {BEFORE: 2e-3, RETRAINED: 2e-3, "model": 1.8e-3}
    return {role: tune(base(), pairs(rows[role]), 45, rates[role]).eval() for role in rows}


def evaluate(models: dict[str, Any], make: Any) -> Results:
    suite = make([person.name for person in PEOPLE[:FORGOTTEN]])
    session = Session(suite, Options())
    candidates = {
        role: Candidate(role, lambda model=model: (model, tokenizer()))
        for role, model in models.items()
    }
    references = {role: candidates[role] for role in (RETRAINED, BEFORE)}
    results = run_session(session, candidates["model"], references)
    add_decoys(session, models[BEFORE], tokenizer(), results)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("make", [demonstration_muse, demonstration_tofu])
def test_the_fakes_are_caught_and_retraining_is_not(models: dict[str, Any], make: Any) -> None:
    results = evaluate(models, make)
    verdicts = {check.name: (check.verdict, check.reason) for check in results.checks}
    for name in ("redirect", "refuse", "destroyed"):
        verdict, reason = verdicts[f"self-test: {name}"]
        assert verdict == "passed" and reason.startswith("caught"), (name, reason)
    assert "destroyed" in verdicts["self-test: destroyed"][1]
    assert "refuses" in verdicts["self-test: refuse"][1]
    failed = [check for check in results.checks if check.verdict == "failed"]
    assert not failed, "a retrained model was accused"
    leaks = [check.verdict for check in results.checks if check.name.startswith("leak")]
    assert "passed" in leaks, "nothing was decided"
    # What the published metrics make of the fakes is why the checks are there.
    values = {role: other.values for role, other in results.others.items()}
    if "forget_quality" in results.model.values:
        assert values["redirect"]["forget_quality"].value > 0.05
    else:
        assert (
            abs(values["destroyed"]["privleak"].value) < abs(values[BEFORE]["privleak"].value) / 4
        )
