"""SatImp: gradient ascent weighted by how far a token is forgotten, and how much it matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, RetainMethod, flag, flags

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.step import Step, Term


def satimp_loss(log_probabilities_BT: Tensor, beta1: float, beta2: float) -> Tensor:
    """p^beta1 * (1 - p)^beta2 * log p of each label, (B, T), the weight without a gradient.

    Gradient ascent where both powers are 0; weighted gradient ascent where beta2 is.
    """
    detached_BT = log_probabilities_BT.detach()
    unlikely_BT = (-detached_BT.expm1()).clamp_min(0)
    return (beta1 * detached_BT).exp() * unlikely_BT.pow(beta2) * log_probabilities_BT


@dataclass
class SatImp(RetainMethod):
    """L = -forget_weight * mean(p^beta1 (1-p)^beta2 NLL)(forget) + retain_weight * R(retain)."""

    forget_weight: float = flag(0.1, "weight of the forget loss")
    beta1: float = flag(5.0, "saturation: power of a token's probability")
    beta2: float = flag(1.0, "importance: power of one minus it")

    card = Card(
        title="Saturation and importance",
        source="Yang et al., Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning, "
        "arXiv 2505.11953 (SatImp)",
        idea="Gradient ascent with a smooth weight for each token: less for those that are forgotten "
        "already (saturation), and less for those that were certain anyway (importance).",
        use_when="Retain quality comes first and forgetting may be gentle.",
        fails_when="Well-memorised answers: a token of probability near 1 weighs almost nothing, so "
        "verbatim text hardly moves at the default weight.",
        differs="Weights 0.1 and 1 are those of open-unlearning's configuration; its class and page "
        "have them the other way round (1 and 0.1). The paper's own table was not at hand.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=5.0)

    def terms(self, step: Step) -> list[Term]:
        side = step["forget"]
        loss_BT = satimp_loss(side.log_probabilities_BT, self.beta1, self.beta2)
        return [side.per_token("forget", loss_BT, self.forget_weight), *self.retain_terms(step)]
