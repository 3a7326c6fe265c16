"""NegGrad+: gradient ascent and descent in one loss, with one weight between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, Method, flag, flags
from llm_unlearn.errors import UserError

if TYPE_CHECKING:
    from llm_unlearn.approximate.step import Step, Term


@dataclass
class NegGradPlus(Method):
    """L = alpha * NLL(retain) - (1 - alpha) * NLL(forget)."""

    alpha: float = flag(0.95, "share of the retain loss; 1: fine-tuning on the retain set alone")

    card = Card(
        title="NegGrad+",
        source="Kurmanji et al., Towards Unbounded Machine Unlearning, arXiv 2302.09880, section 5",
        idea="Fine-tuning on the retain set with a little gradient ascent on the forget set beside it.",
        use_when="A baseline with one number to tune; it was the strongest simple one in its paper.",
        fails_when="Like every ascent without a bound: alpha too small, or too many epochs. Each task "
        "needs another alpha.",
        differs="An epoch is one pass over the forget set with as many retain rows (there: over the "
        "retain set, the forget set again and again). The paper tunes alpha for each vision task and "
        "gives no value for language models; 0.95 is ours.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=10.0)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha is between 0 and 1, got {self.alpha}")

    def terms(self, step: Step) -> list[Term]:
        forget, retain = step["forget"], step["retain"]
        return [
            forget.per_token("forget", forget.log_probabilities_BT, 1 - self.alpha),
            retain.per_token("retain", -retain.log_probabilities_BT, self.alpha),
        ]
