"""Rows of RUM: the forget set in subsets by memorization, and the controls, all in as many steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.unlearn import make_method
from llm_unlearn.leaderboard.plan import REFINED, World
from llm_unlearn.memorizing.refine_arguments import RefineArguments
from llm_unlearn.memorizing.refined_requests import forget_scores
from llm_unlearn.memorizing.refining import Stage, make_plan, unlearn_refined
from llm_unlearn.models import with_adapter

BUDGET = "npo"
"""The method whose steps on the whole forget set every row has; alone it is the vanilla control."""


def unlearn_row(
    world: World,
    row: str,
    seed: int,
    before: Path,
    output: Path,
    load_base: Callable[[str], tuple[Any, Any]],
) -> None:
    """Unlearn a row of `REFINED` from the model before, whose fine-tuning was tracked.

    Raises:
        UserError: the scores tell nothing apart, or the model was fine-tuned before it was tracked.
    """
    methods, control = REFINED[row]
    arguments = RefineArguments(
        refine=world.refine, refine_with=list(methods), refine_control=control
    )

    def load(place: str | None) -> tuple[Any, Any]:
        base, tokenizer = load_base(world.base)
        return with_adapter(base, place or str(before), trainable=True), tokenizer

    stages = [_stage(world, name, seed, output) for name in arguments.methods(BUDGET)]
    budget = _stage(world, BUDGET, seed, output).config
    assert budget is not None
    scores = forget_scores(arguments, before, world.forget, load, budget)
    plan = make_plan(arguments, scores, stages, budget)
    unlearn_refined(plan, stages, world.forget, world.retain, load, output)


def _stage(world: World, name: str, seed: int, output: Path) -> Stage:
    flags = {**world.unlearning, **world.unlearning_of.get(name, {}), "seed": seed}
    config = UnlearningConfig(output_dir=str(output), method=name, **flags)
    return Stage(config, make_method(name, world.methods.get(name)))
