"""What every method is to do to a tiny model that knows its records: one line each."""

from dataclasses import dataclass, field
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
    "icu": Expected(retain=0),
    "o3": Expected(training={"num_train_epochs": 20}),
}
