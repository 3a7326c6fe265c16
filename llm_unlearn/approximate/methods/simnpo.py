"""SimNPO: NPO without a reference model, on the mean of a row's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, RetainMethod, flag, flags

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.step import Step, Term


def simnpo_loss(
    log_probabilities_B: Tensor, lengths_B: Tensor, beta: float, delta: float
) -> Tensor:
    """-(2 / beta) log sigmoid(beta (NLL / length - delta)), (B,)."""
    from llm_unlearn.approximate.losses import preference

    return preference(-log_probabilities_B / lengths_B - delta, beta)


@dataclass
class SimNPO(RetainMethod):
    """L = forget_weight * SimNPO(forget) + retain_weight * R(retain)."""

    forget_weight: float = flag(0.125, "weight of the forget loss")
    beta: float = flag(4.5, "inverse temperature (TOFU forget05: 2.5, forget10: 4.5; MUSE: 0.7)")
    delta: float = flag(0.0, "margin in nats a token (the paper's gamma is beta times it)")

    card = Card(
        title="Simple negative preference optimisation",
        source="Fan et al., Simplicity Prevails, arXiv 2410.07163, eq. 4",
        idea="NPO whose margin is the answer's mean log-probability instead of its ratio to a "
        "reference model, so that long and short, well and badly known answers are treated alike.",
        use_when="No reference is at hand, or NPO forgets short answers unevenly.",
        fails_when="Its defaults depend on the data: forget quality differs by a hundred orders of "
        "magnitude between the paper's tuned values and open-unlearning's.",
        differs="The paper's gamma inside the sigmoid is beta times the released code's; --delta is "
        "the code's.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=10.0, weight_decay=0.01)

    def terms(self, step: Step) -> list[Term]:
        side = step["forget"]
        loss_B = simnpo_loss(side.row_log_probabilities_B, side.lengths_B, self.beta, self.delta)
        return [side.per_row("forget", loss_B, self.forget_weight), *self.retain_terms(step)]
