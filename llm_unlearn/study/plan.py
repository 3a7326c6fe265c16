"""What a study is asked to do, and where its files are."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_unlearn import files
from llm_unlearn.errors import UserError
from llm_unlearn.study.configurations import Configuration, slug
from llm_unlearn.study.results import STUDY_NAME
from llm_unlearn.study.worlds import World


@dataclass(frozen=True)
class Study:
    """What is asked for: a world, a model, and how much of everything.

    Attributes:
        deletions: after how many deletions each run is measured, ascending.
        overrides: flags of every configuration (`passes`, `learning_rate`, ...).
    """

    output: Path
    world: World
    model: str
    configurations: Sequence[Configuration]
    seeds: int
    deletions: Sequence[int]
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """What two calls must have in common to go on with each other's measurements."""
        local = Path(self.model)
        return {
            "world": self.world.name,
            "model": local.resolve().name if local.is_dir() else self.model,
            "subjects": len(self.world.subjects),
            "overrides": dict(self.overrides),
            "score": self.world.score,
            "public": list(self.world.public),
        }

    def check(self) -> None:
        """Refuse what cannot be studied.

        Raises:
            UserError: more deletions than subjects, or no seed.
        """
        most = len(self.world.subjects) - 1
        if not self.deletions or not 0 <= min(self.deletions) <= max(self.deletions) <= most:
            raise UserError(f"--deletions: numbers from 0 to {most} (somebody has to stay)")
        if self.seeds < 1:
            raise UserError(f"--seeds must be at least 1, got {self.seeds}")

    def claim(self) -> None:
        """Make the output directory this study's.

        Raises:
            UserError: it holds another study.
        """
        path = self.output / STUDY_NAME
        self.output.mkdir(parents=True, exist_ok=True)
        if path.exists() and (there := json.loads(path.read_bytes())) != self.describe():
            raise UserError(
                f"{self.output} holds another study ({there}): choose another --output_dir"
            )
        files.write_bytes(path, json.dumps(self.describe(), indent=1).encode())

    def order(self, seed: int) -> list[str]:
        """The subjects in the order of their deletion, the same for every configuration."""
        subjects = self.world.subjects
        return random.Random(f"study {seed}").sample(subjects, len(subjects))

    def measurement(self, one: Configuration, served: str, seed: int, count: int) -> Path:
        place = self.output / "measurements" / one.slug / slug(served) / f"seed-{seed}"
        return place / f"{count}.json"

    def counts(self, one: Configuration) -> list[int]:
        """Before any deletion a retrained or rebuilt model is another configuration's."""
        return [count for count in self.deletions if count or not one.before]
