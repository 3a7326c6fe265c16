"""A request of `recipes/unlearn.py --refine`: where the scores come from, and what goes on from where."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.memorization.counterfactual import read_reference
from llm_unlearn.memorization.orientation import REFERENCE, Floats
from llm_unlearn.memorizing.refine_arguments import RefineArguments
from llm_unlearn.memorizing.refining import Stage, make_plan, unlearn_refined
from llm_unlearn.memorizing.scoring import observed, score
from llm_unlearn.memorizing.targets import LoadedTarget, RunTarget, Target, named_by_content
from llm_unlearn.models import run_of
from llm_unlearn.unlearning import (
    Request,
    RequestArguments,
    check_output,
    load_trainable,
    lora_of,
    read_source,
)

if TYPE_CHECKING:
    from trl import ModelConfig

    from llm_unlearn.approximate.arguments import UnlearningConfig
    from llm_unlearn.approximate.result import Report


def answer_refined(
    arguments: RequestArguments,
    refinement: RefineArguments,
    stages: Sequence[Stage],
    model_arguments: "ModelConfig",
    request: Request,
    say: Callable[[str], None] = lambda _: None,
) -> "list[Report]":
    """What `recipes/unlearn.py --refine` does with its request.

    Args:
        stages: one for each subset, and last the flags of `--method`, whose steps are the budget.
    """
    *parts, whole = stages
    config = whole.config
    assert config is not None
    _check_flags(arguments)
    source, output = str(model_arguments.model_name_or_path), Path(str(config.output_dir))
    check_output(output, [source, arguments.adapter or source])

    def load(place: str | None) -> tuple[Any, Any]:
        if place is not None:
            return load_trainable(place, None, False, model_arguments)
        return load_trainable(source, arguments.adapter, arguments.any_base, model_arguments)

    place = refinement.scores_of or arguments.run or arguments.adapter or source
    say(f"scores: {refinement.refine}")
    scores = _of_main(forget_scores(refinement, Path(place), request.forget, load, config))
    chosen = [whole] if refinement.refine_control == "vanilla" else parts
    plan = make_plan(refinement, scores, chosen, config)
    return unlearn_refined(
        plan, chosen, request.forget, request.retain, load, output, lora_of(model_arguments), say
    )


def _of_main(scores: Floats) -> Floats:
    """The main process's: last bits may differ, and all must part the records alike."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    box = [scores]
    if PartialState().num_processes > 1:
        broadcast_object_list(box)
    return box[0]


def _check_flags(arguments: RequestArguments) -> None:
    """What a chain of trainings does not do is refused, and not left out in silence."""
    asked = {
        "--track_memorization": arguments.track_memorization,
        "--eval_suite": arguments.eval_suite,
        "--encoder": arguments.encoder,
    }
    if refused := [flag for flag, value in asked.items() if value]:
        raise UserError(f"--refine goes without {refused[0]}: leave it out")


def forget_scores(
    refinement: RefineArguments,
    place: Path,
    forget: Sequence[Record],
    load: Callable[[str | None], tuple[Any, Any]],
    config: "UnlearningConfig",
) -> Floats:
    """Oriented scores of forget records: what training showed, the reference's, or measured on the model.

    Args:
        place: a run, or a model with its tables beside it.
    """
    name = str(refinement.refine)
    run = run_of(place)
    target = RunTarget(run) if run else Target(place, named_by_content(forget))
    wanted = forget if run else target.records
    seen = observed(target)
    if reference := read_reference(target.tables):
        seen["counterfactual"] = reference.of(target.pseudonyms())
    if name in seen:
        number = {record.id: place for place, record in enumerate(target.records)}
        at = [number.get(record.id) for record in wanted]
        return np.array([np.nan if one is None else seen[name][one] for one in at])
    if name in REFERENCE:
        raise UserError(
            f"{place} has no counterfactual runs: see `llm-unlearn memorization --help`"
        )
    if refinement.scores_of:
        raise UserError(
            f"--scores_of {place} knows no {name} of these records: name a model or run whose training "
            "was tracked, or leave it out, and they are measured on the model"
        )
    model, tokenizer = load(None)
    loaded = LoadedTarget(model.to(config.device), tokenizer, named_by_content(forget))
    loaded.max_length, loaded.completion_only = config.max_length, config.completion_only_loss
    loaded.learning_rate = config.learning_rate
    held = read_source(refinement.holdout) if refinement.holdout else ()
    return score(loaded, [name], held).scores[name]
