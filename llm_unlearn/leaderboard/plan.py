"""What a benchmark is asked to do, and where its files are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_unlearn import files
from llm_unlearn.data.records import Record, digest
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.attacks.relearning import RelearningAttack
from llm_unlearn.evaluation.suites.suite import Suite

BEFORE, RETRAINED, AGAIN = "before", "retrained", "retrained again"
EXACT = {"exact (experts)": "experts", "exact (S3T)": "s3t"}
# Methods by subset, least memorized first, and the control; `npo` at once is the vanilla control.
REFINED: dict[str, tuple[tuple[str, ...], str]] = {
    "RUM": (("retain_ft", "neggrad_plus", "npo"), "none"),
    "RUM, shuffled": (("retain_ft", "neggrad_plus", "npo"), "shuffle"),
    "RUM, NPO throughout": (("npo",), "none"),
    "RUM, NPO throughout, shuffled": (("npo",), "shuffle"),
}
PLAN_NAME = "benchmark.json"


@dataclass(frozen=True)
class World:
    """Data, base model and suite, with the flags that suit them.

    Attributes:
        base: the model before any fine-tuning.
        fine_tuning: training flags of the model before and of the retrained one.
        unlearning: training flags of every method (none: each method's own preset), and by method.
        methods: flags of methods, by method.
        exact: flags of exact runs as on a command line, by `--exact_method`.
        relearning: how the attacker fine-tunes.
        refine: the memorization score of the rows in `REFINED`.
    """

    name: str
    base: str
    forget: Sequence[Record]
    retain: Sequence[Record]
    suite: Suite
    fine_tuning: Mapping[str, Any]
    unlearning: Mapping[str, Any] = field(default_factory=dict)
    unlearning_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exact: Mapping[str, Sequence[str]] = field(default_factory=dict)
    relearning: RelearningAttack = field(default_factory=RelearningAttack)
    refine: str = "confidence"


@dataclass(frozen=True)
class Benchmark:
    """Which rows of the leaderboard are wanted, how often, and where they go.

    Attributes:
        rows: methods, and names of `EXACT` and `REFINED`.
        seeds: of everything that is trained: the model before, the retrained one, the methods.
    """

    world: World
    rows: Sequence[str]
    seeds: int
    output: Path

    def claim(self) -> None:
        """Make the output directory this benchmark's.

        Raises:
            UserError: it holds another one.
        """
        told = {
            "world": self.world.name,
            "base": self.world.base,
            "suite": self.world.suite.digest,
            "records": digest(
                [[r.content for r in self.world.forget], [r.content for r in self.world.retain]]
            ),
            "fine_tuning": dict(self.world.fine_tuning),
        }
        path = self.output / PLAN_NAME
        self.output.mkdir(parents=True, exist_ok=True)
        if path.exists() and json.loads(path.read_bytes()) != json.loads(json.dumps(told)):
            raise UserError(f"{self.output} holds another benchmark: choose another --output_dir")
        files.write_bytes(path, json.dumps(told, indent=1).encode(), mode=0o644)

    def result(self, row: str, seed: int) -> Path:
        return self.output / "results" / slug(row) / f"seed-{seed}" / "results.json"

    def model(self, row: str, seed: int) -> Path:
        return self.output / "models" / f"seed-{seed}" / slug(row)

    @property
    def all_rows(self) -> list[str]:
        """References first, as they are needed first."""
        return [RETRAINED, BEFORE, AGAIN, *self.rows]


def slug(row: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in row.lower()).strip("-")
