"""From rows to values: means, attacks and comparisons with the retrained model, with intervals.

A metric reads records only, so saved scores serve as well as a model that is at hand. What it is, its
range and its direction stand in `catalogue.py`; the formulas in the modules that are called here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hmean

from llm_unlearn.evaluation import membership, tofu, utility
from llm_unlearn.evaluation.profiles.default import Profile
from llm_unlearn.evaluation.results import NAN, Columns, Records, Value
from llm_unlearn.evaluation.statistics import Interval, mean_interval

RESAMPLES = 2000
FALSE_POSITIVE_RATES = (0.01, 0.05)
NEEDS_RETRAINED = "needs a model retrained without the forget set: --retrain"

Floats = NDArray[np.float64]


class Given(NamedTuple):
    """What a metric may read: rows of the model and of the retrained one, and the conventions."""

    records: Records
    retrained: Records | None
    profile: Profile


class MissingRows(Exception):
    """A metric asks for a section or column that this evaluation does not have."""


@dataclass(frozen=True)
class Metric:
    """How a value comes from rows.

    Attributes:
        compute: see `Given`.
        column: (section, column) whose mean it is, where it is a mean: two models can then be
            compared row by row.
        needs_retrained: whether it is NaN without a retrained model.
        is_share: whether it is in [0, 1], so that it can be given in percent.
    """

    compute: Callable[[Given], Value]
    column: tuple[str, str] | None = None
    needs_retrained: bool = False
    is_share: bool = True


def evaluate_metric(metric: Metric, given: Given) -> Value:
    """The metric's value; NaN with the reason where it cannot be had."""
    if metric.needs_retrained and given.retrained is None:
        return Value(NAN, note=NEEDS_RETRAINED)
    try:
        return metric.compute(given)
    except MissingRows as error:
        return Value(NAN, note=str(error))


def mean_of(section: str, column: str, is_share: bool = True) -> Metric:
    """Mean of one number per row; shares times 100 where the profile wants percent."""

    def compute(given: Given) -> Value:
        scale = 100.0 if given.profile.percent and is_share else 1.0
        return value_of(mean_interval(scale * rows_of(given.records, section, column)))

    return Metric(compute, (section, column), is_share=is_share)


def truth_ratio_of(section: str, is_forgotten: bool) -> Metric:
    """TOFU's mean of truth ratios: `min(R, 1/R)` on the forget set, `max(0, 1 - R)` elsewhere."""

    def compute(given: Given) -> Value:
        return value_of(mean_interval(_bounded_ratios(given, section, is_forgotten)))

    return Metric(compute)


def attack_of(members: str, non_members: str, column: str) -> Metric:
    """AUC of a membership attack, with its true-positive rates at low false-positive rates."""

    def compute(given: Given) -> Value:
        scores = [rows_of(given.records, section, column) for section in (members, non_members)]
        return _attack(scores[0], scores[1], given.profile)

    return Metric(compute)


def reference_attack_of(members: str, non_members: str) -> Metric:
    """AUC of the loss less the loss under the retrained model."""

    def compute(given: Given) -> Value:
        retrained = given.retrained or {}
        scores = [
            rows_of(given.records, section, "loss") - rows_of(retrained, section, "loss")
            for section in (members, non_members)
        ]
        return _attack(scores[0], scores[1], given.profile)

    return Metric(compute, needs_retrained=True)


def privleak_of(members: str, non_members: str) -> Metric:
    """PrivLeak from Min-40%, with a bootstrap interval over the rows of both sets."""

    def compute(given: Given) -> Value:
        pairs = [
            [rows_of(rows, section, "min_k") for section in (members, non_members)]
            for rows in (given.records, given.retrained or {})
        ]
        epsilon = given.profile.epsilon
        found = membership.privleak(*(membership.Scores(*p) for p in pairs), epsilon=epsilon)
        lower, upper = _privleak_interval(pairs, epsilon)
        detail = {"auc": found.auc, "auc_retrained": found.retrain_auc}
        n = min(len(pairs[0][0]), len(pairs[0][1]))
        return Value(found.value, lower, upper, n, found.n_unscorable, detail=detail)

    return Metric(compute, needs_retrained=True)


def forget_quality_of(section: str) -> Metric:
    """TOFU's p-value; D and the numbers of rows stand in the detail."""

    def compute(given: Given) -> Value:
        ratios = [
            rows_of(records, section, "truth_ratio")
            for records in (given.records, given.retrained or {})
        ]
        found = tofu.forget_quality(*ratios)
        detail = {
            "D": found.statistic,
            "n_model": float(found.n_unlearned),
            "n_retrained": float(found.n_retain),
        }
        return Value(
            found.p_value, n=found.n_unlearned, n_unscorable=found.n_unscorable, detail=detail
        )

    return Metric(compute, needs_retrained=True)


def model_utility_of(sections: Mapping[str, str]) -> Metric:
    """TOFU's harmonic mean of nine means, with a bootstrap interval over the rows of each set.

    Args:
        sections: section -> column that is its probability.
    """

    def compute(given: Given) -> Value:
        sets = [
            np.stack(
                [
                    rows_of(given.records, section, column),
                    rows_of(given.records, section, "rougeL_recall"),
                    _bounded_ratios(given, section, is_forgotten=False),
                ]
            )
            for section, column in sections.items()
        ]
        terms = [mean_interval(term).mean for rows in sets for term in rows]
        lower, upper = _utility_interval(sets)
        lost = sum(int(np.isnan(rows).any(axis=0).sum()) for rows in sets)
        n = sum(rows.shape[1] for rows in sets) - lost
        return Value(float(hmean(terms)), lower, upper, n, lost)

    return Metric(compute)


def tug_of_war_of(columns: Mapping[str, tuple[str, str]]) -> Metric:
    """Tug-of-war over sets: how close each set's mean is to the retrained model's.

    Args:
        columns: set (`forget`, `retain`, `test`) -> section and column, in [0, 1].
    """

    def compute(given: Given) -> Value:
        means = [
            {
                name: mean_interval(rows_of(records, *column)).mean
                for name, column in columns.items()
            }
            for records in (given.records, given.retrained or {})
        ]
        n = min(len(rows_of(given.records, *column)) for column in columns.values())
        return Value(utility.tug_of_war(*means), n=n)

    return Metric(compute, needs_retrained=True)


def value_of(interval: Interval, note: str = "") -> Value:
    return Value(
        interval.mean, interval.lower, interval.upper, interval.n, interval.n_unscorable, note
    )


def rows_of(records: Records, section: str, column: str) -> Floats:
    """One column of a section.

    Raises:
        MissingRows: it is not there.
    """
    columns: Columns | None = records.get(section)
    if columns is None:
        raise MissingRows(f"needs {section}, which the data does not have")
    if column not in columns:
        flag = ": --gradient_norm" if column == "gradnorm" else ""
        raise MissingRows(f"needs {column} of {section}, which was not computed{flag}")
    return columns[column]


def _bounded_ratios(given: Given, section: str, is_forgotten: bool) -> Floats:
    ratios = rows_of(given.records, section, "truth_ratio")
    return tofu.bounded_truth_ratios(ratios, is_forgotten, given.profile.epsilon)


def _attack(members: Floats, non_members: Floats, profile: Profile) -> Value:
    found = membership.auc(members, non_members)
    detail = {
        f"tpr_at_{rate:g}_fpr": membership.true_positive_rate(members, non_members, rate).value
        for rate in FALSE_POSITIVE_RATES
    }
    value = Value(
        found.value,
        found.lower,
        found.upper,
        min(found.n_members, found.n_non_members),
        found.n_unscorable,
        detail=detail,
    )
    if profile.members_positive:
        return value
    return replace(value, value=1 - value.value, lower=1 - value.upper, upper=1 - value.lower)


def _privleak_interval(pairs: list[list[Floats]], epsilon: float) -> tuple[float, float]:
    """95 % percentile interval; both models keep the same rows in every resample."""
    kept = []
    for group in range(2):
        columns = np.stack([pairs[0][group], pairs[1][group]])
        kept.append(columns[:, ~np.isnan(columns).any(axis=0)])
    if min(rows.shape[1] for rows in kept) < 2:
        return NAN, NAN
    wins = [
        (kept[0][model][:, None] > kept[1][model])
        + 0.5 * (kept[0][model][:, None] == kept[1][model])
        for model in range(2)
    ]
    generator = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        chosen = np.ix_(*(generator.integers(size, size=size) for size in wins[0].shape))
        auc, retrain_auc = (float(win[chosen].mean()) for win in wins)
        scale = 1 - retrain_auc + epsilon
        found.append(100 * (retrain_auc - auc) / scale if scale else math.nan)
    lower, upper = np.nanquantile(found, [0.025, 0.975])
    return float(lower), float(upper)


def _utility_interval(sets: list[Floats]) -> tuple[float, float]:
    """95 % percentile interval of the harmonic mean; rows of a set are drawn together."""
    generator = np.random.default_rng(0)
    means = []
    for rows in sets:
        if rows.shape[1] < 2:
            return NAN, NAN
        drawn = generator.integers(rows.shape[1], size=(RESAMPLES, rows.shape[1]))
        means += [np.nanmean(term[drawn], axis=1) for term in rows]
    lower, upper = np.nanquantile(hmean(np.stack(means), axis=0), [0.025, 0.975])
    return float(lower), float(upper)
