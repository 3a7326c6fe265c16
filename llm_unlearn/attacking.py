"""What eval/attacks.py does: load the models, run the chosen attacks, print and write what they found."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llm_unlearn import console, scoring
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.evaluation.attacks.battery import Battery, Outcome
    from llm_unlearn.evaluation.harness import Session
    from llm_unlearn.evaluation.results import Results


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("attacks")
    group.add_argument(
        "--attack", action="append", help="one of the above; repeatable (default: all)"
    )
    group.add_argument("--forget_split", default="forget10", help="TOFU: which authors")
    group.add_argument("--never", help="relearning: a model that never saw any of the data")
    group.add_argument("--seeds", type=int, default=3, help="of relearning")
    group.add_argument(
        "--steps", type=int, nargs="+", default=[0, 10, 50, 100], help="of relearning"
    )
    group.add_argument("--learning_rate", type=float, default=1e-4, help="of relearning")
    group.add_argument("--samples", type=int, default=16, help="of sampling, for each question")
    group.add_argument("--bits", type=int, nargs="+", default=[8, 4], help="of quantization")


def run(arguments: argparse.Namespace) -> None:
    """Attack as the flags say."""
    from llm_unlearn.evaluation.attacks.battery import ATTACKS
    from llm_unlearn.evaluation.harness import finish
    from llm_unlearn.evaluation.report import write_report
    from llm_unlearn.evaluation.suites.loading import load_suite

    scoring.quiet()
    if scoring.processes().num_processes > 1:
        raise UserError("attacks run in one process: start eval/attacks.py with python")
    chosen = arguments.attack or list(ATTACKS)
    if unknown := set(chosen) - set(ATTACKS):
        raise UserError(f"unknown --attack {min(unknown)!r}: one of {', '.join(ATTACKS)}")
    name = scoring.model_name(arguments)
    forgotten = scoring.forgotten(arguments, name)
    suite = load_suite(arguments.suite, arguments.forget_split, forgotten)
    output = arguments.output_dir or Path("evaluations", f"{Path(arguments.suite).name}-attacks")
    session = scoring.make_session(arguments, suite, output, None)
    battery = _load(arguments, session, name)
    outcomes = {}
    with console.attack_progress(not arguments.json) as say:
        for attack in chosen:
            say(attack)
            outcomes[attack] = ATTACKS[attack](battery)
    results = _collect(session, battery, outcomes, name)
    finish(results, output, keep_texts=False)
    write_report(results, output / "report.html")
    scoring.show(results, output, arguments.json)


def _load(arguments: argparse.Namespace, session: "Session", name: str) -> "Battery":
    from llm_unlearn.evaluation.attacks.battery import Battery, Settings
    from llm_unlearn.evaluation.attacks.relearning import RelearningAttack
    from llm_unlearn.evaluation.harness import BEFORE, MODEL, RETRAINED

    if arguments.retrain_scores or arguments.before_scores:
        raise UserError("attacks need the models themselves: give --retrain and --before")
    try:
        attack = RelearningAttack(tuple(arguments.steps), arguments.learning_rate)
    except ValueError as error:
        raise UserError(f"--steps or --learning_rate: {error}") from None
    if (
        arguments.seeds < 1
        or arguments.samples < 1
        or not all(2 <= b <= 16 for b in arguments.bits)
    ):
        raise UserError("expected --seeds and --samples of at least 1, and --bits from 2 to 16")
    model, tokenizer = scoring.candidate(arguments, name, arguments.adapter).load()
    models = {MODEL: model}
    paths = {
        RETRAINED: arguments.retrain,
        BEFORE: arguments.before,
        "never trained": arguments.never,
    }
    for role, path in paths.items():
        if path:
            models[role] = scoring.candidate(arguments, path).load()[0]
    settings = Settings(arguments.seeds, attack, arguments.samples, arguments.bits)
    return Battery(session, models, tokenizer, settings)


def _collect(
    session: "Session", battery: "Battery", outcomes: "dict[str, Outcome]", name: str
) -> "Results":
    from llm_unlearn.evaluation.harness import MODEL, versions
    from llm_unlearn.evaluation.results import Evaluation, Results
    from llm_unlearn.evaluation.verdict import FAILED, NO_BASELINE

    found = {role: Evaluation(role, name if role == MODEL else role, "") for role in battery.models}
    results = Results(
        suite=f"attacks on {session.suite.name}",
        profile=session.options.profile,
        model=found.pop(MODEL),
        others=found,
        configuration=session.configuration
        | {"attacks": list(outcomes), **asdict(battery.settings)},
        digests=session.digests,
        versions=versions(),
    )
    for outcome in outcomes.values():
        for role, values in outcome.values.items():
            target = results.model if role == MODEL else results.others[role]
            target.values |= values
        results.differences |= outcome.differences
        results.curves |= outcome.curves
        results.checks += outcome.checks
    failed = [
        check.name.removeprefix("attack: ") for check in results.checks if check.verdict == FAILED
    ]
    if all(check.verdict == NO_BASELINE for check in results.checks):
        results.verdict = f"no baseline: {results.checks[0].reason}"
        return results
    results.verdict = (
        f"gives more away than a retrained model under: {', '.join(failed)}"
        if failed
        else "no attack surely got more out of it than out of a retrained model"
    )
    return results
