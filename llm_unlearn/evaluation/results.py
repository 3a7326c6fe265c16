"""What an evaluation found: values with intervals, numbers by row, and where they came from.

`records` are numbers only, one per row of a section of the suite (`knowmem/forget_qa`), so that a
result can serve later as somebody else's reference, and so that two models can be compared on the
same rows. Texts are kept apart and leave memory only when they are asked for: they are personal.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_unlearn import files
from llm_unlearn.errors import UserError

SCHEMA = 1
NAN = math.nan

Columns = dict[str, NDArray[np.float64]]  # column -> one number per row, NaN = cannot be scored
Records = dict[str, Columns]  # section -> columns


@dataclass(frozen=True)
class Value:
    """One metric of one model.

    Attributes:
        value: NaN where it cannot be scored; `note` then says what is missing.
        lower, upper: 95 % interval, NaN where there is none.
        n: rows behind it; `n_unscorable` more could not be scored.
        detail: further numbers, such as D beside a p-value or the true-positive rate of an attack.
    """

    value: float
    lower: float = NAN
    upper: float = NAN
    n: int = 0
    n_unscorable: int = 0
    note: str = ""
    detail: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """A metric's mean over the same rows, this model less another: paired bootstrap, 95 %."""

    versus: str
    mean: float
    lower: float
    upper: float
    n: int


@dataclass(frozen=True)
class Text:
    """What a model said to one prompt, beside what the benchmark holds for right."""

    section: str
    row: int
    prompt: str
    reference: str
    answer: str


@dataclass
class Evaluation:
    """One model's values and rows.

    Attributes:
        role: `model`, `retrained`, `before`, or the name of a decoy.
        digest: of weights, tokenizer and prompts: what the numbers depend on beside suite and
            configuration.
        cost: `seconds`, `peak_memory_bytes`, `tokens`.
    """

    role: str
    label: str
    digest: str
    values: dict[str, Value] = field(default_factory=dict)
    records: Records = field(default_factory=dict)
    texts: list[Text] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One thing that the harness looked at before believing the numbers.

    Attributes:
        verdict: `passed`, `failed` or `no baseline` (its positive control is missing or was dead).
    """

    name: str
    verdict: str
    reason: str


@dataclass
class Results:
    """An evaluation of one model, with its references, as `results.json` holds it.

    Attributes:
        others: evaluations of the references by role (`retrained`, `before`, decoys).
        differences: by metric, the model against `retrained` or else `before`.
        checks: what the verdict rests on; `verdict` sums them up in one line.
        curves: values by step, for scalability and sustainability: name -> list of Value.
        digests: `data` and `configuration`; a model's own is in its evaluation.
    """

    suite: str
    profile: str
    model: Evaluation
    others: dict[str, Evaluation] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)
    verdict: str = ""
    checks: list[Check] = field(default_factory=list)
    curves: dict[str, list[Value]] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self, with_texts: bool = False) -> dict[str, Any]:
        """Plain JSON: NaN is null, records are lists of rows."""
        content = {
            "schema": SCHEMA,
            "suite": self.suite,
            "profile": self.profile,
            **_evaluation_to_dict(self.model, with_texts),
            "verdict": self.verdict,
            "checks": [asdict(check) for check in self.checks],
            "differences": {name: asdict(d) for name, d in self.differences.items()},
            "curves": {name: [asdict(v) for v in values] for name, values in self.curves.items()},
            "others": {
                role: _evaluation_to_dict(other, with_texts) for role, other in self.others.items()
            },
            "configuration": self.configuration,
            "digests": self.digests,
            "versions": self.versions,
        }
        return _without_nan(content)

    def write(self, path: Path, with_texts: bool = False) -> None:
        """Write `results.json` durably, readable by its owner only."""
        files.write_bytes(path, (json.dumps(self.to_dict(with_texts), indent=1) + "\n").encode())

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Results":
        return cls(
            suite=content["suite"],
            profile=content["profile"],
            model=_evaluation_from_dict(content),
            others={
                role: _evaluation_from_dict(other) for role, other in content["others"].items()
            },
            differences={
                name: Difference(**_with_nan(d)) for name, d in content["differences"].items()
            },
            verdict=content["verdict"],
            checks=[Check(**check) for check in content["checks"]],
            curves={
                name: [_value_from_dict(value) for value in values]
                for name, values in content["curves"].items()
            },
            configuration=dict(content["configuration"]),
            digests=dict(content["digests"]),
            versions=dict(content["versions"]),
        )


def read_results(path: str | Path) -> Results:
    """Read `results.json`, or the one in a directory that an evaluation wrote.

    Raises:
        UserError: no such file, or not one that this version reads.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema") != SCHEMA:
            raise UserError(f"{path}: expected results of schema {SCHEMA}; evaluate again")
        return Results.from_dict(content)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a results.json of an evaluation: {error!r}") from None


def _evaluation_to_dict(evaluation: Evaluation, with_texts: bool) -> dict[str, Any]:
    content: dict[str, Any] = {
        "role": evaluation.role,
        "label": evaluation.label,
        "digest": evaluation.digest,
        "values": {name: asdict(value) for name, value in evaluation.values.items()},
        "records": {section: _rows(columns) for section, columns in evaluation.records.items()},
        "cost": evaluation.cost,
    }
    if with_texts:
        content["texts"] = [asdict(text) for text in evaluation.texts]
    return content


def _evaluation_from_dict(content: Mapping[str, Any]) -> Evaluation:
    return Evaluation(
        role=content["role"],
        label=content["label"],
        digest=content["digest"],
        values={name: _value_from_dict(value) for name, value in content["values"].items()},
        records={section: _columns(rows) for section, rows in content["records"].items()},
        texts=[Text(**text) for text in content.get("texts", [])],
        cost=_with_nan(content["cost"]),
    )


def _value_from_dict(content: Mapping[str, Any]) -> Value:
    return Value(**_with_nan({**content, "detail": _with_nan(content["detail"])}))


def _rows(columns: Columns) -> list[dict[str, float]]:
    names = list(columns)
    return [
        dict(zip(names, map(float, row), strict=True))
        for row in zip(*columns.values(), strict=True)
    ]


def _columns(rows: list[dict[str, float | None]]) -> Columns:
    names = list(rows[0]) if rows else []
    return {
        name: np.array([NAN if row[name] is None else row[name] for row in rows], dtype=np.float64)
        for name in names
    }


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: NAN if value is None else value for key, value in content.items()}
