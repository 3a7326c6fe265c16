"""Refinement (RUM, arXiv 2406.01257): a forget set as homogeneous subsets, unlearned from low to high.

    S_1 .. S_k = refine(S, score)
    for each i, low to high: unlearn S_i, with a method of its own or none, keeping R_i

R_i is the retain set; in the paper also what comes later (`pending_in_retain`), which trains on records that
somebody wants gone and has no place where a deletion must be certain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm_unlearn.data.records import Record
from llm_unlearn.errors import UserError
from llm_unlearn.memorization.orientation import Floats

PARTS, MIN_SIZE = 3, 2
FLAT = 0.05  # highest less lowest subset's mean, as a part of the largest value
TIED = 0.1  # part of the forget set that a cut may fall among equal values
Numbers = NDArray[np.intp]
CONTROLS = ("none", "shuffle", "vanilla")


@dataclass(frozen=True)
class Spread:
    """What tells subsets apart: their mean scores, low to high, and records that a cut parts at random."""

    means: tuple[float, ...]
    tied: int


def refine(scores: ArrayLike, parts: int = PARTS, min_size: int = MIN_SIZE) -> list[Numbers]:
    """Numbers of the records of each subset, least memorised first: quantiles within the forget set.

    They are disjoint and hold every record. Equal scores keep the order of the records.

    Raises:
        UserError: too few records, a record without a score, or scores that do not tell them apart;
            it says which.
    """
    values = _checked(scores, parts, min_size)
    order = np.argsort(values, kind="stable")
    subsets = [np.sort(part) for part in np.array_split(order, parts)]
    _check_spread(values, spread(values, subsets))
    return subsets


def _checked(scores: ArrayLike, parts: int, min_size: int) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if parts < 2 or min_size < 1:
        raise UserError("a refinement has two subsets or more, of one record or more")
    if len(values) < parts * min_size:
        raise UserError(
            f"{len(values)} records are too few for {parts} subsets of {min_size} or more: ask for fewer, "
            "or unlearn them at once"
        )
    if missing := int((~np.isfinite(values)).sum()):
        raise UserError(
            f"{missing} of {len(values)} records have no score: measure them, or refine by another score"
        )
    return values


def spread(values: Floats, subsets: Sequence[Numbers]) -> Spread:
    """How far the subsets are apart, and how many records have the score that a cut falls on."""
    means = tuple(float(values[part].mean()) for part in subsets)
    tied = 0
    for lower, upper in pairwise(subsets):
        edge = values[lower].max()
        if edge >= values[upper].min():
            tied = max(tied, int((values == edge).sum()))
    return Spread(means, tied)


def _check_spread(values: Floats, found: Spread) -> None:
    distance = found.means[-1] - found.means[0]
    if not distance > 0:
        raise UserError(
            "all records have the same score, so no subset is more memorised than another: refine by "
            "another score, or unlearn them at once"
        )
    if distance < FLAT * np.abs(values).max():
        raise UserError(
            f"the scores are flat: the subsets' means are {', '.join(f'{m:.4g}' for m in found.means)}, "
            f"less than {FLAT:.0%} of the largest score apart; refine by another score, or unlearn at once"
        )
    if found.tied > TIED * len(values):
        raise UserError(
            f"{found.tied} of {len(values)} records have the score at which subsets would be parted, so "
            "chance would part them: refine by a score with fewer ties, or into fewer subsets"
        )


def shuffled(sizes: Sequence[int], seed: int) -> list[Numbers]:
    """The control: subsets of the same sizes, drawn at random."""
    order = np.random.default_rng(seed).permutation(sum(sizes))
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]


def retain_pool(
    retain: Sequence[Record],
    forget: Sequence[Record],
    subsets: Sequence[Numbers],
    stage: int,
    pending_in_retain: bool,
) -> list[Record]:
    """What is kept while subset `stage` is unlearned: R_i.

    Subsets of earlier stages are never in it, whether a method unlearned them or none did.
    """
    later = [n for part in subsets[stage + 1 :] for n in part] if pending_in_retain else []
    current = {tuple(forget[n].texts()) for part in subsets[: stage + 1] for n in part}
    return [*retain, *(forget[n] for n in later if tuple(forget[n].texts()) not in current)]


def share_steps(total: int, sizes: Sequence[int], is_active: Sequence[bool]) -> list[int]:
    """A budget of optimizer steps over the subsets that are unlearned, in proportion to their sizes.

    The sum is exactly `total` (largest remainders), so that every control computes as much.

    Raises:
        UserError: no subset is unlearned, or one would get no step.
    """
    weights = np.array([size * active for size, active in zip(sizes, is_active, strict=True)])
    if not weights.any():
        raise UserError("no subset has a method: nothing would be unlearned")
    exact = total * weights / weights.sum()
    steps = np.floor(exact).astype(int)
    for number in np.argsort(steps - exact, kind="stable")[: total - steps.sum()]:
        steps[number] += 1
    if any(active and not step for active, step in zip(is_active, steps, strict=True)):
        raise UserError(f"{total} steps are too few for {sum(is_active)} subsets: raise them")
    return [int(step) for step in steps]


def describe(values: Floats, subsets: Sequence[Numbers]) -> list[dict[str, Any]]:
    """Size and score of each subset, for a report."""
    return [
        {
            "records": len(part),
            "mean": float(values[part].mean()),
            "lowest": float(values[part].min()),
            "highest": float(values[part].max()),
        }
        for part in subsets
    ]
