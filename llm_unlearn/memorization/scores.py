"""From what was seen of each record, epoch by epoch, to one oriented score a record."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_unlearn.memorization.learning_events import ROW_VALUES
from llm_unlearn.memorization.orientation import LEARNING, Floats, oriented

TIE = 1e-6  # of the smallest difference: ties are broken, and flat stays flat
DECIMALS = 12
EARLY = 0.2  # of the epochs, at least one: EL2N tells hard records before all are learnt


def means_by_record(
    index: NDArray[Any], values: NDArray[Any], count: int, chosen: NDArray[np.bool_] | None = None
) -> Floats:
    """Mean of each record's lines, (count,); NaN without one."""
    if chosen is not None:
        index, values = index[chosen], values[chosen]
    lines = np.bincount(index, minlength=count)
    total = np.bincount(index, weights=values.astype(np.float64), minlength=count)
    return np.divide(total, lines, out=np.full(count, np.nan), where=lines > 0)


def learning_scores(columns: Mapping[str, NDArray[Any]], count: int) -> dict[str, Floats]:
    """Oriented scores of `count` records from an observation's columns.

    Args:
        columns: `index`, `epoch` and what was seen; `run`, where several trainings saw the same records:
            EL2N is then early in each of them.

    Returns:
        By name, (count,) each: those whose values were seen. NaN for a record that was not.
    """
    index = columns["index"]
    raw = {
        name: means_by_record(index, columns[name], count)
        for name in ROW_VALUES
        if name in columns and name != "el2n"
    }
    if "el2n" in columns:
        raw["el2n"] = means_by_record(index, columns["el2n"], count, is_early(columns))
    # Sums of the same numbers in another order are the same score, and a tie.
    found = {name: np.round(oriented(name, values), DECIMALS) for name, values in raw.items()}
    if "strict_accuracy" in found and "confidence" in found:
        found["strict_accuracy"] = with_ties_broken(found["strict_accuracy"], found["confidence"])
    return {name: found[name] for name in LEARNING if name in found}


def is_early(columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Which lines are of the first fifth of their training's epochs."""
    epoch = columns["epoch"]
    run = columns.get("run", np.zeros(len(epoch), np.int64))
    early = np.zeros(len(epoch), bool)
    for one in np.unique(run):
        here = run == one
        epochs = np.unique(epoch[here])
        last = epochs[math.ceil(EARLY * len(epochs)) - 1]
        early |= here & (epoch <= last)
    return early


def with_ties_broken(values: Floats, by: Floats) -> Floats:
    """The same values, pulled apart by next to nothing where they are equal.

    Within equal values the order is that of `by`; between others it does not change.
    """
    known = np.flatnonzero(~(np.isnan(values) | np.isnan(by)))
    levels = np.unique(values[known])
    if len(levels) < 2:
        return values  # flat is flat
    smallest = float(np.diff(levels).min())
    place = np.empty(len(known))
    place[np.argsort(by[known], kind="stable")] = np.arange(len(known))
    told = values.copy()
    told[known] += TIE * smallest * place / len(known)
    return told
