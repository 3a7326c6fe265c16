"""What one system is asked at one moment, and the numbers by row that it gives.

Answers and likelihoods come from `evaluation.measure`, as for any suite; what is new here is who
answered, how the next token is distributed at the end of an orphan's prompt, and what a prompt costs.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llm_unlearn.evaluation.measure import Measuring
from llm_unlearn.evaluation.profiles.default import Profile
from llm_unlearn.evaluation.prompts import Prompting
from llm_unlearn.evaluation.results import Columns
from llm_unlearn.evaluation.scorer import Scorer
from llm_unlearn.evaluation.suites.suite import Probes, Questions, Row, Section, Suite
from llm_unlearn.exact.ensemble import BASE, ShardEnsemble
from llm_unlearn.exact.selection import BASE_MODEL
from llm_unlearn.study.worlds import WORDINGS, World, spread

RETAINED, ORPHANS, PUBLIC, HOLDOUT, TRUTH = "retained", "orphans", "public", "holdout", "truth"
KEPT = {
    RETAINED: ("probability", "rougeL_recall", "exact"),
    ORPHANS: ("probability", "rougeL_recall", "exact", "extraction_strength", "substituted", "min_k"),
    PUBLIC: ("probability", "rougeL_recall", "exact", "loss"),
    HOLDOUT: ("min_k",),
    TRUTH: ("truth_ratio",),
}  # fmt: skip
PROMPTS_AT_ONCE = 64
COMPARED_PROMPTS = 32  # of which the next token's distribution is kept
TIMED_PROMPTS = 32
REPETITIONS = 5
PROFILE = Profile()

Prompts = list[tuple[int, ...]]


@dataclass(frozen=True)
class System:
    """A model to ask. `homes`: which of its adapters learnt from a subject; None without any."""

    model: Any
    tokenizer: Any
    homes: Mapping[str, set[int]] | None = None


@dataclass(frozen=True)
class Measured:
    """Numbers by section, column and row; the subject of each row; distributions at prompts' ends."""

    sections: dict[str, dict[str, list[Any]]]
    distributions: NDArray[np.float32] | None


def measure(system: System, world: World, deleted: Sequence[str]) -> Measured:
    """Ask about those who stay, those who went, the public and those who never were."""
    sections = sections_of(world, set(deleted))
    suite = _suite(world, sections, set(deleted))
    scorer = Scorer(system.model, system.tokenizer)
    prompting = Prompting(world.template)
    records = Measuring(scorer, suite, PROFILE, prompting).run().records
    measured = {
        name: _kept(name, section.rows, records[name]) for name, section in sections.items()
    }
    for name, section in sections.items():
        if name.split("/")[0] in (RETAINED, ORPHANS, PUBLIC):
            measured[name] |= _answerers(system, prompts_of(system, world, section.rows), section)
    orphans = sections.get(f"{ORPHANS}/named")
    distributions = None
    if orphans:
        few = spread(orphans.rows, COMPARED_PROMPTS)
        distributions = scorer.next_token_distributions(prompts_of(system, world, few))
    return Measured(measured, distributions)


def sections_of(world: World, deleted: set[str]) -> dict[str, Questions]:
    """What is asked, by `group/wording` or `group/set`."""
    living = set(world.subjects) - deleted
    retained, orphans = world.about(living, some=True), world.about(deleted)
    asked: dict[str, list[Row]] = {}
    for wording, reword in WORDINGS.items():
        asked[f"{RETAINED}/{wording}"] = reword(retained)
        asked[f"{ORPHANS}/{wording}"] = reword(orphans)
    asked |= {f"{PUBLIC}/{name}": rows for name, rows in world.public.items()}
    found = {
        name: Questions(
            [_question(row) for row in rows],
            new_tokens=world.new_tokens,
            is_scored=True,
            is_forgotten=name.startswith(ORPHANS),
        )
        for name, rows in asked.items()
        if rows
    }
    if orphans and world.holdout:
        found[HOLDOUT] = Questions(world.holdout, new_tokens=0, is_scored=True)
    if truth := [row for row in orphans if row.get("perturbed_answer")]:
        found[TRUTH] = Questions(truth, new_tokens=0, is_scored=True)
    return found


def prompts_of(system: System, world: World, rows: Sequence[Row]) -> Prompts:
    """The rows' questions as the model reads them."""
    prompting = Prompting(world.template)
    return [
        PROFILE.question(
            system.tokenizer, str(row["question"]), str(row["answer"]), (), prompting
        ).prompt
        for row in rows
    ]


def shares_of_shards(model: ShardEnsemble, prompts: Prompts) -> list[dict[int, float]]:
    """The weight of each shard in the answer to each prompt; `BASE_MODEL` where nothing answers."""
    found: list[dict[int, float]] = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        batch = prompts[start : start + PROMPTS_AT_ONCE]
        width = max(map(len, batch))
        ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in batch], device=model.device)
        mask = torch.tensor(
            [[1] * len(p) + [0] * (width - len(p)) for p in batch], device=model.device
        )
        for choices in model.choose(ids, mask):
            weights: dict[int, float] = {}
            for choice in choices:
                is_base = choice.adapter == BASE_MODEL or model.adapters[choice.adapter] == BASE
                shard = BASE_MODEL if is_base else choice.adapter
                weights[shard] = weights.get(shard, 0.0) + choice.weight
            found.append(weights)
    return found


def seconds_a_prompt(
    system: System, alone: Any, prompts: Prompts, new_tokens: int
) -> dict[str, float]:
    """Seconds a prompt of the system and of one adapter alone: the fastest of several, in turns."""
    scorers = {
        "prompt_seconds": Scorer(system.model, system.tokenizer),
        "alone_seconds": Scorer(alone, system.tokenizer),
    }
    fastest = dict.fromkeys(scorers, float("inf"))
    for repetition in range(REPETITIONS + 1):
        for name, scorer in scorers.items():
            began = time.perf_counter()
            scorer.generate(prompts, new_tokens)
            if repetition:  # the first time pays for whatever happens only once
                fastest[name] = min(fastest[name], time.perf_counter() - began)
    return {name: seconds / len(prompts) for name, seconds in fastest.items()}


def timed_prompts(system: System, world: World) -> Prompts:
    """Some named questions about private subjects."""
    return prompts_of(system, world, spread(world.rows, TIMED_PROMPTS))


def _question(row: Row) -> dict[str, Any]:
    """Without wrong answers, which are asked about in a section of their own."""
    names = ("subject", "question", "answer")
    return {name: row[name] for name in names if name in row}


def _suite(world: World, sections: Mapping[str, Section], deleted: set[str]) -> Suite:
    living = set(world.subjects) - deleted
    return Suite(
        world.name,
        sections,
        {},
        Probes((), (), "", ""),
        "",
        template=world.template,
        stemmer=world.stemmer,
        others=world.names(living),
        others_facts=world.facts(living),
    )


def _kept(name: str, rows: Sequence[Row], columns: Columns) -> dict[str, list[Any]]:
    kept: dict[str, list[Any]] = {
        column: [None if value != value else value for value in columns[column].tolist()]
        for column in KEPT[name.split("/")[0]]
        if column in columns
    }
    if all("subject" in row for row in rows):
        kept["subject"] = [row["subject"] for row in rows]
    return kept


def _answerers(system: System, prompts: Prompts, section: Questions) -> dict[str, list[float]]:
    """The share of the base model and of the subject's own unit in each answer."""
    if system.homes is None:
        return {"by_base": [1.0] * len(prompts)}
    homes = [system.homes.get(str(row.get("subject")), set()) for row in section.rows]
    shares = shares_of_shards(system.model, prompts)
    return {
        "by_base": [share.get(BASE_MODEL, 0.0) for share in shares],
        "by_own": [
            sum(weight for shard, weight in share.items() if shard in home)
            for share, home in zip(shares, homes, strict=True)
        ],
    }
