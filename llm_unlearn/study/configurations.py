"""What the study compares: one literal table. A new method, shape or aggregation is one line.

Budgets are equal: in every sequence of every method a record is seen `passes` times on average,
with the same batch size and learning rate, hence in the same number of optimiser steps. What more
a method trains (its other sequences) is its own price, and shows in its training time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llm_unlearn.errors import UserError

Kind = Literal["run", "rebuilt", "retrained", "base"]
ALWAYS_ON, GATED = "average", "select"

# How a run can be served, and what of the rule is then not as the run's flags say.
SERVED: dict[str, dict[str, Any]] = {
    name: {"aggregate": name} for name in (ALWAYS_ON, GATED, "mixture", "vote", "merge", "nearest")
}


@dataclass(frozen=True)
class Configuration:
    """One row of the study.

    Attributes:
        served: how the same trained run is served (names of `SERVED`); each is measured.
        flags: of `S3TConfig` and `ModelConfig`, where they differ from `TRAINING`.
        kind: `run` deletes from one trained run, `rebuilt` also trains again what that took,
            `retrained` trains everything again without the deleted, `base` is the base model.
        before: the configuration that it is before any deletion, where it is another.
        subjects_per_shard: by world; gives `num_shards`.
        is_small: whether it belongs to the small form.
    """

    name: str
    served: tuple[str, ...]
    flags: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = "run"
    before: str = ""
    subjects_per_shard: Mapping[str, int] | None = None
    is_small: bool = True

    @property
    def slug(self) -> str:
        return slug(self.name)

    @property
    def trained_as(self) -> str:
        """Directory name of the configuration whose run it begins with."""
        return slug(self.before) if self.kind == "rebuilt" else self.slug

    @property
    def is_exact_method(self) -> bool:
        """Whether it claims to keep its knowledge without retraining."""
        return self.kind == "run" and self.name != PLAIN.name


def slug(name: str) -> str:
    """A name as a directory."""
    return "-".join(name.lower().replace("=", "").replace(",", "").split())


ONE_LORA = {"exact_method": "experts", "num_shards": 1, "lora_r": 32}
BASE = Configuration("base model", (ALWAYS_ON,), kind="base")
PLAIN = Configuration("plain LoRA", (ALWAYS_ON, GATED), ONE_LORA)
RETRAINED = Configuration(
    "retrained plain LoRA", (ALWAYS_ON, GATED), ONE_LORA, kind="retrained", before=PLAIN.name
)
EXPERTS: dict[str, Any] = {"exact_method": "experts", "lora_r": 8}
S3T: dict[str, Any] = {"exact_method": "s3t"}
PER_EXPERT = {"demonstration": 4, "tofu": 4}  # subjects

CONFIGURATIONS: tuple[Configuration, ...] = (
    BASE,
    PLAIN,
    RETRAINED,
    Configuration("S3T", (ALWAYS_ON, GATED), S3T | {"num_shards": 1, "num_slices": 4, "num_sequences": 2}),
    # It learns whole sequences, so that a prompt in doubt can tell whose it is.
    Configuration(
        "S3T m=4", (ALWAYS_ON, GATED, "mixture"),
        S3T | {"num_shards": 4, "num_slices": 3, "num_sequences": 1, "completion_only_loss": False},
    ),
    Configuration(
        "S3T layers", (ALWAYS_ON,), S3T | {"num_slices": 4, "num_sequences": 2, "blocks": "layers"},
        is_small=False,
    ),
    Configuration(
        "SISA m=4", (ALWAYS_ON, GATED), {"exact_method": "sisa", "num_shards": 4, "num_slices": 3}, is_small=False
    ),
    Configuration(
        "LegoNet", ("nearest",), {"exact_method": "lego", "num_shards": 12, "copies": 3}, is_small=False
    ),
    Configuration(
        "experts", (GATED, "mixture", ALWAYS_ON, "vote", "merge"), EXPERTS, subjects_per_shard=PER_EXPERT
    ),
    Configuration(
        "experts, rebuilt", (GATED, "mixture"), EXPERTS, kind="rebuilt", before="experts",
        subjects_per_shard=PER_EXPERT, is_small=False,
    ),
    Configuration("experts by subject", (GATED, "mixture"), EXPERTS | {"num_shards": 0}),
)  # fmt: skip

# What every configuration of a world has in common; `passes` is the budget.
TRAINING: dict[str, dict[str, Any]] = {
    "demonstration": {
        "passes": 60, "per_device_train_batch_size": 12, "learning_rate": 2e-3, "lora_r": 32,
        "max_length": 64,
    },
    "tofu": {
        "passes": 30, "per_device_train_batch_size": 10, "learning_rate": 5e-3, "lora_r": 32,
        "max_length": 512,
    },
}  # fmt: skip
COMMON = {
    "lora_dropout": 0.0, "warmup_steps": 5, "lr_scheduler_type": "cosine", "num_threads": 1,
}  # fmt: skip
LORA_FLAGS = ("lora_r", "lora_alpha", "lora_dropout")


def select(only: Sequence[str], small: bool) -> list[Configuration]:
    """The configurations to study, in the order of the table; references always.

    Raises:
        UserError: a name that is not in the table.
    """
    known = {one.name: one for one in CONFIGURATIONS}
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--only {unknown[0]!r} is not studied: one of {', '.join(known)}")
    if only:
        return [one for one in CONFIGURATIONS if one.name in {*only, BASE.name}]
    return [one for one in CONFIGURATIONS if one.is_small or not small]


def flags_of(
    configuration: Configuration, world: str, subjects: int, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags of `S3TConfig` and of `ModelConfig`.

    Args:
        subjects: how many subjects the run begins with.
        overrides: of the study's caller (`passes` among them).
    """
    flags = COMMON | TRAINING[world] | dict(configuration.flags) | dict(overrides)
    if configuration.subjects_per_shard:
        per_shard = configuration.subjects_per_shard[world]
        flags["num_shards"] = max(2, round(subjects / per_shard))
    flags["lora_alpha"] = 2 * flags["lora_r"]
    flags["num_train_epochs"] = epochs(flags.pop("passes"), flags.get("num_slices", 1))
    lora = {name: flags.pop(name) for name in LORA_FLAGS}
    return flags, lora


def epochs(passes: float, slices: int) -> float:
    """Epochs of a stage, so that a sequence sees a record `passes` times on average.

    Stage i of L sees i of L slices (cumulative data): (L + 1) / 2 times everything in all.
    """
    return 2 * passes / (slices + 1)
