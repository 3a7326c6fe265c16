"""The harness tested on itself: three fakes of forgetting must not pass for it.

Published forget quality and PrivLeak reward a model that answers about somebody else, one that
refuses, and one that is destroyed. Each is made from the model before unlearning and judged like
any other; whatever verdict a suite cannot deny them, it cannot give to a real method either.
"""

from typing import Any

from llm_unlearn.evaluation.decoys import RedirectDecoy, RefuseDecoy, destroyed
from llm_unlearn.evaluation.harness import BEFORE, RETRAINED, Session
from llm_unlearn.evaluation.results import Check, Evaluation, Results
from llm_unlearn.evaluation.verdict import FAILED, NO_BASELINE, PASSED, judge


def ask_decoys(session: Session, model: Any, tokenizer: Any, told: str) -> list[Evaluation]:
    """The three fakes of one model through the suite.

    Args:
        told: digest of the model; the fakes' are made of it.
    """
    suite = session.suite
    redirects = {
        name: suite.others[number % len(suite.others)] for number, name in enumerate(suite.subjects)
    }
    fakes = {
        "redirect": RedirectDecoy(model, tokenizer, redirects),
        "refuse": RefuseDecoy(model, tokenizer, list(suite.subjects)),
    }
    found = [
        session.ask(fake, tokenizer, role, f"decoy: {role}", f"{told}:{role}")
        for role, fake in fakes.items()
    ]
    with destroyed(model):
        found.append(
            session.ask(model, tokenizer, "destroyed", "decoy: destroyed", f"{told}:destroyed")
        )
    return found


def add_decoys(session: Session, model: Any, tokenizer: Any, results: Results) -> None:
    """Judge the fakes of `results`' model before unlearning; a check says of each if it was caught."""
    retrained, before = results.others.get(RETRAINED), results.others[BEFORE]
    for decoy in ask_decoys(session, model, tokenizer, before.digest):
        decoy.values = session.conclude_values(decoy, retrained)
        verdict, checks = judge(decoy, session.suite, retrained, before)
        caught = any(check.verdict == FAILED for check in checks)
        decided = PASSED if caught else NO_BASELINE if retrained is None else FAILED
        results.others[decoy.role] = decoy
        told = f"{'caught' if caught else 'not caught'}: {verdict}"
        results.checks.append(Check(f"self-test: {decoy.role}", decided, told))
