"""What every method is to do to a tiny model that knows its records: one line each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Expected:
    """Directions of the mean log-probability of a token, against the model before.

    Attributes:
        forget, retain: -1 falls, +1 rises, 0 stays within `slack` nats, None: says nothing.
        flags: of the method.
        training: training flags beside those of `test_methods`.
        full: train the weights (methods that cannot work on a fresh LoRA).
        slack: nats a token within which the retain set must stay, beside the direction.
    """

    forget: int | None = -1
    retain: int | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    full: bool = False
    slack: float = 0.5


EXPECTED: dict[str, Expected] = {
    "ga": Expected(),
    "graddiff": Expected(retain=0),
    "npo": Expected(retain=0),
    "simnpo": Expected(retain=0, flags={"forget_weight": 1.0}),
    "kl": Expected(retain=0),
    "wga": Expected(retain=0),
    "satimp": Expected(
        retain=0, flags={"forget_weight": 5.0, "beta1": 1.0}, training={"num_train_epochs": 10}
    ),
    "neggrad_plus": Expected(retain=0, flags={"alpha": 0.5}),
    "scrub": Expected(retain=0, training={"num_train_epochs": 10, "learning_rate": 4e-3}),
    "undial": Expected(retain=0, training={"num_train_epochs": 10}, flags={"retain_weight": 1.0}),
    "ceu": Expected(),
    "pdu": Expected(retain=0, training={"num_train_epochs": 10}),
    "rmu": Expected(
        retain=0, flags={"layer": 1}, training={"num_train_epochs": 20, "learning_rate": 1e-2}
    ),
    "eul": Expected(retain=0, training={"learning_rate": 1e-2, "num_train_epochs": 20}),
    "replacement": Expected(
        retain=0,
        flags={"redact": str(Path(__file__).with_name("private.txt")), "placeholder": " and none"},
        training={"learning_rate": 1e-4, "num_train_epochs": 8, "gradient_accumulation_steps": 100},
    ),
    "balanced_subnet": Expected(
        retain=0,
        full=True,
        flags={"ratio": 0.1},
        training={"learning_rate": 0.1, "per_device_train_batch_size": 8},
    ),
    "ssd": Expected(retain=0, full=True),
    # Refusals win long before answers lose: it takes many steps, and a low beta.
    "idk_dpo": Expected(
        retain=0, flags={"beta": 0.05}, training={"num_train_epochs": 20, "learning_rate": 5e-3}
    ),
    # What this model makes up is noise, so the retain set suffers; test_other_answers gives it better.
    "altpo": Expected(training={"num_train_epochs": 10}),
    # Answers here lead refusals by so much that their preservation weighs next to nothing.
    "idk_ap": Expected(training={"num_train_epochs": 10}),
    "refusal": Expected(
        retain=0, flags={"retain_weight": 0.3}, training={"num_train_epochs": 10}, slack=0.6
    ),
    "random_label": Expected(retain=0),
    "me": Expected(retain=0, flags={"forget_weight": 1.0}, training={"num_train_epochs": 20}),
    "retain_ft": Expected(forget=None, retain=0),
    "scurenewton": Expected(
        retain=0,
        flags={
            "forget_weight": 0.5,
            "unseen": str(Path(__file__).with_name("unseen.jsonl")),
            "most_rise": 0.4,
        },
    ),
    "damped_newton": Expected(forget=None, retain=0, flags={"damping": 1.0}),
    "task_vector": Expected(flags={"alpha": 10.0}, training={"num_train_epochs": 10}),
    "icu": Expected(retain=0),
    "o3": Expected(training={"num_train_epochs": 20}),
    "whp": Expected(
        retain=0, flags={"alpha": 256.0}, training={"num_train_epochs": 10, "learning_rate": 5e-4}
    ),
}
