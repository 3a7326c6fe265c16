"""Evaluations side by side: the model before the deletions, after them, and a retrained one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.evaluation.catalogue import (
    ARROWS,
    MEANINGS,
    as_share,
    describe,
    format_number,
    in_percent,
)
from llm_unlearn.evaluation.report import interval
from llm_unlearn.evaluation.results import Evaluation, Results, Value, read_results

BEFORE, AFTER, RETRAINED = "before", "after", "retrained"
DASH = "–"


@dataclass(frozen=True)
class Shown:
    """One value: as text, and with its interval on a scale of [0, 1] where it has one."""

    text: str
    share: tuple[float, float, float] | None = None  # value, lower, upper


@dataclass(frozen=True)
class Metric:
    """One metric, with a value for every column."""

    name: str
    title: str
    arrow: str
    meaning: str
    values: tuple[Shown, ...]


@dataclass(frozen=True)
class Comparison:
    """What the evaluations say.

    Attributes:
        columns: `before`, `after`, `retrained`: those that there are.
        verdicts: what was evaluated, and the verdict on it.
        notes: why the columns may not be comparable.
    """

    columns: tuple[str, ...]
    metrics: tuple[Metric, ...]
    verdicts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def compare(before: Path | None, after: Path | None) -> Comparison | None:
    """Read the evaluations that are given; None if there is neither.

    What one was held against (`before`, `retrained`) fills the columns that are not given.

    Raises:
        UserError: a path holds no results.json of an evaluation.
    """
    given = {BEFORE: before, AFTER: after}
    found = {when: read_results(path) for when, path in given.items() if path is not None}
    if not found:
        return None
    columns = _columns(found)
    profile = next(iter(found.values())).profile
    names = dict.fromkeys(name for results in found.values() for name in results.model.values)
    return Comparison(
        columns=tuple(columns),
        metrics=tuple(_metric(name, columns, profile) for name in names),
        verdicts=tuple(
            (f"{when}: {results.suite}, profile {results.profile}", results.verdict)
            for when, results in found.items()
        ),
        notes=_notes(list(found.values())),
    )


def _columns(found: Mapping[str, Results]) -> dict[str, Evaluation]:
    references = {}
    for results in found.values():
        references |= {role: results.others[role] for role in results.others}
    models = references | {when: results.model for when, results in found.items()}
    return {name: models[name] for name in (BEFORE, AFTER, RETRAINED) if name in models}


def _notes(found: list[Results]) -> tuple[str, ...]:
    if len({(results.suite, results.profile) for results in found}) > 1:
        return ("They were made with different suites or profiles: do not compare them.",)
    if len({results.digests.get("data") for results in found}) > 1:
        return ("They were asked about different data: compare them with care.",)
    return ()


def _metric(name: str, columns: Mapping[str, Evaluation], profile: str) -> Metric:
    info = describe(name)
    values = tuple(_shown(name, one.values.get(name), profile) for one in columns.values())
    return Metric(name, info.title, ARROWS[info.direction], MEANINGS[info.direction], values)


def _shown(name: str, value: Value | None, profile: str) -> Shown:
    if value is None or not math.isfinite(value.value):
        return Shown(DASH)
    unit = " %" if in_percent(name, profile) else ""
    text = f"{format_number(name, value.value, profile)}{unit} {interval(name, value, profile)}"
    info = describe(name)
    if (info.low, info.high) != (0.0, 1.0):
        return Shown(text.strip())
    middle, *ends = (
        as_share(name, end, profile) for end in (value.value, value.lower, value.upper)
    )
    lower, upper = (end if math.isfinite(end) else middle for end in ends)
    return Shown(text.strip(), (middle, lower, upper))
