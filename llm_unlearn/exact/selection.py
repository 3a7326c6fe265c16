"""Which served adapters answer a prompt: the one that it is for, two, all, or none.

Averaging all adapters dilutes what each one knows. A prompt about somebody has their words in it, and is
likeliest under the adapter that learnt them. So the words point to a few shards (`words.py`): nobody's
prompt has no subject that leads the others and goes to the base model unread; where one subject leads clearly, its
shard answers unread; in between, and where two shards are close, the prompt is read under the candidates and
its likelihood decides. The best must then lead the second best and the base model by a margin, or the base
model answers.

The rule reads living adapters, their indexes and constants, nothing that was fitted on anybody: without a
subject's adapter it decides as a system that never had it. The likelihood ratio to the base
model would not do: every adapter has learnt how questions are asked, so even a general question is
likelier under each of them than under the base.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

Aggregate = Literal["average", "select", "mixture", "vote", "merge", "nearest"]
AGGREGATES: tuple[str, ...] = get_args(Aggregate)

BASE_MODEL = -1
NOTHING = float("-inf")  # the score of a shard of which nothing is left

# Part of a prompt's weight by which a subject's words must lead to be looked at, and within which two are
# close. Chosen, as the default lead is, on TOFU's questions and the toy world, never on a run's records.
DOUBT = 0.1


@dataclass(frozen=True)
class Rule:
    """How prompts find their adapters.

    Attributes:
        lead: part of a prompt's weight by which a subject's words must lead to be believed unread.
        candidates: how many shards read a prompt that is in doubt.
        margin: by how much the best adapter must lead the second best, in nats a token. The default
            was fixed on public people of the toy world, 95 to 97 % of whose questions stay below it.
        floor: the least log-probability that the best adapter may give to any token of the prompt:
            where it is surprised by a name, the prompt is somebody else's. None: no such test (it
            needs adapters that have learnt their prompts by heart, and wordings that they know).
    """

    aggregate: Aggregate = "average"
    margin: float = 0.4
    floor: float | None = None
    lead: float = 0.4
    candidates: int = 4

    @property
    def routes_prompts(self) -> bool:
        return self.aggregate in ("select", "mixture", "nearest")


class Score(NamedTuple):
    """Log-likelihood of a prompt's tokens under one adapter: their mean, and the lowest."""

    mean: float
    lowest: float


class Choice(NamedTuple):
    """An adapter (its index, or `BASE_MODEL`) and its weight in the answer to one prompt."""

    adapter: int
    weight: float


class Candidates(NamedTuple):
    """Shards that a prompt may be for, likeliest first; and whether it is somebody's for sure."""

    shards: list[int]
    is_sure: bool


TO_BASE = [Choice(BASE_MODEL, 1.0)]


def everybody(shards: int) -> list[Choice]:
    """All of some shards; the base model where there is none (any more)."""
    return [Choice(shard, 1 / shards) for shard in range(shards)] or TO_BASE


def candidates(coverage: NDArray[np.float64], lead: float, rule: Rule) -> Candidates:
    """Whom a prompt may be for, by its words (`words.Evidence`)."""
    if lead <= DOUBT:
        return Candidates([], False)
    is_sure = lead > rule.lead
    ranked = np.argsort(-coverage, kind="stable")[: rule.candidates]
    least = coverage.max() - DOUBT if is_sure else 0.0
    return Candidates([int(shard) for shard in ranked if coverage[shard] > least], is_sure)


def choose(
    scores: Sequence[Score], base: float, rule: Rule, found: Candidates | None = None
) -> list[Choice]:
    """Who answers one prompt, by its likelihood.

    `select`: the best if it leads the second best and the base model by the margin, else the base
    model. `mixture`: as `select`, but two that are close and both lead the third share the answer, weighted by the
    likelihoods of the prompt's mean token: for prompts about two subjects, and facts that two
    adapters hold.

    Args:
        scores: by adapter; `NOTHING` where nothing is left of one, or it did not read the prompt.
        base: mean log-likelihood under the base model, which competes with every adapter.
        found: whom the words point to. Where they are sure of some, the best of these needs no
            lead; else words and likelihood must agree on who is first.
    """
    alive = [(score, index) for index, score in enumerate(scores) if score.mean != NOTHING]
    ranked = sorted(alive, key=lambda pair: (-pair[0].mean, pair[1]))
    is_sure = found is not None and found.is_sure
    if not ranked or not (is_sure or _is_at_home(*ranked[0], rule, found)):
        return TO_BASE
    means = [score.mean for score, _ in ranked] + [base] * 2
    if means[0] - max(means[1], base) > rule.margin:
        return [Choice(ranked[0][1], 1.0)]
    are_two = len(ranked) > 1 and (is_sure or means[1] - max(means[2], base) > rule.margin)
    if rule.aggregate == "mixture" and are_two:
        first = 1 / (1 + math.exp(means[1] - means[0]))
        return [Choice(ranked[0][1], first), Choice(ranked[1][1], 1 - first)]
    return [Choice(ranked[0][1], 1.0)] if is_sure else TO_BASE


def is_choice_close(
    scores: Sequence[Score], base: float, rule: Rule, found: Candidates, tolerance: float
) -> bool:
    """Could rounding change what `selection.choose` decides by likelihood?

    Candidates read the prompt in a batch, whose composition decides the last bits: a comparison that holds by less
    than the tolerance is not certified.

    Args:
        scores, base, found: as for `choose`.
        tolerance: nats.
    """
    ranked = sorted((score for score in scores if score.mean > NOTHING), reverse=True)
    if not ranked:
        return False
    means = [score.mean for score in ranked] + [base] * 2
    first = means[0] - max(means[1], base)
    second = means[1] - max(means[2], base)
    gaps = [first - rule.margin, means[0] - means[1]]
    if rule.aggregate == "mixture":
        gaps += [second - rule.margin, means[1] - means[2]]
    if rule.floor is not None and not found.is_sure:
        gaps.append(ranked[0].lowest - rule.floor)
    return any(abs(gap) <= tolerance for gap in gaps)


def _is_at_home(score: Score, shard: int, rule: Rule, found: Candidates | None) -> bool:
    """Is the adapter that likes a prompt best the one whose words it has, and not surprised?"""
    agrees = found is None or shard in found.shards[: 1 if rule.aggregate == "select" else 2]
    return agrees and (rule.floor is None or score.lowest >= rule.floor)
