"""RUM: a forget set in homogeneous subsets, one after another, each with a method of its own or none.

Each goes on from the model that the last one left; all together take as many optimizer steps as the whole forget
set at once would.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_unlearn import files
from llm_unlearn.data.records import Record, digest
from llm_unlearn.errors import UserError
from llm_unlearn.memorization.orientation import Floats
from llm_unlearn.memorization.refinement import (
    Numbers,
    describe,
    refine,
    retain_pool,
    share_steps,
    shuffled,
)
from llm_unlearn.memorizing.refine_arguments import RefineArguments

if TYPE_CHECKING:
    from llm_unlearn.approximate.arguments import UnlearningConfig
    from llm_unlearn.approximate.method import Method
    from llm_unlearn.approximate.result import Report

NONE = "none"
PLAN_NAME, STAGES = "refinement.json", "stages"


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
