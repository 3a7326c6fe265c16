"""UNDIAL: learn from the old model itself, with the forgotten token's logit turned down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import DISTRIBUTIONS, Card, RetainMethod, flag, flags

if TYPE_CHECKING:
    from torch import Tensor

    from llm_unlearn.approximate.step import Step, Term


def adjusted_distributions(reference_log_BTV: Tensor, labels_BT: Tensor, beta: float) -> Tensor:
    """softmax(z_before - beta * onehot(label)), (B, T, V); the old distribution where beta is 0.

    Log-probabilities serve as logits: a constant does not change a softmax. Positions without a
    label stay as they were.
    """
    penalty_BT1 = -beta * (labels_BT >= 0).unsqueeze(-1).to(reference_log_BTV.dtype)
    where_BT1 = labels_BT.clamp_min(0).unsqueeze(-1)
    return reference_log_BTV.scatter_add(-1, where_BT1, penalty_BT1).softmax(-1)


def undial_loss(
    log_BTV: Tensor, reference_log_BTV: Tensor, labels_BT: Tensor, beta: float
) -> Tensor:
    """Cross-entropy to the adjusted distribution, (B, T); its entropy is the lower bound."""
    target_BTV = adjusted_distributions(reference_log_BTV, labels_BT, beta)
    return -(target_BTV * log_BTV).sum(-1)


@dataclass
class UNDIAL(RetainMethod):
    """L = forget_weight * CE(softmax(z_before - beta onehot), now)(forget) + retain_weight * R."""

    retain_weight: float = flag(0.0, "weight of the retain loss; 0: no retain set is needed")
    beta: float = flag(10.0, "how far the logit of a forgotten token is turned down (3 to 30)")

    card = Card(
        title="Self-distillation with adjusted logits",
        source="Dong et al., UNDIAL, arXiv 2402.10052",
        idea="The old model's own distribution with the true token's logit lowered is the target of "
        "ordinary training: a loss with a minimum, so it converges instead of running away.",
        use_when="Stability matters, many steps or many requests follow each other, or there is no "
        "retain set.",
        fails_when="The old model's second choice gives the answer away too; prefixes of the answer "
        "stay as fluent as they were.",
        differs="Averaged over labelled tokens. Open-unlearning averages over all positions and takes "
        "the label -100 as an index, which turns down a token near the vocabulary's end at every prompt "
        "and padding position. The paper's 1e-4 is for a LoRA: the preset's, times ten. The paper's "
        "text was not at hand beyond its abstract; beta and rate are those its authors gave "
        "open-unlearning.",
    )
    preset = flags(learning_rate=1e-5, num_train_epochs=10.0)
    uses_retain = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.uses_retain = self.retain_weight != 0  # pyright: ignore[reportAttributeAccessIssue]

    def needs(self) -> Mapping[str, set[str]]:
        return {**super().needs(), "forget": {DISTRIBUTIONS}}

    def terms(self, step: Step) -> list[Term]:
        side = step["forget"]
        loss_BT = undial_loss(
            side.distributions_BTV, side.reference_distributions_BTV, side.labels_BT, self.beta
        )
        return [side.per_token("forget", loss_BT, self.forget_weight), *self.retain_terms(step)]
