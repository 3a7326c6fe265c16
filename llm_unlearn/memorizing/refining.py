"""RUM: a forget set in homogeneous subsets, one after another, each with a method of its own or none.

The flags of `recipes/unlearn.py --refine`, and what they do. Each subset is a request that goes on from the model
that the last one left; all together take as many optimizer steps as the whole forget set at once would.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_unlearn import files
from llm_unlearn.data.records import Record, digest
from llm_unlearn.errors import UserError
from llm_unlearn.memorization.counterfactual import read_reference
from llm_unlearn.memorization.orientation import SCORES, Floats
from llm_unlearn.memorization.refinement import (
    CONTROLS,
    PARTS,
    Numbers,
    describe,
    refine,
    retain_pool,
    share_steps,
    shuffled,
)
from llm_unlearn.memorizing.scoring import observed, score
from llm_unlearn.memorizing.targets import LoadedTarget, RunTarget, Target, named_by_content
from llm_unlearn.models import run_of
from llm_unlearn.unlearning import (
    Gather,
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
    from llm_unlearn.approximate.method import Method
    from llm_unlearn.approximate.result import Report

NONE = "none"
PLAN_NAME, STAGES = "refinement.json", "stages"


@dataclass
class RefineArguments:
    """How a forget set is refined; without `--refine` it is not."""

    refine: str | None = field(
        default=None,
        metadata={
            "help": "RUM: unlearn the forget set in subsets, parted by this memorization score, low to high."
        },
    )
    refine_with: list[str] | None = field(
        default=None,
        metadata={
            "help": "A method for each subset, least memorized first, or none (--method for all).",
            "action": Gather,
        },
    )
    refine_parts: int = field(default=PARTS, metadata={"help": "How many subsets."})
    refine_control: str = field(
        default="none",
        metadata={"help": "shuffle (random subsets) or vanilla (all at once), in as many steps."},
    )
    pending_in_retain: bool = field(
        default=False,
        metadata={
            "help": "Keep later subsets until their turn, as the paper does; not where a deletion is due."
        },
    )
    scores_of: str | None = field(
        default=None,
        metadata={"help": "Model or run whose training was tracked (default: the one to forget)."},
    )
    holdout: str | None = field(
        default=None, metadata={"help": "--refine holdout: data that the model never saw."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.refine_with, str):
            self.refine_with = [self.refine_with]
        if self.refine is None:
            if self.refine_with or self.refine_control != "none" or self.pending_in_retain:
                raise UserError("the flags of a refinement need --refine SCORE")
            return
        if self.refine not in SCORES:
            raise UserError(f"--refine {self.refine!r}: one of {', '.join(SCORES)}")
        if self.refine_control not in CONTROLS:
            raise UserError(
                f"--refine_control is one of {', '.join(CONTROLS)}, got {self.refine_control!r}"
            )
        if self.refine_with and len(self.refine_with) not in (1, self.refine_parts):
            raise UserError(
                f"--refine_with names a method for each of {self.refine_parts} subsets (or one for all), "
                f"got {len(self.refine_with)}"
            )

    def methods(self, default: str) -> list[str]:
        """A method's name, or `none`, for each subset, least memorised first."""
        given = self.refine_with or [default]
        return given * self.refine_parts if len(given) == 1 else given


@dataclass(frozen=True)
class Stage:
    """One subset: its method with the flags of its training; no method leaves the model as it is."""

    config: "UnlearningConfig | None" = None
    method: "Method | None" = None

    @property
    def name(self) -> str:
        return self.config.method if self.config else NONE


@dataclass(frozen=True)
class Plan:
    """Which records are unlearned in which stage, for how many steps.

    Attributes:
        subsets: numbers of forget records; `scores` are theirs, oriented.
    """

    score: str
    control: str
    subsets: list[Numbers]
    scores: Floats
    steps: list[int]
    pending_in_retain: bool

    def to_dict(self, stages: Sequence[Stage]) -> dict[str, Any]:
        """What was planned, without anything that tells one record from another."""
        told = describe(self.scores, self.subsets)
        for entry, stage, steps in zip(told, stages, self.steps, strict=True):
            entry |= {"method": stage.name, "steps": steps}
        return {
            "score": self.score,
            "control": self.control,
            "pending_in_retain": self.pending_in_retain,
            "subsets": told,
        }


def steps_of(config: "UnlearningConfig", records: int) -> int:
    """Optimizer steps that unlearning so many records at once would take."""
    if config.max_steps > 0:
        return config.max_steps
    batch = config.per_device_train_batch_size * config.world_size
    epoch = math.ceil(math.ceil(records / batch) / config.gradient_accumulation_steps)
    return math.ceil(config.num_train_epochs * epoch)


def make_plan(
    arguments: RefineArguments,
    scores: Floats,
    stages: Sequence[Stage],
    config: "UnlearningConfig",
) -> Plan:
    """Subsets and steps. The controls are held to the same: scores that tell nothing are refused there too.

    Args:
        config: whose steps on the whole forget set are the budget.

    Raises:
        UserError: see `refine` and `share_steps`.
    """
    subsets = refine(scores, arguments.refine_parts)
    if arguments.refine_control == "shuffle":
        subsets = shuffled([len(part) for part in subsets], config.seed)
    elif arguments.refine_control == "vanilla":
        subsets = shuffled([len(scores)], config.seed)
    active = [stage.method is not None for stage in stages]
    steps = share_steps(steps_of(config, len(scores)), [len(p) for p in subsets], active)
    return Plan(
        str(arguments.refine), arguments.refine_control, subsets, scores, steps,
        arguments.pending_in_retain,
    )  # fmt: skip


def unlearn_refined(
    plan: Plan,
    stages: Sequence[Stage],
    forget: Sequence[Record],
    retain: Sequence[Record],
    load: Callable[[str | None], tuple[Any, Any]],
    output: Path,
    lora: Any = None,
    say: Callable[[str], None] = lambda _: None,
) -> "list[Report]":
    """Unlearn the subsets in order, each from the model that the last left; the last one's is the result.

    Killed anywhere, the same call goes on: subsets that are done are not done again. The models in between
    know what comes later, and are removed at the end.

    Args:
        load: model and tokenizer of a directory; of what is to forget, for None.

    Raises:
        UserError: a method that hides, or needs what is not there; see `unlearn`.
    """
    for stage in stages:
        if stage.method is not None and stage.method.is_suppression:
            raise UserError(
                f"{stage.name} hides and leaves no model to go on from: it is no method for a subset"
            )
    told = plan.to_dict(stages)
    work = _claim(output, told, plan, stages, [forget, retain])
    active = [number for number, stage in enumerate(stages) if stage.method is not None]
    source, reports = None, []
    for number in active:
        is_last = number == active[-1]
        place = output if is_last else work / f"subset-{number + 1}"
        say(f"subset {number + 1} of {len(stages)}: {stages[number].name}")
        report = _unlearn_one(plan, stages, number, (forget, retain), load, (source, place), lora)
        reports.append(report)
        source = str(place)
    _conclude(output, work, told, reports)
    return reports


def _unlearn_one(
    plan: Plan,
    stages: Sequence[Stage],
    number: int,
    sets: tuple[Sequence[Record], Sequence[Record]],
    load: Callable[[str | None], tuple[Any, Any]],
    places: tuple[str | None, Path],
    lora: Any,
) -> "Report":
    """One subset, or the report of it if it is done."""
    from llm_unlearn.approximate.result import REPORT_NAME, Report
    from llm_unlearn.approximate.unlearn import unlearn

    (forget, retain), (source, place) = sets, places
    done, stage = place / REPORT_NAME, stages[number]
    if done.exists() and place.parent.name == STAGES:
        return Report(**json.loads(done.read_bytes()))
    if stage.config is None or stage.method is None:
        raise ValueError("a subset without a method is not unlearned")
    model, tokenizer = load(source)
    config = replace(stage.config, output_dir=str(place), max_steps=plan.steps[number])
    kept = retain_pool(retain, forget, plan.subsets, number, plan.pending_in_retain)
    kept = kept if stage.method.uses_retain else []
    chosen = [forget[n] for n in plan.subsets[number]]
    return unlearn(model, tokenizer, chosen, kept, config, replace(stage.method), lora)


def _claim(
    output: Path,
    told: dict[str, Any],
    plan: Plan,
    stages: Sequence[Stage],
    sets: Sequence[Sequence[Record]],
) -> Path:
    """Where the models in between are; those of another plan go."""
    from accelerate import PartialState

    from llm_unlearn.approximate.claim import training_flags

    work, state = output / STAGES, PartialState()
    flags = [
        [s.name, training_flags(s.config), asdict(s.method)] if s.config and s.method else None
        for s in stages
    ]
    content = [[record.content for record in records] for records in sets]
    numbers = [part.tolist() for part in plan.subsets]
    claimed = digest([told, json.loads(json.dumps(flags, default=str)), content, numbers])
    if state.is_main_process:
        path = work / "plan"
        for left in output.glob(f"{files.TEMPORARY_PREFIX}*"):
            files.remove(left)
        if work.exists() and (not path.exists() or path.read_text() != claimed):
            _remove(work)
        work.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, claimed.encode())
    state.wait_for_everyone()
    return work


def _conclude(output: Path, work: Path, told: dict[str, Any], reports: "list[Report]") -> None:
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    seconds = sum(report.seconds for report in reports)
    content = json.dumps({**told, "seconds": seconds}, indent=1)
    files.write_bytes(output / PLAN_NAME, content.encode(), mode=0o644)
    card = output / "README.md"
    lines = [
        f"* {s['records']} records (mean {told['score']} {s['mean']:.4g}): {s['method']}, {s['steps']} steps"
        for s in told["subsets"]
    ]
    section = "\n## Refinement\n\nThe forget set was unlearned in subsets, in this order:\n\n"
    text = card.read_text().split("\n## Refinement\n")[0]
    files.write_bytes(card, (text + section + "\n".join(lines) + "\n").encode(), mode=0o644)
    _remove(work)


def _remove(work: Path) -> None:
    """Out of sight by a rename first, so that a crash leaves no half of a model."""
    doomed = files.temporary_name(work)
    work.rename(doomed)
    files.remove(doomed)


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
    source, output = str(model_arguments.model_name_or_path), Path(str(config.output_dir))
    check_output(output, [source, arguments.adapter or source])

    def load(place: str | None) -> tuple[Any, Any]:
        if place is not None:
            return load_trainable(place, None, False, model_arguments)
        return load_trainable(source, arguments.adapter, arguments.any_base, model_arguments)

    place = refinement.scores_of or arguments.run or arguments.adapter or source
    say(f"scores: {refinement.refine}")
    scores = forget_scores(refinement, Path(place), request.forget, load, config)
    chosen = [whole] if refinement.refine_control == "vanilla" else parts
    plan = make_plan(refinement, scores, chosen, config)
    return unlearn_refined(
        plan, chosen, request.forget, request.retain, load, output, lora_of(model_arguments), say
    )


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
    if target.tables.names() and (reference := read_reference(target.tables)):
        known = dict(zip(reference.records.tolist(), reference.memorization, strict=True))
        seen["counterfactual"] = np.array([known.get(one, np.nan) for one in target.pseudonyms()])
    if name in seen:
        number = {record.id: place for place, record in enumerate(target.records)}
        at = [number.get(record.id) for record in wanted]
        return np.array([np.nan if one is None else seen[name][one] for one in at])
    if name == "counterfactual":
        raise UserError(
            f"{place} has no counterfactual runs: see `llm-unlearn memorization --help`"
        )
    model, tokenizer = load(None)
    loaded = LoadedTarget(model.to(config.device), tokenizer, named_by_content(forget))
    loaded.max_length, loaded.completion_only = config.max_length, config.completion_only_loss
    loaded.learning_rate = config.learning_rate
    held = read_source(refinement.holdout) if refinement.holdout else ()
    return score(loaded, [name], held).scores[name]
