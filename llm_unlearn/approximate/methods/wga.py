"""WGA: gradient ascent whose tokens count less the less likely they have become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, RetainMethod, flag, flags

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.step import Step, Term


def wga_loss(log_probabilities_BT: Tensor, beta: float) -> Tensor:
    """p^beta * log p of each label, (B, T), the weight without a gradient.

    Gradient ascent at beta = 0; at beta = 1 the logits' gradient is bounded.
    """
    weights_BT = (beta * log_probabilities_BT.detach()).exp()
    return weights_BT * log_probabilities_BT


@dataclass
class WGA(RetainMethod):
    """L = -forget_weight * mean(p^beta NLL)(forget) + retain_weight * R(retain)."""

    beta: float = flag(1.0, "power of a token's probability in its weight; 0: gradient ascent")

    card = Card(
        title="Weighted gradient ascent",
        source="Wang et al., Rethinking LLM Unlearning Objectives, arXiv 2502.19301 (WGA)",
        idea="Gradient ascent's gradient grows without bound as a token gets unlikely. A weight of "
        "p^beta for each token takes that out.",
        use_when="Gradient difference destroys the model; token by token, without a reference model.",
        fails_when="Long runs: forgotten tokens stop counting, known ones in the same answer go on "
        "being pushed, common words included.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=5.0)

    def terms(self, step: Step) -> list[Term]:
        side = step["forget"]
        loss_BT = wga_loss(side.log_probabilities_BT, self.beta)
        return [side.per_token("forget", loss_BT, self.forget_weight), *self.retain_terms(step)]
