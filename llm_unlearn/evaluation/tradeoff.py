"""Forgetting against utility: where a model stands between the two, and which are on the front.

The forget axis is the first of these that places the most models: `forget_quality` (a p-value, on
a log scale; 1 = not told apart from the retrained model), the distance of `forget_knowmem` from
the retrained model's, or |`privleak`| (0 = like the retrained model). The utility axis is
`model_utility`, or else `retain_knowmem`. On both, the upper right is best: a distance runs
from right to left.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llm_unlearn.evaluation.catalogue import as_share
from llm_unlearn.evaluation.results import Results, Value

NAN = math.nan
SMALLEST_P_VALUE = 1e-30  # drawn at the edge; below it, p-values differ in nothing but digits
Values = dict[str, Value]


@dataclass(frozen=True)
class Candidate:
    """A model to place: its values, and those of the retrained model that it is held against."""

    label: str
    role: str
    values: Values
    retrained: Values | None
    profile: str


@dataclass(frozen=True)
class Point:
    """A model on the plane. `merit` is x turned so that higher is better."""

    label: str
    role: str
    x: float
    y: float
    merit: float
    on_front: bool = False


@dataclass(frozen=True)
class Tradeoff:
    """The points that both axes can place, and what the axes are."""

    x_title: str
    y_title: str
    logarithmic: bool
    points: list[Point] = field(default_factory=list)
    unplaced: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Axis:
    title: str
    of: Callable[[Candidate], float]
    is_p_value: bool = False


def _share(values: Values | None, name: str, profile: str) -> float:
    value = (values or {}).get(name)
    return NAN if value is None else as_share(name, value.value, profile)


def _forget_quality(one: Candidate) -> float:
    value = _share(one.values, "forget_quality", one.profile)
    # A retrained model is its own reference: a test against the same rows gives exactly 1.
    return 1.0 if one.role == "retrained" and math.isnan(value) else value


def _knowledge_distance(one: Candidate) -> float:
    reference = one.values if one.role == "retrained" else one.retrained
    return abs(
        _share(one.values, "forget_knowmem", one.profile)
        - _share(reference, "forget_knowmem", one.profile)
    )


def _privacy_leak(one: Candidate) -> float:
    value = abs(_share(one.values, "privleak", one.profile))
    return 0.0 if one.role == "retrained" and math.isnan(value) else value


FORGET_AXES = (
    _Axis("forget quality (p-value)", _forget_quality, is_p_value=True),
    _Axis("forget knowledge: distance from retrained", _knowledge_distance),
    _Axis("|PrivLeak|", _privacy_leak),
)
UTILITY_AXES = (
    _Axis("model utility", lambda one: _share(one.values, "model_utility", one.profile)),
    _Axis("retain knowledge", lambda one: _share(one.values, "retain_knowmem", one.profile)),
)


def place(candidates: Sequence[Candidate]) -> Tradeoff:
    """Choose both axes, place every candidate that they can place, and mark the Pareto front."""
    forget, utility = _axis(FORGET_AXES, candidates), _axis(UTILITY_AXES, candidates)
    points, unplaced = [], []
    for one in candidates:
        x, y = forget.of(one), utility.of(one)
        if not (math.isfinite(x) and math.isfinite(y)):
            unplaced.append(one.label)
            continue
        x = max(x, SMALLEST_P_VALUE) if forget.is_p_value else x
        points.append(Point(one.label, one.role, x, y, x if forget.is_p_value else -x))
    marked = _mark_front(points)
    return Tradeoff(forget.title, utility.title, forget.is_p_value, marked, unplaced)


def of_results(results: Results) -> Tradeoff:
    """The model of one evaluation among its references and decoys."""
    evaluations = {"model": results.model, **results.others}
    retrained = results.others.get("retrained")
    return place(
        [
            Candidate(
                one.label if role == "model" else role,
                role,
                one.values,
                retrained.values if retrained else None,
                results.profile,
            )
            for role, one in evaluations.items()
        ]
    )


def _axis(axes: Sequence[_Axis], candidates: Sequence[Candidate]) -> _Axis:
    """The axis that places the most models; references alone would choose one without a model."""
    models = [one for one in candidates if one.role == "model"]
    return max(axes, key=lambda axis: sum(math.isfinite(axis.of(one)) for one in models))


def _mark_front(points: Sequence[Point]) -> list[Point]:
    """Mark the models that no other model beats on one axis without losing on the other."""
    models = [point for point in points if point.role == "model"]

    def beaten(point: Point) -> bool:
        return any(
            one.merit >= point.merit
            and one.y >= point.y
            and (one.merit, one.y) != (point.merit, point.y)
            for one in models
        )

    return [
        Point(p.label, p.role, p.x, p.y, p.merit, p.role == "model" and not beaten(p))
        for p in points
    ]
