"""What a benchmark is about: the embedded demonstration, or a person's own data, model and suite."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_unlearn import demonstration
from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.methods import METHODS, load_method
from llm_unlearn.approximate.session import check_sets
from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.attacks.relearning import RelearningAttack
from llm_unlearn.evaluation.suites.demonstration import demonstration_muse, demonstration_tofu
from llm_unlearn.evaluation.suites.loading import load_suite
from llm_unlearn.launch import typed
from llm_unlearn.leaderboard.plan import EXACT, World
from llm_unlearn.unlearning import read_source

SETTINGS = ("fine_tuning", "unlearning", "unlearning_of", "methods", "exact")
DEMONSTRATION_ATTACK = RelearningAttack(steps=(0, 5, 10, 20, 40), learning_rate=1e-3)


def make_world(arguments: argparse.Namespace) -> World:
    """The world that the flags name.

    Raises:
        UserError: data, model or suite that is missing; unknown settings.
    """
    given = [arguments.forget, arguments.retain, arguments.base]
    if any(given) and not all(given):
        raise UserError("own data needs all three of --forget, --retain and --base")
    world = _own(arguments) if all(given) else _demonstration(arguments.suite, arguments.output_dir)
    if getattr(arguments, "refine", None):
        world = replace(world, refine=arguments.refine)
    return _overridden(world, arguments.settings)


def _demonstration(suite: str, output: Path) -> World:
    suites = {"tofu": demonstration_tofu, "muse": demonstration_muse}
    if suite not in suites:
        raise UserError(
            f"the demonstration asks as {' or '.join(suites)}, not {suite!r}: give --forget, --retain and "
            "--base for other suites"
        )
    forget, retain = demonstration.unlearning_records()
    return World(
        name="demonstration",
        base=str(demonstration.MODEL_PATH),
        forget=forget,
        retain=retain,
        suite=suites[suite](),
        fine_tuning=demonstration.FINE_TUNING,
        unlearning=demonstration.UNLEARNING,
        unlearning_of=demonstration.UNLEARNING_OF,
        methods={name: demonstration.method_flags(name, output) for name in METHODS},
        exact=demonstration.FLAGS,
        relearning=DEMONSTRATION_ATTACK,
    )


def _own(arguments: argparse.Namespace) -> World:
    options = (arguments.subject_column, arguments.rows_per_subject)
    forget = read_source(arguments.forget, *options)
    retain = read_source(arguments.retain, *options)
    if arguments.rows_per_subject:  # they are counted file by file
        retain = [replace(record, subject=f"kept-{record.subject}") for record in retain]
    check_sets(forget, retain, uses_retain=True)
    if arguments.exact is None or arguments.exact:
        _check_subjects(forget, retain, any(options))
    return World(
        name=Path(arguments.forget).stem,
        base=arguments.base,
        forget=forget,
        retain=retain,
        suite=load_suite(arguments.suite, arguments.forget_split),
        fine_tuning={"learning_rate": 1e-4, "num_train_epochs": 5},
    )


def _check_subjects(forget: Sequence[Record], retain: Sequence[Record], is_told: bool) -> None:
    """An exact deletion is of a subject with all of its records."""
    if not is_told:
        raise UserError(
            "exact unlearning needs to know who can ask for deletion: give --subject_column or "
            "--rows_per_subject, or leave its rows out with --exact (and no name)"
        )
    if shared := {one.subject for one in forget} & {one.subject for one in retain}:
        raise UserError(
            f"{min(shared)!r} has records in --forget and in --retain, and exact unlearning deletes all "
            "of a subject: mend the files, or leave its rows out with --exact (and no name)"
        )


def _overridden(world: World, path: Path | None) -> World:
    if path is None:
        return world
    import yaml

    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read --settings {path}: {' '.join(str(error).split())}") from None
    if not isinstance(given, Mapping) or not set(given) <= set(SETTINGS):
        raise UserError(f"--settings {path}: expected some of {', '.join(SETTINGS)}")
    settings = {}
    for name, value in given.items():
        try:
            settings[name] = _read_setting(name, value)
        except UserError as error:
            raise UserError(f"--settings {path}, {name}: {error}") from None
    return replace(world, **settings)


def _read_setting(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Flags, or flags by method."""
    if name in ("fine_tuning", "unlearning"):
        return typed(UnlearningConfig, value)
    known = EXACT.values() if name == "exact" else METHODS
    if not isinstance(value, Mapping):
        raise UserError(f"expected flags by method: {', '.join(known)}")
    if unknown := set(value) - set(known):
        raise UserError(f"unknown method {min(unknown)!r}: one of {', '.join(known)}")
    if name == "exact":
        return {method: shlex.split(flags) for method, flags in value.items()}
    return {
        method: typed(load_method(method) if name == "methods" else UnlearningConfig, flags)
        for method, flags in value.items()
    }
