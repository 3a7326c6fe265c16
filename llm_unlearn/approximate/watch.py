"""Evaluation during training: when to stop, and which state to keep.

Two stopping rules are MUSE's (Shi et al., arXiv 2407.06460): its paper stops at the first epoch whose
utility is below the retrained model's (`utility_floor`), its code takes the first checkpoint that
knows no more of the forget set than the retrained model (`forget_at_retrain`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from llm_unlearn.approximate.tuning import Tuned
from llm_unlearn.errors import UserError

BEST_NAME = "best.safetensors"


@dataclass(frozen=True)
class Standing:
    """What an evaluation found: both in [0, 1], higher = knows more."""

    forget: float
    utility: float


@dataclass
class Watch:
    """Looks at the model after each epoch, in every process; what the main one finds counts.

    Attributes:
        evaluate: puts a suite to the model.
        stop_when: never, utility_floor or forget_at_retrain.
        utility_floor: below it training ends.
        forget_target: what the retrained model knows of the forget set.
        keep: last, or best: the state with the highest `merit`.
        seen: standings by epoch.
    """

    evaluate: Callable[[Any], Standing]
    directory: Path
    stop_when: str = "never"
    utility_floor: float | None = None
    forget_target: float | None = None
    keep: str = "last"
    is_writer: bool = True
    seen: dict[int, Standing] = field(default_factory=dict)
    best_epoch: int | None = None

    def __post_init__(self) -> None:
        if self.stop_when == "utility_floor" and self.utility_floor is None:
            raise UserError("--stop_when utility_floor needs --utility_floor or --retrain_scores")
        if self.stop_when == "forget_at_retrain" and self.forget_target is None:
            raise UserError("--stop_when forget_at_retrain needs --retrain_scores")

    def merit(self, one: Standing) -> float:
        """Utility less what is still known of the forget set beyond the retrained model; below the
        utility floor, a unit less.
        """
        excess = max(0.0, one.forget - (self.forget_target or 0.0))
        below = self.utility_floor is not None and one.utility < self.utility_floor
        return one.utility - excess - float(below)

    def look(self, tuned: Tuned, epoch: int) -> bool:
        """Evaluate, keep the state if it is the best so far, and say whether to stop."""
        was_training = tuned.model.training
        tuned.model.eval()
        # Rounding may differ between processes, but they must stop together.
        one = broadcast_object_list([self.evaluate(tuned.model)])[0]
        tuned.model.train(was_training)
        best = None if self.best_epoch is None else self.merit(self.seen[self.best_epoch])
        self.seen[epoch] = one
        if best is None or self.merit(one) > best:
            self.best_epoch = epoch
            if self.keep == "best" and self.is_writer:
                self.directory.mkdir(parents=True, exist_ok=True)
                tuned.save(self.directory / BEST_NAME)
        return self._is_reached(one)

    def _is_reached(self, one: Standing) -> bool:
        if self.stop_when == "utility_floor":
            return one.utility < (self.utility_floor or 0.0)
        if self.stop_when == "forget_at_retrain":
            return one.forget <= (self.forget_target or 0.0)
        return False

    def restore_best(self, tuned: Tuned) -> None:
        """Put the best state back, where that is what is kept."""
        PartialState().wait_for_everyone()  # the main process may still be writing it
        if self.keep == "best" and (self.directory / BEST_NAME).is_file():
            tuned.restore(self.directory / BEST_NAME)

    def state(self) -> dict[str, Any]:
        seen = {str(epoch): [one.forget, one.utility] for epoch, one in self.seen.items()}
        return {"seen": seen, "best_epoch": self.best_epoch}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.seen = {int(epoch): Standing(*values) for epoch, values in state["seen"].items()}
        self.best_epoch = state["best_epoch"]
