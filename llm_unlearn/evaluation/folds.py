"""MUSE's fifth and sixth question, for any method: larger requests, and one request after another.

Criterion C5 (scalability) starts from the same model for nested forget sets of growing size; C6
(sustainability) hands each request the model that the one before left. Shi et al., arXiv 2407.06460,
section 3. Wanted: utility that stays flat.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

Model = TypeVar("Model")
Fold = TypeVar("Fold")
Score = TypeVar("Score")


class Step(NamedTuple):
    """What was unlearned so far, in rows, and what the suite found then."""

    forgotten: int
    score: object


def scalability(
    unlearn: Callable[[Model, Sequence[Fold]], Model],
    copy: Callable[[], Model],
    folds: Sequence[Sequence[Fold]],
    measure: Callable[[Model], Score],
) -> Iterator[Step]:
    """Unlearn each of some nested forget sets from a fresh copy of the model, and measure.

    Raises:
        ValueError: a set that does not hold the one before it.
    """
    for smaller, larger in pairwise(folds):
        if any(row not in larger for row in smaller):
            raise ValueError("expected nested forget sets, each holding the one before it")
    for fold in folds:
        yield Step(len(fold), measure(unlearn(copy(), fold)))


def sustainability(
    unlearn: Callable[[Model, Sequence[Fold]], Model],
    model: Model,
    folds: Sequence[Sequence[Fold]],
    measure: Callable[[Model], Score],
) -> Iterator[Step]:
    """Unlearn some disjoint forget sets one after the other, and measure after each."""
    forgotten = 0
    for fold in folds:
        model = unlearn(model, fold)
        forgotten += len(fold)
        yield Step(forgotten, measure(model))
