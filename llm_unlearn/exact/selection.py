"""Which served adapters answer a prompt: the one under which it is most likely, two, all, or none.

Averaging all adapters dilutes what each one knows. A prompt about somebody is likeliest under the
adapter that learnt about them, so the mean log-likelihood of its tokens selects; a prompt that is
nobody's is about equally likely under all of them, so the best must lead the second best by a
margin, or the base model answers. The rule reads the living adapters and constants, nothing that
was fitted on anybody: without a subject's adapter it decides as a system that never had it.

The likelihood ratio to the base model would not do: every adapter has learnt how questions are
asked, so even a general question is likelier under each of them than under the base.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Aggregate = Literal["average", "select", "mixture"]
AGGREGATES: tuple[str, ...] = get_args(Aggregate)

BASE_MODEL = -1
NOTHING = float("-inf")  # the score of a shard of which nothing is left


@dataclass(frozen=True)
class Rule:
    """How prompts find their adapters.

    Attributes:
        margin: by how much the best adapter must lead the second best, in nats a token. The default
            was fixed on public people of the toy world, 95 to 97 % of whose questions stay below it.
        floor: the least log-probability that the best adapter may give to any token of the prompt:
            where it is surprised by a name, the prompt is somebody else's. None: no such test (it
            needs adapters that have learnt their prompts by heart, and wordings that they know).
    """

    aggregate: Aggregate = "average"
    margin: float = 0.4
    floor: float | None = None


class Score(NamedTuple):
    """Log-likelihood of a prompt's tokens under one adapter: their mean, and the lowest."""

    mean: float
    lowest: float


class Choice(NamedTuple):
    """An adapter (its index, or `BASE_MODEL`) and its weight in the answer to one prompt."""

    adapter: int
    weight: float


TO_BASE = [Choice(BASE_MODEL, 1.0)]


def choose(scores: Sequence[Score], base: float, rule: Rule) -> list[Choice]:
    """Who answers one prompt.

    `average`: all with equal weights. `select`: the best if it leads the second best by the margin,
    else the base model. `mixture`: as `select`, but two that are close and both lead the third
    share the answer, weighted by the likelihoods of the prompt's mean token: for prompts about
    two subjects, and facts that two adapters hold.

    Args:
        scores: by adapter; `NOTHING` where nothing is left of one.
        base: mean log-likelihood under the base model: what an adapter competes with when there
            is no other.
    """
    if rule.aggregate == "average":
        return [Choice(adapter, 1 / len(scores)) for adapter in range(len(scores))]
    alive = [(score, index) for index, score in enumerate(scores) if score.mean != NOTHING]
    ranked = sorted(alive, key=lambda pair: (-pair[0].mean, pair[1]))
    if not ranked or (rule.floor is not None and ranked[0][0].lowest < rule.floor):
        return TO_BASE
    means = [score.mean for score, _ in ranked] + [base] * max(0, 3 - len(ranked))
    if means[0] - means[1] > rule.margin:
        return [Choice(ranked[0][1], 1.0)]
    if rule.aggregate == "mixture" and len(ranked) > 1 and means[1] - means[2] > rule.margin:
        first = 1 / (1 + math.exp(means[1] - means[0]))
        return [Choice(ranked[0][1], first), Choice(ranked[1][1], 1 - first)]
    return TO_BASE
