"""Results of evaluations, for the Hub's `model-index`: values and numbers of rows, no text of any."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_unlearn.errors import UserError

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class Measured:
    """One metric: the value, its 95 % interval where there is one, and the rows behind it."""

    name: str
    value: float
    lower: float | None
    upper: float | None
    rows: int


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of what is published.

    Attributes:
        made_at: seconds since the epoch; what was evaluated before the last deletion is another model.
    """

    suite: str
    profile: str
    metrics: tuple[Measured, ...]
    made_at: float


def read_evaluation(path: Path) -> Evaluated:
    """The values of an evaluation.

    Args:
        path: the directory that it wrote, or its results.json.

    Raises:
        UserError: there is none, it cannot be read, or it holds no value.
    """
    file = path / RESULTS_NAME if path.is_dir() else path
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        metrics = tuple(_metrics(told["values"]))
        found = Evaluated(
            _name_of(told["suite"]), _name_of(told["profile"]), metrics, file.stat().st_mtime
        )
    except OSError as error:
        raise UserError(f"cannot read the evaluation {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is no results.json of an evaluation") from None
    if not found.metrics:
        raise UserError(f"{file} holds no value that could be published")
    return found


def _metrics(values: dict[str, dict[str, Any]]) -> Sequence[Measured]:
    return [
        Measured(
            name=_name_of(name),
            value=float(one["value"]),
            lower=_number(one["lower"]),
            upper=_number(one["upper"]),
            rows=int(one["n"]),
        )
        for name, one in sorted(values.items())
        if _number(one["value"]) is not None
    ]


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _name_of(text: str) -> str:
    """A suite may be a folder on this machine: its last name, of plain characters, is enough."""
    return re.sub(r"[^A-Za-z0-9_.@%/ ()-]", "_", text.rstrip("/").rsplit("/", 1)[-1])[:80]


def to_model_index(evaluations: Sequence[Evaluated]) -> list[Any]:
    """As the Hub's metadata wants them (`huggingface_hub.EvalResult`)."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=one.suite,
            dataset_name=f"{one.suite} (profile {one.profile})",
            dataset_config=one.profile,
            metric_type=metric.name,
            metric_name=metric.name,
            metric_value=metric.value,
            metric_args={"rows": metric.rows, "lower": metric.lower, "upper": metric.upper},
        )
        for one in evaluations
        for metric in one.metrics
    ]


def to_table(evaluations: Sequence[Evaluated]) -> list[str]:
    """As Markdown."""
    lines = ["| suite | metric | value | 95 % interval | rows |", "|---|---|---|---|---|"]
    for one in evaluations:
        for metric in one.metrics:
            has_interval = metric.lower is not None and metric.upper is not None
            interval = f"{metric.lower:.4g} to {metric.upper:.4g}" if has_interval else ""
            lines.append(
                f"| {one.suite} ({one.profile}) | {metric.name} | {metric.value:.4g} | {interval} | "
                f"{metric.rows} |"
            )
    return lines
