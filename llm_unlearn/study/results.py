"""From the numbers by row to the cells of the tables, with intervals over seeds.

A reference is served like what it is compared with: always on beside always on, gated beside gated.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.membership import Scores, privleak
from llm_unlearn.evaluation.statistics import Interval, across_seeds
from llm_unlearn.evaluation.tofu import forget_quality
from llm_unlearn.study.configurations import ALWAYS_ON, BASE, CONFIGURATIONS, RETRAINED
from llm_unlearn.study.measuring import HOLDOUT, ORPHANS, PUBLIC, RETAINED, TRUTH
from llm_unlearn.study.worlds import WORDINGS

STUDY_NAME = "study.json"
SCORES = {"probability": "probability", "rouge": "rougeL_recall", "exact": "exact"}
NAN = math.nan


class Key(NamedTuple):
    """One cell of the study, under every seed."""

    configuration: str
    served: str
    deletions: int


@dataclass(frozen=True)
class Measurement:
    """One file: numbers by row, and where the distributions lie."""

    content: Mapping[str, Any]
    path: Path

    @property
    def key(self) -> Key:
        return Key(*(self.content[name] for name in ("configuration", "served", "deletions")))

    @property
    def seed(self) -> int:
        return int(self.content["seed"])

    def column(self, section: str, name: str, subjects: set[str] | None = None) -> NDArray[Any]:
        """Numbers by row, of some subjects; none where this was not asked."""
        found = self.content["sections"].get(section, {})
        values = np.array(found.get(name, []), dtype=np.float64)
        if subjects is None or not len(values):
            return values
        return values[[subject in subjects for subject in found["subject"]]]

    def mean(self, section: str, name: str, subjects: set[str] | None = None) -> float:
        values = self.column(section, name, subjects)
        return float(np.nanmean(values)) if np.isfinite(values).any() else NAN

    def distributions(self) -> NDArray[np.float64] | None:
        path = self.path.with_suffix(".safetensors")
        if not path.exists():
            return None
        return load_file(path)["log_probabilities"].astype(np.float64)


Found = Mapping[tuple[Key, int], Measurement]  # by cell and seed


def read_measurements(output: Path) -> dict[tuple[Key, int], Measurement]:
    """Every finished measurement below an output directory."""
    paths = sorted((output / "measurements").glob("*/*/seed-*/*.json"))
    measurements = [Measurement(json.loads(path.read_bytes()), path) for path in paths]
    return {(one.key, one.seed): one for one in measurements}


def values_of(one: Measurement, found: Found) -> dict[str, float]:
    """Every number of one measurement; NaN where something it needs is missing."""
    last = max(key.deletions for key, _ in found if key[:2] == one.key[:2])
    return {
        **_retained(one),
        **_kept_by_the_same(one, found, last),
        **_public(one, _beside(one, found, BASE.name, ALWAYS_ON)),
        **_orphans(one, found),
        **_costs(one),
    }


def _beside(
    one: Measurement, found: Found, name: str, served: str | None = None
) -> Measurement | None:
    """Another system at the same moment under the same seed, served alike."""
    served = served or one.key.served
    candidates = [served] if served == ALWAYS_ON else [served, "select"]
    keys = [(Key(name, way, one.key.deletions), one.seed) for way in candidates]
    return next((found[key] for key in keys if key in found), None)


def _retained(one: Measurement) -> dict[str, float]:
    values = {
        f"{RETAINED} {wording} {score}": one.mean(f"{RETAINED}/{wording}", column)
        for wording in WORDINGS
        for score, column in SCORES.items()
    }
    for wording in WORDINGS:
        for who in ("by_own", "by_base"):
            values[f"{RETAINED} {wording} {who}"] = one.mean(f"{RETAINED}/{wording}", who)
    bystanders = set(one.content["bystanders"])
    everybody = set(one.content["sections"][f"{RETAINED}/named"].get("subject", []))
    for group, subjects in (("bystanders", bystanders), ("others", everybody - bystanders)):
        for score, column in SCORES.items():
            values[f"{group} {score}"] = one.mean(f"{RETAINED}/named", column, subjects)
    values["bystanders"] = float(len(bystanders)) if one.content["deletions"] else NAN
    return values


def _kept_by_the_same(one: Measurement, found: Found, last: int) -> dict[str, float]:
    """What those who stay to the end are known by now: the same people at every moment."""
    end = found.get((one.key._replace(deletions=last), one.seed))
    if end is None:
        return {}
    stay = set(end.content["sections"][f"{RETAINED}/named"].get("subject", []))
    return {
        f"stayed {score}": one.mean(f"{RETAINED}/named", column, stay)
        for score, column in SCORES.items()
    }


def _public(one: Measurement, base: Measurement | None) -> dict[str, float]:
    """Out of domain: the three scores by set and in all, and the loss in nats a token over the base's."""
    sections = [name for name in one.content["sections"] if name.startswith(f"{PUBLIC}/")]
    values: dict[str, float] = {}
    for score, column in SCORES.items():
        by_set = {name: one.mean(name, column) for name in sections}
        values |= {f"{name.removeprefix(f'{PUBLIC}/')} {score}": v for name, v in by_set.items()}
        values[f"{PUBLIC} {score}"] = _mean(by_set.values())
    values[f"{PUBLIC} by_base"] = _mean(one.mean(name, "by_base") for name in sections)
    # The column is a mean log-probability: the higher, the likelier.
    shifts = [base.mean(n, "loss") - one.mean(n, "loss") for n in sections] if base else []
    values["shift"] = _mean(shifts)
    return values


def _orphans(one: Measurement, found: Found) -> dict[str, float]:
    if not one.content["deletions"]:
        return {}
    base = _beside(one, found, BASE.name, ALWAYS_ON)
    retrained = _beside(one, found, RETRAINED.name)
    values = {
        f"{ORPHANS} {wording} {score}": one.mean(f"{ORPHANS}/{wording}", column)
        for wording in WORDINGS
        for score, column in SCORES.items()
    }
    for name in ("extraction_strength", "substituted", "by_base"):
        values[f"{ORPHANS} {name}"] = one.mean(f"{ORPHANS}/named", name)
    values[f"{ORPHANS} kl base"] = _divergence(one, base)
    values[f"{ORPHANS} kl retrained"] = _divergence(one, retrained)
    rebuilt = next(
        (c.name for c in CONFIGURATIONS if c.kind == "rebuilt" and c.before == one.key[0]), ""
    )
    values[f"{ORPHANS} kl rebuilt"] = _divergence(one, _beside(one, found, rebuilt))
    values["forget quality"] = values["privleak"] = NAN
    if retrained and one.key.configuration != RETRAINED.name:
        values["forget quality"] = forget_quality(
            one.column(TRUTH, "truth_ratio"), retrained.column(TRUTH, "truth_ratio")
        ).p_value
        values["privleak"] = privleak(_members(one), _members(retrained)).value
    return values


def _members(one: Measurement) -> Scores:
    return Scores(one.column(f"{ORPHANS}/named", "min_k"), one.column(HOLDOUT, "min_k"))


def _divergence(one: Measurement, other: Measurement | None) -> float:
    """Mean KL(one || other) of the next token at the end of orphans' prompts, in nats; 0 = the same."""
    first, second = one.distributions(), other.distributions() if other else None
    if first is None or second is None:
        return NAN
    return float((np.exp(first) * (first - second)).sum(axis=1).mean())


def _costs(one: Measurement) -> dict[str, float]:
    costs = dict(one.content["costs"])
    if "alone_seconds" in costs:
        costs["inference_ratio"] = costs["prompt_seconds"] / costs["alone_seconds"]
    return costs


def _mean(values: Iterable[float]) -> float:
    given = [value for value in values if math.isfinite(value)]
    return sum(given) / len(given) if given else NAN


@dataclass(frozen=True)
class Results:
    """The intervals of every cell, and the order in which cells are shown."""

    about: Mapping[str, Any]
    cells: Mapping[Key, Mapping[str, Interval]]

    @property
    def rows(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((key.configuration, key.served) for key in self.cells))

    @property
    def deletions(self) -> list[int]:
        return sorted({key.deletions for key in self.cells})

    def get(self, row: tuple[str, str], deletions: int, name: str) -> Interval:
        """The cell's number; NaN where there is none."""
        cell = self.cells.get(Key(*row, deletions), {})
        return cell.get(name, Interval(NAN, NAN, NAN, 0, 0))

    def to_dict(self) -> dict[str, Any]:
        cells = [
            {**key._asdict(), "values": {name: _plain(value) for name, value in cell.items()}}
            for key, cell in self.cells.items()
        ]
        return {"study": dict(self.about), "cells": cells}


def summarise(output: Path) -> Results:
    """All cells of a study from what has been measured so far, in the order of the table.

    Raises:
        UserError: there is no study.
    """
    if not (output / STUDY_NAME).is_file():
        raise UserError(f"{output} holds no study yet: run the recipe without --report_only first")
    about = json.loads((output / STUDY_NAME).read_bytes())
    order = [(one.name, served) for one in CONFIGURATIONS for served in one.served]
    found = read_measurements(output)
    by_key: dict[Key, list[dict[str, float]]] = {}
    for (key, _), one in found.items():
        by_key.setdefault(key, []).append(values_of(one, found))

    # With nobody deleted, a retrained model is the plain one, and a rebuilt one as it was.
    for one in CONFIGURATIONS:
        for served in one.served if one.before else ():
            first, own = Key(one.before, served, 0), Key(one.name, served, 0)
            if first in by_key and any(key[:2] == own[:2] for key in by_key):
                by_key[own] = by_key[first]

    def place(key: Key) -> tuple[int, Key]:
        return order.index(key[:2]) if key[:2] in order else len(order), key

    return Results(about, {key: _intervals(by_key[key]) for key in sorted(by_key, key=place)})


def _intervals(values: Sequence[Mapping[str, float]]) -> dict[str, Interval]:
    names = dict.fromkeys(name for one in values for name in one)
    return {name: across_seeds([one.get(name, NAN) for one in values]) for name in names}


def _plain(value: Interval) -> dict[str, float | int | None]:
    """For JSON, which has no NaN."""
    return {
        k: None if isinstance(v, float) and math.isnan(v) else v for k, v in value._asdict().items()
    }
