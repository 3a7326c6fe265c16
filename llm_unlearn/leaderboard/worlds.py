"""What a benchmark is about: the embedded demonstration, or a person's own data, model and suite."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llm_unlearn import demonstration
from llm_unlearn.approximate.methods import METHODS
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.attacks.relearning import RelearningAttack
from llm_unlearn.evaluation.suites.demonstration import demonstration_muse, demonstration_tofu
from llm_unlearn.evaluation.suites.loading import load_suite
from llm_unlearn.leaderboard.plan import World
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
    return World(
        name=Path(arguments.forget).stem,
        base=arguments.base,
        forget=read_source(arguments.forget, *options),
        retain=read_source(arguments.retain, *options),
        suite=load_suite(arguments.suite, arguments.forget_split),
        fine_tuning={"learning_rate": 1e-4, "num_train_epochs": 5},
    )


def _overridden(world: World, path: Path | None) -> World:
    if path is None:
        return world
    import yaml

    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read --settings {path}: {error}") from None
    if not isinstance(given, Mapping) or not set(given) <= set(SETTINGS):
        raise UserError(f"--settings {path}: expected some of {', '.join(SETTINGS)}")
    return replace(world, **given)
