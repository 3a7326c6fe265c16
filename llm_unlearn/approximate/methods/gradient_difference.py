"""Gradient difference: ascend on the forget set, descend on the retain set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import Card, RetainMethod

if TYPE_CHECKING:
    from llm_unlearn.approximate.step import Step, Term


@dataclass
class GradientDifference(RetainMethod):
    """L = -forget_weight * NLL(forget) + retain_weight * R(retain)."""

    card = Card(
        title="Gradient difference",
        source="Liu et al., Continual Learning and Private Unlearning, arXiv 2203.12817; GradDiff of "
        "TOFU (arXiv 2401.06121), GA_GDR and, with --retain_loss kl, GA_KLR of MUSE (2407.06460)",
        idea="Gradient ascent on the forget set with a training (or KL) loss on the retain set.",
        use_when="Retain data is at hand and a simple baseline is wanted.",
        fails_when="The forget loss has no lower bound, so in the end it wins over the retain loss; "
        "over-unlearning shows as a PrivLeak far above 0.",
        differs="MUSE's released code takes its KL of raw logits, which is none; ours is KL(before || "
        "now) over retain tokens without padding and prompts.",
    )

    def terms(self, step: Step) -> list[Term]:
        side = step["forget"]
        forget = side.per_token("forget", side.log_probabilities_BT, self.forget_weight)
        return [forget, *self.retain_terms(step)]
