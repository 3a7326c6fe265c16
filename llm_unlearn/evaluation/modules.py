"""What the `evaluate` modules under `eval/metrics` have in common.

A module names its inputs and calls one function of `llm_unlearn.evaluation`; its description,
inputs and citation are read from its docstring. Results hold the value, its 95 % interval where
there is one, the rows behind it, and how many could not be scored.
"""

import inspect
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import datasets
import evaluate

from llm_unlearn.evaluation.membership import auc, true_positive_rate
from llm_unlearn.evaluation.statistics import mean_interval

TEXT, FLAG, NUMBER = (datasets.Value(kind) for kind in ("string", "int64", "float64"))
TEXTS, TOKENS, NUMBERS = (datasets.Sequence(feature) for feature in (TEXT, FLAG, NUMBER))
SURE = 0.01  # share of non-members that an attacker may take for members


class Module(evaluate.Metric):
    """A metric of one function: `inputs` are its columns, its module's docstring describes it.

    One process keeps what it is given in memory: `evaluate` would write the texts to a cache.
    """

    inputs: ClassVar[datasets.Features]

    def __init__(self, *args: Any, num_process: int = 1, **options: Any) -> None:
        options["keep_in_memory"] = num_process == 1
        super().__init__(*args, num_process=num_process, **options)

    def _info(self) -> evaluate.MetricInfo:
        documentation = inspect.cleandoc(sys.modules[type(self).__module__].__doc__ or "")
        paragraphs = documentation.split("\n\n")
        return evaluate.MetricInfo(
            description=paragraphs[0],
            citation=_paragraph(paragraphs, "Source:"),
            inputs_description=_paragraph(paragraphs, "Inputs:"),
            features=self.inputs,
        )


def columns(**features: Any) -> datasets.Features:
    """What a module takes for each row, by name."""
    return datasets.Features(features)


def mean(values: Iterable[float]) -> dict[str, float]:
    """The mean over rows with its bootstrap interval; NaN rows are left out and counted."""
    interval = mean_interval(list(values))
    return {"value": interval.mean, **_numbers(interval, "lower upper n n_unscorable")}


def attack(scores: Iterable[float], members: Sequence[int]) -> dict[str, float]:
    """AUC of scores that are higher for members, its interval, and the members surely found.

    Raises:
        ValueError: flags other than 0 and 1.
    """
    inside, outside = split(scores, members)
    area = auc(inside, outside)
    found = true_positive_rate(inside, outside, SURE)
    return {
        **_numbers(area, "value lower upper n_members n_non_members n_unscorable"),
        "true_positive_rate": found.value,
    }


def numbers(values: Iterable[float | None]) -> list[float]:
    """Numbers with NaN where a table has nothing."""
    return [math.nan if value is None else value for value in values]


def split(scores: Iterable[float], members: Sequence[int]) -> tuple[list[float], list[float]]:
    """The scores of members (flag 1) and of non-members (flag 0)."""
    if odd := sorted(set(members) - {0, 1}):
        raise ValueError(f"expected references of 1 (member) or 0 (not a member), got {odd}")
    groups: tuple[list[float], list[float]] = ([], [])
    for score, member in zip(numbers(scores), members, strict=True):
        groups[0 if member else 1].append(score)
    return groups


def hits(predictions: Sequence[int], references: Sequence[int]) -> list[bool]:
    """Which tokens were predicted.

    Raises:
        ValueError: not one prediction for each token.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"expected one predicted token for each true one, got {len(predictions)} for {len(references)}"
        )
    return [predicted == true for predicted, true in zip(predictions, references, strict=True)]


def _numbers(result: Any, names: str) -> dict[str, float]:
    return {name: getattr(result, name) for name in names.split()}


def _paragraph(paragraphs: Sequence[str], start: str) -> str:
    return next((text for text in paragraphs if text.startswith(start)), "")
